"""Families whose experts lie in one tensor: in FP8 without blocks, by scales of a tensor, of an expert, of its gates and ups, of
outputs; and where a quantized directory has tensors of each expert."""

import json

import numpy as np
import pytest
import torch

import families
import mixtures
import quantized
from noria.checkpoint.convert import convert
from noria.errors import InputError
from quantized import FLOAT8, FP8, INT4, compressed
from test_quantized import assert_same_logits, encoded_of

QWEN3_VL = mixtures.QWEN3_VL_MOE | {"hidden_size": 64, "moe_intermediate_size": 32}
LLAMA4 = mixtures.LLAMA4 | {"hidden_size": 64, "intermediate_size": 32}
MISTRAL4 = mixtures.MISTRAL4 | {"hidden_size": 64, "moe_intermediate_size": 32}
STATIC = FP8 | {"activation_scheme": "static", "weight_block_size": None}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}


def of_one(weights):
    """[X, outputs, 1] of weights [X, outputs, inputs]."""
    return np.full((*weights.shape[:2], 1), np.abs(weights).max() / 448)


def of_an_expert(weights):
    return np.broadcast_to(np.abs(weights).max((1, 2), keepdims=True) / 448, (*weights.shape[:2], 1))


def of_halves(weights):
    return np.concatenate([of_an_expert(half) for half in np.split(weights, 2, axis=1)], axis=1)


def of_outputs(weights):
    return np.abs(weights).max(2, keepdims=True) / 448


