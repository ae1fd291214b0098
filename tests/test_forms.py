"""What a checkpoint says of parameters that are not plain: hostile words are refused, plain ones stay as they were."""

import json
import random
import re
import shutil

import h5py
import numpy as np
import pytest
import torch

import families
import tiny_models
from counts import some
from extra_kinds import extra_kinds
from noria import kinds
from noria.__main__ import main
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.random_weights import random_checkpoint
from noria.checkpoint.summary import _numbers_words
from noria.errors import InputError
from noria.tools import container

CONFIG = tiny_models.LLAMA
FORMS = {name: ("grouped", {"group": 8}) for name in ("qkv", "down")}
PLACE = "layers/0001/qkv"


@pytest.fixture(autouse=True)
def extra():
    with extra_kinds():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    tiny_models.write_directory(folder / "hf", CONFIG, tiny_models.state(CONFIG, torch.bfloat16))
    with extra_kinds():
        convert(folder / "hf", folder / "plain.h5")
        convert(folder / "hf", folder / "encoded.h5", forms=FORMS)
    return folder


@pytest.fixture
def model(folder, tmp_path, monkeypatch):
    """A copy of the encoded model, to break; nobody compares the checksum of its header, or looks at it in a child first."""
    monkeypatch.setattr(container, "agrees", lambda path: True)
    return shutil.copy(folder / "encoded.h5", tmp_path / "model.h5")


def test_a_plain_checkpoint_is_of_version_1_and_says_nothing_more(folder):
    with h5py.File(folder / "plain.h5") as file:
        assert file.attrs["version"] == 1
        found = []
        file.visititems(lambda name, node: found.append((name, dict(node.attrs))))
    assert all(attributes.keys() <= {"xxh3_128"} for _, attributes in found)
    with open_checkpoint(folder / "plain.h5") as checkpoint:
        assert checkpoint.version == 1 and not any(block.encoded for block in checkpoint.blocks.values())


def test_an_encoded_parameter_is_a_dataset_of_pieces_with_its_fields_beside_it(folder):
    with h5py.File(folder / "encoded.h5") as file:
        assert file.attrs["version"] == 2
        dataset = file[PLACE]
        fields, matrices = (json.loads(dataset.attrs[name]) for name in ("fields", "matrices"))
        assert dataset.dtype == np.uint8 and dataset.shape[0] == 1 and dataset.attrs["encoding"] == "grouped"
        assert [matrix["shape"] for matrix in matrices] == [[32, 32], [16, 32], [16, 32]]
        assert all(field["offset"] % 16 == 0 for field in fields) and len(fields) == 9
        assert file["layers/0001/out"].shape == (32, 32) and "fields" not in file["layers/0001/out"].attrs


def test_a_field_whose_size_depends_on_the_numbers_takes_what_they_need(folder):
    sizes = []
    with h5py.File(folder / "encoded.h5") as file:
        for layer in range(3):
            fields = json.loads(file[f"layers/{layer:04d}/down"].attrs["fields"])
            sizes.append(next(field["shape"][0] for field in fields if field["name"] == "large"))
    tensors = tiny_models.state(CONFIG, torch.bfloat16)
    wanted = [int((tensors[f"model.layers.{layer}.mlp.down_proj.weight"].abs() > 2).sum()) for layer in range(3)]
    assert sizes == wanted and 0 < max(wanted) <= 32 * 44 // 8


def test_a_parameter_whose_numbers_find_no_room_stays_plain(folder, tmp_path):
    tensors = tiny_models.state(CONFIG, torch.bfloat16)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 10
    tiny_models.write_directory(tmp_path / "hf", CONFIG, tensors)
    convert(tmp_path / "hf", tmp_path / "model.h5", forms=FORMS)
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        encoded = {name: [p.name for p in block.encoded] for name, block in checkpoint.blocks.items()}
    assert encoded["layers/0000"] == ["qkv", "down"] and encoded["layers/0001"] == ["qkv"]


