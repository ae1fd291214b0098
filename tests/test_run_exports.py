"""Exports that a run writes when it is whole: `[job] export`."""

import csv
import json
import os
import shlex

import pytest

import small_run
from noria import config
from noria.__main__ import main
from noria.desk import exports as module
from noria.output.export import export

MORE = ("--max-new-tokens", "3")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small_run.write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """The files of a run, in a folder of its own, which is the working directory."""
    for name in ("model.h5", "prompts.jsonl"):
        os.symlink(files / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*more, code=0):
    command = ["run", "--model", "model.h5", "--prompts", "prompts.jsonl", "--output", "run.h5", *small_run.KEYS]
    assert main([*command, *MORE, *map(str, more)]) == code


@pytest.mark.slow
def test_a_whole_run_writes_its_exports_as_the_command_would(folder, capsys):
    (folder / "out").mkdir()
    flags = [("--export", name) for name in ("a.jsonl", "out/b.csv", "openai:c.jsonl", "d.jsonl.gz")]
    run(*(word for pair in flags for word in pair))
    said = capsys.readouterr().err
    for name, kind in (("a.jsonl", "rows"), ("b.csv", "rows"), ("c.jsonl", "openai"), ("d.jsonl.gz", "rows")):
        assert main(["export", "run.h5", f"again-{name}", "--format", kind]) == 0
        written = folder / "out" / name if name == "b.csv" else folder / name
        assert written.read_bytes() == (folder / f"again-{name}").read_bytes(), name
    assert "export: a.jsonl, 12 rows" in said and "export: c.jsonl, 12 responses" in said
    assert len((folder / "a.jsonl").read_text().splitlines()) == 12
    with open(folder / "out" / "b.csv", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [f"row {row}" for row in range(12)]


def test_a_run_file_lists_exports_and_the_output_tells_of_them(folder):
    (folder / "run.toml").write_text(
        'model = "model.h5"\nprompts = "prompts.jsonl"\noutput = "run.h5"\n[sampling]\nmax_new_tokens = 2\n[job]\n'
        'export = ["a.jsonl", "openai:b.jsonl"]\n'
    )
    assert main(["run", "run.toml", "--device", "cpu"]) == 0
    assert {"a.jsonl", "b.jsonl"} <= set(os.listdir(folder))
    assert main(["export", "run.h5", "c.jsonl"]) == 0
    assert (folder / "c.jsonl").read_bytes() == (folder / "a.jsonl").read_bytes()


def test_the_same_command_writes_the_exports_of_a_finished_output(folder, capsys):
    """As after a kill between the output and its exports."""
    run()
    run("--export", "a.jsonl")
    said = capsys.readouterr().err
    assert "run.h5 is finished: nothing to do" in said and "export: a.jsonl, 12 rows" in said
    assert len((folder / "a.jsonl").read_text().splitlines()) == 12


@pytest.mark.slow
def test_an_export_is_written_only_when_the_run_is_whole(folder):
    run("--export", "a.jsonl", "--limit", "5")
    assert len((folder / "a.jsonl").read_text().splitlines()) == 5
    run("--export", "a.jsonl")
    assert len((folder / "a.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize("again", [False, True], ids=["at the end of the run", "of a finished output"])
def test_an_export_that_fails_leaves_the_output_and_is_told_with_the_command_that_makes_it(
    folder, capsys, monkeypatch, again
):
    def full(source, target, *arguments, **more):
        if target.name in tries:
            raise tries.pop(target.name)
        return export(source, target, *arguments, **more)

    tries = {"a b.jsonl": OSError(28, "No space left on device"), "c.jsonl": RuntimeError("a\nfault")}
    flags = ("--export", "a b.jsonl", "--export", "openai:c.jsonl", "--export", "d.jsonl")
    if again:
        run()
    monkeypatch.setattr(module, "export", full)
    run(*flags)
    said = capsys.readouterr().err
    assert small_run.rows_of(folder / "run.h5")[0][0] == "row 0" and not (folder / "run.h5.parts").exists()
    assert {"d.jsonl"} == {name for name in os.listdir(folder) if name.endswith(".jsonl")} - {"prompts.jsonl"}
    told = [line for line in said.splitlines() if "error: run.h5 is whole, but its export was not written" in line]
    assert len(told) == 2 and "No space left on device" in told[0] and "RuntimeError: a\\nfault" in told[1]
    for line, name in zip(told, ("a b.jsonl", "c.jsonl"), strict=True):
        words = shlex.split(line.partition("again: ")[2])
        assert words[0] == "noria" and main(words[1:]) == 0 and (folder / name).exists()


REFUSED = {
    "no folder": ("no/a.jsonl", "there is no folder no: make it"),
    "no format": ("a.txt", ".txt is not a format of export"),
    "no format of responses": ("openai:a.csv", "export --format openai writes .jsonl"),
    "a folder": ("folder.jsonl", "is a folder"),
    "the prompts": ("prompts.jsonl", "is a link"),
    "the prompts by another name": ("own/../own/p.jsonl", "is a file of this run (own/p.jsonl)"),
    "a hard link to the prompts": ("hard.jsonl", "is a file of this run (own/p.jsonl)"),
    "a link": ("link.jsonl", "is a link: name the file itself"),
    "a link that leads nowhere": ("gone.jsonl", "is a link: name the file itself"),
    "the folder of parts": ("run.h5.parts/a.jsonl", "lies in the folder of the output's parts"),
    "a pipe": ("pipe.jsonl", "is a device or a pipe"),
}


@pytest.mark.parametrize("command", ["run", "validate"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_before_anything_is_done(folder, capsys, command, case):
    name, words = REFUSED[case]
    for made in ("folder.jsonl", "own", "run.h5.parts"):
        (folder / made).mkdir()
    (folder / "own" / "p.jsonl").write_text('{"prompt": "a"}\n')
    os.link(folder / "own" / "p.jsonl", folder / "hard.jsonl")
    os.symlink("own/p.jsonl", folder / "link.jsonl")
    os.symlink("nowhere", folder / "gone.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    before = sorted(folder.rglob("*"))
    arguments = ["--model", "model.h5", "--prompts", "own/p.jsonl", "--output", "run.h5", "--export", name]
    assert main([command, *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and "job.export" in said and len(said.splitlines()) == 1
    assert sorted(set(folder.rglob("*")) - {folder / "run.h5.lock"}) == before
    assert (folder / "own" / "p.jsonl").read_text() == '{"prompt": "a"}\n'


def test_two_exports_of_one_file_and_names_that_are_none_are_refused(folder, capsys):
    run("--export", "a.jsonl", "--export", "openai:./a.jsonl", code=2)
    assert "a.jsonl is another export of this run: name a file of its own" in capsys.readouterr().err
    for name, words in (("", "must be names of files"), ("openai:", "must be names of files"), ("a\0.jsonl", "NUL")):
        run("--export", name, code=2)
        assert words in capsys.readouterr().err
    (folder / "run.toml").write_text("[job]\nexport = [3]\n")
    run("run.toml", code=2)
    assert "job.export has 3" in capsys.readouterr().err
    (folder / "run.toml").write_text('[job]\nexport = "a.jsonl"\n')
    run("run.toml", code=2)
    assert "job.export is 'a.jsonl': it must be a list" in capsys.readouterr().err


def test_parquet_without_pyarrow_is_refused_before_the_run(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.modules", dict(__import__("sys").modules) | {"pyarrow": None})
    run("--export", "a.parquet", code=2)
    assert "parquet needs pyarrow: pip install pyarrow" in capsys.readouterr().err
    assert not (folder / "run.h5").exists() and not (folder / "run.h5.parts").exists()


def test_validate_says_what_will_be_exported(folder, capsys):
    arguments = ["--model", "model.h5", "--prompts", "prompts.jsonl", "--output", "run.h5"]
    assert main(["validate", *arguments, "--export", "a.jsonl", "--export", "openai:b.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "a.jsonl: rows, when the output is whole" in said and "b.jsonl: responses, when" in said
    assert not (folder / "a.jsonl").exists()


def test_log_probabilities_of_a_run_have_the_texts_of_its_model(folder):
    lines = [{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": [5, 6], "max_tokens": 2, "logprobs": 1}}]
    (folder / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("--prompts", "batch.jsonl", "--export", "openai:out.jsonl")
    (line,) = (folder / "out.jsonl").read_text().splitlines()
    choice = json.loads(line)["response"]["body"]["choices"][0]
    assert choice["logprobs"]["tokens"][0].startswith("token_id:"), "this model has no tokenizer"


@pytest.mark.parametrize(("name", "shard", "said"), [
    ("vllm:x.jsonl", None, "job.export vllm:x.jsonl: there is no format 'vllm' (known: openai:FILE); a file of that name is ./vllm:x.jsonl"),
    ("openai:vllm:x.jsonl", None, "there is no format 'vllm'"),
    ("http://host/x.jsonl", None, "there is no format 'http'"),
    ("run.jsonl", "2/4", "job.export run.jsonl is not of shard 2/4 alone, each of the 4 would write it: name a file with the shard's number, such as run.2.jsonl"),
    ("run.jsonl.gz", "2/4", "name a file with the shard's number, such as run.2.jsonl.gz,"),
    ("openai:run-12.jsonl", "2/4", "is not of shard 2/4 alone"),
])  # fmt: skip
def test_an_export_with_an_unknown_format_or_of_all_shards_is_refused(folder, capsys, name, shard, said):
    run("--export", name, *(["--shard", shard] if shard else []), code=2)
    assert said in capsys.readouterr().err and not (folder / "run.h5.parts").exists()


def test_paths_with_a_colon_and_a_shards_own_name_are_taken(folder):
    (folder / "day:1").mkdir()
    for name, shard in (
        ("./vllm:x.jsonl", "1/1"),
        ("day:1/x.jsonl", "1/1"),
        ("12:30.jsonl", "1/1"),
        ("run.02.jsonl", "2/4"),
    ):
        loaded = config.load(
            None,
            {"model": "model.h5", "prompts": "prompts.jsonl", "output": "run.h5", "export": [name], "shard": shard},
        )
        module.check_exports(loaded)


def test_two_shards_write_an_export_each(folder):
    for shard in (1, 2):
        words = ["--output", f"run.{shard}.h5", "--shard", f"{shard}/2", "--export", f"rows.{shard}.jsonl"]
        run(*words)
    ids = [
        json.loads(line)["id"] for shard in (1, 2) for line in (folder / f"rows.{shard}.jsonl").read_text().splitlines()
    ]
    assert sorted(ids) == sorted(f"row {row}" for row in range(12))
