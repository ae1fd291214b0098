"""Tiny models as Hugging Face directories, written by hand: tensor names and files as transformers saves them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "hidden_size": 32,
    "ffn_dim": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 30,
    "tie_word_embeddings": True,
}


def state(config: dict, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the names that transformers gives them; a tied lm_head is not stored."""
    shapes = _llama_shapes(config) if config["model_type"] == "llama" else _opt_shapes(config)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def _llama_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    size, inner = config["hidden_size"], config["intermediate_size"]
    keys = size * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], size), "model.norm.weight": (size,)}
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (size, size),
            "self_attn.k_proj": (keys, size),
            "self_attn.v_proj": (keys, size),
            "self_attn.o_proj": (size, size),
            "mlp.gate_proj": (inner, size),
            "mlp.up_proj": (inner, size),
            "mlp.down_proj": (size, inner),
            "input_layernorm": (size,),
            "post_attention_layernorm": (size,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def _opt_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    size, inner, top = config["hidden_size"], config["ffn_dim"], "model.decoder"
    shapes = {
        f"{top}.embed_tokens.weight": (config["vocab_size"], size),
        f"{top}.embed_positions.weight": (config["max_position_embeddings"] + 2, size),
        f"{top}.final_layer_norm.weight": (size,),
        f"{top}.final_layer_norm.bias": (size,),
    }
    for layer in range(config["num_hidden_layers"]):
        parts = {f"self_attn.{name}_proj": (size, size) for name in ("q", "k", "v", "out")}
        parts |= {
            "fc1": (inner, size),
            "fc2": (size, inner),
            "self_attn_layer_norm": (size,),
            "final_layer_norm": (size,),
        }
        for name, shape in parts.items():
            shapes[f"{top}.layers.{layer}.{name}.weight"] = shape
            shapes[f"{top}.layers.{layer}.{name}.bias"] = shape[:1]
    return shapes


def write_directory(folder: Path, config: dict, tensors: dict, num_shards: int = 1, torch_files: bool = False) -> Path:
    """A Hugging Face directory: config.json and the tensors in one or several weights files, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("pytorch_model", "bin") if torch_files else ("model", "safetensors")
    save = torch.save if torch_files else save_file
    if num_shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return folder
    weight_map, names = {}, sorted(tensors)
    for shard in range(num_shards):
        file = f"{stem}-{shard + 1:05d}-of-{num_shards:05d}.{suffix}"
        mine = names[shard::num_shards]
        save({name: tensors[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def fused(config: dict, tensors: dict) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold, by dataset path: written out by hand, family by family."""
    tied = config["tie_word_embeddings"]
    if config["model_type"] == "llama":
        tokens = tensors["model.embed_tokens.weight"]
        values = {"embed/tokens": tokens, "head/norm": tensors["model.norm.weight"]}
        parts = {
            "attention_norm": ["input_layernorm.weight"],
            "qkv": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            "out": ["self_attn.o_proj.weight"],
            "mlp_norm": ["post_attention_layernorm.weight"],
            "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            "down": ["mlp.down_proj.weight"],
        }
        top = "model.layers"
    else:
        tokens, top = tensors["model.decoder.embed_tokens.weight"], "model.decoder.layers"
        values = {
            "embed/tokens": tokens,
            "embed/positions": tensors["model.decoder.embed_positions.weight"],
            "head/norm": tensors["model.decoder.final_layer_norm.weight"],
            "head/norm_bias": tensors["model.decoder.final_layer_norm.bias"],
        }
        parts = {}
        for name, modules in {
            "attention_norm": ["self_attn_layer_norm"],
            "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "out": ["self_attn.out_proj"],
            "mlp_norm": ["final_layer_norm"],
            "up": ["fc1"],
            "down": ["fc2"],
        }.items():
            parts[name] = [f"{module}.weight" for module in modules]
            parts[f"{name}_bias"] = [f"{module}.bias" for module in modules]
    values["head/lm_head"] = tokens if tied else tensors["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        for name, modules in parts.items():
            values[f"layers/{layer:04d}/{name}"] = torch.cat([tensors[f"{top}.{layer}.{module}"] for module in modules])
    return values
