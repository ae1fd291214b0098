"""Checkpoints and model directories made to do harm: exit code 2, one line, nothing executed, no memory on their word."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from hostile import number, patch
from noria.checkpoint.convert import convert
from tiny_models import LLAMA, state, write_directory

MAX_GROWN = 192 << 20  # bytes, stacks of reading threads among them; every file claims far more or is far smaller
CHILD = Path(__file__).parent / "hostile_child.py"


class Child:
    """A process that runs one command after another; a command that kills it is a failure that names the signal."""

    def __init__(self, folder):
        self._errors = open(folder / "child.err", "w+")  # noqa: SIM115 - closed in close
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "text": True}
        self._process = subprocess.Popen([sys.executable, CHILD], cwd=folder, env=environment, **pipes)

    def run(self, *argv):
        self._process.stdin.write(json.dumps(list(map(str, argv))) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"{argv}: the process ended with {self._process.wait(20)}"
        return json.loads(line)

    def close(self):
        self._process.stdin.close()
        self._process.wait(20)
        self._errors.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model.h5 (with two files of a tokenizer), the directory hf it was made of, and prompts."""
    folder = tmp_path_factory.mktemp("hostile")
    source = write_directory(folder / "hf", LLAMA, state(LLAMA))
    model = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    (source / "tokenizer.json").write_text(model.to_str())
    convert(source, folder / "model.h5")
    (folder / "prompts.jsonl").write_text('{"token_ids": [5, 6]}\n')
    return folder


@pytest.fixture(scope="module")
def child(folder):
    child = Child(folder)
    for _ in range(2):  # once, so that what every run needs is there before memory is measured
        child.run(
            "run",
            "--model",
            folder / "model.h5",
            "--prompts",
            folder / "prompts.jsonl",
            "--output",
            folder / "first.h5",
        )
        child.run("convert", folder / "hf", folder / "first-model.h5", "--overwrite")
    yield child
    child.close()


@pytest.fixture
def refuse(child, folder, tmp_path):
    """Runs a command that must be refused; the line that it says."""

    def refuse(*argv):
        before = sorted(path for path in tmp_path.rglob("*"))
        done = child.run(*argv)
        assert done["code"] == 2, done
        assert done["err"].startswith("noria: ") and done["err"].count("\n") == 1 and len(done["err"]) < 900, done
        assert done["used"] < MAX_GROWN, done
        assert done["asked"] < MAX_GROWN, done
        assert sorted(path for path in tmp_path.rglob("*")) == before
        assert not (folder / "evil-was-here").exists()
        return done["err"]

    return refuse


def run_command(folder, model, output):
    return ["run", "--model", model, "--prompts", folder / "prompts.jsonl", "--output", output, "--device", "cpu"]


# ---- the checkpoint


def beyond_the_end(path):
    """The offset of a dataset is beyond the file."""
    with h5py.File(path) as file:
        offset = file["layers/0001/qkv"].id.get_offset()
    patch(path, "layers/0001/qkv", number(offset), number(1 << 50))


