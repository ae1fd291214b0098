"""A tiny random model of every family, made and saved by transformers itself. Knows nothing of Noria."""

import copy
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"

VOCAB = 97
_ROTARY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def rotary(model_type: str, architecture: str, **keys) -> dict:
    return _ROTARY | {"model_type": model_type, "architectures": [architecture]} | keys


LLAMA = rotary("llama", "LlamaForCausalLM")
MISTRAL = rotary("mistral", "MistralForCausalLM", sliding_window=9)
QWEN2 = rotary("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True)
QWEN3 = rotary("qwen3", "Qwen3ForCausalLM", head_dim=16)
MIXTRAL = rotary("mixtral", "MixtralForCausalLM", num_local_experts=5, num_experts_per_tok=2, intermediate_size=24)
QWEN3_MOE = rotary(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    norm_topk_prob=True,
)
PHI3 = rotary("phi3", "Phi3ForCausalLM", sliding_window=20, pad_token_id=0)
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
}
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": True,
    "activation_function": "relu",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 11}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# Numbers of their own for each of the four frequencies of a head; the long ones must never be used.
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [4.0, 4.0, 8.0, 9.0]}
LONG_PHI3 = {"original_max_position_embeddings": 100, "max_position_embeddings": 800, "sliding_window": None}
GALACTICA = {"activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False}
CONFIGS = {
    "llama": LLAMA,
    "llama without groups": LLAMA | {"num_key_value_heads": 4},
    "llama with one key head": LLAMA | {"num_key_value_heads": 1},
    "llama tied": LLAMA | {"tie_word_embeddings": True},
    "llama with biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama with its own head dim": LLAMA | {"head_dim": 12},
    "llama linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama dynamic": LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama 3": LLAMA | {"rope_theta": 500.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    "llama 3 as written now": LLAMA
    | {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 500.0, "original_max_position_embeddings": 32}},
    "llama yarn": LLAMA | {"rope_scaling": YARN},
    "llama yarn with its own numbers": LLAMA
    | {"rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 4, "beta_slow": 2, "truncate": False}},
    "qwen2 yarn with two scales": QWEN2 | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4}},
    "mistral": MISTRAL,
    "mistral without a window": MISTRAL | {"sliding_window": None},
    "qwen2": QWEN2,
    "qwen2 with windows in its upper layers": QWEN2 | SLIDING | {"max_window_layers": 1, "tie_word_embeddings": False},
    "qwen2 with windows that it does not use": QWEN2 | {"sliding_window": 5, "max_window_layers": 0},
    "qwen3": QWEN3,
    "qwen3 tied with biases": QWEN3 | {"tie_word_embeddings": True, "attention_bias": True},
    "qwen3 with layer types": QWEN3
    | SLIDING
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mixtral": MIXTRAL,
    "mixtral with a window": MIXTRAL | {"sliding_window": 7, "num_experts_per_tok": 1},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe with dense layers": QWEN3_MOE | {"mlp_only_layers": [1], "norm_topk_prob": False},
    "qwen3_moe with every second layer dense": QWEN3_MOE | SLIDING | {"decoder_sparse_step": 2},
    "phi3": PHI3,
    "phi3 partly rotated": PHI3 | {"partial_rotary_factor": 0.75, "sliding_window": None, "tie_word_embeddings": True},
    "phi3 longrope": PHI3 | LONG_PHI3 | {"rope_scaling": LONGROPE},
    "phi3 longrope partly rotated": PHI3
    | LONG_PHI3
    | {
        "partial_rotary_factor": 0.5,
        "rope_scaling": LONGROPE | {"short_factor": [1.0, 1.2], "long_factor": [3.0, 4.0]},
    },
    "gpt2": GPT2,
    "gpt2 with settings": GPT2
    | {"n_inner": 40, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
    "opt": OPT,
    "opt untied": OPT | {"tie_word_embeddings": False},
    "opt without biases": OPT | {"enable_bias": False},
    "opt with the norm after (350m)": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "opt projected and untied": OPT | {"word_embed_proj_dim": 16, "tie_word_embeddings": False},
    "opt of before 4.20": OPT | {"_remove_final_layer_norm": True},
    "galactica": OPT | GALACTICA,
}


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "deepstack_visual_indexes": [0]}
TEXT_ALONE = {"qwen3_vl_moe_text": "qwen3_vl_moe"}  # of which transformers has no model but the one around it


def _around(settings: dict) -> dict:
    """The settings of the model to make for a text model's."""
    kind = TEXT_ALONE.get(settings["model_type"])
    if kind is None:
        return settings
    vision = VISION | {"out_hidden_size": settings["hidden_size"]}
    tied = settings["tie_word_embeddings"]
    return {"model_type": kind, "text_config": settings, "vision_config": vision, "tie_word_embeddings": tied}


def _publish(path: Path) -> None:
    """Gives the tensors of a text model in another its own names, and turns its experts, as they are published."""
    state = {}
    for name, tensor in load_file(path).items():
        if "visual" not in name:
            turned = tensor.transpose(1, 2) if ".experts." in name else tensor
            state[name.replace("model.language_model.", "model.")] = turned.contiguous()
    save_file(state, path)


def empty_model(config: dict) -> torch.nn.Module:
    """A model of transformers, as it is made."""
    import transformers

    settings = {key: value for key, value in config.items() if key != "architectures" and value is not None}
    # null is a choice where the default is another
    settings |= {
        key: None
        for key in ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping", "q_lora_rank")
        if key in config and config[key] is None
    }
    hugging_face = transformers.AutoConfig.for_model(**copy.deepcopy(_around(settings)))
    for its in (hugging_face, hugging_face.get_text_config()):
        its._attn_implementation = its._experts_implementation = "eager"  # float64 too
    return getattr(transformers, config["architectures"][0])(hugging_face).eval()


def random_model(config: dict, seed: int = 0) -> torch.nn.Module:
    """A model of transformers in float32; everything random, norms and biases too."""
    model = empty_model(config).float()
    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]  # corrections
    with torch.inference_mode():
        for name, parameter in [*model.named_parameters(), *buffers]:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.copy_(noise + 1 if norm else noise)
    return model


def save(config: dict, folder: Path, seed: int = 0) -> torch.nn.Module:
    """The model, saved by transformers into `folder` with this config.json."""
    model = random_model(config, seed)
    model.save_pretrained(folder)
    if config["model_type"] in TEXT_ALONE:
        _publish(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return model
