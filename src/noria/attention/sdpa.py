"""Attention on views of the cache, a sequence at a time: every device, every dtype, any head dim.

Decoding rows of equal length whose pages are evenly spaced (a batch admitted together) are one view; only a sequence in
several runs of pages is copied together. Soft caps and sinks go the plain way of _scores.py. Knows no models and steps.
T tokens, H heads, Hkv key/value heads, G = H / Hkv queries that share a key, D head dim, Dv that of a value (D, but for
values of another width), L keys of a sequence.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from noria.attention import _scores, pieces
from noria.kernels.scoring import HeadShape, Scoring, ScoringKind
from noria.step import Span

CHUNK_ROWS = 512  # queries that share one mask: bounds a mask to 512 x L bytes


Rows = tuple[tuple[int, int], ...]  # start .. stop of the pieces of the cache that hold a sequence's keys


@dataclass(frozen=True)
class Call:
    """Sequences that one call computes: all new tokens of one, or the only one of each of `num`, `stride` rows apart.

    `span` and `rows` are the first one's.
    """

    span: Span
    rows: Rows
    num: int = 1
    stride: int = 0


def refuses(device: torch.device, dtype: torch.dtype, heads: HeadShape, scored: frozenset[ScoringKind]) -> str:
    """Nothing: it computes all."""
    return ""


def prepare(spans: list[Span], device: torch.device) -> tuple[Call, ...]:
    """The calls of a microbatch, in order. Needs no device memory."""
    calls: list[Call] = []
    for span in spans:
        call = Call(span, pieces(span))
        joined = _join(calls[-1], call) if calls else None
        if joined:
            calls[-1] = joined
        else:
            calls.append(call)
    return tuple(calls)


def _join(call: Call, following: Call) -> Call | None:
    """Both as one call, if they are decoding rows of one length that go on at the same distance in the cache."""
    first, last = call.span, following.span
    if not (first.count == last.count == len(call.rows) == len(following.rows) == 1 and first.length == last.length):
        return None
    stride = following.rows[0][0] - call.rows[0][0] - call.stride * (call.num - 1)
    if stride <= 0 or (call.num > 1 and stride != call.stride):
        return None
    return Call(first, call.rows, call.num + 1, stride)


def attention(
    plan: tuple[Call, ...],
    queries: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scores: Scoring,
) -> torch.Tensor:
    """[T, H, Dv]: each query attends to its own sequence's keys up to itself, the last `window` of them if given.

    queries [T, H, D]; caches [rows, Hkv, D] and [rows, Hkv, Dv] of one layer, in which the new tokens already lie.
    """
    num_tokens, num_heads, head_dim = queries.shape
    grouped = (num_tokens, key_cache.shape[1], num_heads // key_cache.shape[1])
    attended = queries.new_empty((*grouped, value_cache.shape[-1]))
    queries = queries.view(*grouped, head_dim)
    for call in plan:
        span, rows = call.span, call.rows
        if span.count == 1 and scores.window is not None:
            rows = _last(rows, scores.window)
        tokens = slice(span.first, span.first + span.count * call.num)
        if call.num > 1:
            keys, values = (_strided(cache, rows[0], call) for cache in (key_cache, value_cache))
            _decode_together(queries[tokens], keys, values, scores, attended[tokens])
            continue
        keys, values = _gather(key_cache, rows), _gather(value_cache, rows)
        function = _decode if span.count == 1 else _prefill
        function(queries[tokens], keys, values, scores, attended[tokens])
    return attended.view(num_tokens, num_heads, value_cache.shape[-1])


def _strided(cache: torch.Tensor, rows: tuple[int, int], call: Call) -> torch.Tensor:
    """[num, Hkv, L, D]: a view of the keys of decoding rows that lie evenly spaced, the first one's at `rows`."""
    start, stop = rows
    row, head, element = cache.stride()
    size = (call.num, cache.shape[1], stop - start, cache.shape[2])
    return cache.as_strided(size, (call.stride * row, head, row, element), cache.storage_offset() + start * row)


def _last(rows: Rows, count: int) -> Rows:
    """The pieces that hold the last `count` rows."""
    kept: list[tuple[int, int]] = []
    for start, stop in reversed(rows):
        start = max(start, stop - count)
        kept.insert(0, (start, stop))
        count -= stop - start
        if count == 0:
            break
    return tuple(kept)


def _gather(cache: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[L, Hkv, D]: a view if the rows are one piece, else a copy."""
    if len(rows) == 1:
        return cache[rows[0][0] : rows[0][1]]
    return torch.cat([cache[start:stop] for start, stop in rows])


def _decode_together(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scoring, attended: torch.Tensor
) -> None:
    """One new token of each sequence. queries and attended [N, Hkv, G, D]; keys and values [N, Hkv, L, D]."""
    if scores.plain and not _elementwise(queries):
        attended.copy_(F.scaled_dot_product_attention(queries, keys, values, scale=scores.scale))
        return
    for row in range(len(queries)):
        own = slice(row, row + 1)
        _decode(queries[own], keys[row].transpose(0, 1), values[row].transpose(0, 1), scores, attended[own])


def _elementwise(queries: torch.Tensor) -> bool:
    """Whether products and sums beat matrix products: one query a key, one thread of a CPU.

    Measured, 64 rows of 12 heads of 64, 600 keys: sums 22.6 ms, bmm 37.7, fused kernel 38.3; two threads: 34, 24, 21.
    """
    exact = queries.dtype in (torch.float32, torch.float64)
    return exact and not queries.is_cuda and queries.shape[2] == 1 and torch.get_num_threads() == 1


def _decode(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scoring, attended: torch.Tensor
) -> None:
    """One new token: it sees all keys given. queries and attended [1, Hkv, G, D]; keys and values [L, Hkv, D]."""
    if not scores.plain:
        _scores.attend(queries, keys, values, scores, attended)
    elif _elementwise(queries):
        weights = torch.softmax((keys * (queries[0, :, 0] * scores.scale)).sum(dim=-1), dim=0)
        torch.sum(values * weights[:, :, None], dim=0, out=attended[0, :, 0])
    elif queries.dtype in (torch.float32, torch.float64):
        found = torch.bmm(queries[0] * scores.scale, keys.permute(1, 2, 0))
        torch.bmm(torch.softmax(found, dim=-1), values.transpose(0, 1), out=attended[0])
    else:
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        attended.copy_(F.scaled_dot_product_attention(queries, keys, values, scale=scores.scale))


def _prefill(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scoring, attended: torch.Tensor
) -> None:
    """The last tokens of a sequence, or all. queries and attended [count, Hkv, G, D]; keys and values [L, Hkv, D]."""
    if not scores.plain:
        _scores.attend(queries, keys, values, scores, attended)
        return
    count, length, window, scale = len(queries), len(keys), scores.window, scores.scale
    group = (-1, queries.shape[2], -1, -1)
    keys, values = (tensor.transpose(0, 1)[:, None].expand(group) for tensor in (keys, values))
    queries, attended = queries.permute(1, 2, 0, 3), attended.permute(1, 2, 0, 3)
    if count == length and (window is None or window >= length):
        attended.copy_(F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale))
        return
    for first in range(0, count, CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, count)
        stop, start = length - count + last, _scores.first_seen(length - count + first, window)
        mask = _scores.mask(last - first, stop - start, window, queries.device)
        part = F.scaled_dot_product_attention(
            queries[:, :, first:last], keys[:, :, start:stop], values[:, :, start:stop], attn_mask=mask, scale=scale
        )
        attended[:, :, first:last].copy_(part)
