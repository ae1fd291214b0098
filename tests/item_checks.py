"""What attention over work items must hold on any device, in Triton's interpreter too: right, and the same bits.

One row of LENGTH tokens is computed in many ways: its queries at once, in chunks, one by one, beside others, behind a
shared beginning, its keys in one run or in several, its sections by one program or by many.
"""

import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F

import item_cases
from item_cases import ragged
from noria.kernels import attend, lists, work

NONE = work.NONE


def packing(heads, programs=1000, window=None, widest=work.WIDE_TILE, most_slots=1 << 16):
    widest = work.LEAST_TILE if heads.within else widest
    return work.Packing(heads.heads // heads.key_heads, heads.key_heads, programs, most_slots, widest, window)


def tensors(heads, tokens, rows, dtype, device, seed=0):
    """Random queries (a view of wider rows, as models give them), keys and values of a cache."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(tokens, heads.heads + 3, heads.dim, generator=generator).to(device, dtype)[:, : heads.heads]
    keys = torch.randn(rows, heads.key_heads, heads.dim, generator=generator).to(device, dtype)
    values = torch.randn(rows, heads.key_heads, heads.width, generator=generator).to(device, dtype)
    return queries, keys, keys[..., : heads.width] if heads.within else values


def attended(rows, its_packing, queries, keys, values, scores):
    on_device = attend.to_device(lists.make(rows, its_packing), queries.device)
    return attend.attend(on_device, queries, keys, values, scores)


# Rows as steps have them: new tokens, keys, runs.
MIXED = ragged(
    [1, 1, 70, 1, 33, 5, 1],
    [1, 333, 330, 64, 33, 1090, 2050],
    [
        [(0, 64)],
        [(64, 384)],
        [(512, 64), (5184, 320)],
        [(640, 64)],
        [(704, 64)],
        [(2048, 1024), (1152, 128)],
        [(4096, 1088), (3072, 64), (1280, 960)],
    ],
)
MIXED_ROWS = 5504


def unused_is_nan(rows, *caches):
    """The caches with NaN in all rows that hold no key."""
    held = np.concatenate([item_cases.cache_rows(rows, row) for row in range(len(rows.counts))])
    unused = torch.ones(len(caches[0]), dtype=torch.bool)
    unused[torch.from_numpy(held)] = False
    return [cache.masked_fill(unused.to(cache.device)[:, None, None], torch.nan) for cache in caches]


def error(found, expected):
    """The relative error in the norm of the whole."""
    return float(np.linalg.norm(found.double().cpu().numpy() - expected) / np.linalg.norm(expected))


def errors(heads, dtype, device, scores, rows=MIXED, cache_rows=MIXED_ROWS, programs=1000):
    """The errors of the items and of torch's sdpa in this dtype, against float64. The latter knows no cap and no sinks."""
    queries, keys, values = tensors(heads, int(rows.counts.sum()), cache_rows, dtype, device)
    keys, values = unused_is_nan(rows, keys, values)
    values = keys[..., : heads.width] if heads.within else values
    found = attended(rows, packing(heads, programs), queries, keys, values, scores)
    host = [tensor.double().cpu().numpy() for tensor in (queries, keys, values)]
    sinks = None if scores.sinks is None else scores.sinks.cpu().numpy()
    dense = functools.partial(item_cases.dense, rows, *host, scores.scale, scores.window)
    return error(found, dense(scores.soft_cap, sinks)), error(sdpa(rows, queries, keys, values, scores), dense())


def sdpa(rows, queries, keys, values, scores):
    """[T, H, V] by torch, row after row."""
    found, token = [], 0
    for row, count in enumerate(rows.counts.tolist()):
        held = torch.from_numpy(item_cases.cache_rows(rows, row)).to(keys.device)
        positions = torch.arange(len(held) - count, len(held), device=keys.device)[:, None]
        seen = torch.arange(len(held), device=keys.device) <= positions
        if scores.window is not None:
            seen &= torch.arange(len(held), device=keys.device) > positions - scores.window
        group = queries.shape[1] // keys.shape[1]
        own = [tensor[held].repeat_interleave(group, dim=1).transpose(0, 1)[None] for tensor in (keys, values)]
        asked = queries[token : token + count].transpose(0, 1)[None]
        found.append(F.scaled_dot_product_attention(asked, *own, attn_mask=seen, scale=scores.scale)[0].transpose(0, 1))
        token += count
    return torch.cat(found)


def ways(length, ones=None):
    """(name, rows, position of each of their tokens): all compute queries of one row; tokens of other rows are at NONE.

    The row's keys lie in `place(length)` cache rows from 0 on and, cut into four runs, from there on again; behind both
    are those of others. `ones`: the positions that are computed one by one; all, if None.
    """
    room, shared = place(length), (length // 64 - 1) * 64
    whole = [(0, room)]
    cuts = [0, *(length // 64 * share // 7 * 64 for share in (1, 3, 6)), room]
    runs = [(room + (room - stop), stop - start) for start, stop in itertools.pairwise(cuts)]
    other = [(2 * room, 640)]
    every = np.arange(length)
    yield "at once", ragged([length], [length], [whole]), every
    yield "in several runs", ragged([length], [length], [runs]), every
    ends = [*range(100, length, 100), length]
    counts = np.diff([0, *ends])
    yield "in chunks", ragged(counts, ends, [whole] * len(ends)), every
    ones = every if ones is None else np.array(ones)
    yield "token by token", ragged([1] * len(ones), ones + 1, [whole] * len(ones)), ones
    yield "token by token in several runs", ragged([1] * len(ones), ones + 1, [runs] * len(ones)), ones
    beside = np.concatenate([np.full(501, NONE), every[-1:], np.full(1, NONE)])
    yield "one token in company", ragged([500, 1, 1, 1], [600, 77, length, 640], [other, other, whole, other]), beside
    for position in (0, 63, 64, length // 2, length - 1):
        yield f"token {position} alone", ragged([1], [position + 1], [whole]), np.array([position])
    for beginning in (64, 1024, shared):
        last = ones[ones >= beginning]
        of = [0] * len(last)
        yield (
            f"behind {beginning} shared",
            ragged([1] * len(last), last + 1, [whole] * len(last), of, [beginning], [NONE]),
            last,
        )
    last = ones[ones >= shared]
    of = [number % 3 for number in range(len(last))]
    tree = ragged(
        [1] * len(last), last + 1, [runs] * len(last), of, [64, 1088 if shared > 1088 else 512, shared], [NONE, 0, 1]
    )
    yield "behind beginnings of beginnings", tree, last


def place(length):
    return -(-length // 64) * 64


def other_bits(heads, dtype, device, scores, length, programs=(1, 1000, 1 << 20), widest=work.WIDE_TILE, ones=None):
    """(name, programs) of every way whose bits are not those of the row at once."""
    return [way[:2] for way in _compared(heads, dtype, device, scores, length, programs, widest, ones) if not way[2]]


def _compared(heads, dtype, device, scores, length, programs, widest, ones):
    room = place(length)
    queries, keys, values = tensors(heads, length, 2 * room + 640, dtype, device)
    for way, rows, _ in ways(length, ones=ones):
        if way == "in several runs":  # the same keys there again
            for cache in (keys, values):
                cache[torch.from_numpy(item_cases.cache_rows(rows, 0)).to(device)] = cache[:length].clone()
    others = tensors(heads, 1000, 1, dtype, device, seed=1)[0]
    expected = None
    for name, rows, positions in ways(length, ones=ones):
        own = torch.from_numpy(positions).to(device)
        asked = torch.where(
            (own >= 0)[:, None, None], queries[own], others[torch.arange(len(own), device=device) % 1000]
        )
        for number in programs:
            found = attended(rows, packing(heads, number, scores.window, widest), asked, keys, values, scores)
            expected = found if expected is None else expected
            yield name, number, torch.equal(found[own >= 0], expected[own[own >= 0]])
