"""The reference: every family in float64, dense, one sequence at a time, without any cache.

Works from a config.json's dict and tensors named as Hugging Face names them. Knows nothing of Noria.
"""

import math

import numpy as np


def logits(config: dict, state: dict, token_ids: list[int]) -> np.ndarray:
    """[T, V] logits after each token. `state` maps names to numpy arrays (or torch tensors)."""
    weights = {name: np.asarray(tensor, np.float64) for name, tensor in state.items()}
    family = {"opt": _opt, "gpt2": _gpt2}.get(config["model_type"], _rotary_decoder)
    return family(config, weights, np.asarray(token_ids))


def generate(config: dict, state: dict, token_ids: list[int], max_new_tokens: int, end_token_ids=()) -> list[int]:
    """The tokens that follow, each the most likely one; an end token is the last."""
    generated: list[int] = []
    while len(generated) < max_new_tokens and not (generated and generated[-1] in end_token_ids):
        generated.append(int(logits(config, state, [*token_ids, *generated])[-1].argmax()))
    return generated


def _rotary_decoder(config, weights, ids):
    """Llama and its relatives: what they differ in is seen in the names of their tensors."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    hidden = weights["model.embed_tokens.weight"][ids]
    rotated = int(head_dim * config.get("partial_rotary_factor", 1.0))
    angles = np.arange(len(ids))[:, None] * _frequencies(config, rotated)
    eps, scale = config.get("rms_norm_eps", 1e-6), _rotary_scale(config)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        x = _rms_norm(hidden, weights[name + "input_layernorm.weight"], eps)
        if name + "self_attn.qkv_proj.weight" in weights:
            sizes = [heads * head_dim, (heads + kv_heads) * head_dim]
            q, k, v = np.split(_linear(weights, name + "self_attn.qkv_proj", x), sizes, axis=-1)
        else:
            q, k, v = (_linear(weights, f"{name}self_attn.{p}_proj", x) for p in "qkv")
        q, k, v = _split(q, heads), _split(k, kv_heads), _split(v, kv_heads)
        if name + "self_attn.q_norm.weight" in weights:
            q, k = (_rms_norm(y, weights[f"{name}self_attn.{p}_norm.weight"], eps) for p, y in (("q", q), ("k", k)))
        turned = (scale * _rotate(y[..., :rotated], angles) for y in (q, k))
        q, k = (np.concatenate((t, y[..., rotated:]), axis=-1) for t, y in zip(turned, (q, k), strict=True))
        k, v = (np.repeat(tensor, heads // kv_heads, axis=1) for tensor in (k, v))
        hidden = hidden + _linear(weights, name + "self_attn.o_proj", _attention(q, k, v, _window(config, layer)))
        x = _rms_norm(hidden, weights[name + "post_attention_layernorm.weight"], eps)
        hidden = hidden + (
            _experts(config, weights, name, x) if _routers(weights, name) else _mlp(weights, name + "mlp.", x)
        )
    matrix = weights["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    return _rms_norm(hidden, weights["model.norm.weight"], eps) @ matrix.T


def _window(config, layer):
    kind = config["model_type"]
    windowed = kind in ("mistral", "mixtral", "phi3") or config.get("use_sliding_window")
    if kind in ("qwen2", "qwen3") and windowed:
        types = config.get("layer_types")
        windowed = types[layer] == "sliding_attention" if types else layer >= config["max_window_layers"]
    return config.get("sliding_window") if windowed else None


def _mlp(weights, name, x, gate="gate_proj", up="up_proj", down="down_proj"):
    if name + "gate_up_proj.weight" in weights:
        gate, up = np.split(_linear(weights, name + "gate_up_proj", x), 2, axis=-1)
    else:
        gate, up = _linear(weights, name + gate, x), _linear(weights, name + up, x)
    return _linear(weights, name + down, gate / (1 + np.exp(-gate)) * up)


def _routers(weights, name):
    return [place for place in ("mlp.", "block_sparse_moe.") if f"{name}{place}gate.weight" in weights]


def _experts(config, weights, name, x):
    """One token after another, one expert after another."""
    place = name + _routers(weights, name)[0]
    names = ("w1", "w3", "w2") if "sparse" in place else ("gate_proj", "up_proj", "down_proj")
    scores, mixed = _linear(weights, place + "gate", x), np.zeros_like(x)
    for token, row in enumerate(scores):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        chosen = np.argsort(-probabilities)[: config["num_experts_per_tok"]]
        total = probabilities[chosen].sum() if "sparse" in place or config.get("norm_topk_prob") else 1.0
        for expert in chosen:
            output = _mlp(weights, f"{place}experts.{expert}.", x[token], *names)
            mixed[token] += output * probabilities[expert] / total
    return mixed


def _gpt2(config, weights, ids):
    name, heads, hidden_size = "transformer.", config["n_head"], config["n_embd"]
    weights = {key: w.T if ".h." in key and w.ndim == 2 else w for key, w in weights.items()}
    hidden = weights[name + "wte.weight"][ids] + weights[name + "wpe.weight"][: len(ids)]
    for layer in range(config["n_layer"]):
        name = f"transformer.h.{layer}."
        x = _linear(weights, name + "attn.c_attn", _layer_norm(weights, name + "ln_1", hidden))
        q, k, v = (_split(part, heads) for part in np.split(x, [hidden_size, 2 * hidden_size], axis=-1))
        q = q / (layer + 1 if config.get("scale_attn_by_inverse_layer_idx") else 1)
        hidden = hidden + _linear(weights, name + "attn.c_proj", _attention(q, k, v))
        x = _linear(weights, name + "mlp.c_fc", _layer_norm(weights, name + "ln_2", hidden))
        hidden = hidden + _linear(
            weights, name + "mlp.c_proj", _activation(config.get("activation_function", "gelu_new"), x)
        )
    return _layer_norm(weights, "transformer.ln_f", hidden) @ weights["transformer.wte.weight"].T


def _activation(name, x):
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _opt(config, weights, ids):
    name, heads, before = "model.decoder.", config["num_attention_heads"], config.get("do_layer_norm_before", True)
    hidden = weights[name + "embed_tokens.weight"][ids]
    if name + "project_in.weight" in weights:
        hidden = _linear(weights, name + "project_in", hidden)
    hidden = hidden + weights[name + "embed_positions.weight"][2 : 2 + len(ids)]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.decoder.layers.{layer}."
        x = _layer_norm(weights, name + "self_attn_layer_norm", hidden) if before else hidden
        q, k, v = (_split(_linear(weights, f"{name}self_attn.{p}_proj", x), heads) for p in "qkv")
        hidden = hidden + _linear(weights, name + "self_attn.out_proj", _attention(q, k, v))
        hidden = hidden if before else _layer_norm(weights, name + "self_attn_layer_norm", hidden)
        x = _layer_norm(weights, name + "final_layer_norm", hidden) if before else hidden
        x = _activation(config.get("activation_function", "relu"), _linear(weights, name + "fc1", x))
        hidden = hidden + _linear(weights, name + "fc2", x)
        hidden = hidden if before else _layer_norm(weights, name + "final_layer_norm", hidden)
    if before and not config.get("_remove_final_layer_norm"):
        hidden = _layer_norm(weights, "model.decoder.final_layer_norm", hidden)
    if "model.decoder.project_out.weight" in weights:
        hidden = _linear(weights, "model.decoder.project_out", hidden)
    tied = config.get("tie_word_embeddings", True)
    return hidden @ weights["model.decoder.embed_tokens.weight" if tied else "lm_head.weight"].T


def _linear(weights, name, x):
    return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)


def _split(x, heads):
    return x.reshape(len(x), heads, -1)


def _attention(q, k, v, window=None):
    """Dense softmax over all earlier tokens, or the last `window`: [T, H, D] each, to [T, H * D]."""
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    seen = np.tri(len(q), dtype=bool) & ~np.tri(len(q), k=-(window or len(q)), dtype=bool)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1)


def _rms_norm(x, weight, eps):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def _layer_norm(weights, name, x):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return normed * weights.get(name + ".weight", 1.0) + weights.get(name + ".bias", 0.0)


def _rotate(x, angles):
    """Turns the complex numbers made of the first and the second half of each head."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate((turned.real, turned.imag), axis=-1)


