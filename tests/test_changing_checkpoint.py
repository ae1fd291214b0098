"""A checkpoint that is written to while its weights stream from disk: no token is made of what is another model by now."""

import os
import random
import threading
import time

import pytest
import torch

import small_run
import tiny_models
from counts import count
from mpirun import mpirun
from noria.__main__ import main
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.scratch import checkpoint_regions
from noria.engine.stage import Stage
from noria.errors import Changed
from noria.output.generations import open_generations
from noria.output.parts import part_files, parts_folder
from noria.streams import CpuStreams
from noria.tiers.disk import Disk

FLOAT64 = ["--dtype", "float64"]
STREAMED = ["--weights", "disk=100", "--seal-seconds", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("streamed"))
    rows = (folder / "prompts.jsonl").read_text().splitlines()
    lengths = [f'{line[:-1]}, "max_new_tokens": {1 + 2 * row}}}' for row, line in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("\n".join(lengths) + "\n")
    for name, seed in (("model.h5", 0), ("other.h5", 1)):
        tiny_models.write_directory(folder / "hf", tiny_models.LLAMA, tiny_models.state(tiny_models.LLAMA, seed=seed))
        convert(folder / "hf", folder / name, "float64", overwrite=True)
    assert main(small_run.command(folder, "undisturbed.h5", *FLOAT64)) == 0
    return folder


@pytest.fixture
def model(folder):
    """The checkpoint, as it was again after the test."""
    path = folder / "model.h5"
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


def written_over(path):
    with path.open("r+b") as file:
        file.write(path.with_name("other.h5").read_bytes())


def truncated(path):
    os.truncate(path, 3000)


def copied_over(path):
    path.write_bytes(path.with_name("other.h5").read_bytes())


def one_bit(path):
    with open_checkpoint(path) as checkpoint:
        offset = checkpoint.extent("layers/0001").offset + 40
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def touched(path):
    os.utime(path)


def appended(path):
    with path.open("ab") as file:
        file.write(b"more")


def replaced(path):
    path.with_name("new").write_bytes(path.with_name("other.h5").read_bytes())
    os.replace(path.with_name("new"), path)


HARMLESS = [touched, appended, replaced]  # the open file has the same weights
CHANGES = [written_over, truncated, copied_over, one_bit]


@pytest.fixture
def disk(model):
    with open_checkpoint(model) as checkpoint:
        block = checkpoint.blocks["layers/0001"]
        tier = Disk(checkpoint_regions(checkpoint, ["layers/0000", "layers/0001"]), CpuStreams(torch.device("cpu")))
        try:
            yield tier, checkpoint.blocks["layers/0000"].nbytes, block.nbytes
        finally:
            tier.close()


def load(disk):
    tier, offset, nbytes = disk
    memory = torch.zeros(nbytes, dtype=torch.uint8)
    tier.load([(offset, memory)]).event().synchronize()
    return memory


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_of_a_file_that_was_changed_is_never_handed_on(disk, model, change):
    load(disk)
    os.utime(model, ns=(1, 1))
    load(disk)
    change(model)
    for _ in range(2):
        with pytest.raises(Changed, match=f"model {model} changed while the run reads it"):
            load(disk)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_the_first_load_is_told_as_one(disk, model, change):
    change(model)
    with pytest.raises(Changed, match="changed while the run reads it"):
        load(disk)


@pytest.mark.parametrize("change", HARMLESS)
def test_a_file_that_was_touched_is_read_again_once_and_goes_on(disk, model, monkeypatch, change):
    before = load(disk)
    change(model)
    assert torch.equal(load(disk), before)
    monkeypatch.setattr("noria.checkpoint.checkpoint.Checking.update", lambda *_: pytest.fail("it was compared before"))
    assert torch.equal(load(disk), before)


def tokens_of(*files):
    found = {}
    for path in files:
        with open_generations(path) as file:
            found |= {row.row: row.token_ids.tolist() for row in file.rows()}
    return found


def check(folder, output, change, code, said):
    """A run that was disturbed has only tokens of the model as it was, and goes on with it."""
    whole = {row: tokens for row, (_, _, tokens) in enumerate(small_run.rows_of(folder / "undisturbed.h5"))}
    if code == 0:
        assert small_run.rows_of(folder / output) == small_run.rows_of(folder / "undisturbed.h5")
        return
    assert code == 1 and change in CHANGES, said
    assert f"model {folder / 'model.h5'} changed while the run reads it" in said and "Traceback" not in said, said
    for row, tokens in tokens_of(*part_files(parts_folder(folder / output))).items():
        assert whole[row][: len(tokens)] == tokens


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES + HARMLESS)
def test_one_rank_makes_no_token_of_another_model(folder, model, monkeypatch, capsys, change):
    whole, forward = model.read_bytes(), Stage.forward
    for number in range(count(50)):
        visits, at, output = [0], random.Random(number).randrange(2, 24), f"{change.__name__}-{number}.h5"

        def acting(self, *arguments, visits=visits, at=at):
            visits[0] += 1
            if visits[0] == at:
                change(model)
            return forward(self, *arguments)

        capsys.readouterr()
        with monkeypatch.context() as patched:
            patched.setattr(Stage, "forward", acting)
            code = main(small_run.command(folder, output, *FLOAT64, *STREAMED))
        assert (code == 0) == (change in HARMLESS)
        check(folder, output, change, code, capsys.readouterr().err)
        model.write_bytes(whole)
        assert main(small_run.command(folder, output, *FLOAT64, *STREAMED)) == 0
        check(folder, output, change, 0, "")


@pytest.mark.slow
def test_two_ranks_make_no_token_of_another_model(folder, model):
    whole = model.read_bytes()
    for number in range(count(50)):
        change, output = CHANGES[number % len(CHANGES)], f"two-{number}.h5"

        def when_begun(output=folder / output, change=change, seconds=random.Random(number).uniform(0, 0.3)):
            end = time.monotonic() + 30
            while not (part_files(parts_folder(output)) or output.exists()) and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(seconds)
            change(model)

        other = threading.Thread(target=when_begun)
        other.start()
        done = mpirun(2, ["noria", *small_run.command(folder, output, *FLOAT64, *STREAMED)])
        other.join()
        check(folder, output, change, done.returncode, done.stderr)
        model.write_bytes(whole)
