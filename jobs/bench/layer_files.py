"""Directories with random weights in the formats of large mixtures: layers of DeepSeek-V3 (FP8 in blocks of 128 x 128),
gpt-oss-120b (MXFP4) and Kimi K2.5 (whole numbers of 4 bits in groups of 32, with its text_config), at their widths.

Made by the formats' definitions, without Noria.
"""

import json

import numpy as np
import torch
from large_shapes import DEEPSEEK_V3, GPT_OSS_120B, KIMI_K2
from safetensors.torch import save_file

VOCAB, SHARD = 1024, 16  # token ids; experts in a file
SHAPES = ("deepseek-v3", "gpt-oss", "kimi-k2.5")


def directory_of(name, layers, experts):
    """config.json, the shards, and how many experts a layer has: `experts`, or (None) all of the model's."""
    random, cut = (
        np.random.default_rng(0),
        {"num_hidden_layers": layers, "vocab_size": VOCAB, "tie_word_embeddings": False},
    )
    if name == "gpt-oss":
        windows = {"layer_types": (["sliding_attention", "full_attention"] * layers)[:layers]}
        config = GPT_OSS_120B | cut | windows | ({"num_local_experts": experts} if experts else {})
        return config, gpt_oss_files(random, config), config["num_local_experts"]
    cut |= {"first_k_dense_replace": 0} | (
        {"n_routed_experts": experts, "n_group": 1, "topk_group": 1} if experts else {}
    )
    if name == "deepseek-v3":
        config = DEEPSEEK_V3 | cut
        return config, latent_files(random, config, "", fp8, fp8), config["n_routed_experts"]
    text = KIMI_K2 | cut
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text}
    return config, latent_files(random, text, "language_model.", plain, int4), text["n_routed_experts"]


def write_directory(folder, config, files):
    folder.mkdir()
    weight_map, written = {}, 0
    for number, tensors in enumerate(files):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        written += (folder / name).stat().st_size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return written


def fp8(random, outputs, inputs):
    codes = random.integers(0, 256, (outputs, inputs), np.uint8)
    codes[(codes & 127) == 127] = 0  # no number
    scales = random.random((-(-outputs // 128), -(-inputs // 128)), np.float32) + 1e-3
    return {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "weight_scale_inv": torch.from_numpy(scales)}


def int4(random, outputs, inputs):
    codes = random.integers(-(2**31), 2**31, (outputs, inputs // 8), np.int64).astype(np.int32)
    scales = torch.from_numpy(random.random((outputs, inputs // 32), np.float32) + 1e-3).bfloat16()
    shape = torch.tensor([outputs, inputs])
    return {"weight_packed": torch.from_numpy(codes), "weight_scale": scales, "weight_shape": shape}


def plain(random, outputs, inputs):
    return {"weight": torch.from_numpy(random.random((outputs, inputs), np.float32)).bfloat16()}


def named(prefix, tensors):
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def ends(random, prefix, hidden):
    tensors = named(f"{prefix}model.embed_tokens", plain(random, VOCAB, hidden))
    tensors |= named(f"{prefix}lm_head", plain(random, VOCAB, hidden))
    return tensors | {f"{prefix}model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}


def latent_files(random, config, prefix, attention, expert):
    """Shards of a model of latent attention; `attention` and `expert` make matrices."""
    yield ends(random, prefix, config["hidden_size"])
    hidden, inner, heads = config["hidden_size"], config["moe_intermediate_size"], config["num_attention_heads"]
    ups = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes = {
        "q_a_proj": (1536, hidden),
        "q_b_proj": (heads * 192, 1536),
        "kv_a_proj_with_mqa": (576, hidden),
        "kv_b_proj": (heads * 256, 512),
        "o_proj": (hidden, heads * 128),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
    for layer in range(config["num_hidden_layers"]):
        top = f"{prefix}model.layers.{layer}"
        tensors = {f"{top}.{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
        tensors |= named(f"{top}.mlp.gate", plain(random, config["n_routed_experts"], hidden))
        tensors[f"{top}.mlp.gate.e_score_correction_bias"] = torch.zeros(config["n_routed_experts"])
        for name, shape in shapes.items():
            tensors |= named(f"{top}.self_attn.{name}", attention(random, *shape))
        for name, shape in ups.items():
            tensors |= named(f"{top}.mlp.shared_experts.{name}", attention(random, *shape))
        for number in range(config["n_routed_experts"]):
            for name, shape in ups.items():
                tensors |= named(f"{top}.mlp.experts.{number}.{name}", expert(random, *shape))
            if number % SHARD == SHARD - 1 or number == config["n_routed_experts"] - 1:
                yield tensors
                tensors = {}


def gpt_oss_files(random, config):
    yield ends(random, "", 2880)
    heads = {"q_proj": (4096, 2880), "k_proj": (512, 2880), "v_proj": (512, 2880), "o_proj": (2880, 4096)}
    experts = config["num_local_experts"]
    for layer in range(config["num_hidden_layers"]):
        top, tensors = f"model.layers.{layer}", {}
        for name, shape in {f"self_attn.{name}": shape for name, shape in heads.items()}.items():
            tensors |= named(f"{top}.{name}", plain(random, *shape))
            tensors[f"{top}.{name}.bias"] = torch.zeros(shape[0], dtype=torch.bfloat16)
        tensors |= named(f"{top}.mlp.router", plain(random, experts, 2880))
        tensors[f"{top}.mlp.router.bias"] = torch.zeros(experts, dtype=torch.bfloat16)
        tensors[f"{top}.self_attn.sinks"] = torch.zeros(64, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{top}.{name}.weight"] = torch.ones(2880, dtype=torch.bfloat16)
        for name, outputs in (("gate_up_proj", 5760), ("down_proj", 2880)):
            place = f"{top}.mlp.experts.{name}"
            blocks = random.integers(0, 256, (experts, outputs, 90, 16), np.uint8)
            scales = random.integers(110, 130, (experts, outputs, 90), np.uint8)
            tensors |= {f"{place}_blocks": torch.from_numpy(blocks), f"{place}_scales": torch.from_numpy(scales)}
            tensors[f"{place}_bias"] = torch.zeros(experts, outputs, dtype=torch.bfloat16)
        yield tensors
