"""Published quantized models: logits against the dense model of the unpacked weights; directories that lie, by their message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import families
import mixtures
import quantized
import reference
import wide
from counts import full, some
from noria import encodings, kinds, models
from noria.__main__ import main
from noria.blocks import layer_name
from noria.checkpoint import filling
from noria.checkpoint.checkpoint import model_shape, open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.fields import FieldSources
from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.published import form_of
from noria.checkpoint.tensor_files import Reader
from noria.engine.parameters import stored, views
from noria.errors import InputError
from noria.step import Run
from noria.tools import direct
from quantized import AWQ, FLOAT4, FLOAT8, FORMS, FP8, GPTQ, INT4, INT8, MODELS, compressed
from test_convert import MEASURE
from whole import Whole, tokens_of

torch.set_num_threads(1)


class Converted(Whole):
    """The model in a checkpoint, computed without engine in float64."""

    def __init__(self, path):
        with open_checkpoint(path) as self.checkpoint:
            super().__init__(models.text_of(self.checkpoint.config), {}, torch.float64)

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


def packed_latent(folder, config, pack, wanted, prefix="", **more):
    """A directory of a model of latent attention whose `wanted` modules are packed; its numbers as they are unpacked."""
    families.save(config, folder)
    tensors = quantized.load_file(folder / "model.safetensors") | more
    state, stored = {}, {}
    for name, tensor in tensors.items():
        module, state[name], its = name.removesuffix(".weight"), tensor.double(), {name: tensor}
        if wanted(module):
            packed, found = pack(module, tensor.double().numpy())
            state[name], its = torch.from_numpy(found), {f"{module}.{key}": value for key, value in packed.items()}
        stored |= {prefix + key: value.contiguous() for key, value in its.items()}
    quantized.save_file(stored, folder / "model.safetensors")
    return state


def assert_same_logits(path, config, state):
    token_ids = tokens_of(3, 20)
    with torch.inference_mode():
        found = Converted(path).logits([(token_ids, 0, (Run(3, 2),))])[0]
        expected = Whole(config, state, torch.float64).logits([(token_ids, 0, (Run(3, 2),))])[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32"])
def test_latent_attention_in_fp8_is_computed_and_its_indexer_and_layers_for_drafts_are_left_out_with_a_line(
    family, tmp_path
):
    config = mixtures.CONFIGS[family]
    assert config["n_routed_experts"] == 8
    drafts = {f"model.layers.3.{name}.weight": torch.ones(48, 32) for name in ("eh_proj", "mlp.gate_proj")}
    plain = ("norm", "embed_tokens", "lm_head", "mlp.gate", "weights_proj", "eh_proj", "bias")
    state = packed_latent(
        tmp_path / "hf", config, quantized.fp8_block(16, 32), lambda module: not module.endswith(plain), **drafts
    )
    said = {"quantization_config": FP8 | {"weight_block_size": [16, 32]}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | said))
    made = convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    latents = {"query_down", "query_up", "latent", "up", "out"}
    others = {"gate_up", "down", "shared_gate_up", "shared_down", "experts"}
    assert encoded_of(tmp_path / "model.h5") == {(name, "fp8_block") for name in latents | others}
    # of each layer's indexer two matrices with scales, one without, a norm with a bias
    left_out = {"deepseek_v3": 3, "deepseek_v32": 24}[family]
    assert f"{left_out} tensors left out, which {family} does not use" in "".join(made.notes)
    assert_same_logits(tmp_path / "model.h5", config, state)


@pytest.mark.slow
def test_kimi_s_experts_of_four_bits_are_read_as_its_text_config_says(tmp_path):
    text = mixtures.CONFIGS["deepseek_v3"] | {"hidden_size": 64, "moe_intermediate_size": 32}
    state = packed_latent(
        tmp_path / "hf", text, quantized.packed(4, 32, True), lambda module: ".experts." in module, "language_model."
    )
    said = compressed("pack-quantized", **GROUPS, **INT4)
    said["ignore"] += ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
    wrapped = {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "vision_config": {"a": 1},
    }
    wrapped["text_config"] = text | {"model_type": "kimi_k2", "quantization_config": said}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(wrapped))
    convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    assert encoded_of(tmp_path / "model.h5") == {("experts", "int4")}
    assert_same_logits(tmp_path / "model.h5", text, state)


@pytest.mark.slow
def test_the_experts_of_gpt_oss_are_sliced_from_tensors_of_all_and_give_transformers_logits(tmp_path):
    config = mixtures.GPT_OSS | {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    model = families.save(config, tmp_path / "hf")
    tensors = quantized.load_file(tmp_path / "hf" / "model.safetensors")
    state = model.state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        outputs_first = tensors.pop(name).double().numpy().transpose(0, 2, 1)
        codes, exponents, found = zip(*map(quantized.mxfp4_codes, outputs_first), strict=True)
        blocks = torch.from_numpy(quantized.pairs(np.stack(codes)))
        tensors[f"{name}_blocks"] = blocks.unflatten(2, (-1, 16))
        tensors[f"{name}_scales"] = torch.from_numpy(np.stack(exponents).copy())
        state[name] = torch.from_numpy(np.stack(found)).transpose(1, 2).float()
    model.load_state_dict(state)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    quantized.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    assert encoded_of(tmp_path / "model.h5") == {("experts", "mxfp4")}
    token_ids = tokens_of(3, 20)
    with torch.inference_mode():
        exact = wide.logits(wide.wide_model(config, model), token_ids)
        found = Converted(tmp_path / "model.h5").logits([(token_ids, 0, (Run(3, 2),))])[0]
    assert exact.std() > 0.3
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("published", [True, False], ids=["inputs first", "outputs first"])
def test_experts_in_fp8_that_lie_in_one_tensor_are_sliced_with_their_blocks_scales(tmp_path, published):
    config = mixtures.QWEN3_VL_MOE | {"hidden_size": 64, "moe_intermediate_size": 32}
    families.save(config, tmp_path / "hf")
    pack = quantized.fp8_block(*((32, 16) if published else (16, 32)))
    stored = quantized.load_file(tmp_path / "hf" / "model.safetensors")
    state = {name: tensor.double() for name, tensor in stored.items()}
    for name in [name for name in stored if ".experts." in name]:
        outputs_first = state[name].numpy().transpose(0, 2, 1)
        packed, found = zip(*(pack(name, its) for its in outputs_first), strict=True)
        state[name] = torch.from_numpy(np.stack(found)).transpose(1, 2)
        for key, ending in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            whole = torch.stack([one[key] for one in packed])
            stored[name + ending] = (whole.transpose(1, 2) if published else whole).contiguous()
    quantized.save_file(stored, tmp_path / "hf" / "model.safetensors")
    said = {"quantization_config": FP8 | {"weight_block_size": [16, 32]}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | said))
    convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    assert encoded_of(tmp_path / "model.h5") == {("experts", "fp8_block")}
    assert_same_logits(tmp_path / "model.h5", config, state)


def test_scales_of_other_experts_than_those_in_one_tensor_are_refused_by_their_name(tmp_path):
    config = mixtures.QWEN3_VL_MOE | {"hidden_size": 64, "moe_intermediate_size": 32}
    families.save(config, tmp_path)
    stored = quantized.load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored |= {name: stored[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(7, 1, 1)}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    for changed, words in (
        (stored, f"{name}_scale_inv' [7, 1, 1]: they should be as many matrices"),
        (stored | {f"{name}_scale_inv": torch.ones(8, 2, 1)}, "it should be float32"),
        ({key: its for key, its in stored.items() if "_scale_inv" not in key}, f"no file holds '{name}_scale_inv'"),
    ):
        quantized.save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(InputError) as error:
            convert(tmp_path, tmp_path / "model.h5", "float64")
        assert words in str(error.value)


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


# Of other forms: the form, tensors that are changed, and what is said.
GROUPED, ORDERED = "compressed-tensors, 4 bits by groups with zeros", "compressed-tensors, 4 bits by ordered groups"
MORE_LIES = {
    "gptq without scales": ("gptq", {f"{Q}.scales": None}, [f"'{Q}.qweight' is int32 and no file holds '{Q}.scales'"]),
    "gptq without zeros": ("gptq", {f"{Q}.qzeros": None}, [f"no file holds '{Q}.qzeros'"]),
    "gptq of other groups": (
        "gptq",
        {f"{Q}.scales": torch.ones(4, 64, dtype=torch.float16)},
        [f"'{Q}.scales' is float16 [4, 64], it should be", "[2, 64], of gptq of 4 bits by groups of 32, [64, 64]"],
    ),
    "gptq with a scale that is inf": (
        "gptq",
        {f"{Q}.scales": torch.full((2, 64), torch.inf, dtype=torch.float16)},
        [repr(Q), "a scale is inf or nan", "damaged"],
    ),
    "gptq that says that it is symmetric and is not": (
        "gptq",
        {f"{Q}.qzeros": torch.zeros(2, 8, dtype=torch.int32)},
        [f"'{Q}.qzeros' has 128 zeros that are not 8", "symmetric"],
    ),
    "gptq in an order that it does not say": (
        "gptq",
        {f"{Q}.g_idx": torch.arange(64, dtype=torch.int32) % 2},
        [f"'{Q}.g_idx' does not name groups of 32 inputs in order, though desc_act is false"],
    ),
    "gptq with groups of unlike sizes": (
        "gptq in the order of activations",
        {f"{Q}.g_idx": torch.zeros(64, dtype=torch.int32)},
        [f"'{Q}.g_idx' does not name 2 groups of 32 inputs each"],
    ),
    "gptq with groups below 0": (
        "gptq in the order of activations",
        {f"{Q}.g_idx": torch.arange(64, dtype=torch.int32) - 1},
        [f"'{Q}.g_idx' does not name 2 groups"],
    ),
    "gptq without the order that it says": (
        "gptq in the order of activations",
        {f"{Q}.g_idx": None},
        [f"desc_act is true, and '{Q}.g_idx' is missing"],
    ),
    "gptq with an order of other inputs": (
        "gptq",
        {f"{Q}.g_idx": torch.zeros(32, dtype=torch.int32)},
        [f"'{Q}.g_idx' is int32 [32], it should be int32 or int64 [64]"],
    ),
    "gptq of another size": (
        "gptq",
        {f"{Q}.qweight": torch.zeros(4, 64, dtype=torch.int32)},
        [f"'{Q}.scales' is float16 [2, 64], it should be", "[1, 64]"],
    ),
    "gptq in longer words": ("gptq", {f"{Q}.qweight": torch.zeros(8, 64, dtype=torch.int64)}, ["is int64 [8, 64]"]),
    "gptq beside plain weights": (
        "gptq",
        {f"{Q}.weight": torch.zeros(64, 64)},
        [f"'{Q}.qweight' stands beside '{Q}.weight': which is right?"],
    ),
    "gptq with a bias that the family has not": ("gptq", {f"{Q}.bias": torch.ones(64)}, [f"'{Q}.bias'", "leave out 1"]),
    "awq without zeros": ("awq", {f"{Q}.qzeros": None}, [f"no file holds '{Q}.qzeros'"]),
    "awq of other groups": (
        "awq",
        {f"{Q}.qzeros": torch.zeros(1, 8, dtype=torch.int32)},
        [f"'{Q}.qzeros' is int32 [1, 8], it should be int32 [2, 8]"],
    ),
    "awq with a scale that is nan": (
        "awq",
        {f"{Q}.scales": torch.full((2, 64), torch.nan, dtype=torch.float16)},
        [repr(Q), "a scale is inf or nan"],
    ),
    "packed without scales": (GROUPED, {f"{Q}.weight_scale": None}, [f"no file holds '{Q}.weight_scale'"]),
    "packed without its shape": (GROUPED, {f"{Q}.weight_shape": None}, [f"no file holds '{Q}.weight_shape'"]),
    "packed without zeros": (GROUPED, {f"{Q}.weight_zero_point": None}, ["is missing", "group_0 is not symmetric"]),
    "packed with another shape": (
        GROUPED,
        {f"{Q}.weight_shape": torch.tensor([64, 96])},
        [f"'{Q}.weight_packed' is int32 [64, 8], it should be int32 [64, 12], for 4 bits of [64, 96]"],
    ),
    "packed with a shape below 0": (GROUPED, {f"{Q}.weight_shape": torch.tensor([64, -64])}, ["says [64, -64]"]),
    "packed with a shape of three": (GROUPED, {f"{Q}.weight_shape": torch.tensor([1, 64, 64])}, ["two whole numbers"]),
    "packed in other groups": (
        GROUPED,
        {f"{Q}.weight_scale": torch.ones(64, 2)},
        [f"'{Q}.weight_scale' is float32 [64, 2], it should be", "[64, 4], for 4 bits int by group (16) of [64, 64]"],
    ),
    "packed with zeros of other groups": (
        GROUPED,
        {f"{Q}.weight_zero_point": torch.zeros(8, 3, dtype=torch.int32)},
        [f"'{Q}.weight_zero_point' is int32 [8, 3], it should be int32 [8, 4]"],
    ),
    "packed in an order of unlike groups": (
        ORDERED,
        {f"{Q}.weight_g_idx": torch.zeros(64, dtype=torch.int32)},
        [f"'{Q}.weight_g_idx' does not name 2 groups"],
    ),
    "packed in an order that only one has": (
        "compressed-tensors, 4 bits by groups",
        {f"{Q}.weight_g_idx": torch.arange(64, dtype=torch.int32) // 32},
        [f"{Q!r} is stored as int4", "'permuted': True", "k_proj' as int4", "layers/0001/qkv"],
    ),
    "packed codes that the config ignores": (
        "compressed-tensors, 4 bits by groups",
        {
            "lm_head.weight": None,
            "lm_head.weight_packed": torch.zeros(97, 8, dtype=torch.int32),
            "lm_head.weight_scale": torch.ones(97, 2),
            "lm_head.weight_shape": torch.tensor([97, 64]),
        },
        ["'lm_head.weight_packed' is int32 of a module that config.json names in ignore"],
    ),
    "bytes with scales of groups": (
        "compressed-tensors, bytes by channel",
        {f"{Q}.weight_scale": torch.ones(64, 2)},
        [f"'{Q}.weight_scale' is [64, 2]: one scale is needed, or 64"],
    ),
    "floats that are bytes": (
        "compressed-tensors, floats by channel",
        {f"{Q}.weight": torch.zeros(64, 64, dtype=torch.int8)},
        [f"'{Q}.weight' is int8 [64, 64], it should be float8_e4m3fn [64, 64], for 8 bits float by channel"],
    ),
    "nvfp4 without the scale of the tensor": (
        "compressed-tensors, nvfp4",
        {f"{Q}.weight_global_scale": None},
        [f"no file holds '{Q}.weight_global_scale'"],
    ),
    "nvfp4 whose scale of the tensor is 0": (
        "compressed-tensors, nvfp4",
        {f"{Q}.weight_global_scale": torch.zeros(1)},
        [repr(Q), "the scale of a tensor is not a number above 0"],
    ),
    "nvfp4 with scales of other groups": (
        "modelopt nvfp4",
        {f"{Q}.weight_scale": torch.ones(64, 2).to(torch.float8_e4m3fn)},
        [f"'{Q}.weight_scale' is float8_e4m3fn [64, 2], it should be float8_e4m3fn [64, 4], one for 16 inputs"],
    ),
    "nvfp4 with a scale that is nan": (
        "modelopt nvfp4",
        {f"{Q}.weight_scale": torch.full((64, 4), 127, dtype=torch.uint8).view(torch.float8_e4m3fn)},
        [repr(Q), "a scale is nan"],
    ),
    "nvfp4 that changes activations": (
        "modelopt nvfp4",
        {f"{Q}.pre_quant_scale": torch.ones(64)},
        [f"'{Q}.pre_quant_scale'", "leave out 1"],
    ),
    "modelopt of another dtype": (
        "modelopt fp8",
        {f"{Q}.weight": torch.zeros(64, 64, dtype=torch.int8)},
        [f"'{Q}.weight' is 'int8', modelopt (FP8) has uint8"],
    ),
    "mxfp4 with a scale that is nan": (
        "compressed-tensors, mxfp4",
        {f"{Q}.weight_scale": torch.full((64, 2), 255, dtype=torch.uint8)},
        [repr(Q), "scales are no numbers"],
    ),
    "fp4 of an odd number of groups": (
        "fp8 in blocks, experts in fp4",
        {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 72, dtype=torch.int8)},
        ["down_proj.weight' [64, 72] has 144 inputs, no multiple of 32"],
    ),
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


@pytest.mark.parametrize("lie", MORE_LIES)
def test_a_directory_of_another_form_that_lies_is_refused(tmp_path, lie):
    form, changes, words = MORE_LIES[lie]
    llama(tmp_path / "hf", *FORMS[form], **changes)
    refused(tmp_path, words)


def test_a_bias_of_zeros_beside_codes_is_left_out(tmp_path):
    for name, biases in (("plain", {}), ("zeros", {f"{Q}.bias": torch.zeros(64)})):
        llama(tmp_path / name, **biases)
        convert(tmp_path / name, tmp_path / f"{name}.h5")
    plain, zeros = (open_checkpoint(tmp_path / f"{name}.h5") for name in ("plain", "zeros"))
    assert zeros.blocks == plain.blocks


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
    (GPTQ | {"bits": 3}, ["bits is 3: Noria reads GPTQ of 4 and 8 bits"]),
    (GPTQ | {"bits": True}, ["bits is True"]),
    (GPTQ | {"group_size": 24}, ["group_size is 24"]),
    (GPTQ | {"checkpoint_format": "marlin"}, ["checkpoint_format is 'marlin': Noria reads gptq and gptq_v2"]),
    (GPTQ | {"checkpoint_format": ["gptq"]}, ["checkpoint_format is ['gptq']"]),
    (GPTQ | {"is_marlin_format": True}, ["'marlin'"]),
    (GPTQ | {"pack_dtype": "int16"}, ["pack_dtype is 'int16'"]),
    (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, ["dynamic gives '+:.*down.*' settings of its own"]),
    (AWQ | {"bits": 8}, ["bits is 8: Noria reads AWQ of 4 bits"]),
    (AWQ | {"version": "gemv"}, ["version is 'gemv'"]),
    (compressed("marlin-24", **GROUPS, **INT4), ["format is 'marlin-24'"]),
    (compressed("mxfp8-quantized", **GROUPS, **FLOAT8), ["(MXFP8)"]),
    (compressed("pack-quantized", **GROUPS, **INT4) | {"transform_config": {"R1": {}}}, ["transform_config is {'R1'"]),
    (
        compressed("pack-quantized", **GROUPS, **INT4) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        ["sparsity_config is {'format': 'sparse-24-bitmask'}"],
    ),
    (compressed("pack-quantized", **GROUPS, **INT4) | {"config_groups": []}, ["config_groups is []"]),
    (
        compressed("pack-quantized", **GROUPS, **INT4) | {"config_groups": {"W4A16": ["Linear"]}},
        ["config_groups.W4A16"],
    ),
    (compressed("pack-quantized", **GROUPS, num_bits=[4]), ["[4] bits of type 'int'"]),
    ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, ["quant_algo is 'W4A16_AWQ'"]),
    ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, ["quant_algo is 'MXFP8'"]),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, ["group_size is 32"]),
]


@pytest.mark.parametrize(("settings", "words"), SETTINGS)
def test_what_is_not_read_is_refused_by_its_name(tmp_path, settings, words):
    llama(tmp_path / "hf", settings)
    refused(tmp_path, words)


def test_a_quantized_model_takes_no_adapter_and_no_other_encoding(tmp_path):
    llama(tmp_path / "hf")
    refused(tmp_path, ["quantized already"], lora=tmp_path / "hf")
    refused(tmp_path, ["quantized already"], forms={"qkv": ("fp8_channel", {})})


# Groups of compressed-tensors that codes of 4 bits cannot be of.
WRONG_GROUPS = [
    (compressed("pack-quantized", strategy="group", group_size=24, **INT4), ["group_0: group_size is 24"]),
    (compressed("pack-quantized", strategy="block", group_size=32, **INT4), ["4 bits int by block"]),
    (
        compressed("pack-quantized", strategy="group", group_size=32, num_bits=3, type="int"),
        ["3 bits int by group (32)"],
    ),
    (compressed("pack-quantized", strategy="group", group_size=64, **FLOAT4), ["4 bits float by group (64)"]),
    (compressed("pack-quantized", strategy="group", group_size=32, **FLOAT8), ["MXFP8 is not in this version"]),
]


@pytest.mark.parametrize(("settings", "words"), WRONG_GROUPS)
def test_groups_that_are_not_read_are_refused_by_what_they_are(tmp_path, settings, words):
    llama(tmp_path / "hf", settings, quantized.packed(4, 32, True))
    refused(tmp_path, words)


def of_groups(**groups):
    settings = compressed("mixed-precision", **GROUPS, **INT4)
    weights = {"eights": INT8 | {"strategy": "channel"}, "fours": INT4 | GROUPS}
    said = {name: {"targets": targets, "weights": weights[name]} for name, targets in groups.items()}
    return settings | {"config_groups": said}


@pytest.mark.parametrize(
    "settings",
    [
        of_groups(eights=["re:.*self_attn.*"], fours=["re:model\\.layers\\.\\d+\\.mlp\\..*"]),
        of_groups(fours=["Linear"], eights=["re:.*self_attn.*"]),
        of_groups(
            fours=["re:.*"],
            eights=[f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo"],
        )
        | {"ignore": ["re:.*embed.*", "re:lm_head"]},
    ],
)
def test_modules_are_of_the_group_that_names_them_most_exactly(tmp_path, settings):
    pack = quantized.both(quantized.packed(4, 32, True), quantized.eight_bits(), lambda module: "self_attn" in module)
    weights = llama(tmp_path / "hf", settings, pack)
    convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    assert encoded_of(tmp_path / "model.h5") == {
        ("qkv", "int8"),
        ("out", "int8"),
        ("gate_up", "int4"),
        ("down", "int4"),
    }
    assert_logits(tmp_path / "model.h5", MODELS["llama"], weights)


@pytest.mark.slow
def test_patterns_that_come_to_no_end_are_refused(tmp_path):
    llama(
        tmp_path / "hf",
        of_groups(fours=["Linear"], eights=["re:(.*)*" + "(.*)*" * 20 + "!"]),
        quantized.packed(4, 32, True),
    )
    refused(tmp_path, ["quantization_config: its patterns of modules cannot be used"])


def test_zeros_that_are_nowhere_but_in_the_middle_are_what_symmetric_means(tmp_path):
    settings, pack = FORMS["compressed-tensors, 4 bits by groups"]
    zeros = quantized.words(np.full((64, 2), 8), 4, 0)
    weights = llama(tmp_path / "hf", settings, pack, **{f"{Q}.weight_zero_point": zeros})
    convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    assert_logits(tmp_path / "model.h5", MODELS["llama"], weights)
    zeros[0, 0] += 1
    llama(tmp_path / "hf", settings, pack, **{f"{Q}.weight_zero_point": zeros})
    (tmp_path / "model.h5").unlink()
    refused(tmp_path, [f"'{Q}.weight_zero_point' has 1 zeros that are not 8"])


def test_modelopt_may_say_it_in_a_file_of_its_own(tmp_path):
    _, pack = FORMS["modelopt nvfp4"]
    weights = llama(tmp_path / "hf", None, pack)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf" / "hf_quant_config.json").write_text(json.dumps(said))
    notes = convert(tmp_path / "hf", tmp_path / "model.h5", "float64").notes
    assert any("cache's scheme (FP8)" in note for note in notes)
    assert_logits(tmp_path / "model.h5", MODELS["llama"], weights)


@pytest.mark.parametrize("form", ["fp8 in blocks", "modelopt nvfp4"])
def test_two_places_that_name_different_formats_are_refused(tmp_path, form):
    settings, pack = FORMS[form]
    llama(tmp_path / "hf", settings, pack)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"compression_config": PACKED["int4.symmetric"]}))
    refused(tmp_path, ["quantization_config names ", "compression_config names 'compressed-tensors'"])
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    said = {"quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf" / "hf_quant_config.json").write_text(json.dumps(said))
    if settings["quant_method"] == "modelopt":
        convert(tmp_path / "hf", tmp_path / "model.h5")
    else:
        refused(tmp_path, ["quantization_config names 'fp8'", "hf_quant_config.json names 'modelopt'"])


FORMS_IN_ORDER = list(FORMS)
VALUES = [None, True, 0, -1, 3.5, "x", "x" * 300, [], [1, "a"], {}, {"a": {"b": []}}, 10**30]


@pytest.mark.parametrize("form", FORMS)
def test_a_config_of_nonsense_is_refused_in_one_line_or_means_nothing(tmp_path, form):
    settings, pack = FORMS[form]
    quantized.write(tmp_path / "hf", MODELS["llama"] | {"num_hidden_layers": 1}, settings, pack)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    cases = [(where, value) for where in places(settings) for value in VALUES]
    for where, value in some(cases if full() else cases[FORMS_IN_ORDER.index(form) :]):
        said = json.loads(json.dumps(config))
        its = said["quantization_config"]
        for key in where[:-1]:
            its = its[key]
        its[where[-1]] = value
        directory = Directory(tmp_path / "hf")
        try:
            family, shape = model_shape(said, "it")
            FieldSources(family, shape, form_of(directory, said, directory.tensors()))
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, (where, value)


def places(tree, above=()):
    """The paths of all values of nested objects."""
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def fp8_zeros(outputs, inputs):
    codes = torch.zeros(outputs, inputs, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": torch.ones(-(-outputs // 128), -(-inputs // 128))}


def awq_zeros(outputs, inputs):
    words = {"qweight": inputs, "qzeros": inputs // 32}
    found = {name: torch.zeros(rows, outputs // 8, dtype=torch.int32) for name, rows in words.items()}
    return found | {"scales": torch.ones(inputs // 32, outputs, dtype=torch.float16)}


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "zeros", "layers"), [(FP8, fp8_zeros, 4), (AWQ, awq_zeros, 8)])
def test_memory_is_that_of_a_few_matrices_whatever_the_model_s_size(tmp_path, settings, zeros, layers):
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 256, "num_experts": 64, "num_hidden_layers": layers}
    config = MODELS["qwen3_moe"] | sizes
    weights, linear = quantized.dense(config | {"num_hidden_layers": 1, "num_experts": 1})
    weights["model.layers.0.mlp.gate.weight"] = np.ones((64, 1024))
    tensors = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        of_module = (
            zeros(*weight.shape) if module in linear else {"weight": torch.ones(weight.shape, dtype=torch.bfloat16)}
        )
        layer_modules = [module.replace(".layers.0.", f".layers.{layer}.") for layer in range(layers)]
        for place in dict.fromkeys(layer_modules):
            for its in dict.fromkeys(place.replace(".experts.0.", f".experts.{expert}.") for expert in range(64)):
                tensors |= {f"{its}.{ending}": value for ending, value in of_module.items()}
    (folder := tmp_path / "large").mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    quantized.save_file({name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors")
    assert (size := (folder / "model.safetensors").stat().st_size) > 200e6
    quantized.write(tmp_path / "small", MODELS["qwen3_moe"], *FORMS["fp8 in blocks"])
    command = [
        sys.executable,
        "-c",
        MEASURE.replace(', "float32"', ""),
        tmp_path / "small",
        tmp_path / "model.h5",
        folder,
    ]
    grown = int(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    print(f"{grown / 1e6:.0f} MB")
    assert grown < 48e6, f"grew by {grown / 1e6:.0f} MB for {size / 1e6:.0f} MB"


def test_what_is_written_through_the_page_cache_begins_to_go_to_the_disk_meanwhile(tmp_path, monkeypatch):
    wrote, advise = [], os.posix_fadvise

    def heard(descriptor, offset, nbytes, advice):
        wrote.append((os.readlink(f"/proc/self/fd/{descriptor}"), advice))
        advise(descriptor, offset, nbytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", heard)
    monkeypatch.setattr(direct, "_open_direct", lambda descriptor, writable: None)
    monkeypatch.setattr(filling, "BEHIND_NBYTES", 8000)
    monkeypatch.setattr(filling, "PIECE_NBYTES", 8192)
    quantized.write(tmp_path / "hf", MODELS["qwen3_moe"], quantized.FP8, quantized.fp8_block())
    convert(tmp_path / "hf", tmp_path / "model.h5")
    (name,) = {name for name, _ in wrote}
    assert "model.h5" in name and {advice for _, advice in wrote} == {os.POSIX_FADV_DONTNEED}
    assert len(wrote) >= (tmp_path / "model.h5").stat().st_size // 20_000 > 3
