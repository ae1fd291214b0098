"""Published quantized models: logits against the dense model of the unpacked weights; directories that lie, by their message."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import quantized
import reference
from counts import full
from noria import encodings, kinds
from noria.__main__ import main
from noria.blocks import layer_name
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.published import form_of
from noria.checkpoint.tensor_files import Reader
from noria.engine.parameters import stored, views
from noria.errors import InputError
from noria.step import Run
from quantized import AWQ, FLOAT4, FLOAT8, FORMS, FP8, GPTQ, INT4, INT8, MODELS, compressed
from whole import Whole, tokens_of

torch.set_num_threads(1)


class Converted(Whole):
    """The model in a checkpoint, computed without engine in float64."""

    def __init__(self, path):
        with open_checkpoint(path) as self.checkpoint:
            super().__init__(self.checkpoint.config, {}, torch.float64)

    def block(self, state, name, shapes):
        layout = self.checkpoint.blocks[name]
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        self.checkpoint.read_block(name, buffer.numpy())
        encodings.check_block(layout, buffer, "it")
        found, pieces = views(buffer, layout), stored(buffer, layout)
        for parameter in layout.encoded:
            its = {key: torch.full(shape, torch.nan, dtype=torch.float64) for key, shape in parameter.computed.items()}
            encodings.decode(parameter, pieces[parameter.name], its)
            found |= its
        return found


def encoded_of(path):
    with open_checkpoint(path) as checkpoint:
        blocks = [checkpoint.blocks[layer_name(layer)] for layer in range(checkpoint.shape.num_layers)]
        return {(parameter.name, parameter.encoding) for block in blocks for parameter in block.encoded}


def assert_logits(path, config, weights):
    token_ids = tokens_of(3, 20)
    with torch.inference_mode():
        found = Converted(path).logits([(token_ids, 0, (Run(3, 2),))])[0]
    expected = reference.logits(config, weights, token_ids)
    assert expected.std() > 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


ALL = [(form, model) for form in FORMS for model in MODELS]  # those of one form follow each other
PAIRS = ALL if full() else [ALL[len(MODELS) * number + number % len(MODELS)] for number in range(len(FORMS))]


@pytest.mark.parametrize(("form", "model"), PAIRS)
def test_logits_are_those_of_the_dense_model_of_the_unpacked_weights(tmp_path, form, model):
    config, (settings, pack) = MODELS[model], FORMS[form]
    weights = quantized.write(tmp_path / "hf", config, settings, pack)
    made = convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    matrices = {"qkv", "out", "experts"} if "moe" in model else {"qkv", "out", "gate_up", "down"}
    encoded = encoded_of(tmp_path / "model.h5")
    assert {name for name, _ in encoded} == matrices
    assert all(f"{encoding} " in made.forms for _, encoding in encoded)
    assert_logits(tmp_path / "model.h5", config, weights)


# What config.json says of the makers' own tensors in data/quantized (made by make.py there) and data/packed.
SMALL = FP8 | {"weight_block_size": [16, 32]}
MADE = {
    "fp8": SMALL,
    "fp8, e8m0": SMALL,
    "compressed, float channel": compressed("float-quantized", strategy="channel", **FLOAT8),
    "compressed, float tensor": compressed("float-quantized", strategy="tensor", **FLOAT8),
    "compressed, float block": compressed("float-quantized", strategy="block", block_structure=[16, 32], **FLOAT8),
    "compressed, bytes": compressed("int-quantized", strategy="channel", **INT8),
    "compressed, bytes with zeros": compressed("int-quantized", strategy="channel", symmetric=False, **INT8),
    "compressed, mxfp4": compressed("mxfp4-pack-quantized", strategy="group", group_size=32, **FLOAT4),
    "gptq": GPTQ,
    "gptq, zeros": GPTQ | {"sym": False},
    "gptq, zeros as they are": GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
    "gptq, ordered": GPTQ | {"desc_act": True},
    "gptq, 8 bits": GPTQ | {"bits": 8, "sym": False, "desc_act": True},
    "awq": AWQ,
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "gpt_oss": {"quant_method": "mxfp4"},
}
GROUPS = {"strategy": "group", "group_size": 32}
PACKED = {
    "int4.symmetric": compressed("pack-quantized", **GROUPS, **INT4),
    "int4.zeros": compressed("pack-quantized", **GROUPS, symmetric=False, **INT4),
    "int4.channel": compressed("pack-quantized", strategy="channel", **INT4),
    "int4.actorder": compressed("pack-quantized", **GROUPS, symmetric=False, actorder="group", **INT4),
    "int8.zeros": compressed("pack-quantized", **GROUPS, symmetric=False, **INT8),
    "int8.channel": compressed("pack-quantized", strategy="channel", **INT8),
    "nvfp4": compressed("nvfp4-pack-quantized", strategy="tensor_group", group_size=16, **FLOAT4),
}
DATA = Path(__file__).parent / "data"


def decoded(folder, settings, tensors, number=None):
    """The module `it` of these tensors, as the form that the settings name reads it: float64 [outputs, inputs]."""
    quantized.save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    directory = Directory(folder)
    form = form_of(directory, {"quantization_config": settings}, directory.tensors())
    matrix = form.matrix("it", number)
    kind, fields = kinds.load("encodings", matrix.encoding), matrix.fields(Reader())
    its = kind.DEFAULTS | matrix.settings
    assert {name: tuple(value.shape) for name, value in fields.items()} == {
        name: shape for name, (shape, _) in kind.fields(matrix.shape, "float64", its).items()
    }
    pieces = {name: value.contiguous()[None] for name, value in fields.items()}
    kind.check(pieces, matrix.shape, its)
    into = torch.full((1, *matrix.shape), torch.nan, dtype=torch.float64)
    kind.decode(pieces, its, into)
    return into[0]


def assert_near(found, theirs):
    """Equal but for the rounding of their products, of two factors or three."""
    rtol = 3e-7 if theirs.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, theirs.double(), rtol=rtol, atol=0)
    assert theirs.count_nonzero() > theirs.numel() / 2


@pytest.mark.parametrize("case", MADE)
def test_what_the_makers_programs_pack_is_decoded_to_what_they_unpack(tmp_path, case):
    made = quantized.load_file(DATA / "quantized" / "quantized.safetensors")
    tensors = {name.removeprefix(f"{case}: "): its for name, its in made.items() if name.startswith(f"{case}: ")}
    theirs = tensors.pop("weight of it")
    for number in range(2) if case == "gpt_oss" else [None]:
        found = decoded(tmp_path, MADE[case], tensors, number)
        assert_near(found, theirs if number is None else theirs[number])


@pytest.mark.parametrize("case", PACKED)
def test_what_compressed_tensors_packs_is_decoded_to_what_it_unpacks(tmp_path, case):
    made = quantized.load_file(DATA / "packed" / "packed.safetensors")
    tensors = {f"it{name.removeprefix(case)}": its for name, its in made.items() if name.startswith(f"{case}.")}
    theirs = tensors.pop("it.weight")
    if case == "nvfp4":
        tensors["it.weight_scale"] = tensors["it.weight_scale"].view(torch.float8_e4m3fn)
    assert_near(decoded(tmp_path, PACKED[case], tensors), theirs)


def llama(folder, settings=FP8, pack=None, plain=(), **changes):
    return quantized.write(folder, MODELS["llama"], settings, pack or quantized.fp8_block(), plain, **changes)


def test_what_the_directory_has_in_full_precision_stays_so_layer_by_layer(tmp_path):
    plain = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"]
    weights = llama(tmp_path / "hf", FP8 | {"modules_to_not_convert": ["lm_head", *plain]}, plain=plain)
    made = convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        found = [[one.name for one in checkpoint.blocks[layer_name(layer)].encoded] for layer in range(2)]
    assert found == [["qkv", "gate_up", "down"], ["qkv", "out", "gate_up"]]
    assert "float64" in made.forms
    assert_logits(tmp_path / "model.h5", MODELS["llama"], weights)


def test_tensors_of_bare_models_are_found_by_the_names_that_older_checkpoints_give_them(tmp_path):
    weights = llama(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = quantized.load_file(file)
    quantized.save_file({name.removeprefix("model."): value for name, value in tensors.items()}, file)
    convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    assert_logits(tmp_path / "model.h5", MODELS["llama"], weights)


def test_torch_files_hold_codes_too(tmp_path):
    weights = llama(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    torch.save(quantized.load_file(file), tmp_path / "hf" / "pytorch_model.bin")
    file.unlink()
    convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    assert_logits(tmp_path / "model.h5", MODELS["llama"], weights)


def test_rounding_of_activations_and_cache_is_left_out_in_a_line_each(tmp_path):
    settings, pack = FORMS["fp8 with a scale a tensor, as vLLM has it"]
    llama(tmp_path / "hf", settings, pack, **{"model.layers.0.self_attn.k_scale": torch.tensor(1.0)})
    notes = convert(tmp_path / "hf", tmp_path / "model.h5").notes
    assert [note for note in notes if "activations" in note] == [
        "fp8: it rounds activations too (static), Noria does not: only weights are stored so, and products are the more"
        " precise ones; 15 tensors of it left out"
    ]
    assert ["float8" in note and "cache" in note for note in notes].count(True) == 1


def test_the_command_says_what_came_in_which_form(tmp_path, capsys):
    llama(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "model.h5")]) == 0
    assert (
        "llama, 2 layers, bfloat16, stored as fp8_block 87.1 % (8.02 bits), bfloat16 12.9 %," in capsys.readouterr().out
    )
    assert main(["inspect", "--json", str(tmp_path / "model.h5")]) == 0
    assert json.loads(capsys.readouterr().out)["encodings"]["fp8_block"]["numbers"] == 86016
    assert main(["inspect", str(tmp_path / "model.h5")]) == 0
    assert "qkv [128, 64] fp8_block, 8.05 bits" in capsys.readouterr().out


Q = "model.layers.1.self_attn.q_proj"
LIES = {
    "no scales": (
        {f"{Q}.weight_scale_inv": None},
        [f"'{Q}.weight' is float8_e4m3fn and no file holds", f"'{Q}.weight_scale_inv' or", "download"],
    ),
    "scales of another grid": (
        {f"{Q}.weight_scale_inv": torch.ones(2, 1)},
        [f"'{Q}.weight_scale_inv' is float32 [2, 1], it should be", "[1, 1], one for 128 x 128 of [64, 64]"],
    ),
    "scales of bytes": ({f"{Q}.weight_scale_inv": torch.ones(1, 1, dtype=torch.uint8)}, ["is 'uint8': scales are"]),
    "a scale that is nan": ({f"{Q}.weight_scale_inv": torch.full((1, 1), torch.nan)}, [repr(Q), "1 of 1 scales"]),
    "a scale below 0": ({f"{Q}.weight_scale_inv": torch.full((1, 1), -1.0)}, [repr(Q), "such as -1"]),
    "a code that is nan": (
        {f"{Q}.weight": torch.full((64, 64), 255, dtype=torch.uint8).view(torch.float8_e4m3fn)},
        [repr(Q), "a code is 127 or 255", "damaged"],
    ),
    "codes of another shape": (
        {f"{Q}.weight": torch.zeros(48, 64, dtype=torch.uint8).view(torch.float8_e4m3fn)},
        [f"{Q!r} [48, 64]", "cannot make layers/0001/qkv [128, 64]", "different models"],
    ),
    "codes that are no matrix": (
        {f"{Q}.weight": torch.zeros(64, dtype=torch.uint8).view(torch.float8_e4m3fn)},
        [f"'{Q}.weight' is float8_e4m3fn [64]: quantized weights are matrices"],
    ),
    "codes of another dtype": ({f"{Q}.weight": torch.zeros(64, 64, dtype=torch.int8)}, ["is 'int8', fp8 in blocks"]),
    "a matrix left plain beside quantized ones": (
        {f"{Q}.weight": torch.zeros(64, 64), f"{Q}.weight_scale_inv": None},
        ["'model.layers.1.self_attn.k_proj' is stored as fp8_block", f"{Q!r} is not", "layers/0001/qkv"],
    ),
    "a scale that no matrix has": (
        {"model.layers.1.mlp.weight_scale_inv": torch.ones(1)},
        ["would leave out 1 tensor"],
    ),
    "an embedding in codes": (
        {
            "model.embed_tokens.weight": torch.zeros(97, 64, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "model.embed_tokens.weight_scale_inv": torch.ones(1, 1),
        },
        ["'model.embed_tokens' is quantized", "gathered"],
    ),
    "a norm in codes": (
        {"model.norm.weight": torch.zeros(64, dtype=torch.uint8).view(torch.float8_e4m3fn)},
        ["'model.norm.weight' is float8_e4m3fn"],
    ),
    "a bias that the family has not": ({f"{Q}.bias": torch.ones(64)}, [f"'{Q}.bias'", "would leave out 1 tensor"]),
}


def refused(folder, words, **keys):
    with pytest.raises(InputError) as error:
        convert(folder / "hf", folder / "model.h5", **keys)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and [path.name for path in folder.iterdir()] == ["hf"]


@pytest.mark.parametrize("lie", LIES)
def test_a_directory_that_lies_about_itself_is_refused(tmp_path, lie):
    changes, words = LIES[lie]
    llama(tmp_path / "hf", **changes)
    refused(tmp_path, words)


def test_a_bias_of_zeros_beside_codes_is_left_out(tmp_path):
    llama(tmp_path / "hf", **{f"{Q}.bias": torch.zeros(64)})
    convert(tmp_path / "hf", tmp_path / "model.h5")


SETTINGS = [
    (FP8 | {"fmt": "e5m2"}, ["quantization_config: fmt is 'e5m2'"]),
    (FP8 | {"weight_block_size": 128}, ["weight_block_size is 128: it must be two"]),
    (FP8 | {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, ["MXFP8"]),
    (FP8 | {"expert_dtype": "fp6"}, ["expert_dtype is 'fp6'"]),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        ["'bitsandbytes' (codes of bitsandbytes", "take the unquantized"],
    ),
    ({"quant_method": "gguf"}, ["'gguf' (GGUF"]),
    ({"quant_method": ["fp8"]}, ["\"['fp8']\""]),
    ({"bits": 4}, ["'unknown'"]),
    ([4], ["quantization_config is [4]: it must be an object"]),
    ("x" * 10**6, ["quantization_config is 'xxx"]),
]


@pytest.mark.parametrize(("settings", "words"), SETTINGS)
def test_what_is_not_read_is_refused_by_its_name(tmp_path, settings, words):
    llama(tmp_path / "hf", settings)
    refused(tmp_path, words)


def test_a_quantized_model_takes_no_adapter_and_no_other_encoding(tmp_path):
    llama(tmp_path / "hf")
    refused(tmp_path, ["quantized already"], lora=tmp_path / "hf")
    refused(tmp_path, ["quantized already"], forms={"qkv": ("fp8_channel", {})})
