"""Latent attention (DeepSeek-V2, arXiv 2405.04434): a token leaves one vector, of which all heads' keys and values are made.

The matrix that makes keys of it is absorbed into the queries, the one that makes values into what is attended to: a key is
never expanded. That is so for prompts too, because a row's bits may not depend on how its tokens are cut into steps: what a
stopped row has generated is a prompt when it goes on. Keys expanded for prompts would make a DeepSeek-V3 layer's attention
1.3 (prompts of 512 tokens) to 1.6 times (2,048 and more) as fast on an H200: 1.5 ms of the 40 and more that 16,384 tokens
take in such a layer, 9 of 55 with prompts of 2,048, where its bytes take 210 ms to stream (`jobs/bench/latent.py`).
A family takes all here by `from noria.models._latent import *`.
T tokens, H heads, E hidden, L numbers of a latent, P of a head's query that are not turned, R that are, Dv of a value.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from noria.arrays import Array
from noria.errors import require
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _rotary
from noria.models._cache import Cache
from noria.models._decoder import ALIASES, embed, embed_parameters, head, head_parameters, positional
from noria.models._experts import Experts
from noria.models._linear import linear
from noria.pieces import Wanted

__all__ = [
    "ALIASES",
    "embed",
    "embed_parameters",
    "head",
    "head_parameters",
    "layer",
    "layer_parameters",
    "positional",
    "sources",
]

NORM_EPS = 1e-6  # of the latents' norms, whatever config.json says of the others
MODULES = _decoder.MODULES | {
    "query": ("self_attn.q_proj",),
    "query_down": ("self_attn.q_a_proj",),
    "query_norm": ("self_attn.q_a_layernorm",),
    "query_up": ("self_attn.q_b_proj",),
    "latent": ("self_attn.kv_a_proj_with_mqa",),
    "latent_norm": ("self_attn.kv_a_layernorm",),
    "up": ("self_attn.kv_b_proj",),
}
BIASED = ("query_down", "latent", "out")  # where config.json says attention_bias


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention: L (rank), P (plain), R (turned), Dv (value); queries: of the latent that queries are made
    of, 0 if there is none. pairs: whether numbers are turned in pairs of neighbours. scale: of the scores."""

    queries: int
    rank: int
    plain: int
    turned: int
    value: int
    pairs: bool
    scale: float
    bias: bool

    def work_size(self, heads: int) -> int:
        """Numbers that a token takes at most while it attends: queries, plain and absorbed, and what they attend to."""
        return heads * (2 * (self.plain + self.turned) + 3 * self.rank + 2 * self.turned + 2 * self.value)


