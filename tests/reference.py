"""The reference: Llama and OPT in float64, dense, one sequence at a time, without any cache.

Works from a config.json's dict and tensors named as Hugging Face names them. Knows nothing of Noria.
"""

import math

import numpy as np


def logits(config: dict, state: dict, token_ids: list[int]) -> np.ndarray:
    """[T, V] logits after each token. `state` maps names to numpy arrays (or torch tensors)."""
    weights = {name: np.asarray(tensor, np.float64) for name, tensor in state.items()}
    return {"llama": _llama, "opt": _opt}[config["model_type"]](config, weights, np.asarray(token_ids))


def generate(config: dict, state: dict, token_ids: list[int], max_new_tokens: int, end_token_ids=()) -> list[int]:
    """The tokens that follow, each the most likely one; an end token is the last."""
    generated: list[int] = []
    while len(generated) < max_new_tokens and not (generated and generated[-1] in end_token_ids):
        generated.append(int(logits(config, state, [*token_ids, *generated])[-1].argmax()))
    return generated


def _llama(config, weights, ids):
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    hidden = weights["model.embed_tokens.weight"][ids]
    angles = np.arange(len(ids))[:, None] * _frequencies(
        config, config.get("head_dim") or config["hidden_size"] // heads
    )
    eps = config.get("rms_norm_eps", 1e-6)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        x = _rms_norm(hidden, weights[name + "input_layernorm.weight"], eps)
        q, k, v = (_linear(weights, f"{name}self_attn.{p}_proj", x) for p in "qkv")
        q, k = _rotate(_split(q, heads), angles), _rotate(_split(k, kv_heads), angles)
        k, v = (np.repeat(tensor, heads // kv_heads, axis=1) for tensor in (k, _split(v, kv_heads)))
        hidden = hidden + _linear(weights, name + "self_attn.o_proj", _attention(q, k, v))
        x = _rms_norm(hidden, weights[name + "post_attention_layernorm.weight"], eps)
        gate = _linear(weights, name + "mlp.gate_proj", x)
        gated = gate / (1 + np.exp(-gate)) * _linear(weights, name + "mlp.up_proj", x)
        hidden = hidden + _linear(weights, name + "mlp.down_proj", gated)
    matrix = weights["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    return _rms_norm(hidden, weights["model.norm.weight"], eps) @ matrix.T


def _opt(config, weights, ids):
    name, heads = "model.decoder.", config["num_attention_heads"]
    hidden = weights[name + "embed_tokens.weight"][ids] + weights[name + "embed_positions.weight"][2 : 2 + len(ids)]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.decoder.layers.{layer}."
        x = _layer_norm(weights, name + "self_attn_layer_norm", hidden)
        q, k, v = (_split(_linear(weights, f"{name}self_attn.{p}_proj", x), heads) for p in "qkv")
        hidden = hidden + _linear(weights, name + "self_attn.out_proj", _attention(q, k, v))
        x = np.maximum(_linear(weights, name + "fc1", _layer_norm(weights, name + "final_layer_norm", hidden)), 0)
        hidden = hidden + _linear(weights, name + "fc2", x)
    tied = config.get("tie_word_embeddings", True)
    matrix = weights["model.decoder.embed_tokens.weight" if tied else "lm_head.weight"]
    return _layer_norm(weights, "model.decoder.final_layer_norm", hidden) @ matrix.T


def _linear(weights, name, x):
    return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)


def _split(x, heads):
    return x.reshape(len(x), heads, -1)


def _attention(q, k, v):
    """Dense softmax over all earlier tokens: [T, H, D] each, to [T, H * D]."""
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1)


def _rms_norm(x, weight, eps):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def _layer_norm(weights, name, x):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return normed * weights[name + ".weight"] + weights[name + ".bias"]


def _rotate(x, angles):
    """Turns the complex numbers made of the first and the second half of each head."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate((turned.real, turned.imag), axis=-1)


def _frequencies(config, head_dim):
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind != "llama3":
        return frequencies
    # Turns that a frequency makes in the context it was trained with: many stay, few slow down, a ramp between.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return share * frequencies + (1 - share) * frequencies / rope["factor"]
