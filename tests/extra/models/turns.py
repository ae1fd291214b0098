"""A family for tests: layers in turn of one array of 40 numbers a token, keys and values, a decayed sum a sequence.

No model is like it; it has what a cache may hold. `dense` computes whole sequences in numpy, without any cache.
T tokens, E hidden, D numbers of a state.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from noria.arrays import Array, keys_and_values
from noria.model import ModelShape
from noria.models import _rotary

ARCHITECTURES = ("TurnsForCausalLM",)
ALIASES = ()
HIDDEN, VOCAB, LATENT, TAKEN, HEADS, KV_HEADS, HEAD_DIM, STATE, WINDOW = 24, 61, 40, 28, 4, 2, 8, 7, 20
CONFIG = {"architectures": ["TurnsForCausalLM"], "model_type": "turns", "num_layers": 7, "eos_token_id": 3}
ENTRIES = (
    (Array("latent", (LATENT,)),),
    keys_and_values(KV_HEADS, HEAD_DIM, WINDOW),
    # float32: widened in a float64 run. Of 56 and 24 bytes there: one ends where no other may begin.
    (Array("state", (STATE,), "sequence", "float32"), Array("tail", (3, 1), "sequence")),
)


def shape(config):
    layers = config["num_layers"]
    cache = tuple(ENTRIES[layer % 3] for layer in range(layers))
    return ModelShape("turns", layers, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, 96, False, cache=cache)


def embed_parameters(shape):
    return {"tokens": (VOCAB, HIDDEN)}


def layer_parameters(shape, layer):
    return (
        {"queries": (2 * LATENT, HIDDEN), "latent": (LATENT, HIDDEN), "out": (HIDDEN, 2 * TAKEN)},
        {"qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), "out": (HIDDEN, HEADS * HEAD_DIM)},
        {"decay": (STATE, HIDDEN), "new": (STATE, HIDDEN), "out": (HIDDEN, STATE)},
    )[layer % 3]


def head_parameters(shape):
    return {"lm_head": (VOCAB, HIDDEN)}


def sources(shape, block):
    if block == "embed":
        return {"tokens": ("embed",)}
    if block == "head":
        return {"lm_head": ("head",)}
    layer = int(block.removeprefix("layers/"))
    return {name: (f"{layer}.{name}",) for name in layer_parameters(shape, layer)}


def embed(shape, parameters, token_ids, positions):
    return F.embedding(token_ids, parameters["tokens"])


def positional(shape, positions, dtype):
    return _rotary.tables(1e4, None, HEAD_DIM, positions, dtype)


def layer(shape, index, parameters, hidden, positional, cache):
    normed = F.rms_norm(hidden, (HIDDEN,), eps=1e-6)
    if index % 3 == 2:
        return hidden + F.linear(torch.tanh(_decayed(parameters, normed, cache)), parameters["out"])
    if index % 3 == 1:
        heads = F.linear(normed, parameters["qkv"]).view(len(hidden), -1, HEAD_DIM)
        queries, keys, values = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        attended = cache.attend(queries, key=keys, value=values, rotary=positional, window=WINDOW)
    else:
        queries = F.linear(normed, parameters["queries"]).view(len(hidden), 2, LATENT)
        attended = cache.attend(queries, latent=F.linear(normed, parameters["latent"]), values=TAKEN, scale=0.4)
    return hidden + F.linear(attended.reshape(len(hidden), -1), parameters["out"])


def _decayed(parameters: Mapping[str, torch.Tensor], normed, cache):
    """[T, D]: the sum so far of what each token adds, and what the three last ones before it added to the first number."""
    decay, new = (F.linear(normed, parameters[name]) for name in ("decay", "new"))
    decay, found = torch.sigmoid(decay), torch.empty_like(new)
    states, tails = cache.before("state"), cache.before("tail")
    starts, kept = cache.starts.tolist(), cache.kept.tolist()
    after = torch.full_like(states, torch.nan), torch.full_like(tails, torch.nan)
    for row, (first, last) in enumerate(itertools.pairwise(starts)):
        state, tail = states[row], tails[row]
        for token in range(first, last):
            state = decay[token] * state + new[token]
            found[token] = state + tail.sum()
            tail = torch.cat((tail[1:], new[token, :1, None]))
            if token - first + 1 == kept[row]:
                after[0][row], after[1][row] = state, tail
    cache.after("state", after[0])
    cache.after("tail", after[1])
    return found


def head(shape, parameters, hidden):
    return F.linear(F.rms_norm(hidden, (HIDDEN,), eps=1e-6), parameters["lm_head"])


def random_state(config, seed=0):
    """Random float64 tensors under the names of a Hugging Face directory."""
    generator, its_shape = torch.Generator().manual_seed(seed), shape(config)
    sizes = {"embed": (VOCAB, HIDDEN), "head": (VOCAB, HIDDEN)}
    for layer in range(its_shape.num_layers):
        sizes |= {f"{layer}.{name}": size for name, size in layer_parameters(its_shape, layer).items()}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) * 0.4 for name, size in sizes.items()}


def dense(config, weights, token_ids):
    """[T, V] logits of a whole sequence, in numpy. weights: arrays by name."""
    hidden = weights["embed"][token_ids]
    for layer in range(config["num_layers"]):
        its = {name.split(".")[1]: array for name, array in weights.items() if name.startswith(f"{layer}.")}
        hidden = hidden + (_dense_latent, _dense_keys, _dense_state)[layer % 3](its, _normed(hidden)) @ its["out"].T
    return _normed(hidden) @ weights["head"].T


def _normed(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def _softmax(scores, seen):
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _dense_latent(its, x):
    latent, queries = x @ its["latent"].T, (x @ its["queries"].T).reshape(len(x), 2, LATENT)
    weights = _softmax(0.4 * np.einsum("qhd,kd->hqk", queries, latent), np.tri(len(x), dtype=bool))
    return np.einsum("hqk,kd->qhd", weights, latent[:, :TAKEN]).reshape(len(x), -1)


def _dense_keys(its, x):
    heads = (x @ its["qkv"].T).reshape(len(x), -1, HEAD_DIM)
    queries, keys, values = np.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
    turn = np.exp(1j * np.arange(len(x))[:, None] * 1e4 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM))[:, None]
    half = HEAD_DIM // 2
    turned = ((y[..., :half] + 1j * y[..., half:]) * turn for y in (queries, keys))
    queries, keys = (np.concatenate((y.real, y.imag), axis=-1) for y in turned)
    keys, values = (np.repeat(y, HEADS // KV_HEADS, axis=1) for y in (keys, values))
    seen = np.tri(len(x), dtype=bool) & ~np.tri(len(x), k=-WINDOW, dtype=bool)
    weights = _softmax(np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(HEAD_DIM), seen)
    return np.einsum("hqk,khd->qhd", weights, values).reshape(len(x), -1)


def _dense_state(its, x):
    decay, new = 1 / (1 + np.exp(-(x @ its["decay"].T))), x @ its["new"].T
    found, state = np.empty_like(new), np.zeros(STATE)
    for token in range(len(x)):
        state = decay[token] * state + new[token]
        found[token] = state + new[max(token - 3, 0) : token, 0].sum()
    return np.tanh(found)