# What a maker's directory has: config, settings, how names of scales end, whether outputs lie first, scales, and how they lie.
CASES = {
    "Mistral's, one an expert": (MISTRAL4, STATIC, "_scale_inv", True, of_an_expert, lambda its: its[:, :1]),
    "one an expert, flat, turned": (QWEN3_VL, STATIC, "_scale_inv", False, of_an_expert, lambda its: its[:, 0, 0]),
    "transformers', gates and ups": (
        QWEN3_VL,
        STATIC,
        "_scale_inv",
        True,
        of_halves,
        lambda its: its[:, :: its.shape[1] // 2],
    ),
    "one for all": (QWEN3_VL, STATIC, "_scale_inv", True, of_one, lambda its: its[:1, 0, 0]),
    "ModelOpt's, one for all": (LLAMA4, MODELOPT, "_weight_scale", False, of_one, lambda its: its[0, 0, 0]),
    "fbgemm's, one an output": (LLAMA4, {"quant_method": "fbgemm_fp8"}, "_scale", False, of_outputs, lambda its: its),
}


def packed(folder, case):
    """Writes a directory of random numbers, whose experts are in FP8 as the case has them; the state that it stands for."""
    config, settings, ending, outputs_first, scales_of, lie = CASES[case]
    families.save(config, folder)
    stored = quantized.load_file(folder / "model.safetensors")
    state = {name: tensor.double() for name, tensor in stored.items()}
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        turned = config is not MISTRAL4  # as the family has it
        weights = state[name].numpy()
        weights = weights.transpose(0, 2, 1) if turned else weights
        halves = scales_of is of_halves and "down" in name
        scales = (of_an_expert if halves else scales_of)(weights).astype(np.float32)
        codes = quantized.to_e4m3(weights / scales)
        found = quantized.e4m3(codes) * scales.astype(np.float64)
        state[name] = torch.from_numpy(found.transpose(0, 2, 1) if turned else found).contiguous()
        lying = codes if outputs_first else codes.transpose(0, 2, 1)
        stored[name] = quantized.float8(np.ascontiguousarray(lying))
        how = (lambda its: its[:, :1]) if halves else lie
        stored[name + ending] = torch.from_numpy(np.ascontiguousarray(how(scales)))
        if settings is STATIC:
            stored[f"{name}_activation_scale"] = torch.ones(len(weights))
        elif settings is MODELOPT:
            stored[f"{name}_input_scale"] = torch.tensor(0.5)
    quantized.save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return config, state


@pytest.mark.parametrize("case", CASES)
def test_experts_in_one_tensor_with_scales_of_no_blocks_give_the_logits_of_their_numbers(tmp_path, case):
    config, state = packed(tmp_path / "hf", case)
    made = convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    assert encoded_of(tmp_path / "model.h5") == {("experts", "fp8_channel")}
    assert any("rounds activations" in note for note in made.notes) or "fbgemm" in case
    assert_same_logits(tmp_path / "model.h5", config, state)


def test_scales_that_fit_no_matrix_are_refused_by_their_name(tmp_path):
    packed(tmp_path / "hf", "Mistral's, one an expert")
    stored = quantized.load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scale_inv"
    for shape, words in (((8, 3, 1), "one scale a matrix of [64, 32] is needed"), ((7, 1, 1), "as many matrices")):
        quantized.save_file(stored | {name: torch.ones(shape)}, tmp_path / "hf" / "model.safetensors")
        with pytest.raises(InputError) as error:
            convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
        assert repr(name) in str(error.value) and words in str(error.value)


def test_experts_in_one_tensor_of_modelopt_in_four_bits_are_refused_by_what_they_are(tmp_path):
    packed(tmp_path / "hf", "ModelOpt's, one for all")
    stored = quantized.load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    stored[name] = torch.zeros(8, 32, 64, dtype=torch.uint8)
    quantized.save_file(stored, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InputError, match=f"'{name}' is 'uint8': of experts in one tensor Noria reads FP8"):
        convert(tmp_path / "hf", tmp_path / "model.h5", "float64")


# What programs make that quantize each expert as modules of its own.
APART = {
    "compressed-tensors, FP8": (
        QWEN3_VL,
        quantized.fp8_channel(),
        "fp8_channel",
        compressed("float-quantized", **FLOAT8),
    ),
    "compressed-tensors, 4 bits": (
        QWEN3_VL,
        quantized.packed(4, 32, True),
        "int4",
        compressed("pack-quantized", strategy="group", group_size=32, **INT4),
    ),
    "FP8 by blocks": (MISTRAL4, quantized.fp8_block(16, 16), "fp8_block", FP8 | {"weight_block_size": [16, 16]}),
    "of Llama 4, FP8": (LLAMA4, quantized.fp8_channel(), "fp8_channel", compressed("float-quantized", **FLOAT8)),
    "in full precision": (QWEN3_VL, lambda module, weight: ({"weight": torch.from_numpy(weight)}, weight), "", None),
}


def apart(folder, case):
    """Writes a directory of random numbers, with the experts of each layer in modules of their own; its state."""
    config, pack, _, settings = APART[case]
    families.save(config, folder)
    stored = quantized.load_file(folder / "model.safetensors")
    state = {name: tensor.double() for name, tensor in stored.items()}
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        turned, weights = config is not MISTRAL4, stored.pop(name).double().numpy()
        found, (top, _, what) = [], name.rpartition(".")
        modules = ("gate_proj", "up_proj") if what == "gate_up_proj" else ("down_proj",)
        for expert, whole in enumerate(weights.transpose(0, 2, 1) if turned else weights):
            parts = []
            for module, weight in zip(modules, np.split(whole, len(modules)), strict=True):
                packed, numbers = pack(module, weight)
                stored |= {f"{top}.{expert}.{module}.{key}": its.contiguous() for key, its in packed.items()}
                parts.append(numbers)
            found.append(np.concatenate(parts))
        state[name] = torch.from_numpy(np.stack(found).transpose(0, 2, 1) if turned else np.stack(found)).contiguous()
    quantized.save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return config, state


@pytest.mark.parametrize("case", APART)
def test_a_tensor_an_expert_is_read_where_the_family_publishes_one_of_all(tmp_path, case):
    config, state = apart(tmp_path / "hf", case)
    convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
    encoding = APART[case][2]
    assert encoded_of(tmp_path / "model.h5") == ({("experts", encoding)} if encoding else set())
    assert_same_logits(tmp_path / "model.h5", config, state)


def test_an_expert_without_its_tensor_is_named(tmp_path):
    apart(tmp_path / "hf", "compressed-tensors, FP8")
    stored = quantized.load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj"
    for ending in ("weight", "weight_scale"):
        stored.pop(f"{name}.{ending}")
    quantized.save_file(stored, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InputError, match=f"'{name}' is not"):
        convert(tmp_path / "hf", tmp_path / "model.h5", "float64")
