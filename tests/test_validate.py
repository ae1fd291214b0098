"""`noria validate`: what it says of good and bad runs, and that it needs neither MPI nor a GPU and changes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import small_run
import test_tokenizer
import tiny_models
from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.commands import validate
from noria.output.generations import open_generations

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer of 400 tokens and a context of 64."""
    folder = tmp_path_factory.mktemp("validate")
    config = tiny_models.LLAMA | {"vocab_size": 400}
    tiny_models.write_directory(folder / "hf", config, tiny_models.state(config))
    files = test_tokenizer.files_of(test_tokenizer.byte_level_with_bos()) | {"chat_template.jinja": CHAT.encode()}
    for name, content in files.items():
        (folder / "hf" / name).write_bytes(content)
    convert(folder / "hf", folder / "model.h5")
    return folder


@pytest.fixture
def validated(folder, capsys):
    """The exit code and what is said of these rows."""

    def validate(rows, *flags):
        path = folder / "prompts.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        before = sorted(file.name for file in folder.iterdir())
        files = ["--model", folder / "model.h5", "--prompts", path, "--output", folder / "out.h5"]
        code = main(["validate", *map(str, files), *map(str, flags)])
        assert sorted(file.name for file in folder.iterdir()) == before, "it leaves nothing behind"
        said = capsys.readouterr()
        assert said.err.count("\n") == (code == 2) and "Traceback" not in said.err
        return code, said.out, said.err

    return validate


