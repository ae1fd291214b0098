"""The checkpoint: its layout as HDF5 alone sees it, reading blocks, and every file that is refused, by its message."""

import json
import os
import random
import re
import shutil
import threading

import h5py
import numpy as np
import pytest
import torch
from h5py import h5d, h5p, h5s, h5t
from hypothesis import given, settings
from hypothesis import strategies as st

from noria.blocks import ALIGNMENT, DTYPE_NBYTES, lay_out, layer_name, round_up
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.random_weights import PERIOD, random_checkpoint
from noria.checkpoint.writer import Header, file_nbytes, write_checkpoint
from noria.errors import InputError
from noria.tools import container
from tiny_models import LLAMA, OPT, fused, state, write_directory

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One converted model of each family, in bfloat16; copy before writing into them."""
    folder, paths = tmp_path_factory.mktemp("models"), {}
    for config in (LLAMA, OPT):
        source = write_directory(folder / config["model_type"], config, state(config, torch.bfloat16))
        (source / "tokenizer.json").write_bytes(b'{"model": {}}')
        paths[config["model_type"]] = folder / f"{config['model_type']}.h5"
        convert(source, paths[config["model_type"]])
    return paths


@pytest.fixture
def model(models, tmp_path):
    """A copy of the Llama to break."""
    return shutil.copy(models["llama"], tmp_path / "model.h5")


def read(checkpoint, name):
    buffer = bytearray(checkpoint.blocks[name].nbytes)
    checkpoint.read_block(name, buffer)
    return bytes(buffer)


# ---- layout


def bfloat16_bits(value: torch.Tensor) -> bytes:
    return value.view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_hdf5_alone_shows_every_dataset_with_true_bfloat16_values(models, config):
    expected, path = fused(config, state(config, torch.bfloat16)), models[config["model_type"]]
    with h5py.File(path) as file:
        found = {}
        file.visititems(lambda name, node: found.update({name: node[()]}) if isinstance(node, h5py.Dataset) else None)
        found["embed/tokens"] = file["embed/tokens"][()]  # visititems shows an object that has two names once
        found.setdefault("head/lm_head", file["head/lm_head"][()])
        tokenizer = found.pop("tokenizer/tokenizer.json")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(found[name], value.float().numpy()), name
        assert tokenizer.tobytes() == b'{"model": {}}'
        assert file.attrs["format"] == "noria-checkpoint" and file.attrs["version"] == 1
        assert file.attrs["family"] == config["model_type"] and file.attrs["dtype"] == "bfloat16"


def test_raw_bytes_at_a_dataset_s_offset_are_bfloat16(models):
    content = models["llama"].read_bytes()
    with h5py.File(models["llama"]) as file:
        for name, value in fused(LLAMA, state(LLAMA, torch.bfloat16)).items():
            offset = file[name].id.get_offset()
            assert content[offset : offset + value.nbytes] == bfloat16_bits(value), name


def test_a_layer_is_one_extent_of_pages_padded_with_zeros(models):
    content = models["llama"].read_bytes()
    expected = fused(LLAMA, state(LLAMA, torch.bfloat16))
    with h5py.File(models["llama"]) as file:
        offsets = {name: file[name].id.get_offset() for name in expected}
    with open_checkpoint(models["llama"]) as checkpoint:
        for name, block in checkpoint.blocks.items():
            parts = [bfloat16_bits(expected[f"{name}/{p.name}"]) for p in block.parameters]
            whole = b"".join(part.ljust(round_up(len(part)), b"\0") for part in parts)
            offset = offsets[f"{name}/{block.parameters[0].name}"]
            assert offset % ALIGNMENT == 0 and content[offset : offset + block.nbytes] == whole
            assert read(checkpoint, name) == whole


def test_a_tied_embedding_is_stored_once(models):
    with h5py.File(models["opt"]) as file:
        assert file["embed/tokens"] == file["head/lm_head"]
    with h5py.File(models["llama"]) as file:
        assert file["embed/tokens"] != file["head/lm_head"]
    with open_checkpoint(models["opt"]) as checkpoint:
        assert checkpoint.num_parameters == sum(value.numel() for value in state(OPT).values())


sizes = st.sampled_from([1, 7, 512, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 5000, 70_000])
shapes = st.lists(st.one_of(st.tuples(sizes), st.tuples(st.integers(1, 9), sizes)), min_size=1, max_size=9)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.lists(shapes, min_size=3, max_size=12),
    st.sampled_from(sorted(DTYPE_NBYTES)),
    st.sampled_from(["untied", "end to beginning", "beginning to end", "apart"]),
    st.integers(0, 200_000),
)
def test_any_shapes_lie_without_gaps_whatever_the_sizes(tmp_path_factory, block_shapes, dtype, tie, text):
    path = tmp_path_factory.mktemp("layout") / "model.h5"
    names = ["embed", *map(layer_name, range(len(block_shapes) - 2)), "head"]
    named = {n: {f"p{i}": shape for i, shape in enumerate(s)} for n, s in zip(names, block_shapes, strict=True)}
    if tie == "end to beginning":
        named["embed"], named["head"] = {"tokens": (11, 3)} | named["embed"], named["head"] | {"lm_head": (11, 3)}
    elif tie == "beginning to end":
        named["embed"], named["head"] = named["embed"] | {"tokens": (11, 3)}, {"lm_head": (11, 3)} | named["head"]
    elif tie == "apart":
        named["embed"], named["head"] = named["embed"] | {"tokens": (11, 3)}, named["head"] | {"lm_head": (11, 3)}
    blocks = {name: lay_out(name, shapes, dtype) for name, shapes in named.items()}

    def chunks(block, parameter):
        content = np.random.default_rng(parameter.nbytes).bytes(parameter.nbytes)
        return (content[i : i + 9999] for i in range(0, len(content), 9999))

    header = Header(
        "none", dtype, "none", "x" * text, tokenizer={"tokenizer.json": bytes(text % 5000), "vocab.json": b""}
    )
    write_checkpoint(path, header, blocks, None if tie == "untied" else "tokens", chunks)
    assert path.stat().st_size <= file_nbytes(blocks, header)
    content = path.read_bytes()
    with h5py.File(path) as file:
        for name, block in blocks.items():
            begin = file[name][block.parameters[0].name].id.get_offset()
            assert begin % ALIGNMENT == 0 and begin + block.nbytes <= len(content)
            for parameter in block.parameters:
                offset = begin + parameter.offset
                assert file[name][parameter.name].id.get_offset() == offset
                assert content[offset : offset + parameter.nbytes] == b"".join(chunks(block, parameter))
                pad = content[offset + parameter.nbytes : begin + round_up(parameter.offset + parameter.nbytes)]
                assert pad == bytes(len(pad))
        if tie != "untied":
            assert (file["embed/tokens"] == file["head/lm_head"]) == (tie != "apart")


# ---- reading


def test_what_a_checkpoint_says_of_itself(models):
    with open_checkpoint(models["llama"]) as checkpoint:
        assert checkpoint.family == "llama" and checkpoint.dtype == "bfloat16" and checkpoint.config == LLAMA
        assert checkpoint.generation_config == {} and checkpoint.source == "llama"
        assert list(checkpoint.blocks) == ["embed", "layers/0000", "layers/0001", "layers/0002", "head"]
        assert checkpoint.shape.num_kv_heads == 2 and checkpoint.shape.vocab_size == 101
        assert checkpoint.nbytes == sum(block.nbytes for block in checkpoint.blocks.values())
        assert checkpoint.num_parameters == sum(value.numel() for value in state(LLAMA).values())


def test_the_hash_is_of_the_model_wherever_it_lies(models, tmp_path):
    hashes = []
    for number, (config, seed) in enumerate([(LLAMA, 0), (LLAMA, 0), (LLAMA, 1), (LLAMA | {"rope_theta": 5.0}, 0)]):
        source = write_directory(
            tmp_path / f"{number}" / "llama", config, state(config, seed=seed), num_shards=number + 1
        )
        convert(source, tmp_path / f"{number}.h5")
        with open_checkpoint(tmp_path / f"{number}.h5") as checkpoint:
            hashes.append(checkpoint.header_hash)
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_threads_read_blocks_side_by_side(models):
    with open_checkpoint(models["llama"]) as checkpoint:
        expected = {name: read(checkpoint, name) for name in checkpoint.blocks}
    wrong = []
    with open_checkpoint(models["llama"]) as checkpoint:

        def reader(seed):
            names = random.Random(seed).choices(list(expected), k=60)
            wrong.extend(name for name in names if read(checkpoint, name) != expected[name])

        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not wrong


def test_short_reads_are_taken_up_where_they_ended(models, monkeypatch):
    preadv = os.preadv
    with open_checkpoint(models["llama"]) as checkpoint:
        expected = read(checkpoint, "layers/0001")
        monkeypatch.setattr(container.os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:1000]], offset))
        assert read(checkpoint, "layers/0001") == expected


def test_a_buffer_may_be_of_any_type_but_of_one_size(models):
    with open_checkpoint(models["llama"]) as checkpoint:
        expected, nbytes = read(checkpoint, "head"), checkpoint.blocks["head"].nbytes
        for buffer in (np.empty((2, nbytes // 8), np.float32), torch.empty(nbytes, dtype=torch.uint8).numpy()):
            checkpoint.read_block("head", buffer)
            assert buffer.tobytes() == expected
        with pytest.raises(AssertionError):
            checkpoint.read_block("head", bytearray(nbytes - 1))


def test_hundreds_of_checkpoints_leave_no_descriptor_open(models, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "broken.h5").write_bytes(models["llama"].read_bytes()[:-5000])
    for _ in range(20):
        open_checkpoint(models["llama"]).close()
        with pytest.raises(InputError):
            open_checkpoint(tmp_path / "broken.h5")
    assert len(os.listdir("/proc/self/fd")) == before


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_found_at_the_first_load_of_its_block(model):
    with h5py.File(model) as file:
        flip(model, file["layers/0001/down"].id.get_offset() + 77)
    with open_checkpoint(model) as checkpoint:
        read(checkpoint, "layers/0000")
        for attempt in (lambda: read(checkpoint, "layers/0001"), lambda: checkpoint.verify_block("layers/0001")):
            with pytest.raises(
                InputError, match="model.h5: block 'layers/0001' is damaged: its checksum is .* the header says"
            ):
                attempt()


def test_a_checksum_covers_the_padding_too(model):
    with h5py.File(model) as file:
        flip(model, file["head/norm"].id.get_offset() + 100)  # 64 bytes of numbers
    with open_checkpoint(model) as checkpoint, pytest.raises(InputError, match="'head' is damaged"):
        read(checkpoint, "head")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(model):
    with open_checkpoint(model) as checkpoint:
        os.truncate(model, 9000)
        with pytest.raises(InputError, match="ends before byte .*: it was truncated while it was read"):
            read(checkpoint, "head")


# ---- several files


def split(model, link="part.h5", path="/layers/0001"):
    """Moves layer 1 to part.h5 beside the model, and links to it."""
    shutil.copy(model, model.parent / "part.h5")
    with h5py.File(model, "r+") as file:
        del file["layers/0001"]
        file["layers/0001"] = h5py.ExternalLink(link, path)


def test_a_layer_may_lie_in_another_file_of_the_folder(models, model):
    split(model)
    with open_checkpoint(models["llama"]) as whole, open_checkpoint(model) as checkpoint:
        for name in whole.blocks:
            assert read(checkpoint, name) == read(whole, name)
        assert checkpoint.header_hash == whole.header_hash


def test_links_that_leave_the_folder_or_lead_nowhere_are_refused(models, tmp_path):
    (tmp_path / "outside").mkdir()
    shutil.copy(models["llama"], tmp_path / "outside" / "part.h5")
    for number, (link, path, message) in enumerate(
        [
            (
                "../outside/part.h5",
                "/layers/0001",
                "links to '../outside/part.h5': a checkpoint's files must be in one folder",
            ),
            (str(tmp_path / "outside/part.h5"), "/layers/0001", "a checkpoint's files must be in one folder"),
            ("away.h5", "/layers/0001", "links to 'away.h5': a checkpoint's files must be in one folder"),
            ("gone.h5", "/layers/0001", "is in the file 'gone.h5', which is missing"),
            ("part.h5", "/layers/7777", "has no 'layers/0001/attention_norm'"),
            ("model.h5", "/layers/0001", "more than 4 links"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = shutil.copy(models["llama"], folder / "model.h5")
        (folder / "away.h5").symlink_to("../outside/part.h5")
        split(model, link, path)
        refused(model, message)


# ---- refusals


def refused(path, *words):
    with pytest.raises(InputError) as error:
        open_checkpoint(path).close()
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 800  # one names all families
    for word in words:
        assert word in message, message


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    refused(tmp_path / "none.h5", "does not exist")
    source = write_directory(tmp_path / "hf", LLAMA, state(LLAMA))
    refused(source, "is a directory", f"`noria convert {source} model.h5`")
    refused(source / "model.safetensors", "is not an HDF5 file: its")
    (tmp_path / "empty.h5").touch()
    refused(tmp_path / "empty.h5", "is not an HDF5 file: its 0 bytes")
    os.mkfifo(tmp_path / "pipe.h5")
    refused(tmp_path / "pipe.h5", "is not a regular file")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    refused(tmp_path / "other.h5", "is not a checkpoint: its format is None")
    with h5py.File(tmp_path / "output.h5", "w") as file:
        file.attrs["format"] = "noria-generations"
    refused(tmp_path / "output.h5", "its format is 'noria-generations', not 'noria-checkpoint'")


def test_a_truncated_file_is_refused_wherever_it_ends(models, tmp_path):
    content = models["llama"].read_bytes()
    for length in [1, 7, 8, 100, 2047, 2048, *range(4096, len(content) - 200, len(content) // 13), len(content) - 200]:
        (tmp_path / "cut.h5").write_bytes(content[:length])
        with pytest.raises(InputError) as error:
            open_checkpoint(tmp_path / "cut.h5")
        assert "truncated" in str(error.value) or "not an HDF5 file" in str(error.value)
    whole = re.search(rf"it has {length} bytes of (\d+); copy or make it again", str(error.value))
    assert whole and 0 < len(content) - int(whole[1]) < 100  # HDF5 does not know of the checksum behind its end


def test_an_extent_beyond_its_file_is_refused_to_the_byte(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(5000))
    with open(path, "rb") as file:
        container.check_inside(container.Extent(file.fileno(), path, 904, 4096), "head")
        with pytest.raises(
            InputError, match="x is truncated: 'head' ends at byte 5001, the file has 5000; copy or make"
        ):
            container.check_inside(container.Extent(file.fileno(), path, 905, 4096), "head")


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"version": 3}, ["is version 3 of the format, this Noria reads up to 2: use a newer Noria"]),
        ({"version": "1"}, ["version is '1', it should be a whole number"]),
        ({"version": [1, 1]}, ["needs one value as its attribute 'version', it has shape [2]"]),
        ({"version": 0}, ["it should be a whole number from 1 on"]),
        ({"format": 7}, ["needs a text attribute 'format'"]),
        ({"dtype": "int4"}, ["dtype is 'int4'; known: float64"]),
        ({"dtype": "float32"}, ["'embed/tokens' is stored as bfloat16, not as float32"]),
        ({"dtype": "float16"}, ["'embed/tokens' is stored as bfloat16, not as float16"]),
        ({"family": "opt"}, ["family is 'opt', its config says 'llama'"]),
        ({"config": 3}, ["needs a text attribute 'config'"]),
        ({"config": "{"}, ["config is not JSON"]),
        ({"config": "[" * 10**5}, ["config is not JSON"]),
        ({"config": '{"model_type": "bloom"}'}, ["'bloom'"]),
        ({"generation_config": "[]"}, ["generation_config holds a JSON list"]),
    ],
)
def test_attributes_that_are_wrong_are_refused(model, attributes, words):
    with h5py.File(model, "r+") as file:
        file.attrs.update(attributes)
    refused(model, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, ["'embed/tokens' has shape [101, 32], it should be [101, 64]"]),
        ({"vocab_size": 10**9}, ["has shape [101, 32], it should be [1000000000, 32]"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers is 1000000000000: it must be at most 10000"]),
        ({"num_hidden_layers": 2}, ["holds 3 layers, its config says 2"]),
        ({"intermediate_size": 45}, ["'layers/0000/gate_up' has shape [88, 32], it should be [90, 32]"]),
    ],
)
def test_shapes_unlike_the_config_s_are_refused(model, changes, words):
    with h5py.File(model, "r+") as file:
        file.attrs["config"] = json.dumps(LLAMA | changes)
    refused(model, *words)


def test_missing_parts_are_refused(models, tmp_path):
    for name in ("embed", "layers", "layers/0002/qkv", "head/lm_head", "tokenizer"):
        model = shutil.copy(models["llama"], tmp_path / "model.h5")
        with h5py.File(model, "r+") as file:
            del file[name]
        refused(model, "has no", name)
    for name in ("format", "version", "config", "generation_config", "dtype", "family", "source"):
        model = shutil.copy(models["llama"], tmp_path / "model.h5")
        with h5py.File(model, "r+") as file:
            del file.attrs[name]
        refused(model, "not a checkpoint" if name == "format" else name)
    model = shutil.copy(models["llama"], tmp_path / "model.h5")
    with h5py.File(model, "r+") as file:
        del file["layers/0001"].attrs["xxh3_128"]
    refused(model, "'/layers/0001' needs a text attribute 'xxh3_128'")


def replace_dataset(model, name, create=None, kind=None, space=None, write=True):
    with h5py.File(model, "r+", libver="latest") as file:
        old = file[name]
        shape, values = old.shape, old[()]
        kind = kind or old.id.get_type()
        del file[name]
        group, _, leaf = name.rpartition("/")
        create = create or h5p.create(h5p.DATASET_CREATE)
        new = h5d.create(file[group].id, leaf.encode(), kind, space or h5s.create_simple(shape), create)
        if write:
            new.write(h5s.ALL, h5s.ALL, values.astype(np.float32))


def test_datasets_of_another_layout_are_refused(models, tmp_path):
    def attempt(*words, **how):
        model = shutil.copy(models["llama"], tmp_path / "model.h5")
        replace_dataset(model, "layers/0001/qkv", **how)
        refused(model, "'layers/0001/qkv'", *words)

    chunked = h5p.create(h5p.DATASET_CREATE)
    chunked.set_chunk((8, 8))
    attempt("is not stored as one contiguous piece", create=chunked)
    external = h5p.create(h5p.DATASET_CREATE)
    external.set_external(b"/etc/passwd", 0, h5py.h5f.UNLIMITED)
    attempt("is not stored as one contiguous piece", create=external, write=False)
    attempt("has no data: the file was never finished", write=False)
    attempt("not as bfloat16", kind=h5t.IEEE_F16LE)
    attempt("not where its block has it")
    virtual = h5py.VirtualLayout(shape=(64, 32), dtype="f4")
    virtual[:] = h5py.VirtualSource("gone.h5", "x", shape=(64, 32))
    model = shutil.copy(models["llama"], tmp_path / "model.h5")
    with h5py.File(model, "r+") as file:
        del file["layers/0001/qkv"]
        file["layers/0001"].create_virtual_dataset("qkv", virtual)
    refused(model, "'layers/0001/qkv' is stored as float32, not as bfloat16")
    with h5py.File(model, "r+") as file:
        del file["layers/0001/qkv"]
        file["layers/0001/qkv"] = h5py.SoftLink("/layers/0000/qkv")
    refused(model, "'layers/0001/qkv' is a SoftLink: links here are hard or to other files")


def test_tokenizer_files_are_bytes_of_a_known_name(model):
    with h5py.File(model, "r+") as file:
        file["tokenizer/../../etc"] = np.zeros(3, np.uint8)
        file["tokenizer"].create_dataset("unknown.exe", data=np.zeros(3, np.uint8))
    with open_checkpoint(model) as checkpoint:
        assert list(checkpoint.tokenizer) == ["tokenizer.json"]
    with h5py.File(model, "r+") as file:
        del file["tokenizer/tokenizer.json"]
        file["tokenizer/tokenizer.json"] = np.zeros((2, 2), np.uint8)
    refused(model, "'tokenizer/tokenizer.json' has shape [2, 2], it should be [bytes]")


# ---- random weights


@pytest.mark.parametrize("config", [LLAMA, OPT, LLAMA | {"tie_word_embeddings": True}], ids=["llama", "opt", "tied"])
@pytest.mark.parametrize("dtype", sorted(DTYPE_NBYTES))
def test_random_weights_are_the_same_every_time_and_differ_between_layers(config, dtype):
    one, other = random_checkpoint(config, dtype), random_checkpoint(config, dtype)
    assert next(iter(one.blocks)) == "embed" and one.header_hash == other.header_hash
    contents = {name: read(one, name) for name in one.blocks}
    assert all(read(other, name) == content for name, content in contents.items())
    assert len(set(contents.values())) == len(contents)
    if one.shape.tied:
        embed, head = one.blocks["embed"].parameters[0], one.blocks["head"].parameters[-1]
        tokens = contents["embed"][embed.offset : embed.offset + embed.nbytes]
        assert tokens == contents["head"][head.offset : head.offset + head.nbytes]


def test_random_weights_have_norms_of_one_and_the_config_s_width():
    wide = LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "initializer_range": 0.05}
    checkpoint = random_checkpoint(wide, "float32")
    content = read(checkpoint, "layers/0000")
    for p in checkpoint.blocks["layers/0000"].parameters:
        values = np.frombuffer(content, np.float32, p.nbytes // 4, p.offset).reshape(p.shape)
        if p.name.endswith("norm"):
            assert (values == 1).all()
        else:
            assert abs(values.std() - 0.05) < 0.001 and abs(values.mean()) < 0.001
            assert len(np.unique(values, axis=0)) == len(values)


def test_no_two_rows_of_a_large_random_matrix_are_equal():
    large = LLAMA | {"hidden_size": 1024, "vocab_size": 3000}
    checkpoint = random_checkpoint(large, "float32")
    content = read(checkpoint, "embed")
    values = np.frombuffer(content, np.float32, 3000 * 1024).reshape(3000, 1024)
    assert values.size > 2 * PERIOD and len(np.unique(values[:, :4], axis=0)) == 3000
    assert all(PERIOD % divisor for divisor in range(2, 1025))


def test_random_weights_of_an_unknown_model_are_refused():
    with pytest.raises(InputError, match="BloomForCausalLM"):
        random_checkpoint({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "float32")
    with pytest.raises(InputError, match="dtype is 'int8'; known"):
        random_checkpoint(LLAMA, "int8")