def over_the_end(path):
    """The last page of a block is beyond the file."""
    with h5py.File(path) as file:
        offset = file["head/lm_head"].id.get_offset()
    patch(path, "head/lm_head", number(offset), number(path.stat().st_size // 4096 * 4096))


def overflowing(path):
    """Offset and size together are more than 64 bits."""
    with h5py.File(path) as file:
        offset = file["layers/0000/qkv"].id.get_offset()
    patch(path, "layers/0000/qkv", number(offset), number((1 << 63) + 4096))


def overlapping(path):
    """Two parameters at one place."""
    with h5py.File(path) as file:
        first, second = (file[f"layers/000{layer}/qkv"].id.get_offset() for layer in (0, 1))
    patch(path, "layers/0001/qkv", number(second), number(first))


def larger_than_its_extent(path):
    """A shape and a config of 2 * 10^9 rows in the place of 101."""
    set_config(path, vocab_size=2_000_000_000)
    for name in ("embed/tokens", "head/lm_head"):
        patch(path, name, number(101), number(2_000_000_000))


def of_a_shape_whose_size_overflows(path):
    set_config(path, vocab_size=2**31 - 1)
    for name in ("embed/tokens", "head/lm_head"):
        patch(path, name, number(101), number(1 << 60))


def a_tokenizer_beyond_the_end(path):
    patch(path, "tokenizer/tokenizer.json", number(tokenizer_nbytes(path)), number(1 << 29))


def a_tokenizer_of_terabytes(path):
    patch(path, "tokenizer/tokenizer.json", number(tokenizer_nbytes(path)), number(1 << 42))


def tokenizer_nbytes(path):
    with h5py.File(path) as file:
        return len(file["tokenizer/tokenizer.json"])


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def truncated_by_a_byte(path):
    content = path.read_bytes()
    os.truncate(path, len(content) - 16 - 40 - 1)  # behind what HDF5 reads lie one hole and the checksum's end
    assert content[-40:].startswith(b"NoriaSum")


def a_link_out_of_the_folder(path):
    with h5py.File(path, "r+") as file:
        del file["layers/0001"]
        file["layers/0001"] = h5py.ExternalLink("../../../../../../etc/passwd", "/x")


def a_link_to_a_device(path):
    with h5py.File(path, "r+") as file:
        del file["layers/0001"]
        file["layers/0001"] = h5py.ExternalLink("/dev/zero", "/x")


def files_in_a_circle(path):
    with h5py.File(path, "r+") as file:
        del file["layers/0001"]
        file["layers/0001"] = h5py.ExternalLink(path.name, "/layers/0001")


def groups_in_a_circle(path):
    with h5py.File(path, "r+") as file:
        del file["layers/0001"]
        file["layers/0001"] = file["layers"]


def soft_links_in_a_circle(path):
    with h5py.File(path, "r+") as file:
        del file["layers/0001"]
        file["layers/0001"] = h5py.SoftLink("/layers/0002")
        del file["layers/0002"]
        file["layers/0002"] = h5py.SoftLink("/layers/0001")


def a_tokenizer_link_in_a_circle(path):
    with h5py.File(path, "r+") as file:
        del file["tokenizer"]
        file["tokenizer"] = file["/"]
        file["/tokenizer.json"] = h5py.SoftLink("/tokenizer.json")


def data_in_another_file(path):
    with h5py.File(path, "r+") as file:
        del file["layers/0001/qkv"]
        file["layers/0001"].create_dataset("qkv", (64, 32), "f4", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def an_attribute_of_a_billion_rows(path):
    with h5py.File(path, "r+") as file:
        del file.attrs["version"]
        file.attrs.create("version", np.arange(77), dtype="i1")
    patch(path, "/", number(77), number(10**9))


def a_text_attribute_of_a_billion_rows(path):
    with h5py.File(path, "r+") as file:
        del file["layers/0001"].attrs["xxh3_128"]
        file["layers/0001"].attrs.create("xxh3_128", np.array([b"a"] * 77))
    patch(path, "layers/0001", number(77), number(10**9))


def an_attribute_of_many_rows(path):
    """400 MB, all there: stored apart from the header, as HDF5 stores large attributes."""
    with h5py.File(path, "r+", libver=("v108", "v108")) as file:
        del file.attrs["version"]
        file.attrs.create("version", np.zeros(100_000_000, "f4"))


def a_text_of_terabytes(path):
    """The length that a variable-length string says it has."""
    with h5py.File(path, "r+") as file:
        length = len(file.attrs["config"].encode())
    patch(path, "/", struct.pack("<I", length), struct.pack("<I", 2**32 - 2))


def a_string_type_of_gigabytes(path):
    with h5py.File(path, "r+") as file:
        del file["layers/0001"].attrs["xxh3_128"]
        file["layers/0001"].attrs.create("xxh3_128", np.bytes_("a" * 77))
    patch(path, "layers/0001", struct.pack("<I", 77), struct.pack("<I", 2**31 - 1))


def set_config(path, **changes):
    with h5py.File(path, "r+") as file:
        file.attrs["config"] = json.dumps(LLAMA | changes)


CHECKPOINTS = {
    beyond_the_end: "layers/0001/qkv",
    over_the_end: "head/lm_head",
    overflowing: "layers/0000/qkv",
    overlapping: "not where its block has it",
    larger_than_its_extent: "embed/tokens",
    of_a_shape_whose_size_overflows: "embed/tokens",
    a_tokenizer_beyond_the_end: "tokenizer/tokenizer.json",
    a_tokenizer_of_terabytes: "tokenizer/tokenizer.json",
    truncated: "is truncated: it has",
    truncated_by_a_byte: "is truncated: it has",
    a_link_out_of_the_folder: "a checkpoint's files must be in one folder",
    a_link_to_a_device: "a checkpoint's files must be in one folder",
    files_in_a_circle: "goes through more than 4 links",
    groups_in_a_circle: "has no 'layers/0001/attention_norm'",
    soft_links_in_a_circle: "is a SoftLink",
    a_tokenizer_link_in_a_circle: "is a SoftLink",
    data_in_another_file: "is not stored as one contiguous piece",
    an_attribute_of_a_billion_rows: "",
    a_text_attribute_of_a_billion_rows: "",
    an_attribute_of_many_rows: "the attributes of '/' take 4000",
    a_text_of_terabytes: "",
    a_string_type_of_gigabytes: "",
}


@pytest.mark.slow
@pytest.mark.parametrize("harm", CHECKPOINTS, ids=lambda harm: harm.__name__)
def test_a_hostile_checkpoint_is_refused(folder, tmp_path, refuse, harm):
    model = shutil.copy(folder / "model.h5", tmp_path / "model.h5")
    harm(model)
    assert model.stat().st_size < 1 << 20 or harm is an_attribute_of_many_rows
    for argv in (run_command(folder, model, tmp_path / "out.h5"), ["inspect", model]):
        line = refuse(*argv)
        assert str(model) in line and CHECKPOINTS[harm] in line, line


def test_a_flipped_bit_of_any_block_is_found_before_it_is_used(folder, tmp_path, refuse, child):
    with h5py.File(folder / "model.h5") as file:
        offsets = {name: file[name].id.get_offset() for name in ("embed/tokens", "layers/0002/down", "head/norm")}
    for name, offset in offsets.items():
        content = bytearray((folder / "model.h5").read_bytes())
        content[offset + 5] ^= 4
        (tmp_path / "model.h5").write_bytes(content)
        block = name.rpartition("/")[0]
        done = child.run(*run_command(folder, tmp_path / "model.h5", tmp_path / "out.h5"))
        assert done["code"] == 2 and done["asked"] < MAX_GROWN, done
        said = done["err"].splitlines()[-1]  # the plan was said before
        assert said.startswith("noria: ") and f"block '{block}' is damaged: its checksum is" in said
        assert f"1 of 5 blocks damaged: {block}" in refuse("inspect", tmp_path / "model.h5", "--verify")


# ---- the model directory


SIZES = [-1, 0, 2.5, "4", None, [4], {}, True, 10**9, 2**31, 2**63, 10**30, 10**4000, float("nan"), float("inf"), 1e308]


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"]
)
def test_absurd_sizes_are_refused_by_name(folder, tmp_path, refuse, key):
    for size in SIZES:
        source = shutil.copytree(folder / "hf", tmp_path / "hf", dirs_exist_ok=True)
        (source / "config.json").write_text(json.dumps(LLAMA | {key: size}))
        line = refuse("convert", source, tmp_path / "made.h5")
        assert "config.json" in line, line
        if size != 10**9 or key == "num_hidden_layers":
            model = shutil.copy(folder / "model.h5", tmp_path / "model.h5")
            set_config(model, **{key: size})
            assert str(model) in refuse("inspect", model)
            model.unlink()
        prompts = ["--prompts", folder / "prompts.jsonl", "--output", tmp_path / "out.h5"]
        refuse("run", "--random-weights", source / "config.json", *prompts, "--device", "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "x" * 10**6},
        {"architectures": ["x" * 1000] * 1000},
        {"model_type": {"llama": 1}},
        {"hidden_act": "x" * 10**6},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"type": "linear", "factor": float("nan")}},
        {"rope_scaling": {"type": ["x" * 10**6]}},
        {"rope_theta": -1},
        {"rms_norm_eps": "1e400"},
        {"max_position_embeddings": 10**12},
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 10**9},
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": ["x" * 10**6]},
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": 7},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_inner": 10**18},
        {"model_type": "opt", "architectures": ["OPTForCausalLM"], "ffn_dim": 3, "activation_function": {}},
    ],
)
def test_a_config_of_nonsense_is_refused_in_one_short_line(folder, tmp_path, refuse, changes):
    source = shutil.copytree(folder / "hf", tmp_path / "hf")
    (source / "config.json").write_text(json.dumps(LLAMA | changes))
    assert "config.json" in refuse("convert", source, tmp_path / "made.h5")
    model = shutil.copy(folder / "model.h5", tmp_path / "model.h5")
    with h5py.File(model, "r+", libver=("v108", "v108")) as file:
        file.attrs["config"] = json.dumps(LLAMA | changes)
    assert "config.json" in refuse("inspect", model)


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "evil-was-here"),)


