"""noria inspect: what it prints, what --verify finds, and that hostile texts stay text."""

import h5py
import pytest
import torch

from noria.__main__ import main
from noria.checkpoint.convert import convert
from tiny_models import LLAMA, OPT, state, write_directory


@pytest.fixture
def model(tmp_path):
    source = write_directory(tmp_path / "tiny", OPT, state(OPT, torch.bfloat16))
    (source / "tokenizer.json").write_bytes(b"{}")
    convert(source, tmp_path / "model.h5")
    return tmp_path / "model.h5"


def inspect(capsys, *arguments):
    """The exit code and the two outputs of `noria inspect`."""
    code = main(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_it_says_what_a_checkpoint_holds(model, capsys):
    code, out, err = inspect(capsys, model)
    assert (code, err) == (0, "")
    numbers = sum(tensor.numel() for tensor in state(OPT).values())
    for words in (
        f"{model}: checkpoint, version 1, made from tiny",
        f"opt, dtype bfloat16, {numbers:,} parameters",
        "2 layers, hidden 32, heads 4 of 8 (key/value 4), vocabulary 101, positions 30, embedding tied to the head",
        "12.0 KiB: tokens [101, 32], positions [32, 32]",
        "2 of 52.0 KiB: attention_norm [32]",
        "tokenizer.json (2 B)",
    ):
        assert words in out, out


def test_verify_says_that_all_is_right(model, capsys):
    code, out, _ = inspect(capsys, model, "--verify")
    assert code == 0 and "4 blocks" in out and "every checksum is right" in out


def test_verify_finds_every_flipped_byte(model, capsys):
    with h5py.File(model) as file:
        offsets = [file[name].id.get_offset() for name in ("layers/0000/up", "head/norm_bias")]
    content = bytearray(model.read_bytes())
    for offset in offsets:
        content[offset + 3] ^= 0x10
    model.write_bytes(content)
    assert inspect(capsys, model)[0] == 0
    code, out, err = inspect(capsys, model, "--verify")
    assert code == 2
    assert "block 'layers/0000' is damaged" in out and "block 'head' is damaged" in out
    assert err.endswith("2 of 4 blocks damaged: layers/0000, head\n")


def test_texts_of_the_file_cannot_steer_the_terminal(model, capsys):
    with h5py.File(model, "r+") as file:
        file.attrs["source"] = "a\x1b[2Jb\r\n\u202ec\x9b"
    code, out, _ = inspect(capsys, model)
    assert code == 0 and r"made from a\x1b[2Jb\r\n\u202ec\x9b" in out
    with h5py.File(model, "r+") as file:
        file.attrs["format"] = "x\x1b[2J"
    code, out, err = inspect(capsys, model)
    assert code == 2 and r"its format is 'x\x1b[2J'" in err


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x89HDF\r\n\x1a\n" + bytes(100)])
def test_what_is_no_hdf5_file_is_an_error_in_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "x.h5").write_bytes(content)
    code, out, err = inspect(capsys, tmp_path / "x.h5")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "x.h5" in err


def test_an_hdf5_file_of_something_else_is_an_error(tmp_path, capsys):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"] = 1
    assert "it has no attribute 'format'" in inspect(capsys, tmp_path / "x.h5")[2]
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file.attrs["format"] = "other"
    assert "known: 'noria-checkpoint', 'noria-generations'" in inspect(capsys, tmp_path / "x.h5")[2]


def test_an_untied_model_says_nothing_of_ties(tmp_path, capsys):
    convert(write_directory(tmp_path / "tiny", LLAMA, state(LLAMA)), tmp_path / "model.h5")
    code, out, _ = inspect(capsys, tmp_path / "model.h5")
    assert code == 0 and "embedding tied" not in out and "tokenizer   none: prompts must be token_ids" in out
