"""Kinds of attention over the paged KV cache: one file each, functions of tensors.

A kind knows nothing of models, ranks or steps. This file chooses one and says where a span's keys lie.
"""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, Protocol

import torch

from noria import kinds
from noria.arrays import Array
from noria.kernels.scoring import HeadShape, ScoringKind
from noria.model import ModelShape
from noria.step import PAGE_TOKENS, Span


class HeldPlan(Protocol):
    """A plan in memory that stays where it is, which a kind's `held` makes: for calls that are recorded once."""

    def take(self, plan: Any) -> bool:
        """What this plan has takes the place of what was there; False where it had no room: record the calls anew."""
        ...


ORDER = ("items", "sdpa")  # the fastest first; the last one does everything


def fitting(device: torch.device, dtype: torch.dtype, shape: ModelShape) -> tuple[ModuleType, str]:
    """The fastest kind that attends in all layers of a model in this dtype on this device; and why no faster one does.

    It is built, which takes seconds the first time.
    """
    needs = _needs(shape)
    if needs is None:
        return kinds.load("attention", ORDER[-1]), "a layer's arrays do not say what its keys and values are"
    return choose(device, dtype, needs) if needs else (kinds.load("attention", ORDER[-1]), "no layer attends")


def decodes_ahead(kind: ModuleType, device: torch.device, dtype: torch.dtype, shape: ModelShape) -> str:
    """Why a model's cache in fewer bits is decoded before this kind attends to it; empty where the kind does that itself, tile
    by tile. It is built then."""
    if not hasattr(kind, "refuses_coded"):
        return f"{kinds.name_of(kind)} reads plain caches"
    needs, form = _needs(shape) or {}, shape.cache_encoding
    refusals = (kind.refuses_coded(device, dtype, heads, frozenset(its), form) for heads, its in needs.items())
    return next(filter(None, refusals), "")


def _needs(shape: ModelShape) -> dict[HeadShape, set[ScoringKind]] | None:
    """The shapes of the heads of a model's layers, each with the ways of its scores; None where they are not known."""
    needs: dict[HeadShape, set[ScoringKind]] = {}
    for layer in range(shape.num_layers):
        arrays = [array for array in shape.arrays(layer) if array.per == "token"]
        if not arrays:
            continue
        heads = _heads(shape.num_heads, arrays)
        if heads is None:
            return None
        its = ScoringKind(arrays[0].window, shape.soft_cap is not None, layer in shape.sinks)
        needs.setdefault(heads, set()).add(its)
    return needs


def _heads(num_heads: int, arrays: list[Array]) -> HeadShape | None:
    """Of a layer with these arrays of tokens; None where they do not say what a key and a value are."""
    rows = [array.row for array in arrays]
    if len(rows) == 1 and len(rows[0]) == 1 and arrays[0].value:
        return HeadShape(num_heads, 1, *rows[0], arrays[0].value, within=True)
    if {2} != {len(rows), *map(len, rows)}:
        return None
    (key_heads, dim), (_, width) = rows
    return HeadShape(num_heads, key_heads, dim, width)


def choose(
    device: torch.device, dtype: torch.dtype, needs: Mapping[HeadShape, Iterable[ScoringKind]]
) -> tuple[ModuleType, str]:
    """The fastest kind that computes heads of these shapes, each scored in these ways; and why no faster one does."""
    said: list[str] = []
    for name in ORDER:
        kind = kinds.load("attention", name)
        refusals = (kind.refuses(device, dtype, heads, frozenset(scored)) for heads, scored in needs.items())
        why = next(filter(None, refusals), "")
        if not why:
            return kind, "; ".join(said)
        said.append(f"not {name}: {why}")
    raise AssertionError(f"{ORDER[-1]} does not do everything: {said[-1]}")


def pieces(span: Span) -> tuple[tuple[int, int], ...]:
    """The rows `start .. stop` of the cache that hold the span's keys, in order; runs that touch are one piece.

    Pages beyond the span's length, reserved for tokens to come, are left out.
    """
    found: list[tuple[int, int]] = []
    left = span.length
    for run in span.runs:
        count = min(left, run.count * PAGE_TOKENS)
        if count == 0:
            break
        start, left = run.start * PAGE_TOKENS, left - count
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], start + count)
        else:
            found.append((start, start + count))
    assert left == 0, f"{span} lacks pages for {left} tokens"
    return tuple(found)