def test_embedding_and_a_head_that_is_one_stay_plain(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    tiny_models.write_directory(tmp_path / "hf", config, tiny_models.state(config, torch.bfloat16))
    forms = {name: ("grouped", {"group": 8}) for name in ("tokens", "lm_head", "down")}
    convert(tmp_path / "hf", tmp_path / "model.h5", forms=forms)
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        assert not checkpoint.blocks["embed"].encoded and not checkpoint.blocks["head"].encoded


def test_the_hash_of_a_model_holds_how_it_is_encoded(folder, model):
    with open_checkpoint(folder / "encoded.h5") as one, open_checkpoint(model) as other:
        before = one.header_hash
        assert other.header_hash == before
    change(model, lambda attributes: attributes.__setitem__("settings", '{"group": 8, "more": 1}'))
    with open_checkpoint(model) as other:
        assert other.header_hash != before


def change(path, how):
    with h5py.File(path, "r+", libver=("v108", "v108")) as file:
        how(file[PLACE].attrs)


def said(text, index=0, /, **changes):
    """Changes one entry of a list that the attributes hold."""

    def how(attributes):
        tree = json.loads(attributes[text])
        tree[index] |= changes
        attributes[text] = json.dumps(tree)

    return how


def put(name, value):
    return lambda attributes: attributes.__setitem__(name, value)


ROWS = [{"name": "", "shape": [1, 32], "transposed": False}] * 64
HOSTILE = {
    "an encoding of later": (put("encoding", "fp9_block"), "is encoded as 'fp9_block': this Noria knows "),
    "plain": (put("encoding", "plain"), "is encoded as 'plain'"),
    "a path": (put("encoding", "../plain"), "is encoded as '../plain'"),
    "an encoding that is no text": (put("encoding", 3), "needs a text attribute 'encoding'"),
    "fields that are no JSON": (put("fields", "["), "cannot be read"),
    "fields that are no list": (put("fields", "{}"), "a list of objects is needed"),
    "deep JSON": (put("fields", "[" * 10**5), "cannot be read"),
    "no fields": (put("fields", "[]"), "a list of objects is needed"),
    "long fields": (put("fields", " " * (1 << 21)), "at most 1048576 are read"),
    "a float type": (said("fields", dtype="float8_e4m3fn"), "is no field; dtypes are"),
    "another type": (said("fields", dtype="float32"), "its field 0.codes is float32"),
    "a negative offset": (said("fields", offset=-16), "is no field"),
    "an offset that is no number": (said("fields", offset="0"), "is no field"),
    "a crooked offset": (said("fields", 1, offset=1032), "multiples of 16"),
    "a field beyond the piece": (said("fields", 8, offset=1 << 40), "of a piece of"),
    "fields that overlap": (said("fields", 1, offset=16), "where the field before it ends"),
    "a shape that is too large": (said("fields", shape=[32, 1 << 20]), "[32, 1048576]"),
    "a shape whose size overflows": (said("fields", shape=[2**31 - 1, 2**31 - 1]), "its field 0.codes is uint8"),
    "a shape of terabytes": (said("fields", shape=[1 << 60]), "is no shape"),
    "a list longer than its room": (said("fields", 2, shape=[4096]), "[129] at most"),
    "a name twice": (said("fields", name="0.scales"), "has the fields"),
    "a name of several lines": (said("fields", name="a\nb\x1b[31m"), "is no field"),
    "a name that is no text": (said("fields", name="\ud800"), "is no field"),
    "a long name": (said("fields", name="a" * 10**5), "is no field"),
    "an offset of hundreds of digits": (said("fields", 8, offset=10**400), "is no field"),
    "a type that is a list": (said("fields", dtype=[]), "is no field"),
    "a matrix with a name of several lines": (said("matrices", name="a\nb\x1b[31m"), "is no matrix"),
    "a matrix with a name that is no text": (said("matrices", name="\ud800"), "is no matrix"),
    "a matrix with a long name": (said("matrices", name="a" * 10**5), "is no matrix"),
    "a matrix of each row": (put("matrices", json.dumps(ROWS)), "2.codes, 2.scales, ..."),
    "a matrix too many rows": (said("matrices", shape=[33, 32]), "they do not make [64, 32]"),
    "a matrix of nothing": (said("matrices", shape=[0, 32]), "they do not make [64, 32]"),
    "a matrix of a name": (said("matrices", name="other"), "they do not make [64, 32]"),
    "settings that are no object": (put("settings", "[]"), "its settings are no object"),
    "no settings": (put("settings", "{}"), "has no settings {}"),
    "settings of nonsense": (put("settings", '{"group": 0}'), "group is 0"),
    "other settings": (put("settings", '{"group": 4}'), "its field 0.scales is float32 [32, 4], grouped has it as"),
}


@pytest.mark.parametrize("harm", HOSTILE)
def test_what_a_file_says_of_an_encoding_is_refused_in_one_line(model, harm):
    how, words = HOSTILE[harm]
    change(model, how)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        open_checkpoint(model)
    text = str(error.value)
    assert str(model) in text and PLACE in text and "\n" not in text and len(text) < 700, text
    assert text.encode() and text.isprintable()


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2, 4096), "u1", "should be [1, bytes of a piece]"),
        ((4096,), "u1", "should be [1, bytes of a piece]"),
        ((1, 4090), "u1", "multiples of 16"),
        ((1, 32), "u1", "of a piece of 32"),
        ((1, 8192), "f4", "is stored as float32, not as uint8"),
        ((1, 1 << 50), "u1", "is truncated"),
    ],
)
def test_a_dataset_that_is_not_pieces_of_bytes_is_refused(model, shape, dtype, words):
    with h5py.File(model, "r+", libver=("v108", "v108")) as file:
        attributes = dict(file[PLACE].attrs)
        del file[PLACE]
        create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        create.set_layout(h5py.h5d.CONTIGUOUS)
        create.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
        kind = h5py.h5t.py_create(np.dtype(dtype))
        h5py.h5d.create(file["layers/0001"].id, b"qkv", kind, h5py.h5s.create_simple(shape), create)
        file[PLACE].attrs.update(attributes)
        if np.prod(shape) < 1 << 20:
            file[PLACE][(0,) * len(shape)] = 1
    with pytest.raises(InputError, match=re.escape(words) + "|has no data") as error:
        open_checkpoint(model)
    assert "\n" not in str(error.value)