def _rotary_scale(config):
    """By how much longer contexts sharpen attention: YaRN's 0.1 ln s + 1, LongRoPE's sqrt(1 + ln s / ln L)."""
    rope = config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "longrope":
        old = config["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(config["max_position_embeddings"] / old) / math.log(old))
    if kind != "yarn":
        return 1.0
    above, below = (0.1 * rope.get(name, 0) * math.log(rope["factor"]) + 1 for name in ("mscale", "mscale_all_dim"))
    return rope.get("attention_factor") or (above / below if below > 1 else 0.1 * math.log(rope["factor"]) + 1)


def _frequencies(config, head_dim):
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "longrope":
        return frequencies / rope["short_factor"]
    if kind == "yarn":
        # The index at which a frequency turns so often in the old context: it stays above the one and slows below the other.
        old, index = rope["original_max_position_embeddings"], np.arange(head_dim // 2)
        at = [
            math.log(old / (2 * math.pi * rope.get(name, turns)), theta) * head_dim / 2
            for name, turns in (("beta_fast", 32), ("beta_slow", 1))
        ]
        fast, slow = (math.floor(at[0]), math.ceil(at[1])) if rope.get("truncate", True) else at
        fast, slow = max(fast, 0), min(slow, head_dim - 1)
        share = np.clip((index - fast) / (slow - fast), 0, 1)
        return frequencies * (1 - share + share / rope["factor"])
    if kind != "llama3":
        return frequencies
    # Turns that a frequency makes in the context it was trained with: many stay, few slow down, a ramp between.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return share * frequencies + (1 - share) * frequencies / rope["factor"]
