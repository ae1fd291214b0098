"""noria convert --quantization: which parameters are stored in fewer bits, how near they stay, and what is said of it."""

import json

import h5py
import pytest
import torch

import families
from noria import encodings
from noria.__main__ import main
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.quantization import GROUP_SIZES, WORDS, quantization
from noria.engine.decoding import Decoder
from noria.engine.parameters import Undecoded
from noria.errors import InputError

CPU = torch.device("cpu")
# The least that a weight may lose: relative Frobenius error of normal numbers, as in the literature on each form.
MOST = {"fp8": 0.03, "fp8_channel": 0.03, "int8": 0.006, "int4": 0.1}
BITS = {"fp8": (8, 8.3), "fp8_channel": (8, 9.1), "int8": (8, 9.1), "int4": (4, 5.1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization")
    for name in ("llama", "qwen3_moe", "mixtral", "gpt2"):
        families.save(families.CONFIGS[name], folder / name)
        convert(folder / name, folder / f"{name}.h5")
    return folder


def tensors_of(path):
    """What a layer computes with, by block and name."""
    with open_checkpoint(path) as checkpoint:
        found = {}
        for name, block in checkpoint.blocks.items():
            buffer = torch.empty(block.nbytes, dtype=torch.uint8)
            checkpoint.read_block(name, buffer.numpy())
            held = Undecoded(block, buffer)
            its = Decoder(block.decoded_nbytes, CPU).parameters(name, held)
            for key, value in its.items():
                found[f"{name}/{key}"] = (
                    value if isinstance(value, torch.Tensor) else value.of(range(len(value)))
                ).clone()
        return found


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "gpt2"])
def test_matrices_of_layers_are_stored_in_fewer_bits_and_stay_near(folder, tmp_path, name, word):
    assert main(["convert", str(folder / name), str(tmp_path / "small.h5"), "--quantization", word]) == 0
    before, after = tensors_of(folder / f"{name}.h5"), tensors_of(tmp_path / "small.h5")
    assert before.keys() == after.keys()
    encoded = set()
    for key, value in before.items():
        if torch.equal(value, after[key]):
            continue
        encoded.add(key.rpartition("/")[2])
        error = (value - after[key]).norm() / value.norm()
        assert 1e-4 < error < MOST[word], key
    experts = {"experts.gate_up", "experts.down"}
    kinds = {"gpt2": {"qkv", "out", "up", "down"}, "llama": {"qkv", "out", "gate_up", "down"}}
    assert encoded == kinds.get(name, {"qkv", "out"} | experts)
    with open_checkpoint(tmp_path / "small.h5") as checkpoint:
        assert checkpoint.version == 2
        for block in checkpoint.blocks.values():
            for parameter in block.encoded:
                assert parameter.encoding == WORDS[word]
                stored = 8 * sum(one.nbytes for one in parameter.piece.fields) / (parameter.numbers / parameter.pieces)
                assert BITS[word][0] <= stored <= BITS[word][1] + 3, parameter.name  # rows of 12 to 48 numbers


def test_groups_are_as_large_as_asked(folder, tmp_path):
    for size in GROUP_SIZES:
        path = tmp_path / f"{size}.h5"
        flags = ["--quantization", "int4", "--group-size", str(size)]
        assert main(["convert", str(folder / "llama"), str(path), *flags]) == 0
        with h5py.File(path) as file:
            assert json.loads(file["layers/0001/down"].attrs["settings"])["group_size"] == size


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group-size", "64"], "--group-size 64 without --quantization"),
        (
            ["--quantization", "fp8", "--group-size", "64"],
            "--group-size 64 with --quantization fp8, which has no groups",
        ),
        (["--quantization", "int3"], "invalid choice: 'int3'"),
        (["--quantization", "int4", "--group-size", "48"], "invalid choice: '?48'?"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, tmp_path, capsys, flags, words):
    try:
        code = main(["convert", str(folder / "llama"), str(tmp_path / "small.h5"), *flags])
    except SystemExit as error:
        code = error.code
    import re

    assert code == 2 and re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "small.h5").exists()


def test_a_number_that_is_none_is_refused_with_its_tensor(folder, tmp_path):
    model = families.save(families.CONFIGS["llama"], tmp_path / "hf")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(
        InputError, match=r"layers/0001/gate_up, of model.layers.1.mlp.gate_proj.weight, .*up_proj.weight"
    ):
        convert(tmp_path / "hf", tmp_path / "small.h5", forms=quantization("int8"))
    assert not (tmp_path / "small.h5").exists()


def test_fields_do_not_depend_on_how_many_threads_make_them(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from noria import kinds
    from noria.pieces import Matrix

    numbers, matrices = torch.randn(300, 96, generator=torch.Generator().manual_seed(1)), [Matrix("", (300, 96))]
    monkeypatch.setattr(encodings, "ENCODED_NUMBERS", 20_000)
    with ThreadPoolExecutor(3) as pool:
        for name in kinds.names("encodings"):
            settings = kinds.load("encodings", name).DEFAULTS
            its = numbers.bfloat16() if name == "exponent" else numbers
            whole = encodings.encode(name, matrices, [its], settings)
            parts = encodings.encode(name, matrices, [its], settings, pool)
            assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole), name