def test_an_encoded_embedding_is_refused(folder, model):
    with h5py.File(model, "r+", libver=("v108", "v108")) as file:
        attributes = dict(file["layers/0001/down"].attrs)
        file.move("embed/tokens", "embed/other")
        fields = json.loads(attributes["fields"])
        create = file["embed"].create_dataset("tokens", (1, 1 << 16), np.uint8)
        create.attrs.update(attributes | {"fields": json.dumps(fields)})
    with pytest.raises(InputError, match="'embed/tokens' is encoded: rows of an embedding are gathered"):
        open_checkpoint(model)


def test_inspect_shows_encoding_and_bits(folder, capsys):
    assert main(["inspect", str(folder / "encoded.h5")]) == 0
    out = capsys.readouterr().out
    assert "checkpoint, version 2" in out and re.search(r"qkv \[64, 32\] grouped, 1\d\.\d\d bits", out)
    assert main(["inspect", str(folder / "plain.h5"), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "checkpoint, version 1" in out and "bits" not in out and "every checksum is right" in out


def test_inspect_names_the_layers_that_have_each_parameters(tmp_path, capsys):
    turns = kinds.load("models", "turns")
    tiny_models.write_directory(tmp_path / "hf", turns.CONFIG, turns.random_state(turns.CONFIG))
    convert(tmp_path / "hf", tmp_path / "model.h5")
    assert main(["inspect", str(tmp_path / "model.h5")]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("layers"))
    assert lines[first].startswith("layers      7, ") and lines[first].endswith(" together")
    assert lines[first + 1 : first + 4] == [
        "0, 3, 6: queries [80, 24], latent [40, 24], out [24, 56]",
        "1, 4: qkv [64, 24], out [24, 32]",
        "2, 5: decay [7, 24], new [7, 24], out [24, 7]",
    ]
    assert _numbers_words([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert _numbers_words(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, ... (20 of them)"


def test_experts_are_pieces_whose_down_matrix_is_transposed():
    blocks = random_checkpoint(families.MIXTRAL, "float32").blocks
    experts = next(p for p in blocks["layers/0000"].parameters if p.name == "experts")
    assert experts.pieces == 5 and [matrix.transposed for matrix in experts.piece.matrices] == [False, False, True]
    assert experts.computed == {"experts.gate_up": (5, 48, 32), "experts.down": (5, 32, 24)}
    assert [field.offset for field in experts.piece.fields] == [0, 24 * 32 * 4, 2 * 24 * 32 * 4]


@pytest.mark.parametrize("seed", some(range(500)))
def test_any_changed_text_is_read_or_refused_in_one_line(model, seed):
    draw = random.Random(seed)
    name = draw.choice(["fields", "matrices", "settings", "encoding"])

    def how(attributes):
        text = attributes[name]
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(text))
            put_in = draw.choice(["", draw.choice('0123456789-.,:[]{}"e'), "null", "1e999", "true", "\\u0000"])
            text = text[:at] + put_in + text[at + draw.randint(0, 2) :]
        attributes[name] = text

    change(model, how)
    try:
        with open_checkpoint(model) as checkpoint:
            assert [one.name for one in checkpoint.blocks["layers/0001"].encoded] == ["qkv", "down"]
    except InputError as error:
        text = str(error)
        assert str(model) in text and "\n" not in text and len(text) < 700, text
