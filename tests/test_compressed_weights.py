"""noria convert --compress-weights exponent: the same numbers in fewer bits, and the same tokens."""

import json

import pytest
import torch

import families
import tiny_models
from noria import config
from noria.__main__ import main
from noria.checkpoint import quantization
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.engine.decoding import Decoder
from noria.engine.parameters import Undecoded
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.run import run

LLAMA = tiny_models.LLAMA | {"hidden_size": 64, "intermediate_size": 96}
FLAGS = ["--compress-weights", "exponent"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(quantization, "CODED_NUMBERS", 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    tensors = tiny_models.state(LLAMA, torch.bfloat16)
    tensors["model.layers.1.self_attn.o_proj.weight"].view(torch.int16).random_(
        0, 0x7F00
    )  # more escapes than there is room
    tiny_models.write_directory(folder / "llama", LLAMA, tensors)
    tiny_models.write_directory(folder / "wide", LLAMA, tiny_models.state(LLAMA, torch.float32))
    tiny_models.write_directory(folder / "half", LLAMA, tiny_models.state(LLAMA, torch.float16))
    families.save(families.CONFIGS["qwen3_moe"], folder / "qwen3_moe")
    return folder


def tensors_of(path):
    """The bits of what a layer computes with, by block and name; and the parameters that are encoded."""
    found, encoded = {}, {}
    with open_checkpoint(path) as checkpoint:
        for name, block in checkpoint.blocks.items():
            buffer = torch.empty(block.nbytes, dtype=torch.uint8)
            checkpoint.read_block(name, buffer.numpy())
            its = Decoder(block.decoded_nbytes, torch.device("cpu")).parameters(name, Undecoded(block, buffer))
            for key, value in its.items():
                whole = value if isinstance(value, torch.Tensor) else value.of(range(len(value)))
                found[f"{name}/{key}"] = whole.clone().contiguous().view(torch.int16)
            encoded[name] = {one.name: one.encoding for one in block.encoded}
    return found, encoded


def both(folder, tmp_path, name, dtype="auto"):
    """What of a compressed checkpoint is encoded; it holds what the plain one does."""
    convert(folder / name, tmp_path / "plain.h5", dtype)
    convert(folder / name, tmp_path / "small.h5", dtype, forms=quantization.compressed)
    (plain, _), (small, encoded) = tensors_of(tmp_path / "plain.h5"), tensors_of(tmp_path / "small.h5")
    assert plain.keys() == small.keys() and all(torch.equal(value, small[key]) for key, value in plain.items())
    return encoded


@pytest.mark.slow
def test_the_flag_stores_them_so_and_inspect_shows_it(folder, tmp_path, capsys):
    assert main(["convert", str(folder / "llama"), str(tmp_path / "small.h5"), *FLAGS]) == 0
    assert "stored as exponent" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "small.h5")]) == 0
    assert "exponent" in capsys.readouterr().out


def test_every_number_stays_and_what_has_too_many_escapes_is_plain(folder, tmp_path):
    encoded = both(folder, tmp_path, "llama")
    every = dict.fromkeys(["qkv", "out", "gate_up", "down"], "exponent")
    assert encoded["layers/0000"] == every and encoded["head"] == {"lm_head": "exponent"} and not encoded["embed"]
    assert encoded["layers/0001"] == {name: its for name, its in every.items() if name != "out"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wide", "qwen3_moe"])
def test_numbers_of_a_wider_source_are_rounded_as_plain_ones_are(folder, tmp_path, name):
    encoded = both(folder, tmp_path, name, "bfloat16")
    assert "down" in encoded["layers/0000"] or "experts" in encoded["layers/0000"]


@pytest.mark.slow
def test_a_run_gives_the_tokens_of_the_plain_model(folder, tmp_path):
    both(folder, tmp_path, "wide", "bfloat16")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"token_ids": [5 + row, 9, 17]}) for row in range(3)))
    tokens = []
    for name in ("plain", "small"):
        keys = {
            "model": tmp_path / f"{name}.h5",
            "prompts": tmp_path / "p.jsonl",
            "output": tmp_path / f"{name}-out.h5",
        }
        flags = {"device": "cpu", "max_new_tokens": 6, "weights": {"cpu": 100}}
        run(config.load(None, {key: str(path) for key, path in keys.items()} | flags), Solo())
        with open_generations(keys["output"]) as found:
            tokens.append([row.token_ids.tolist() for row in found.rows()])
    assert tokens[0] == tokens[1] and [len(row) for row in tokens[0]] == [6, 6, 6]


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("half", [], "layers/0000/qkv: exponent stores numbers of bfloat16, not float16: leave them plain"),
        (
            "llama",
            ["--quantization", "int4"],
            "--quantization int4 with --compress-weights exponent: a matrix is stored in",
        ),
    ],
)
def test_what_cannot_be_is_refused(folder, tmp_path, capsys, name, flags, words):
    assert main(["convert", str(folder / name), str(tmp_path / "small.h5"), *FLAGS, *flags]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "small.h5").exists()


def test_small_parameters_stay_plain(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "CODED_NUMBERS", 1 << 16)
    assert not convert(folder / "llama", tmp_path / "m.h5", forms=quantization.compressed).forms