def torch_directory(folder, tmp_path):
    source = shutil.copytree(folder / "hf", tmp_path / "hf")
    (source / "model.safetensors").unlink()
    return source, source / "pytorch_model.bin"


def test_a_pickle_with_code_runs_nothing(folder, tmp_path, refuse):
    source, file = torch_directory(folder, tmp_path)
    for content in (Evil(folder), {"model.norm.weight": Evil(folder)}):
        for new in (True, False):
            torch.save(content, file, _use_new_zipfile_serialization=new)
            assert "pytorch_model.bin is not a file of plain tensors" in refuse("convert", source, tmp_path / "made.h5")
        file.write_bytes(pickle.dumps(content))
        assert "pytorch_model.bin" in refuse("convert", source, tmp_path / "made.h5")


@pytest.mark.slow
def test_an_archive_that_grows_when_it_is_opened_is_refused(folder, tmp_path, refuse):
    source, file = torch_directory(folder, tmp_path)
    torch.save(state(LLAMA), file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in old.infolist():
            content = old.read(entry)
            bomb.writestr(
                entry.filename, content + bytes(600 << 20) if entry.filename.endswith("data.pkl") else content
            )
    (tmp_path / "bomb").rename(file)
    assert file.stat().st_size < 2 << 20
    assert "pytorch_model.bin" in refuse("convert", source, tmp_path / "made.h5")


def test_tensors_without_their_numbers_are_refused(folder, tmp_path, refuse):
    source, file = torch_directory(folder, tmp_path)
    name = "model.norm.weight"
    for tensor in (torch.empty(32, device="meta"), torch.ones(1).expand(10**12), torch.ones(32).to_sparse()):
        torch.save(state(LLAMA) | {name: tensor}, file)
        assert "pytorch_model.bin" in refuse("convert", source, tmp_path / "made.h5")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "x" * 5000, "\0"])
