"""Kinds of attention over the paged KV cache: one file each, functions of tensors.

A kind knows nothing of models, ranks or steps. This file chooses one and says where a span's keys lie.
"""

from collections.abc import Iterable
from types import ModuleType

import torch

from noria import kinds
from noria.arrays import Entry
from noria.step import PAGE_TOKENS, Span

ORDER = ("varlen", "sdpa")  # the fastest first; the last one does everything


def choose(device: torch.device, dtype: torch.dtype, *head_dims: int) -> ModuleType:
    """The fastest kind that computes all these head dims in this dtype on this device."""
    modules = (kinds.load("attention", name) for name in ORDER)
    return next(module for module in modules if all(module.usable(device, dtype, size) for size in head_dims))


def fitting(device: torch.device, dtype: torch.dtype, cache: Iterable[Entry]) -> ModuleType:
    """The fastest kind that attends to the arrays of all these layers in this dtype on this device."""
    layers = [entry for entry in cache if not isinstance(entry, int)]
    rows = {tuple(array.row for array in arrays if array.per == "token") for arrays in layers} - {()}
    if rows and all(len(pair) == 2 and pair[0] == pair[1] and len(pair[0]) == 2 for pair in rows):
        return choose(device, dtype, *(keys[-1] for keys, _ in rows))
    return kinds.load("attention", ORDER[-1])


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
