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
}
