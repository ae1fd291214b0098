"""noria convert: against the safetensors' own values, and every refusal by its message."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import families
import tiny_models
from decoders import GPT_NEOX
from forks import forked
from noria.__main__ import main
from noria.checkpoint import convert as convert_module
from noria.checkpoint import tensor_files
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.desk.examination import doubts
from noria.errors import InputError
from tiny_models import LLAMA, OPT, fused, state, write_directory

torch.set_num_threads(1)
TIED_LLAMA = LLAMA | {"tie_word_embeddings": True}
UNTIED_OPT = OPT | {"tie_word_embeddings": False}
TIED = {
    name: config | {"tie_word_embeddings": True}
    for name, config in families.CONFIGS.items()
    if name in (config["model_type"], "opt with the norm after (350m)")
}


def block_values(checkpoint, name):
    """A block's parameters by dataset path, read through read_block."""
    block, dtype = checkpoint.blocks[name], getattr(torch, checkpoint.dtype)
    buffer = torch.empty(block.nbytes, dtype=torch.uint8)
    checkpoint.read_block(name, buffer.numpy())
    return {
        f"{name}/{p.name}": buffer[p.offset : p.offset + p.nbytes].view(dtype).view(p.shape) for p in block.parameters
    }


def assert_holds(path, expected):
    with open_checkpoint(path) as checkpoint:
        found = {}
        for name in checkpoint.blocks:
            found |= block_values(checkpoint, name)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize(
    "config", [LLAMA, TIED_LLAMA, OPT, UNTIED_OPT], ids=["llama", "llama-tied", "opt", "opt-untied"]
)
@pytest.mark.parametrize(
    ("num_shards", "torch_files"), [(1, False), (3, False), (1, True), (3, True)], ids=["one", "sharded", "bin", "bins"]
)
def test_every_value_is_the_source_s(tmp_path, config, num_shards, torch_files):
    tensors = state(config, torch.bfloat16)
    source = write_directory(tmp_path / "hf", config, tensors, num_shards, torch_files)
    made = convert(source, tmp_path / "model.h5")
    assert made.dtype == "bfloat16"
    assert_holds(tmp_path / "model.h5", fused(config, tensors))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_another_dtype_is_torch_s_own_cast(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK_NBYTES", 1000)  # every tensor in many pieces
    tensors = state(LLAMA, torch.float32)
    convert(write_directory(tmp_path / "hf", LLAMA, tensors), tmp_path / "model.h5", dtype)
    assert_holds(
        tmp_path / "model.h5", {name: v.to(getattr(torch, dtype)) for name, v in fused(LLAMA, tensors).items()}
    )


def test_a_bare_model_without_its_prefix_converts(tmp_path):
    tensors = state(OPT)
    source = write_directory(tmp_path / "hf", OPT, {name.removeprefix("model."): v for name, v in tensors.items()})
    convert(source, tmp_path / "model.h5")
    assert_holds(tmp_path / "model.h5", fused(OPT, tensors))


def test_texts_and_tokenizer_travel_unchanged(tmp_path):
    source = write_directory(tmp_path / "hf", LLAMA, state(LLAMA))
    long = json.dumps(LLAMA | {"id2label": {str(i): "é" * 40 for i in range(5000)}}, ensure_ascii=False)
    (source / "config.json").write_text(long)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    files = {"tokenizer.json": b'{"a": "\xff\x00"}', "tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ x }}"}
    for name, content in files.items():
        (source / name).write_bytes(content)
    (source / "vocab.json").write_bytes(b"{}")
    convert(source, tmp_path / "model.h5")
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        assert checkpoint.tokenizer == files
        assert checkpoint.config == json.loads(long)
        assert checkpoint.generation_config == {"eos_token_id": [2, 7]}
    with h5py.File(tmp_path / "model.h5") as file:
        assert file.attrs["config"] == long
        assert file["tokenizer/tokenizer.json"][()].tobytes() == files["tokenizer.json"]


def test_vocabulary_and_merges_are_kept_where_there_is_no_tokenizer_json(tmp_path):
    source = write_directory(tmp_path / "hf", OPT, state(OPT))
    (source / "vocab.json").write_bytes(b"{}")
    (source / "merges.txt").write_bytes(b"")
    made = convert(source, tmp_path / "model.h5")
    assert not made.notes, "these two are a tokenizer"
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        assert checkpoint.tokenizer == {"vocab.json": b"{}", "merges.txt": b""}


def test_the_dtype_that_most_numbers_have_is_the_source_s(tmp_path):
    tensors = state(LLAMA, torch.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    made = convert(write_directory(tmp_path / "hf", LLAMA, tensors), tmp_path / "model.h5")
    assert made.dtype == "bfloat16"
    assert made.notes[0] == "most tensors are bfloat16; cast to it: 1 of float32"


def test_tensors_left_over_are_named_once_and_known_ones_not_at_all(tmp_path):
    tensors = state(TIED_LLAMA) | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": state(TIED_LLAMA)["model.embed_tokens.weight"],
        "vision.tower": torch.ones(3),
    }
    made = convert(write_directory(tmp_path / "hf", TIED_LLAMA, tensors), tmp_path / "model.h5")
    assert [note for note in made.notes if "left out" in note] == [
        "1 tensor left out, which llama does not use: 'vision.tower'"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.1.self_attn.k_scale",
        "model.layers.2.mlp.up_proj.lora_A.weight",
        "base_model.model.lora_embedding_A",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.self_attn.q_norm.weight",
        "model.layers.2.mlp.down_proj.input_quantizer._amax",
        "model.norm.bias",
        "lm_head.bias",
        "model.embed_tokens.weight_absmax",
    ],
)
def test_a_tensor_left_over_that_changes_every_number_is_refused(tmp_path, name):
    source = directory(tmp_path, **{name: torch.ones(3)})
    refused(
        source, tmp_path, f"model.safetensors: {name!r}: llama as config.json", "leave out 1 tensor of", "unquantized"
    )


