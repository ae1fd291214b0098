"""Models in the forms in which others publish quantized weights: small directories, packed here by numpy alone.

`PACK[form](module, weight)` gives the tensors of a module as the form's makers name and pack them, and the weight [outputs,
inputs] in float64 that they stand for. The layouts are held to what the makers' own programs write by test_quantized.py.
Knows nothing of Noria.
"""

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file  # noqa: F401 - tests write such files again

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
MODELS = {
    "llama": SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "mistral": SIZES | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 9},
    "qwen3": SIZES | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": SIZES
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}


# ---- models in full precision


def dense(config, seed=0):
    """Weights in float64 by their names, of bfloat16 numbers; and the modules that a form quantizes."""
    random, size, inner = np.random.default_rng(seed), config["hidden_size"], config["intermediate_size"]
    heads, keys = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
    weights, linear = {}, []

    def draw(name, *shape, width=0.2):
        weights[name] = bfloat16(random.standard_normal(shape) * width + (1 if "norm" in name else 0))

    draw("model.embed_tokens.weight", config["vocab_size"], size)
    draw("lm_head.weight", config["vocab_size"], size)
    draw("model.norm.weight", size)
    for layer in range(config["num_hidden_layers"]):
        top = f"model.layers.{layer}"
        its = {"q_proj": (heads, size), "k_proj": (keys, size), "v_proj": (keys, size), "o_proj": (size, heads)}
        modules = {f"self_attn.{name}": shape for name, shape in its.items()}
        places = {"mlp": inner}
        if "num_experts" in config:
            draw(f"{top}.mlp.gate.weight", config["num_experts"], size)
            places = {f"mlp.experts.{x}": config["moe_intermediate_size"] for x in range(config["num_experts"])}
        for place, width in places.items():
            modules |= {f"{place}.gate_proj": (width, size), f"{place}.up_proj": (width, size)}
            modules[f"{place}.down_proj"] = (size, width)
        norms = {"input_layernorm": size, "post_attention_layernorm": size}
        norms |= (
            dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), config["head_dim"])
            if "qwen3" in config["model_type"]
            else {}
        )
        for name, number in norms.items():
            draw(f"{top}.{name}.weight", number)
        for name, shape in modules.items():
            draw(f"{top}.{name}.weight", *shape)
            linear.append(f"{top}.{name}")
    return weights, linear


def bfloat16(numbers):
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float64)).bfloat16().double().numpy()


def write(folder, config, settings, pack, plain=(), **changes):
    """A directory with these settings as its quantization_config; gives the dense weights that its tensors stand for.

    `pack` packs every matrix but those in `plain`. `changes`: tensors that are put in place of others, None takes out.
    """
    weights, linear = dense(config)
    tensors = {}
    for name, weight in list(weights.items()):
        module = name.removesuffix(".weight")
        if module in linear and module not in plain:
            packed, weights[name] = pack(module, weight)
            tensors |= {f"{module}.{ending}": value for ending, value in packed.items()}
        else:
            tensors[name] = torch.from_numpy(weight).bfloat16()
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    said = {"quantization_config": settings} if settings else {}
    (folder / "config.json").write_text(json.dumps(config | said))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return weights


# ---- codes


def e4m3(codes):
    """The numbers of e4m3 codes, from their bits: 1 sign, 4 of exponent with bias 7, 3 of mantissa."""
    codes = np.asarray(codes, np.int64)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where((codes & 127) == 127, np.nan, np.where(codes & 128, -size, size))


def nearest(numbers, values):
    """The index of the nearest of `values` for each number."""
    order = np.argsort(values, kind="stable")
    middles = (values[order][1:] + values[order][:-1]) / 2
    return order[np.searchsorted(middles, numbers)]


E4M3 = np.nan_to_num(e4m3(np.arange(256)), nan=1e9)