def shape(family: str, config: read.Keys, experts: Experts, pairs: bool = True) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what cannot be computed.

    To the cache there is one key head, of L + R numbers.
    """
    heads, its = read.integer(config, "num_attention_heads"), _sizes(config, pairs)
    read.only(
        config, "num_key_value_heads", heads, f"latent attention has as many as num_attention_heads says, {heads}"
    )
    full = its.plain + its.turned
    read.only(config, "qk_head_dim", full, f"it must be qk_nope_head_dim + qk_rope_head_dim, {full}")
    require(
        config.get("head_dim") in (None, its.turned, its.plain, full),  # nothing is computed by it
        f"config.json: head_dim is {read.shown(config.get('head_dim'))}: it must be qk_rope_head_dim, {its.turned},"
        f" qk_nope_head_dim, {its.plain}, or their sum",
    )
    of_turned = config.having(head_dim=its.turned, num_key_value_heads=1)
    found = _decoder.shape(family, of_turned, _decoder.Variant(experts=experts))
    return replace(
        found,
        head_dim=its.rank + its.turned,
        mixture_size=max(found.mixture_size, its.work_size(heads)),
        details={**found.details, "latent": its},
        cache=((Array("latent", (its.rank + its.turned,), value=its.rank),),) * found.num_layers,
    )


def _sizes(config: Mapping[str, Any], pairs: bool) -> Latent:
    plain, turned = read.integer(config, "qk_nope_head_dim"), read.integer(config, "qk_rope_head_dim")
    return Latent(
        queries=0 if config.get("q_lora_rank") is None else read.integer(config, "q_lora_rank"),
        rank=read.integer(config, "kv_lora_rank"),
        plain=plain,
        turned=turned,
        value=read.integer(config, "v_head_dim"),
        pairs=pairs,
        scale=(plain + turned) ** -0.5 * _rotary.score_scale(config),
        bias=read.flag(config, "attention_bias", False),
    )


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...] | Wanted]:
    """In stored order; `up` has the keys' matrix [P, L] and the values' [Dv, L] of one head after another."""
    its, hidden, heads = shape.details["latent"], shape.hidden_size, shape.num_heads
    queries = heads * (its.plain + its.turned)
    wanted: dict[str, tuple[int, ...] | Wanted] = {"attention_norm": (hidden,)}
    if its.queries:
        wanted |= {"query_down": (its.queries, hidden), "query_norm": (its.queries,)}
    wanted |= {"query_up": (queries, its.queries)} if its.queries else {"query": (queries, hidden)}
    wanted |= {"latent": (its.rank + its.turned, hidden), "latent_norm": (its.rank,)}
    wanted |= {"up": (heads * (its.plain + its.value), its.rank), "out": (hidden, heads * its.value)}
    found: dict[str, tuple[int, ...] | Wanted] = {}
    for name, sizes in wanted.items():
        found[name] = sizes
        if its.bias and name in BIASED and isinstance(sizes, tuple):
            found[f"{name}_bias"] = sizes[:1]
    others = _decoder.layer_parameters(shape, layer)
    return found | {name: others[name] for name in others if name not in (*found, "qkv")}


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES, parameters=layer_parameters)


def attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, ...],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, Dv] from normed hidden states [T, E].

    positional: cosines and sines, and by how much queries are longer [T, 1, 1] where a family says so.
    """
    its, (cosines, sines, *longer) = shape.details["latent"], positional
    turn = _rotary.rotate_pairs if its.pairs else _rotary.rotate
    plain, turned = _queries(shape, parameters, normed).split((its.plain, its.turned), dim=-1)
    latent, key = linear(normed, parameters["latent"], parameters.get("latent_bias")).split((its.rank, its.turned), -1)
    latent = F.rms_norm(latent, (its.rank,), parameters["latent_norm"], NORM_EPS)
    rows = torch.cat((latent, turn(key[:, None], cosines, sines)[:, 0]), dim=-1)
    up = parameters["up"].view(shape.num_heads, -1, its.rank)
    absorbed = torch.bmm(plain.transpose(0, 1), up[:, : its.plain]).transpose(0, 1)
    queries = torch.cat((absorbed, turn(turned, cosines, sines)), dim=-1)
    if longer:
        queries = (queries * longer[0]).to(queries.dtype)
    attended = cache.attend(queries, latent=rows, values=its.rank, scale=its.scale)
    return torch.bmm(attended.transpose(0, 1), up[:, its.plain :].transpose(1, 2)).transpose(0, 1)


def _queries(shape: ModelShape, parameters: Mapping[str, torch.Tensor], normed: torch.Tensor) -> torch.Tensor:
    """[T, H, P + R] of normed hidden states [T, E]."""
    its = shape.details["latent"]
    if not its.queries:
        return linear(normed, parameters["query"]).unflatten(-1, (shape.num_heads, -1))
    down = linear(normed, parameters["query_down"], parameters.get("query_down_bias"))
    down = F.rms_norm(down, (its.queries,), parameters["query_norm"], NORM_EPS)
    return linear(down, parameters["query_up"]).unflatten(-1, (shape.num_heads, -1))


layer = partial(_decoder.layer, attention=attend)