def test_what_old_checkpoints_carry_and_layers_that_are_not_computed_are_no_reason_to_refuse(tmp_path):
    more = {f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(4) for name in ("cos_cached", "sin_cached")}
    made = convert(
        directory(tmp_path, **more, **{"model.layers.30.mlp.up_proj.bias": torch.ones(4)}), tmp_path / "m.h5"
    )
    assert [note for note in made.notes if "left out" in note] == [
        "1 tensor left out, which llama does not use: 'model.layers.30.mlp.up_proj.bias'"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "model.audio_tower.layers.0.self_attn.per_dim_scale",
        "model.vision_tower.std_scale",
        "mtp.layers.0.mlp.down_proj.weight_scale",
    ],
)
def test_scales_of_what_is_not_computed_are_left_out_with_a_line(tmp_path, name):
    made = convert(directory(tmp_path, **{name: torch.ones(3)}), tmp_path / "m.h5")
    assert [note for note in made.notes if "left out" in note] == [
        f"1 tensor left out, which llama does not use: {name!r}"
    ]


@pytest.mark.parametrize("name", ["model.embed_scale", "logit_scale"])
def test_a_scale_beside_what_is_computed_is_refused(tmp_path, name):
    refused(directory(tmp_path, **{name: torch.ones(1)}), tmp_path, f"{name!r}: llama as config.json", "leave out 1")