def to_e4m3(numbers):
    codes = np.r_[0:127, 129:255]
    return codes[nearest(np.clip(numbers, -448, 448), E4M3[codes])].astype(np.uint8)


def blocks(weight, rows, columns):
    """The largest absolute number of each block."""
    found = np.zeros((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)))
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            its = weight[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            found[row, column] = np.abs(its).max()
    return found


def spread(scales, shape, rows, columns):
    return np.repeat(np.repeat(scales, rows, 0)[: shape[0]], columns, 1)[:, : shape[1]]


def float8(codes):
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


# ---- FP8


def fp8_block(rows=128, columns=128, ending="weight_scale_inv", dtype=torch.float32):
    """e4m3 codes with a scale a block; dtype float8_e8m0fnu, or uint8 for its bytes: scales are powers of two."""
    exponents = dtype in (torch.uint8, torch.float8_e8m0fnu)

    def pack(module, weight):
        scales = blocks(weight, rows, columns) / 448
        if exponents:
            stored = np.ceil(np.log2(scales)).astype(np.int64) + 127
            scales, kept = 2.0 ** (stored - 127.0), torch.from_numpy(stored.astype(np.uint8)).view(dtype)
        else:
            kept = torch.from_numpy(scales).to(dtype)
            scales = kept.double().numpy()
        wide = spread(scales, weight.shape, rows, columns)
        codes = to_e4m3(weight / wide)
        return {"weight": float8(codes), ending: kept}, e4m3(codes) * wide

    return pack


def fp8_whole(ending="weight_scale_inv", shape=(), dtype=torch.float32, more=()):
    """One scale a tensor."""

    def pack(module, weight):
        kept = torch.tensor(np.abs(weight).max() / 448).to(dtype)
        codes = to_e4m3(weight / kept.double().numpy())
        packed = {"weight": float8(codes), ending: kept.reshape(shape)}
        return packed | {name: torch.tensor(0.5) for name in more}, e4m3(codes) * kept.double().numpy()

    return pack


def fp8_channel(ending="weight_scale", dtype=torch.float32, flat=False):
    """A scale an output."""

    def pack(module, weight):
        kept = torch.from_numpy(np.abs(weight).max(1, keepdims=True) / 448).to(dtype)
        codes = to_e4m3(weight / kept.double().numpy())
        return {"weight": float8(codes), ending: kept[:, 0] if flat else kept}, e4m3(codes) * kept.double().numpy()

    return pack


# ---- floats of 4 bits

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def pairs(codes):
    """Codes of 4 bits two a byte, the first in the low half."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def to_e2m1(numbers):
    positive = nearest(np.abs(np.clip(numbers, -6, 6)), E2M1[:8])
    return (positive | np.where(numbers < 0, 8, 0)).astype(np.uint8)


def mxfp4_codes(weight):
    """Codes, exponents + 127 of groups of 32, and the numbers that they stand for."""
    exponents = np.floor(np.log2(np.abs(weight).reshape(len(weight), -1, 32).max(2))).astype(np.int64) - 2
    wide = 2.0 ** np.repeat(exponents, 32, 1)
    codes = to_e2m1(weight / wide)
    return codes, (exponents + 127).astype(np.uint8), E2M1[codes] * wide


def mxfp4(codes_name="weight_packed", scale_name="weight_scale", codes_dtype=torch.uint8, scale_dtype=torch.uint8):
    def pack(module, weight):
        codes, exponents, found = mxfp4_codes(weight)
        packed = {codes_name: torch.from_numpy(pairs(codes)).view(codes_dtype)}
        return packed | {scale_name: torch.from_numpy(exponents).view(scale_dtype)}, found

    return pack


def nvfp4(codes_name="weight_packed", whole_name="weight_global_scale", divides=True, more=()):
    def pack(module, weight):
        whole = np.float32(np.abs(weight).max() / (6 * 448))
        whole, factor = (
            (np.float32(1 / whole), 1 / np.float64(np.float32(1 / whole))) if divides else (whole, np.float64(whole))
        )
        scales = to_e4m3(np.abs(weight).reshape(len(weight), -1, 16).max(2) / 6 / factor)
        wide = np.repeat(e4m3(scales), 16, 1) * factor
        codes = to_e2m1(weight / np.where(wide > 0, wide, 1))
        packed = {codes_name: torch.from_numpy(pairs(codes)), "weight_scale": float8(scales)}
        packed |= {whole_name: torch.tensor([whole]) if divides else torch.tensor(whole)}
        return packed | {name: torch.tensor(0.5) for name in more}, E2M1[codes] * wide

    return pack


def both(first, second, is_second):
    """The second way for modules of which `is_second` is true."""

    def pack(module, weight):
        return (second if is_second(module) else first)(module, weight)

    return pack


# ---- whole numbers


def integers(weight, bits, group, symmetric, dtype, groups_of=None):
    """Codes from 0 on, scales and zeros [outputs, groups], and the numbers that they stand for; `groups_of`: the group of
    each input."""
    inputs = weight.shape[1]
    groups_of = np.arange(inputs) // (inputs if group == -1 else group) if groups_of is None else groups_of
    number, top = groups_of.max() + 1, 2**bits - 1
    least, most = (
        np.stack([how(weight[:, groups_of == one], 1) for one in range(number)], 1) for how in (np.min, np.max)
    )
    if symmetric:
        scales, zeros = np.maximum(np.abs(least), np.abs(most)) * 2 / top, np.full(least.shape, 2 ** (bits - 1))
    else:
        least, most = np.minimum(least, 0), np.maximum(most, 0)
        scales, zeros = (most - least) / top, np.round(-least / ((most - least) / top))
    kept = torch.from_numpy(scales).to(dtype)
    scales, zeros = kept.double().numpy(), np.clip(zeros, 0, top).astype(np.int64)
    codes = np.clip(np.round(weight / scales[:, groups_of]) + zeros[:, groups_of], 0, top).astype(np.int64)
    return codes, kept, zeros, (codes - zeros[:, groups_of]) * scales[:, groups_of]


def words(codes, bits, axis):
    """Codes along an axis in words of 32 bits, the lowest bits first, zeros behind the last."""
    codes, each = np.moveaxis(codes, axis, -1), 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    codes = codes.reshape(*codes.shape[:-1], -1, each).astype(np.uint32)
    found = (codes << (np.arange(each, dtype=np.uint32) * bits)).sum(-1, dtype=np.uint32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(found, -1, axis)).view(np.int32))


def shuffled(module, inputs, group):
    """A group for each input, in an order of the module's own, as activations might give it."""
    random = np.random.default_rng(sum(module.encode()))
    return random.permutation(inputs) // group


def packed(bits, group, symmetric, dtype=torch.bfloat16, ordered=False):
    """compressed-tensors, pack-quantized."""

    def pack(module, weight):
        groups_of = shuffled(module, weight.shape[1], group) if ordered else None
        codes, scales, zeros, found = integers(weight, bits, group, symmetric, dtype, groups_of)
        tensors = {"weight_packed": words(codes, bits, 1), "weight_scale": scales}
        tensors |= {"weight_shape": torch.tensor(weight.shape)}
        tensors |= {} if symmetric else {"weight_zero_point": words(zeros, bits, 0)}
        return tensors | ({"weight_g_idx": torch.from_numpy(groups_of).int()} if ordered else {}), found

    return pack


def eight_bits(symmetric=True, whole=False, group=-1):
    """compressed-tensors, int-quantized."""

    def pack(module, weight):
        if whole:
            scale = torch.tensor(np.abs(weight).max() / 127).to(torch.bfloat16)
            codes = np.round(weight / scale.double().item())
            return {
                "weight": torch.from_numpy(codes).to(torch.int8),
                "weight_scale": scale,
            }, codes * scale.double().item()
        codes, scales, zeros, found = integers(weight, 8, group, symmetric, torch.bfloat16)
        tensors = {"weight": torch.from_numpy(codes - 128).to(torch.int8), "weight_scale": scales}
        return tensors | (
            {} if symmetric else {"weight_zero_point": torch.from_numpy(zeros - 128).to(torch.int8)}
        ), found

    return pack


def gptq(bits, group, symmetric, less_one=True, ordered=False, index=True, bias=False):
    """qweight, qzeros, scales, g_idx."""

    def pack(module, weight):
        inputs = weight.shape[1]
        groups_of = (
            shuffled(module, inputs, group) if ordered else np.arange(inputs) // (inputs if group == -1 else group)
        )
        codes, scales, zeros, found = integers(weight, bits, group, symmetric, torch.float16, groups_of)
        qzeros = words(zeros, bits, 0).T
        qzeros = qzeros - (0x11111111 if bits == 4 else 0x01010101) if less_one else qzeros
        tensors = {"qweight": words(codes, bits, 1).T, "qzeros": qzeros, "scales": scales.T}
        tensors |= {"g_idx": torch.from_numpy(groups_of).int()} if index else {}
        return tensors | ({"bias": torch.zeros(len(weight), dtype=torch.float16)} if bias else {}), found

    return pack


def awq(group):
    """qweight, qzeros, scales of the layout GEMM."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def laid(codes):
        return words(codes.T.reshape(codes.shape[1], -1, 8)[:, :, order].reshape(codes.shape[1], -1), 4, 1)

    def pack(module, weight):
        codes, scales, zeros, found = integers(weight, 4, group, False, torch.float16)
        return {"qweight": laid(codes), "qzeros": laid(zeros), "scales": scales.T}, found

    return pack


def compressed(form, activations=None, **weights):
    """What config.json says of a directory of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True} | weights, "input_activations": activations}
    settings = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "kv_cache_scheme": None}
    return settings | {"config_groups": {"group_0": group}, "quantization_status": "compressed"}


