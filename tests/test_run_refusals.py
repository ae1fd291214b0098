"""Wrong input of a run: exit code 2 and one line that says what, where and what to do, before the model is loaded."""

import os
import re
import shutil
import subprocess
import sys
import time

import h5py
import pytest
import torch

import noria.run
import small_run
import tiny_models
from forks import forked
from mpirun import describe, mpirun
from noria import order
from noria.__main__ import main
from noria.checkpoint.checkpoint import Checkpoint
from noria.checkpoint.convert import convert
from noria.errors import InputError
from noria.limits import MAX_GROUPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.write_files(tmp_path_factory.mktemp("refusals"))


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def loaded(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(noria.run, "load", loaded)
    monkeypatch.setattr(Checkpoint, "read_block", loaded)


@pytest.fixture
def refusal(folder, capsys, nothing_is_loaded):
    """The one line with which `noria run` refuses these arguments."""

    def refuse(*arguments, output="out.h5", command=None):
        before = sorted(path.name for path in folder.iterdir())
        capsys.readouterr()
        assert main(command or small_run.command(folder, output, *arguments)) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("noria: ")
        assert printed.err.count("\n") == 1 and printed.err.endswith("\n") and len(printed.err) < 700
        assert sorted(path.name for path in folder.iterdir()) == before, "a refused run leaves nothing behind"
        return printed.err

    return refuse


def test_a_right_command_would_have_loaded_the_model(folder, capsys, nothing_is_loaded):
    assert main(small_run.command(folder, "loads.h5")) == 1
    assert "AssertionError: the model was loaded" in capsys.readouterr().err


# The checkpoint.


def test_a_missing_checkpoint_is_named(refusal, folder):
    line = refusal("--model", folder / "nowhere.h5")
    assert f"{folder}/nowhere.h5 does not exist: noria convert HF_DIR MODEL.h5 makes a checkpoint" in line


def test_a_folder_and_a_text_file_are_no_checkpoints(refusal, folder):
    assert f"{folder}/hf is a folder: noria convert" in refusal("--model", folder / "hf")
    assert "prompts.jsonl" in refusal("--model", folder / "prompts.jsonl")


def test_another_programs_hdf5_file_is_no_checkpoint(refusal, folder):
    with h5py.File(folder / "other.h5", "w") as file:
        file["x"] = [1, 2]
    line = refusal("--model", folder / "other.h5")
    assert "other.h5" in line and "checkpoint" in line


def test_a_truncated_checkpoint_is_refused(refusal, folder):
    whole = (folder / "model.h5").read_bytes()
    (folder / "cut.h5").write_bytes(whole[: len(whole) // 2])
    assert "cut.h5" in refusal("--model", folder / "cut.h5")


def test_a_newer_checkpoint_is_refused_with_both_versions(refusal, folder):
    shutil.copy(folder / "model.h5", folder / "newer.h5")
    with h5py.File(folder / "newer.h5", "r+") as file:
        file.attrs["version"] = 99
    line = refusal("--model", folder / "newer.h5")
    assert "newer.h5 is version 99 of the format, this Noria reads up to 2" in line


# Keys and flags.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--laps", "4"], "4 virtual stages (ranks x laps) for 3 layers: use at most 3"),
        (["--groups", "0"], "pipeline.groups is 0: it must be at least 1"),
        (["--groups", "-1"], "pipeline.groups is -1: it must be at least 1"),
        (["--groups", str(MAX_GROUPS + 1)], f"it must be at most {MAX_GROUPS}"),
        (["--groups", "two"], "argument --groups: 'two': it must be an integer"),
        (["--groups"], "argument --groups: expected one argument; noria run --help says more"),
        (["--groups", "1", "--blocking"], "needs 2 <= groups <= ranks; leave pipeline.blocking out"),
        (["--random-weights", "config.json"], "model and job.random_weights contradict each other"),
        (["--step-tokens", "8", "--microbatch-tokens", "9"], "pipeline.microbatch_tokens is 9, more than"),
        (["--partition", "1,1"], "pipeline.partition has 2 numbers with sum 2: it needs 1 (ranks x laps) with sum 3"),
        (["--partition", "1,,2"], "argument --partition: '1,,2': it must be a list such as 10,10,9"),
        (["--partition", "greddy"], "did you mean 'greedy'?"),
        (["--transport", "mpi_hots"], "did you mean 'mpi_host'?"),
        (["--temperature", "-1"], "sampling.temperature is -1.0: it must be 0 or more"),
        (["--temperature", "nan"], "sampling.temperature is nan: it must be 0 or more"),
        (["--top-k", str(2**31)], "sampling.top_k is 2147483648: it must be in"),
        (["--gpu-memory", "lots"], "placement.gpu_memory is 'lots': it must be a size such as 16GiB"),
        (["--gpu-memory", "1KiB"], "the limit is 1.0 KiB: use more ranks"),
        (["--modle", "x"], "noria run does not know '--modle'; did you mean '--model'?"),
        (["--max_new_tokens=3"], "did you mean '--max-new-tokens'?"),
        (["one.toml", "two.toml"], "noria run does not know 'two.toml'"),
        (
            ["--export", "a.jsonl", "b.csv"],
            "b.csv is read as the run file: --export takes one value, give it once for each: --export a.jsonl --export b.csv\n",
        ),
        (
            ["one.toml", "--export", "a.jsonl", "b.csv"],
            "'b.csv': --export takes one value, give it once for each: --export a.jsonl --export b.csv\n",
        ),
        (
            ["--export", "a.jsonl", "b.csv", "one.toml"],
            "'one.toml': --export takes one value, give it once for each: --export a.jsonl --export b.csv\n",
        ),
        (["one.toml", "--output", "a.h5", "b.h5"], "does not know 'b.h5': --output takes one value\n"),
        (["one.toml", "--ignore-eos", "b.h5"], "does not know 'b.h5'\n"),
        (["nowhere.toml"], "run file nowhere.toml: No such file or directory"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompts", "prompts.docx"], ".jsonl"),
    ],
)
def test_a_wrong_key_is_refused_with_the_reason(refusal, arguments, said):
    assert said in refusal(*arguments)


def test_there_are_as_many_groups_as_tags():
    assert MAX_GROUPS == order.MAX_GROUPS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[pipeline]\nlap = 2", "unknown key pipeline.lap; did you mean 'laps'?"),
        ("[pipelin]\nlaps = 2", "unknown key pipelin; did you mean 'pipeline'?"),
        ("sampling = 3", "sampling is a section of the run file: write [sampling]"),
        ("[[sampling]]\nseed = 3", "sampling is a section of the run file: write [sampling]"),
        (f"[sampling]\ntop_p = 1{'0' * 400}", "sampling.top_p is 1"),
        ('"a\\nb" = 1', "unknown key a\\nb"),
        ("a\nb", "is not TOML"),
    ],
)
def test_a_wrong_run_file_is_refused_beside_flags_too(refusal, folder, text, said):
    (folder / "run.toml").write_text(text)
    assert said in refusal(folder / "run.toml")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (
            ["rum"],
            "no command 'rum' (known: convert, run, validate, plan, probe, inspect, report, export, merge); did you mean 'run'?",
        ),
        (["run"], "no model: give model = FILE.h5 in the run file or --model FILE.h5"),
        (["run", "--model", "m.h5"], "no prompts"),
        (["run", "--model", "m.h5", "--prompts", "p.jsonl"], "no output"),
        (["convert"], "the following arguments are required: HF_DIR, MODEL.h5; noria convert --help says more"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(refusal, command, said):
    assert said in refusal(command=command)


# The output.


def test_an_output_that_is_no_output_is_left_alone(refusal, folder):
    (folder / "notes.h5").write_text("my notes\n")
    line = refusal(output="notes.h5")
    assert "notes.h5 is not a Noria output" in line and "name another file, or move it away" in line
    assert "not a Noria output" in refusal("--overwrite", output="notes.h5")
    assert "not a Noria output" in refusal(output="model.h5")
    assert (folder / "notes.h5").read_text() == "my notes\n"


def test_an_outputs_missing_folder_is_named_with_the_command_that_makes_it(refusal, folder):
    assert f"mkdir -p {folder}/nowhere" in refusal(output="nowhere/out.h5")


def test_an_output_in_a_folder_that_cannot_be_written_is_refused(refusal):
    assert "folder /proc cannot be written" in refusal("--output", "/proc/out.h5")


def test_an_output_that_is_a_folder_is_refused(refusal, folder):
    (folder / "results").mkdir()
    assert "results is a folder: name a file" in refusal(output="results")


def test_an_old_output_stays_where_it_is_when_the_run_is_refused(refusal, folder):
    (folder / "old.h5.parts").mkdir()
    (folder / "old.h5.parts" / "part-000000.h5").write_bytes(b"rows")
    refusal("--overwrite", "--laps", "9", output="old.h5")
    refusal("--overwrite", "--model", folder / "nowhere.h5", output="old.h5")
    assert (folder / "old.h5.parts" / "part-000000.h5").exists()


def test_a_refused_run_makes_no_folder_for_parts(refusal):
    said = refusal("--chat", output="chat.h5")  # the fixture looks whether the folder is as it was
    assert "sampling.chat: the model has no chat template" in said
    assert "sampling.system needs sampling.chat" in refusal("--system", "Be kind.", output="chat.h5")


@pytest.mark.parametrize("why", [["--gpu-memory", "1KiB"], ["--chat"]])
def test_a_finished_output_stays_where_it_is_when_the_run_is_refused(refusal, folder, finished, why):
    before = finished.read_bytes()
    refusal("--overwrite", *why, output="finished.h5")
    shutil.copy(folder / "prompts.jsonl", folder / "longer.jsonl")
    with open(folder / "longer.jsonl", "a") as file:
        file.write('{"token_ids": [7, 8]}\n')
    if "--chat" not in why:
        refusal("--extend", "--prompts", folder / "longer.jsonl", *why, output="finished.h5")
    assert finished.read_bytes() == before


def test_damage_found_while_the_model_is_loaded_leaves_nothing_behind(folder, capsys, monkeypatch):
    def damaged(*arguments):
        raise InputError("block layers/0001 is damaged")

    monkeypatch.setattr(noria.run, "load", damaged)
    assert main(small_run.command(folder, "damaged.h5")) == 2
    assert "noria: block layers/0001 is damaged\n" in capsys.readouterr().err
    assert not list(folder.glob("damaged.h5*"))


def test_a_run_refused_where_nobody_looked_before_takes_its_empty_folder_away(refusal, monkeypatch):
    def damaged(*arguments):
        raise InputError("the tokenizer is damaged")

    monkeypatch.setattr("noria.desk.desk.Admission", damaged)
    assert "the tokenizer is damaged" in refusal(output="tokenizer.h5")


# The machine.


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_the_reason_and_the_remedy(refusal, monkeypatch):
    for name in noria.run.launcher.GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    line = refusal("--device", "cuda")
    assert "device = 'cuda'" in line and "CUDA" in line and "run with --device cpu" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_the_scheduler_gave_is_not_passed_over(refusal, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "CUDA_VISIBLE_DEVICES says there is one" in refusal("--device", "auto")


@pytest.mark.slow
@pytest.mark.mpi
def test_ranks_that_do_not_see_each_other_are_refused(folder):
    environment = os.environ | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}
    command = [sys.executable, "-m", "noria", *small_run.command(folder, "lonely.h5")]
    done = subprocess.run(forked(command), env=environment, capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if line.startswith("noria: ")]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert "the launcher started 4 ranks, but MPI sees 1" in said[0] and "mpirun of the same MPI" in said[0]


# What is there already.


@pytest.fixture(scope="module")
def finished(folder):
    assert main(small_run.command(folder, "finished.h5")) == 0
    return folder / "finished.h5"


def test_a_finished_output_is_left_alone_and_the_model_not_loaded(finished, folder, capsys, nothing_is_loaded):
    before = finished.read_bytes()
    capsys.readouterr()
    assert main(small_run.command(folder, "finished.h5")) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "finished.h5 is finished: nothing to do" in said and "--overwrite" in said
    assert finished.read_bytes() == before


def test_a_finished_output_of_another_run_is_not_taken_for_this_ones(finished, refusal, folder):
    line = refusal("--temperature", "0.25", output="finished.h5")
    assert "finished.h5 holds rows of another run: sampling.temperature: 0.9 there, 0.25 now" in line
    shutil.copy(folder / "prompts.jsonl", folder / "more.jsonl")
    with open(folder / "more.jsonl", "a") as file:
        file.write('{"prompt": "one more"}\n')
    assert "another run: prompts:" in refusal("--prompts", folder / "more.jsonl", output="finished.h5")


def test_overwrite_moves_the_finished_output_aside(finished, folder, capsys):
    shutil.copy(finished, folder / "again.h5")
    assert main(small_run.command(folder, "again.h5", "--overwrite", "--temperature", "0")) == 0
    assert small_run.rows_of(folder / "again.h5.old-1") == small_run.rows_of(finished)
    assert small_run.rows_of(folder / "again.h5") != small_run.rows_of(finished)


# Under mpirun: one rank speaks, and the exit code comes through.


def said_by_ranks(done):
    return [line for line in done.stderr.splitlines() if line.startswith("noria: ")]


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("num_ranks", "arguments", "said"),
    [
        (4, [], "4 virtual stages (ranks x laps) for 3 layers: use at most 3 ranks x laps"),
        (3, ["--modle", "x"], "did you mean '--model'?"),
        (3, ["--weights", "gpu=60"], "the shares sum to 60 %, they must sum to 100"),
        (3, ["--blocking", "--groups", "4"], "pipeline.blocking with 4 groups on 3 ranks deadlocks"),
        (2, ["--model", "nowhere.h5"], "nowhere.h5"),
    ],
)
def test_one_of_many_ranks_refuses_for_all(folder, num_ranks, arguments, said):
    done = mpirun(num_ranks, ["noria", *small_run.command(folder, "ranks.h5", *arguments)])
    assert done.returncode == 2, describe(done)
    assert len(said_by_ranks(done)) == 1 and said in said_by_ranks(done)[0], describe(done)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.mpi
