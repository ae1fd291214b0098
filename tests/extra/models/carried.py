"""A family for tests: a bundle that differs from border to border, and layers that read another layer's cache.

Every third layer chooses three rows of a table (int32) and a weight; the layer after it reads both and hands the choice on
to the next, which reads it again. No model is like it. `dense` computes whole sequences in numpy, without any cache.
T tokens, E hidden, D head dim.
"""

import numpy as np
import torch
import torch.nn.functional as F

from noria.arrays import Array, keys_and_values
from noria.model import ModelShape

ARCHITECTURES = ("CarriedForCausalLM",)
ALIASES = ()
HIDDEN, VOCAB, HEADS, HEAD_DIM, TABLE, CHOSEN, CONTEXT = 20, 53, 2, 10, 9, 3, 96
# `reads`: layer -> the layer whose keys and values it takes.
CONFIG = {
    "architectures": ["CarriedForCausalLM"],
    "model_type": "carried",
    "num_layers": 7,
    "reads": {"4": 1},
    "eos_token_id": 3,
}
# float32: widened in a float64 run. Rows of 8 and of 12 bytes there: the second array is aligned in a message.
WEIGHT, CHOICE = Array("weight", (), dtype="float32"), Array("chosen", (CHOSEN,), dtype="int32")
BESIDE = ((), (WEIGHT, CHOICE), (CHOICE,))


def shape(config):
    layers, reads = config["num_layers"], {int(layer): other for layer, other in config["reads"].items()}
    cache = tuple(reads.get(layer, keys_and_values(1, HEAD_DIM)) for layer in range(layers))
    bundle = tuple(BESIDE[border % 3] for border in range(layers + 1))
    sizes = layers, HIDDEN, HEADS, 1, HEAD_DIM, VOCAB, CONTEXT, False
    return ModelShape("carried", *sizes, cache=cache, bundle=bundle)


def embed_parameters(shape):
    return {"tokens": (VOCAB, HIDDEN), "positions": (CONTEXT, HIDDEN)}


def layer_parameters(shape, layer):
    own = {} if isinstance(shape.cache[layer], int) else {"key": (HEAD_DIM, HIDDEN), "value": (HEAD_DIM, HIDDEN)}
    chosen = {"router": (TABLE + 1, HIDDEN)} if layer % 3 == 0 else {"table": (TABLE, HIDDEN)}
    return {"queries": (HEADS * HEAD_DIM, HIDDEN), "out": (HIDDEN, HEADS * HEAD_DIM)} | own | chosen


def head_parameters(shape):
    return {"lm_head": (VOCAB, HIDDEN)}


def sources(shape, block):
    if block in ("embed", "head"):
        parameters = embed_parameters(shape) if block == "embed" else head_parameters(shape)
        return {name: (name,) for name in parameters}
    layer = int(block.removeprefix("layers/"))
    return {name: (f"{layer}.{name}",) for name in layer_parameters(shape, layer)}


def embed(shape, parameters, token_ids, positions):
    return {"hidden": F.embedding(token_ids, parameters["tokens"]) + F.embedding(positions, parameters["positions"])}


def positional(shape, positions, dtype):
    return None


def layer(shape, index, parameters, given, positional, cache):
    """`chosen` is handed on as it came: the same tensor."""
    hidden, beside = given["hidden"], [array.name for array in BESIDE[index % 3]]
    assert list(given) == ["hidden", *beside], "what travels at this border, in its order"
    normed = F.rms_norm(hidden, (HIDDEN,), eps=1e-6)
    queries = F.linear(normed, parameters["queries"]).view(len(hidden), HEADS, HEAD_DIM)
    own = {name: F.linear(normed, parameters[name])[:, None] for name in ("key", "value") if name in parameters}
    hidden = hidden + F.linear(cache.attend(queries, **own).reshape(len(hidden), -1), parameters["out"])
    if index % 3 == 0:
        scores = F.linear(F.rms_norm(hidden, (HIDDEN,), eps=1e-6), parameters["router"])
        chosen = scores[:, :TABLE].topk(CHOSEN).indices.to(torch.int32)
        return {"hidden": hidden, "chosen": chosen, "weight": torch.sigmoid(scores[:, TABLE])}
    assert given["chosen"].dtype == torch.int32
    added = F.embedding(given["chosen"], parameters["table"])
    if index % 3 == 2:
        return {"hidden": hidden + added[:, 0] - added[:, -1]}
    assert given["weight"].dtype == hidden.dtype
    return {"hidden": hidden + given["weight"][:, None] * added.sum(1), "chosen": given["chosen"]}


def head(shape, parameters, given):
    return F.linear(F.rms_norm(given["hidden"], (HIDDEN,), eps=1e-6), parameters["lm_head"])


def random_state(config, seed=0):
    """Random float64 tensors under the names of a Hugging Face directory."""
    generator, its = torch.Generator().manual_seed(seed), shape(config)
    sizes = embed_parameters(its) | head_parameters(its)
    for layer in range(its.num_layers):
        sizes |= {f"{layer}.{name}": size for name, size in layer_parameters(its, layer).items()}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) * 0.6 for name, size in sizes.items()}


def dense(config, weights, token_ids):
    """[T, V] logits of a whole sequence, in numpy. weights: arrays by name."""
    hidden = weights["tokens"][token_ids] + weights["positions"][: len(token_ids)]
    caches, chosen, weight = {}, None, None
    for layer in range(config["num_layers"]):
        its = {name.split(".")[1]: array for name, array in weights.items() if name.startswith(f"{layer}.")}
        x = _normed(hidden)
        if str(layer) in config["reads"]:
            keys, values = caches[config["reads"][str(layer)]]
        else:
            keys, values = caches[layer] = x @ its["key"].T, x @ its["value"].T
        queries = (x @ its["queries"].T).reshape(len(x), HEADS, HEAD_DIM)
        scores = np.einsum("qhd,kd->hqk", queries, keys) / np.sqrt(HEAD_DIM)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        seen = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,kd->qhd", seen / seen.sum(-1, keepdims=True), values).reshape(len(x), -1)
        hidden = hidden + attended @ its["out"].T
        if layer % 3 == 0:
            scores = _normed(hidden) @ its["router"].T
            chosen = np.argsort(-scores[:, :TABLE], axis=1)[:, :CHOSEN]
            weight = 1 / (1 + np.exp(-scores[:, TABLE:]))
        elif layer % 3 == 1:
            hidden = hidden + weight * its["table"][chosen].sum(1)
        else:
            hidden = hidden + its["table"][chosen[:, 0]] - its["table"][chosen[:, -1]]
    return _normed(hidden) @ weights["lm_head"].T


def _normed(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