BAD = {
    "beyond the context": ({"token_ids": [5] * 64}, "the prompt has 64 tokens, the model's context 64"),
    "a long text": ({"prompt": "the cat " * 200}, "tokens, the model's context 64: shorten it"),
    "empty": ({"prompt": ""}, "prompt is empty"),
    "not JSON": ("{nonsense", "line 2 is not JSON"),
    "wrong type": ({"prompt": 5}, "prompt is 5: it must be a string"),
    "wrong sampling": ({"prompt": "the", "temperature": "hot"}, "temperature is 'hot'"),
    "near key": ({"prompt": "the", "temprature": 1}, "did you mean 'temperature'?"),
    "token id out of range": ({"token_ids": [400]}, "token id 400 is not in the model's vocabulary of 400"),
    "negative id": ({"token_ids": [-1]}, "token_ids[0] is -1"),
    "duplicate id": ({"id": "first", "prompt": "the"}, "id 'first' is that of an earlier row too"),
    "roles": ({"messages": [{"content": "x"}]}, "messages[0].role is None"),
    "not UTF-8 ids": ({"id": ["x"], "prompt": "the"}, "id is ['x']"),
    "stop id of no token": ({"prompt": "the", "stop_token_ids": [5000]}, "stop_token_ids has 5000"),
    "contradicting keys": ({"prompt": "the", "min_new_tokens": 5, "max_new_tokens": 2}, "min_new_tokens is 5"),
    "system without chat": ({"prompt": "the", "system": "x"}, "system needs chat"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_told_with_its_reason_and_the_exit_code_is_2(name, validated):
    bad, words = BAD[name]
    code, said, error = validated([{"id": "first", "prompt": "the cat"}, bad, {"prompt": "dog"}])
    assert code == 2
    (line,) = [line for line in said.splitlines() if line.startswith("row ")]
    assert line.startswith("row 1 ") and words in line
    assert "1 of 3 rows of" in error and "would end with an error" in error


@pytest.mark.slow
def test_a_run_agrees_with_what_was_said_of_its_rows(validated, folder):
    rows = [{"id": "first", "prompt": "the cat"}, *(bad for bad, _ in BAD.values()), {"prompt": "x \0 \u202b א 🎉"}]
    code, said, error = validated(rows)
    assert code == 2 and f"{len(BAD)} of {len(rows)} rows" in error
    (folder / "prompts.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    arguments = ["--model", folder / "model.h5", "--prompts", folder / "prompts.jsonl", "--output", folder / "run.h5"]
    assert main(["run", *map(str, arguments), "--device", "cpu", "--max-new-tokens", "3"]) == 0
    with open_generations(folder / "run.h5") as file:
        wrong = {row.row: row.error for row in file.rows() if row.status == "error"}
    for number in (2, 7, 13):
        shown = next(line for line in said.splitlines() if line.startswith(f"row {number} ")) if number < 11 else ""
        assert not shown or wrong[number] in shown
    assert len(wrong) == len(BAD) and wrong[1].startswith("the prompt has 64 tokens")
    (folder / "run.h5").unlink()


def test_a_good_run_is_counted_and_nothing_is_wrong_with_it(validated):
    code, said, _ = validated(
        [{"token_ids": [5] * 9}, {"prompt": "the cat"}, {"messages": [{"role": "user", "content": "a"}]}]
    )
    assert code == 0
    assert "llama, 3 layers, vocabulary 400, context 64" in said and "3 rows, 0 wrong" in said
    assert "(longest " in said and "to be made" in said and said.endswith("nothing is wrong\n")
    assert "note        the model has a chat template" in said


def test_hundreds_of_bad_rows_are_counted_and_ten_told(validated):
    code, said, error = validated([{"prompt": ""}] * 300)
    assert code == 2 and "300 of 300 rows" in error
    assert sum(line.startswith("row ") for line in said.splitlines()) == 10 and "and 290 other rows" in said


def test_flags_and_run_file_are_those_of_run(validated, folder, capsys):
    (folder / "run.toml").write_text(
        f'model = "{folder}/model.h5"\nprompts = "{folder}/some.jsonl"\noutput = "{folder}/out.h5"\n[sampling]\nchat = true\n'
    )
    (folder / "some.jsonl").write_text('{"prompt": "the cat"}\n')
    capsys.readouterr()
    assert main(["validate", str(folder / "run.toml"), "--max-new-tokens", "7"]) == 0
    said = capsys.readouterr().out
    assert "at most 7 new ones" in said and "note" not in said
    assert main(["validate", str(folder / "run.toml"), "--max-newtokens", "7"]) == 2
    assert "did you mean '--max-new-tokens'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "nowhere.h5"], "nowhere.h5 does not exist"),
        (["--prompts", "nowhere.jsonl"], "no such file"),
        (["--output", "/nowhere/out.h5"], "there is no folder /nowhere"),
        (["--output", "/proc/out.h5"], "folder /proc cannot be written"),
        (["--trace", "/nowhere/trace.json"], "there is no folder /nowhere"),
        (["--temperature", "-1"], "sampling.temperature is -1"),
        (["--system", "x"], "sampling.system needs sampling.chat"),
    ],
)
def test_what_is_wrong_with_the_run_itself_is_one_line(validated, flags, words):
    code, _, error = validated([{"prompt": "the"}], *flags)
    assert code == 2 and words in error


def test_a_disk_without_space_is_wrong(validated, monkeypatch):
    monkeypatch.setattr(validate, "_space", lambda config, found: (3 * 2**30, 2**30))
    code, _, error = validated([{"prompt": "the"}])
    assert code == 2 and "may need 3.00 GiB, its folder has 1.00 GiB free" in error


@pytest.mark.slow
def test_the_space_for_a_run_is_at_least_what_it_takes(folder, capsys):
    arguments = small_run.command(
        folder, "took.h5", "--model", folder / "model.h5", "--prompts", folder / "space.jsonl"
    )
    (folder / "space.jsonl").write_text("".join(f'{{"prompt": "the cat {row}"}}\n' for row in range(300)))
    assert main(["validate", *arguments[1:]]) == 0
    needed = float(capsys.readouterr().out.split("at most ")[-1].split(" MiB")[0]) * 2**20
    assert main(arguments) == 0
    took = (folder / "took.h5").stat().st_size
    assert took / 2 < needed < 20 * took
    (folder / "took.h5").unlink()


@pytest.mark.slow
def test_neither_mpi_nor_a_device_is_touched(folder):
    program = """if True:
        import sys
        from noria.__main__ import main
        code = main(sys.argv[1:])
        import torch
        assert "mpi4py.MPI" not in sys.modules and not torch.cuda.is_initialized()
        sys.exit(code)
    """
    (folder / "p.jsonl").write_text('{"prompt": "the"}\n')
    files = ["--model", folder / "model.h5", "--prompts", folder / "p.jsonl", "--output", Path(folder) / "out.h5"]
    done = subprocess.run(
        [sys.executable, "-c", program, "validate", *map(str, files)], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
