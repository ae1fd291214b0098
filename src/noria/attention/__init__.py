"""Kinds of attention over the paged KV cache: one file each, functions of tensors.

A kind knows nothing of models, ranks or steps. This file chooses one and says where a span's keys lie.
"""

from collections.abc import Iterable
from types import ModuleType

import torch

from noria import kinds
from noria.arrays import Entry
from noria.kernels.scoring import HeadShape
from noria.step import PAGE_TOKENS, Span

ORDER = ("items", "sdpa")  # the fastest first; the last one does everything


def choose(device: torch.device, dtype: torch.dtype, shapes: Iterable[HeadShape]) -> tuple[ModuleType, str]:
    """The fastest kind that computes heads of all these shapes in this dtype on this device; why no faster one does."""
    shapes, said = list(shapes), list[str]()
    for name in ORDER:
        kind = kinds.load("attention", name)
        why = next(filter(None, (kind.refuses(device, dtype, shape) for shape in shapes)), "")
        if not why:
            return kind, "; ".join(said)
        said.append(f"not {name}: {why}")
    raise AssertionError(f"{ORDER[-1]} does not do everything: {said[-1]}")


def fitting(device: torch.device, dtype: torch.dtype, num_heads: int, cache: Iterable[Entry]) -> tuple[ModuleType, str]:
    """The kind that attends to the arrays of all these layers, as `choose` gives it.

    A layer with one array of tokens takes values from its keys; a fast kind would not know how wide.
    """
    layers = [entry for entry in cache if not isinstance(entry, int)]
    rows = {tuple(array.row for array in arrays if array.per == "token") for arrays in layers} - {()}
    if not rows:
        return kinds.load("attention", ORDER[-1]), "no layer attends"
    if any(len(pair) != 2 or {*map(len, pair)} != {2} for pair in rows):
        return kinds.load("attention", ORDER[-1]), "values lie within keys"
    return choose(device, dtype, {HeadShape(num_heads, keys[0], keys[1], values[1]) for keys, values in rows})


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
