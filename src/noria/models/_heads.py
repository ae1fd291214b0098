"""A layer's heads: its norm, queries, keys and values of it, norms of heads, ways to attend, and the product behind attention.

Functions of tensors: nothing of ranks, streams or files. T tokens, H heads, Hkv key/value heads, D head dim, Dv that of a
value, E hidden.
"""

from collections.abc import Mapping

import torch

from noria.model import ModelShape
from noria.models import _fused
from noria.models._cache import Cache
from noria.models._fused import Norming
from noria.models._linear import linear
from noria.models._rotary import Rotary


def norm(shape: ModelShape, weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    return _fused.norm(hidden, Norming(weight, shape.details["norm_eps"]))


def add_norm(
    shape: ModelShape, weight: torch.Tensor, branch: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of what a branch of a layer returned and the hidden states before it, in the branch's memory, and its RMSNorm."""
    return _fused.add_norm(branch, hidden, Norming(weight, shape.details["norm_eps"]))


def split(
    shape: ModelShape,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    heads: tuple[int, int] | None = None,
    value_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [T, H, D], keys [T, Hkv, D] and values [T, Hkv, Dv] of normed hidden states [T, E], not yet turned.

    heads: H and Hkv of a layer, and value_dim: Dv, if they are not the model's.
    """
    (queries, keys), size = heads or (shape.num_heads, shape.num_kv_heads), shape.head_dim
    qkv, counts = linear(normed, parameters["qkv"], parameters.get("qkv_bias")), (queries, keys, keys)
    if value_dim is None or value_dim == size:
        made = qkv.view(-1, sum(counts), size).split_with_sizes(counts, dim=1)
    else:
        parts = qkv.split_with_sizes((queries * size, keys * size, keys * value_dim), dim=1)
        made = tuple(part.unflatten(1, (count, -1)) for part, count in zip(parts, counts, strict=True))
    return made[0], made[1], made[2]


def split_groups(
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], normed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `split`, where `qkv` has each key head's queries, its key and its value one after another (GPT-NeoX, Falcon)."""
    qkv = linear(normed, parameters["qkv"], parameters.get("qkv_bias"))
    groups = qkv.view(len(normed), shape.num_kv_heads, -1, shape.head_dim)
    return groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]


def norms(shape: ModelShape, parameters: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The weights [D] of norms of each head, of queries and of keys, where a model has them."""
    return (parameters["query_norm"], parameters["key_norm"]) if shape.details["head_norms"] else None


def norm_each(
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], queries: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys after a norm of each head."""
    return norm(shape, parameters["query_norm"], queries), norm(shape, parameters["key_norm"], keys)


def norm_across(
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], queries: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys after norms over the numbers of all heads of a token."""
    normed = (
        norm(shape, parameters[name], heads.flatten(1)).view_as(heads)
        for name, heads in (("query_norm", queries), ("key_norm", keys))
    )
    return next(normed), next(normed)


def attend_across(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E], where norms go over all heads (OLMo 2, MiniMax-M2)."""
    queries, keys, values = split(shape, parameters, normed)
    queries, keys = norm_across(shape, parameters, queries, keys)
    return cache.attend(queries, key=keys, value=values, rotary=positional)


def attend_pairs(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E], where neighbours in a head are turned together (GLM-4, ERNIE 4.5)."""
    queries, keys, values = split(shape, parameters, normed)
    return cache.attend(queries, key=keys, value=values, rotary=Rotary(*positional, pairs=True))


def project_out(parameters: Mapping[str, torch.Tensor], attended: torch.Tensor) -> torch.Tensor:
    """[T, E] of what the heads attended to [T, H, D]."""
    return linear(attended.flatten(1), parameters["out"], parameters.get("out_bias"))