def test_a_finished_output_ends_many_ranks_with_success(finished, folder):
    started = time.monotonic()
    done = mpirun(3, ["noria", *small_run.command(folder, "finished.h5")])
    assert done.returncode == 0 and time.monotonic() - started < 60, describe(done)
    assert done.stderr.count("is finished: nothing to do") == 1 and "plan:" not in done.stderr


@pytest.mark.slow
@pytest.mark.mpi
def test_ranks_that_see_different_checkpoints_under_one_name_are_refused(folder, tmp_path):
    for rank, seed in enumerate((0, 0, 1)):
        (tmp_path / str(rank)).mkdir()
        small_run.write_model(tmp_path / str(rank), "model.h5", seed)
    own_folder = 'cd "$1/${OMPI_COMM_WORLD_RANK:-$PMI_RANK}"; shift; exec "$@"'
    command = ["noria", *small_run.command(folder, tmp_path / "out.h5", "--model", "model.h5")]
    done = mpirun(3, ["bash", "-c", own_folder, "bash", tmp_path, *command])
    said = (
        r"noria: model model\.h5 is ([\d,]+) bytes with header (\w+) on \S+ \(rank 0\) but ([\d,]+) bytes with header"
    )
    (line,) = said_by_ranks(done)
    found = re.match(
        said + r" (\w+) on \S+ \(rank 2\): every rank must see the same checkpoint, so copy it again", line
    )
    assert done.returncode == 2 and found and found[2] != found[4], describe(done)
    assert not list(tmp_path.glob("out.h5*")), "a refused run leaves nothing behind"


@pytest.mark.mpi
def test_a_command_of_one_process_is_refused_under_mpirun_by_one_rank():
    done = mpirun(2, [sys.executable, "-m", "noria", "export", "a.h5", "b.jsonl"])
    said = [line for line in done.stderr.splitlines() if line.startswith("noria:")]
    assert done.returncode == 2 and said == [
        "noria: noria export is a program of one process: start it without mpirun (here 2 ranks)"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("redirection", "code"), [(">&-", 0), (">/dev/full", 1)])
def test_a_closed_or_full_stdout_is_no_traceback(redirection, code, tmp_path):
    convert(
        tiny_models.write_directory(tmp_path / "hf", tiny_models.LLAMA, tiny_models.state(tiny_models.LLAMA)),
        tmp_path / "m.h5",
    )
    command = f"{sys.executable} -m noria inspect {tmp_path}/m.h5 {redirection}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=buffered)
    assert done.returncode == code and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == code, done