def test_an_index_that_names_files_elsewhere_is_refused(folder, tmp_path, refuse, shard):
    source = shutil.copytree(folder / "hf", tmp_path / "hf")
    (source / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    assert "hf" in refuse("convert", source, tmp_path / "made.h5")


def test_safetensors_that_claim_more_than_they_have_are_refused(folder, tmp_path, refuse):
    source = shutil.copytree(folder / "hf", tmp_path / "hf")
    for header in (
        {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [1] * 10**5 + [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"a" * 10**6: {"dtype": "F32", "shape": "x" * 10**6, "data_offsets": [0, 4]}},
    ):
        text = json.dumps(header).encode()
        (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
        assert "model.safetensors" in refuse("convert", source, tmp_path / "made.h5")
    (source / "model.safetensors").write_bytes(struct.pack("<Q", 90_000_000) + bytes(64))
    assert "is truncated" in refuse("convert", source, tmp_path / "made.h5")


# ---- fuzz


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_any_changed_header_is_read_or_refused_in_one_line(folder, tmp_path, seed):
    worker = Path(__file__).parent / "fuzz_worker.py"
    command = [sys.executable, worker, folder / "model.h5", tmp_path, str(seed), "300"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    last = (tmp_path / "last").read_text() if (tmp_path / "last").exists() else "nothing"
    assert done.returncode == 0, f"exit code {done.returncode} after {last}\n{done.stdout}\n{done.stderr[-3000:]}"
    counts = json.loads(done.stdout.strip().replace("'", '"'))
    assert counts["refused"] > 100
