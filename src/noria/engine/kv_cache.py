"""This rank's KV cache: pages of 16 tokens for each of its layers, and which pages each slot holds.

Slots and pages are given by rank 0 and are the same on all ranks; this file only executes the changes that headers carry.
"""

import numpy as np
import torch

from noria.blocks import ModelShape
from noria.step import PAGE_TOKENS, Run, Span, Step


class KvCache:
    """K and V of this rank's layers, each `[layer][page * token][kv head][head dim]`, so that a run of pages is a view."""

    def __init__(self, shape: ModelShape, layers: list[int], num_pages: int, dtype: torch.dtype, device: torch.device):
        size = (len(layers), num_pages * PAGE_TOKENS, shape.num_kv_heads, shape.head_dim)
        self._keys = torch.empty(size, dtype=dtype, device=device)
        self._values = torch.empty(size, dtype=dtype, device=device)
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._runs: dict[int, tuple[Run, ...]] = {}

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def apply(self, step: Step) -> None:
        """Takes over the changes of slots that a header carries."""
        for slot in step.released:
            del self._runs[slot]
        for admitted in step.admitted:
            self._runs[admitted.slot] = admitted.runs

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [pages * 16, Hkv, D]."""
        index = self._index[layer]
        return self._keys[index], self._values[index]

    def spans(self, step: Step, first_row: int, last_row: int) -> list[Span]:
        """The rows `first_row .. last_row` of a step as attention sees them, counted from the first one's first token."""
        spans, first = [], 0
        for row in range(first_row, last_row):
            slot, count, position = int(step.slots[row]), int(step.counts[row]), int(step.positions[row])
            spans.append(Span(first, count, position + count, self._runs[slot]))
            first += count
        return spans


def cache_rows(spans: list[Span]) -> np.ndarray:
    """[T] where in the cache each new token's key and value belong: page * 16 + token."""
    pieces = []
    for span in spans:
        positions = np.arange(span.length - span.count, span.length)
        if len(span.runs) == 1:
            pieces.append(positions + span.runs[0].start * PAGE_TOKENS)
        else:
            pages = np.concatenate([np.arange(run.start, run.start + run.count) for run in span.runs])
            pieces.append(pages[positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS)
    return np.concatenate(pieces)