INT4 = {"num_bits": 4, "type": "int"}
INT8 = {"num_bits": 8, "type": "int"}
FLOAT8 = {"num_bits": 8, "type": "float"}
FLOAT4 = {"num_bits": 4, "type": "float"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
WHOLE = FP8 | {"weight_block_size": None, "activation_scheme": "static"}
# Of each form: what its config says, and how it packs a matrix.
FORMS = {
    "fp8 in blocks": (FP8, fp8_block()),
    "fp8 in small blocks, scales in bfloat16": (
        FP8 | {"weight_block_size": [32, 48]},
        fp8_block(32, 48, dtype=torch.bfloat16),
    ),
    "fp8 in blocks, e8m0": (FP8 | {"scale_fmt": "ue8m0"}, fp8_block(ending="scale", dtype=torch.float8_e8m0fnu)),
    "fp8 in blocks, bytes of e8m0": (FP8 | {"scale_fmt": "ue8m0"}, fp8_block(dtype=torch.uint8)),
    "fp8 with a scale a tensor": (WHOLE, fp8_whole(more=("activation_scale",))),
    "fp8 with a scale a tensor, as vLLM has it": (
        WHOLE | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        fp8_whole("weight_scale", (1,), torch.bfloat16, ("input_scale",)),
    ),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8_channel()),
    "fp8 in blocks, experts in fp4": (
        FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"},
        both(
            fp8_block(ending="scale", dtype=torch.float8_e8m0fnu),
            mxfp4("weight", "scale", torch.int8, torch.float8_e8m0fnu),
            lambda module: "mlp" in module,
        ),
    ),
    "compressed-tensors, floats by channel": (
        compressed("float-quantized", {"num_bits": 8, "type": "float", "dynamic": True}, strategy="channel", **FLOAT8),
        fp8_channel(dtype=torch.bfloat16),
    ),
    "compressed-tensors, floats by tensor": (
        compressed("float-quantized", strategy="tensor", **FLOAT8),
        fp8_whole("weight_scale", (1,), torch.bfloat16, ("input_scale",)),
    ),
    "compressed-tensors, floats by block": (
        compressed("float-quantized", strategy="block", block_structure=[128, 128], **FLOAT8),
        fp8_block(ending="weight_scale", dtype=torch.bfloat16),
    ),
    "compressed-tensors, bytes by channel": (compressed("int-quantized", strategy="channel", **INT8), eight_bits()),
    "compressed-tensors, bytes by channel with zeros": (
        compressed("int-quantized", strategy="channel", symmetric=False, **INT8),
        eight_bits(False),
    ),
    "compressed-tensors, bytes by tensor": (
        compressed("int-quantized", strategy="tensor", **INT8),
        eight_bits(whole=True),
    ),
    "compressed-tensors, 4 bits by groups": (
        compressed("pack-quantized", strategy="group", group_size=32, **INT4),
        packed(4, 32, True),
    ),
    "compressed-tensors, 4 bits by groups with zeros": (
        compressed("pack-quantized", strategy="group", group_size=16, symmetric=False, **INT4),
        packed(4, 16, False, torch.float16),
    ),
    "compressed-tensors, 4 bits by channel": (
        compressed("pack-quantized", strategy="channel", **INT4),
        packed(4, -1, True),
    ),
    "compressed-tensors, 4 bits by ordered groups": (
        compressed("pack-quantized", strategy="group", group_size=32, actorder="group", **INT4),
        packed(4, 32, True, ordered=True),
    ),
    "compressed-tensors, 8 bits by groups": (
        compressed("pack-quantized", strategy="group", group_size=32, **INT8),
        packed(8, 32, True, torch.float32),
    ),
    "compressed-tensors, 8 bits by ordered groups with zeros": (
        compressed("pack-quantized", strategy="group", group_size=32, symmetric=False, actorder="group", **INT8),
        packed(8, 32, False, ordered=True),
    ),
    "compressed-tensors, nvfp4": (
        compressed("nvfp4-pack-quantized", strategy="tensor_group", group_size=16, **FLOAT4),
        nvfp4(more=("input_global_scale",)),
    ),
    "compressed-tensors, mxfp4": (
        compressed("mxfp4-pack-quantized", strategy="group", group_size=32, **FLOAT4),
        mxfp4(),
    ),
    "gptq": (GPTQ, gptq(4, 32, True, bias=True)),
    "gptq without g_idx": (GPTQ | {"checkpoint_format": "gptq"}, gptq(4, 32, True, index=False)),
    "gptq with zeros": (GPTQ | {"sym": False}, gptq(4, 32, False)),
    "gptq with zeros as they are": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, gptq(4, 32, False, False)),
    "gptq in the order of activations": (GPTQ | {"desc_act": True}, gptq(4, 32, True, ordered=True)),
    "gptq of 8 bits": (GPTQ | {"bits": 8, "group_size": -1}, gptq(8, -1, True)),
    "gptq of 8 bits with zeros": (
        GPTQ | {"bits": 8, "sym": False, "desc_act": True},
        gptq(8, 32, False, ordered=True),
    ),
    "awq": (AWQ, awq(32)),
    "awq by rows": ({"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "version": "GEMM"}, awq(-1)),
    "modelopt nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        nvfp4("weight", "weight_scale_2", False, ("input_scale",)),
    ),
    "modelopt fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        fp8_whole("weight_scale", more=("input_scale",)),
    ),
    "modelopt, each layer by itself": (
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"x": {"quant_algo": "FP8"}}},
        both(
            fp8_channel(flat=True),
            nvfp4("weight", "weight_scale_2", False),
            lambda module: "mlp" in module,
        ),
    ),
}