def test_a_head_of_a_tied_model_is_its_embedding_under_each_of_its_names(tmp_path):
    families.save(GPT_NEOX | {"tie_word_embeddings": True}, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    embedding = next(tensors[name] for name in tensors if name.endswith("embed_in.weight"))
    save_file(tensors | {"embed_out.weight": embedding.clone()}, file, {"format": "pt"})
    assert not [note for note in convert(tmp_path / "hf", tmp_path / "m.h5").notes if "left out" in note]
    save_file(tensors | {"lm_head.weight": embedding.clone(), "embed_out.weight": embedding + 1}, file)
    with pytest.raises(InputError, match="'embed_out.weight' differs from 'gpt_neox.embed_in.weight'"):
        convert(tmp_path / "hf", tmp_path / "other.h5")


def test_a_bias_of_the_head_of_a_tied_model_is_refused(tmp_path):
    source = write_directory(tmp_path / "hf", TIED_LLAMA, state(TIED_LLAMA) | {"lm_head.bias": torch.ones(97)})
    refused(source, tmp_path, "'lm_head.bias': llama as config.json", "leave out 1 tensor of", "unquantized")


def test_the_mask_that_gpt2_saved_is_left_out_without_a_word(tmp_path):
    families.save(families.GPT2, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert not [note for note in convert(tmp_path / "hf", tmp_path / "m.h5").notes if "left out" in note]


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_that_holds_its_head_alone_is_what_transformers_makes_of_it(tmp_path, name):
    families.save(TIED[name], tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    embedding = next(key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors.pop(embedding)
    save_file(tensors, file, {"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").get_input_embeddings().weight
    assert torch.equal(expected, tensors["lm_head.weight"])
    convert(tmp_path / "hf", tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5") as made:
        for place in ("embed/tokens", "head/lm_head"):
            assert np.array_equal(made[place][()], expected.detach().numpy())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, 524])
def test_a_file_system_without_locks_converts_and_says_so(tmp_path, monkeypatch, code):
    def no_locks(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    made = convert(directory(tmp_path), tmp_path / "model.h5")
    assert "has no file locks" in made.notes[0]
    open_checkpoint(tmp_path / "model.h5").close()


def test_hdf5_takes_no_lock_of_its_own(tmp_path, monkeypatch):
    opened, open_file = [], h5py.File

    def watched(name, mode, **how):
        file = open_file(name, mode, **how)
        with open(how["fileobj"].path if "fileobj" in how else name) as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where somebody else has it
        opened.append(mode)
        return file

    monkeypatch.setattr(h5py, "File", watched)
    convert(directory(tmp_path), tmp_path / "model.h5")
    assert "w" in opened and "r+" in opened


def test_a_tied_head_that_is_another_matrix_is_refused(tmp_path):
    tensors = state(TIED_LLAMA) | {"lm_head.weight": torch.ones(101, 32)}
    source = write_directory(tmp_path / "hf", TIED_LLAMA, tensors)
    with pytest.raises(InputError, match="'lm_head.weight' differs from .* set that to false to keep the head"):
        convert(source, tmp_path / "model.h5")
    assert not (tmp_path / "model.h5").exists()


def test_progress_ends_at_the_whole(tmp_path):
    calls = []
    convert(
        write_directory(tmp_path / "hf", OPT, state(OPT)),
        tmp_path / "model.h5",
        progress=lambda *call: calls.append(call),
    )
    done = [call[1] for call in calls]
    assert done == sorted(done) and {call[0] for call in calls} == {"embed", "layers/0000", "layers/0001", "head"}
    assert done[-1] == sum(v.nbytes for name, v in fused(OPT, state(OPT)).items() if name != "embed/tokens")


MEASURE = """
import sys, torch
from noria.checkpoint.convert import convert
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
convert(sys.argv[1], sys.argv[2] + ".small")
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
convert(sys.argv[3], sys.argv[2], "float32")
print(status("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_stays_far_below_the_model_s_size(tmp_path):
    config = LLAMA | {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 20000, "num_hidden_layers": 8}
    shapes = tiny_models._llama_shapes(config) | {"lm_head.weight": (20000, 1024)}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size > 200e6
    small = write_directory(tmp_path / "small", LLAMA, state(LLAMA, torch.bfloat16))
    large = write_directory(tmp_path / "large", config, tensors, num_shards=2)
    command = [sys.executable, "-c", MEASURE, small, tmp_path / "model.h5", large]
    grown = int(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    assert grown < 60e6, f"grew by {grown / 1e6:.0f} MB for {size / 1e6:.0f} MB in bfloat16"


def test_never_are_two_torch_files_open(tmp_path, monkeypatch):
    source = write_directory(tmp_path / "hf", LLAMA, state(LLAMA), num_shards=3, torch_files=True)
    load, mapped = tensor_files._load, []

    def counting(path):
        with open("/proc/self/maps") as maps:
            mapped.append(sum(".bin" in line for line in maps))
        return load(path)

    monkeypatch.setattr(tensor_files, "_load", counting)
    convert(source, tmp_path / "model.h5")
    assert len(mapped) > 6 and set(mapped) == {0}


# ---- refusals


def refused(source, tmp_path, *words, **how):
    """Converting raises InputError with these words in one line, and leaves no file behind."""
    target = how.pop("target", tmp_path / "model.h5")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        convert(source, target, **how)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert sorted(tmp_path.iterdir()) == before


def directory(tmp_path, config=LLAMA, num_shards=1, torch_files=False, **replaced):
    tensors = {name: tensor for name, tensor in (state(config) | replaced).items() if tensor is not None}
    return write_directory(tmp_path / "hf", config, tensors, num_shards, torch_files)


def test_a_source_that_is_none_is_refused(tmp_path):
    refused(tmp_path / "none", tmp_path, "none does not exist")
    refused("owner/model", tmp_path, "owner/model does not exist", "hf download")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", tmp_path, "is a file: give the Hugging Face directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "empty has no config.json")


def test_a_directory_without_weights_is_refused(tmp_path):
    source = directory(tmp_path)
    (source / "model.safetensors").rename(source / "adapter_model.safetensors")
    refused(source, tmp_path, "hf has no weights", "model.safetensors.index.json", "pytorch_model.bin")


FOREIGN = {
    "adapter_config.json": ["an adapter of peft", "noria convert HF_DIR MODEL.h5 --lora ADAPTER_DIR"],
    "model.Q4_K_M.gguf": ["GGUF, llama.cpp's format"],
    "consolidated.00.pth": ["format of their makers' own programs", "take the model in Hugging Face's format"],
    "consolidated.safetensors": ["format of their makers' own programs"],
    "weights.00.npz": ["MLX's format"],
    "tf_model.h5": ["TensorFlow's weights"],
    "flax_model.msgpack": ["Flax's weights"],
    "model.onnx": ["ONNX"],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_in_another_format_is_refused_by_its_name_with_what_to_do(tmp_path, name):
    source = directory(tmp_path)
    (source / "model.safetensors").rename(source / name)
    refused(source, tmp_path, "hf has no weights", f"; {name} is ", *FOREIGN[name])
    (source / "config.json").unlink()
    refused(source, tmp_path, "hf has no config.json", f"; {name} is ", *FOREIGN[name])
    refused(source / name, tmp_path, f"{name} is a file", *FOREIGN[name])


def test_files_of_other_formats_beside_a_whole_model_are_no_reason_to_refuse_but_an_adapter_is(tmp_path):
    source = directory(tmp_path)
    for name in ("consolidated.00.pth", "model.gguf", "adapter_config.json"):
        (source / name).write_bytes(b"{}")
    convert(source, tmp_path / "model.h5")
    (source / "adapter_model.safetensors").write_bytes(b"{}")
    refused(source, tmp_path, "hf holds an adapter beside the model", "--lora", target=tmp_path / "other.h5")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            json.dumps(LLAMA | {"quantization": {"group_size": 64, "bits": 4}}),
            ["quantization", "'MLX' (MLX's format)", "unquantized"],
        ),
        (
            json.dumps(LLAMA | {key: {"group_size": 64, "bits": 4} for key in ("quantization", "quantization_config")}),
            ["quantization", "'MLX' (MLX's format)", "unquantized"],
        ),
        (
            json.dumps(LLAMA | {"compression_config": {"format": "dense"}}),
            ["compression_config", "config_groups is None"],
        ),
        ("{", ["config.json is not JSON"]),
        ("[1]", ["config.json holds a JSON list"]),
        ("[" * 100000, ["config.json is not JSON"]),
        ('{"model_type": "bloom", "architectures": ["BloomForCausalLM"]}', ["BloomForCausalLM", "known:", "llama"]),
        (json.dumps(LLAMA | {"hidden_size": "32"}), ["hidden_size", "'32'"]),
        (json.dumps(LLAMA | {"architectures": 3}), ["config.json", "hf", "architectures is 3: it must be a list"]),
        (json.dumps(LLAMA | {"quantization_config": {"quant_method": "gptq"}}), ["bits is None", "GPTQ"]),
        (
            json.dumps(LLAMA | {"num_hidden_layers": 9999}),
            ["lacks 'model.layers.3.", "and more", "layers/0003 of llama"],
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path, text, words):
    source = directory(tmp_path)
    (source / "config.json").write_text(text)
    refused(source, tmp_path, *words)


def test_a_missing_tensor_is_named(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    refused(directory(tmp_path, **{name: None}), tmp_path, f"lacks {name!r}", "layers/0001 of llama needs 1 tensors")


@pytest.mark.parametrize(
    ("ending", "instead"),
    [("q_proj.weight", "q_proj.qweight"), ("q_proj.weight", "q_proj.base_layer.weight")],
)
def test_a_missing_tensor_that_has_another_form_is_named_with_that_form(tmp_path, ending, instead):
    prefix = "model.layers.1.self_attn."
    source = directory(tmp_path, **{prefix + ending: None, prefix + instead: torch.ones(3)})
    refused(source, tmp_path, f"lacks '{prefix}{ending}'", f"they hold '{prefix}{instead}'", "save_pretrained()")


def test_a_model_saved_inside_a_wrapper_is_refused_with_the_wrapper_s_names(tmp_path):
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in state(LLAMA).items()}
    source = write_directory(tmp_path / "hf", LLAMA, wrapped)
    refused(source, tmp_path, "they hold 'base_model.model.model.embed_tokens.weight'", "adapters merged")


def test_a_wrong_shape_is_refused_with_both_shapes(tmp_path):
    source = directory(tmp_path, **{"model.layers.2.self_attn.k_proj.weight": torch.ones(8, 32)})
    refused(source, tmp_path, "'model.layers.2.self_attn.k_proj.weight' [8, 32]", "layers/0002/qkv [64, 32]")


def test_an_expert_of_a_wrong_shape_is_named_before_all_others(tmp_path):
    source, name = tmp_path / "hf", "model.layers.1.mlp.experts.3.down_proj.weight"
    families.save(families.QWEN3_MOE, source)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {name: tensors[name].T.contiguous()}, source / "model.safetensors")
    refused(source, tmp_path, f"model.safetensors: {name!r} [12, 32] cannot make layers/0001/experts [8, 36, 32]")


def test_quantized_numbers_are_refused(tmp_path):
    source = directory(tmp_path, **{"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})
    refused(source, tmp_path, "'model.norm.weight' is 'float8_e4m3fn'", "bfloat16")


def test_numbers_beyond_the_dtype_are_refused(tmp_path):
    source = directory(tmp_path, **{"model.norm.weight": torch.full((32,), 7e4)})
    refused(
        source,
        tmp_path,
        "'model.norm.weight' holds 7e+04, float16 ends at 6.55e+04",
        "--dtype bfloat16",
        dtype="float16",
    )


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b"])
def test_a_weight_map_that_leaves_the_directory_is_refused(tmp_path, shard):
    source = directory(tmp_path)
    (source / "model.safetensors").rename(tmp_path / "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refused(source, tmp_path, f"the file name {shard!r} leaves the directory")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, ["has no weight_map"]),
        ({"weight_map": {"a": 1}}, ["has no weight_map"]),
        ({"weight_map": {"a": "gone.safetensors"}}, ["'gone.safetensors', which is missing"]),
        ({"weight_map": {"a": "config.json"}}, ["'config.json', it should be a .safetensors file"]),
        ({"weight_map": {"a": "weights.safetensors"}}, ["says that 'weights.safetensors' holds 'a', but it does not"]),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, index, words):
    source = directory(tmp_path)
    (source / "model.safetensors").rename(source / "weights.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path, *words)


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    source = directory(tmp_path)
    (source / "model.safetensors").rename(tmp_path / "elsewhere")
    (source / "model.safetensors").symlink_to("../elsewhere")
    refused(
        source, tmp_path, "model.safetensors is a link to", "elsewhere, outside", "copy the file into the directory"
    )
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("nothing")
    refused(source, tmp_path, "is a link to nothing: download it again")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("model.safetensors")
    refused(source, tmp_path, "model.safetensors is a link to nothing: download it again")


def test_a_download_cache_is_read_through_its_links_and_no_further(tmp_path):
    cache = tmp_path / "models--owner--tiny"
    source = write_directory(cache / "snapshots" / "abc123", LLAMA, state(LLAMA))
    (cache / "blobs").mkdir()
    for file in list(source.iterdir()):
        file.rename(cache / "blobs" / f"hash-{file.name}")
        file.symlink_to(f"../../blobs/hash-{file.name}")
    convert(source, tmp_path / "model.h5")
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        assert checkpoint.source == "owner/tiny@abc123"
    (tmp_path / "other").write_text("{}")
    (source / "generation_config.json").symlink_to(tmp_path / "other")
    refused(source, tmp_path, "generation_config.json is a link to", "outside", target=tmp_path / "another.h5")
    refused(cache, tmp_path, "no config.json", f"did you mean {source}?", target=tmp_path / "another.h5")


def test_damaged_safetensors_are_refused(tmp_path):
    source = directory(tmp_path)
    file = source / "model.safetensors"
    whole = file.read_bytes()

    def with_header(header):
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + bytes(64)

    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    for content, words in [
        (whole[:-1], ["is truncated: its tensors end at byte", "download it again"]),
        (whole[:50], ["is truncated: its header ends at byte"]),
        (b"", ["is not a safetensors file: its 0 bytes"]),
        (b"\xff" * 99, ["is not a safetensors file"]),
        (b"version https://git-lfs.github.com/spec/v1", ["Git LFS pointer", "git lfs pull"]),
        (with_header([]), ["header is damaged"]),
        (with_header({"a": {}}), ["header is damaged"]),
        (with_header({"a": tensor | {"shape": [10**18]}}), ["header is damaged", "does not take the bytes"]),
        (with_header({"a": tensor | {"data_offsets": [-16, 0]}}), ["header is damaged"]),
        (with_header({"a": tensor | {"shape": [-4], "data_offsets": [16, 0]}}), ["header is damaged"]),
        (with_header({"a": tensor | {"data_offsets": [2**70, 2**70 + 16]}}), ["is truncated"]),
        (with_header({"a": tensor, "b": tensor | {"data_offsets": [12, 28]}}), ["header is damaged", "b begins in a"]),
        (with_header({"b": tensor, "a": tensor}), ["header is damaged", "b begins in a"]),
    ]:
        file.write_bytes(content)
        refused(source, tmp_path, "model.safetensors", *words)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_torch_files_run_no_code_and_hold_tensors_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = directory(tmp_path, torch_files=True)
    file = source / "pytorch_model.bin"
    for content in (Evil(), {"a": Evil()}, {"a": 3}, [torch.ones(3)], {"a": torch.ones(1).expand(10**12)}):
        torch.save(content, file)
        refused(source, tmp_path, "pytorch_model.bin", "tensor")
    file.write_bytes(b"no zip")
    refused(source, tmp_path, "pytorch_model.bin is not a file of plain tensors, or is damaged")
    assert not (tmp_path / "evil-was-here").exists()


def test_torch_files_of_the_old_format_convert(tmp_path):
    tensors = state(OPT)
    source = write_directory(tmp_path / "hf", OPT, tensors, torch_files=True)
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(source, tmp_path / "model.h5")
    assert_holds(tmp_path / "model.h5", fused(OPT, tensors))


def test_an_existing_target_is_kept_unless_told_otherwise(tmp_path):
    source, target = directory(tmp_path), tmp_path / "model.h5"
    target.write_text("mine")
    refused(source, tmp_path, "model.h5 exists (4 bytes): use --overwrite")
    assert target.read_text() == "mine"
    refused(source, tmp_path, "hf is a directory: give the file to make", target=source)
    refused(source, tmp_path, "there is no folder", target=tmp_path / "no" / "model.h5")
    convert(source, target, overwrite=True)
    assert_holds(target, fused(LLAMA, state(LLAMA)))


def test_a_failure_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    source, target = directory(tmp_path), tmp_path / "model.h5"
    target.write_text("mine")
    monkeypatch.setattr(tensor_files.Reader, "chunks", lambda *_: (torch.ones(1 // number) for number in (1, 0)))
    with pytest.raises(ZeroDivisionError):
        convert(source, target, overwrite=True)
    assert target.read_text() == "mine" and sorted(tmp_path.iterdir()) == [source, target]


def test_a_full_disk_is_refused_with_the_numbers(tmp_path, monkeypatch):
    source = directory(tmp_path)
    statvfs = os.statvfs_result((4096, 4096, 9, 9, 9, 9, 9, 9, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: statvfs)
    refused(source, tmp_path, " bytes, 36,864 are free in ", "narrower --dtype")


def test_the_space_asked_for_covers_the_file(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(convert_module, "_check_space", lambda target, nbytes: asked.append(nbytes))
    for number, config in enumerate((LLAMA, OPT)):
        target = tmp_path / f"{number}.h5"
        made = convert(write_directory(tmp_path / str(number), config, state(config)), target)
        assert target.stat().st_size == made.nbytes <= asked[-1]


def test_the_command_converts_and_exits_with_0_or_2(tmp_path, capsys):
    source, target = str(directory(tmp_path)), str(tmp_path / "model.h5")
    assert main(["convert", source, target, "--dtype", "bfloat16"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{target}: llama, 3 layers, bfloat16,") and "no tokenizer.json" in err
    assert main(["convert", source, target]) == 2
    assert "use --overwrite" in capsys.readouterr().err
    assert main(["convert", source, target, "--overwrite"]) == 0


def test_the_command_tells_of_texts_that_cannot_be_used(tmp_path, capsys):
    source = directory(tmp_path)
    (source / "chat_template.jinja").write_text("{% for")
    (source / "generation_config.json").write_text('{"eos_token_id": 5000}')
    assert main(["convert", str(source), str(tmp_path / "model.h5")]) == 0
    said = capsys.readouterr().err
    assert "noria: end token 5000 is not in the model's vocabulary of 101: no row can end with it" in said
    assert "noria: the model's chat template cannot be used: " in said


@pytest.mark.parametrize(
    ("size", "vocab_size", "doubted"),
    [(2048, 101, True), (2048, 2048, False), (2048, 2112, False), (2048, 32000, True), (0, 32000, False)],
)
def test_a_tokenizer_of_far_fewer_ids_or_of_more_than_the_model_has_is_told(size, vocab_size, doubted):
    tokenizer, chat = SimpleNamespace(vocab_size=size, end_token_ids=(1,)), SimpleNamespace(error="")
    said = [f"the tokenizer has {size:,} ids, the model's vocabulary {vocab_size:,}: "] * doubted
    found = doubts(tokenizer, chat, vocab_size)
    assert len(found) == len(said) and all(line.startswith(words) for line, words in zip(found, said, strict=True))


def test_hdf5_alone_reads_true_values_of_each_dtype(tmp_path):
    values = fused(LLAMA, state(LLAMA))
    source = write_directory(tmp_path / "hf", LLAMA, state(LLAMA))
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        convert(source, tmp_path / "model.h5", dtype, overwrite=True)
        with h5py.File(tmp_path / "model.h5") as file:
            for name, value in values.items():
                assert np.array_equal(file[name][()], value.to(getattr(torch, dtype)).double().numpy()), (dtype, name)


@pytest.mark.slow
def test_two_conversions_of_one_target_are_one_too_many(tmp_path):
    source, target = directory(tmp_path), tmp_path / "model.h5"
    command = [sys.executable, "-m", "noria", "convert", source, target, "--overwrite"]
    others = []

    def meanwhile(block, done, total):
        if not others:
            others.append(subprocess.run(forked(command), capture_output=True, text=True, timeout=60))

    made = convert(source, target, progress=meanwhile)
    assert others[0].returncode == 2 and made.notes == convert(source, tmp_path / "other.h5").notes
    assert re.fullmatch(
        rf"noria: output {target} is being written by noria convert on \S+ \(process {os.getpid()}, since \S+\):"
        r" wait for it, or name another output\n",
        others[0].stderr,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.h5", "other.h5"]


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path):
    source, target = directory(tmp_path), tmp_path / "model.h5"
    script = "import os, sys\nfrom noria.checkpoint.writer import replacing\nfrom pathlib import Path\n" + (
        "with replacing(Path(sys.argv[1]), False):\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run(forked([sys.executable, "-c", script, target])).returncode == -9
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    foreign = ["model.h5.4711.tmp", "model.h5.tmp"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    convert(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.h5", *foreign]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_conversion_that_a_signal_ends_leaves_nothing_and_says_so_in_a_line(tmp_path, number):
    source, target = directory(tmp_path), tmp_path / "model.h5"
    target.write_text("old")
    script = "import os, sys\nfrom noria import __main__\nfrom noria.commands import convert\n" + (
        f"convert._Lines.__call__ = lambda *_: os.kill(os.getpid(), {int(number)})\n"
        "sys.argv = ['noria', 'convert', *sys.argv[1:], '--overwrite']\n__main__.main()\n"
    )
    command = forked([sys.executable, "-c", script, source, target])
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (-number, "")
    assert ended.stderr.splitlines()[-1:] == [f"noria: noria convert was ended by {number.name}"]
    assert "Traceback" not in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.h5"]
    assert target.read_text() == "old"


def test_a_conversion_that_was_started_to_ignore_a_hangup_does(tmp_path):
    source, target = directory(tmp_path), tmp_path / "model.h5"
    script = "import os, signal, sys\nfrom noria import __main__\nfrom noria.commands import convert\n" + (
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "convert._Lines.__call__ = lambda *_: os.kill(os.getpid(), signal.SIGHUP)\n"
        "sys.argv = ['noria', 'convert', *sys.argv[1:]]\n__main__.main()\n"
    )
    assert subprocess.run(forked([sys.executable, "-c", script, source, target]), timeout=60).returncode == 0
    assert target.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_changes_while_it_is_converted_is_refused_by_the_file_s_name(tmp_path, name):
    source, target = directory(tmp_path), tmp_path / "model.h5"

    def meanwhile(block, done, total):
        (source / "README.md").write_text("no part of the model")
        os.utime(source / name, ns=(1, 1))

    with pytest.raises(InputError, match=rf"{name} changed while it was converted: nothing is written"):
        convert(source, target, progress=meanwhile)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
