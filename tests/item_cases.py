"""Rows of keys for attention over work items, dense softmax of them in numpy, and rows under which a result may not change.

A row's keys are numbered as in a cache of its own; `layout` says where a step finds them.
T queries, H heads, Hkv key heads, D head dim, V width of a value.
"""

from dataclasses import dataclass

import numpy as np

from noria.kernels import work


@dataclass(frozen=True)
class Heads:
    heads: int
    key_heads: int
    dim: int
    width: int
    within: bool = False  # a value is the first numbers of its key


def ragged(counts, lengths, runs, prefixes=None, shared=(), parents=(), firsts=None):
    """RaggedRows of lists: `runs` of each row as (first cache row, keys), from position 0 or `firsts` of the row on."""
    flat = [run for of_row in runs for run in of_row]
    offsets = np.cumsum([0, *map(len, runs)])
    positions = [
        first + sum(keys for _, keys in of_row[:index])
        for first, of_row in zip(firsts or [0] * len(runs), runs, strict=True)
        for index in range(len(of_row))
    ]
    named = [work.NONE] * len(counts) if prefixes is None else prefixes
    starts, keys = zip(*flat, strict=True) if flat else ((), ())
    arrays = (counts, lengths, offsets, starts, positions, keys, named, shared, parents)
    return work.RaggedRows(*(np.array(values, np.int64) for values in arrays))


def cache_rows(rows, row):
    """The cache rows of a row's keys, in order; -1 for those that its runs no longer hold."""
    runs = range(rows.offsets[row], rows.offsets[row + 1])
    gone = [np.full(rows.run_positions[runs[0]], -1)]
    return np.concatenate(gone + [rows.run_rows[run] + np.arange(rows.run_keys[run]) for run in runs])[
        : rows.lengths[row]
    ]


def dense(rows, queries, keys, values, scale, window=None, soft_cap=None, sinks=None):
    """[T, H, V] float64: softmax of each query over the keys that it sees, row after row."""
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, keys, values))
    group, attended, token = queries.shape[1] // keys.shape[1], [], 0
    for row, count in enumerate(rows.counts):
        held = cache_rows(rows, row)
        own_keys, own_values = (np.repeat(cache[held], group, axis=1) for cache in (keys, values))
        positions = np.arange(rows.lengths[row] - count, rows.lengths[row])
        scores = np.einsum("thd,nhd->htn", queries[token : token + count], own_keys) * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        seen = np.arange(len(held)) <= positions[:, None]
        if window is not None:
            seen &= np.arange(len(held)) > positions[:, None] - window
        scores = np.where(seen, scores, -np.inf)
        sink = (
            np.full((*scores.shape[:2], 1), -np.inf)
            if sinks is None
            else np.broadcast_to(np.asarray(sinks, np.float64)[:, None, None], (*scores.shape[:2], 1))
        )
        top = np.maximum(scores.max(axis=2, keepdims=True), sink)
        weights = np.exp(scores - top)
        weights /= weights.sum(axis=2, keepdims=True) + np.exp(sink - top)
        attended.append(np.einsum("htn,nhv->thv", weights, own_values))
        token += count
    return np.concatenate(attended)
