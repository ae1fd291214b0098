"""Dense softmax attention over a paged cache, token by token in float64: what every kind of attention must give."""

import random

import torch
import torch.nn.functional as F

from noria.rows.pages import Pages
from noria.step import PAGE_TOKENS, Run, Span


def attention(spans, queries, key_cache, value_cache, scale, window, soft_cap=None, sinks=None) -> torch.Tensor:
    """[T, H, Dv] float64 on the CPU. A sink is a key more, whose score no cap changes and whose value is zero."""
    queries, key_cache, value_cache = (tensor.double().cpu() for tensor in (queries, key_cache, value_cache))
    attended = torch.full((*queries.shape[:2], value_cache.shape[2]), torch.nan, dtype=torch.float64)
    group = queries.shape[1] // key_cache.shape[1]
    for span in spans:
        pages = [page for run in span.runs for page in range(run.start, run.start + run.count)]
        rows = [page * PAGE_TOKENS + token for page in pages for token in range(PAGE_TOKENS)]
        for index in range(span.count):
            stop = span.length - span.count + index + 1
            seen = rows[max(0, stop - window) if window else 0 : stop]
            for head in range(queries.shape[1]):
                keys, values = key_cache[seen, head // group], value_cache[seen, head // group]
                scores = keys @ queries[span.first + index, head] * scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                if sinks is not None:
                    scores, values = (
                        torch.cat([scores, sinks[head : head + 1].double().cpu()]),
                        F.pad(values, (0, 0, 0, 1)),
                    )
                attended[span.first + index, head] = torch.softmax(scores, dim=0) @ values
    return attended


def spans_of(*sequences: tuple[int, int, tuple[tuple[int, int], ...]]) -> list[Span]:
    """Spans side by side of (new tokens, length, runs as (start, count))."""
    spans, first = [], 0
    for count, length, runs in sequences:
        spans.append(Span(first, count, length, tuple(Run(*run) for run in runs)))
        first += count
    return spans


def full_cache(num_pages, rounds, seed=0, most=400) -> list[Span]:
    """Rows of many lengths in a cache that stayed full while rows ended and others came: some lie in several runs.

    Most of them decode, one in eight is at a chunk of its prompt.
    """
    choose, pages, rows = random.Random(seed), Pages(num_pages), []
    for _ in range(rounds):
        while (runs := pages.reserve(-(-(length := choose.randint(5, most)) // PAGE_TOKENS))) is not None:
            rows.append((length, runs))
        for _ in range(1 + len(rows) // 8):
            pages.release(rows.pop(choose.randrange(len(rows)))[1])
    sequences = []
    for place, (length, runs) in enumerate(rows):
        seen = choose.randint(2, length)
        sequences.append((min(seen, 17) if place % 8 == 0 else 1, seen, [(run.start, run.count) for run in runs]))
    return spans_of(*sequences)


def in_blocks(spans):
    """Spans like these whose runs, four times as long, hold whole blocks of keys."""
    sequences = []
    for span in spans:
        length = span.length * 4 - 3
        count = 1 if span.count == 1 else length if span.count == span.length else span.count * 3
        sequences.append((count, length, tuple((4 * run.start, 4 * run.count) for run in span.runs)))
    return spans_of(*sequences)


def behind_beginnings(spans):
    """Those of in_blocks that go on from beginnings which several have: 100 pages further on, [A] and [A, B] in turn."""
    beginning = ((0, 8), (20, 4))
    sequences = []
    for place, span in enumerate(in_blocks(spans)):
        shared = beginning[: place % 3]
        length = span.length + sum(count for _, count in shared) * PAGE_TOKENS
        runs = tuple((run.start + 100, run.count) for run in span.runs)
        sequences.append((span.count, length, (*shared, *runs)))
    return spans_of(*sequences)


def most_pages(spans):
    return max(run.start + run.count for span in spans for run in span.runs)


# Microbatches that a kind of attention must compute: new tokens, length, and pages of every sequence.
CASES = {
    "one decoding row": spans_of((1, 37, ((2, 3),))),
    "the first token of a sequence": spans_of((1, 1, ((5, 2),))),
    "decoding rows": spans_of((1, 37, ((9, 3),)), (1, 16, ((2, 1),)), (1, 50, ((4, 4),))),
    "decoding rows of one length, evenly spaced, then not": spans_of(
        (1, 20, ((1, 2),)),
        (1, 20, ((4, 3),)),
        (1, 20, ((7, 2),)),
        (1, 20, ((9, 2),)),
        (1, 20, ((11, 1), (0, 1))),
        (1, 20, ((16, 2),)),
        (1, 20, ((13, 2),)),
        (1, 18, ((18, 2),)),
        (2, 18, ((20, 2),)),
    ),
    "a whole prompt": spans_of((33, 33, ((0, 9),))),
    "a chunk with a past": spans_of((20, 45, ((3, 3),))),
    "prompts beside decoding rows": spans_of(
        (17, 17, ((11, 2),)), (1, 40, ((0, 3),)), (5, 30, ((6, 4),)), (1, 3, ((4, 1),)), (2, 2, ((20, 1),))
    ),
    "pages in several runs": spans_of((1, 60, ((9, 1), (3, 2), (12, 1))), (18, 35, ((7, 1), (0, 2)))),
    "runs that touch, and pages not yet used": spans_of((1, 20, ((4, 1), (5, 4), (1, 2))), (16, 16, ((14, 1), (2, 1)))),
    "mixed lengths in a full cache": full_cache(22, rounds=20, most=90),
    "everything at once": spans_of(
        (1, 18, ((20, 2),)), (6, 40, ((1, 1), (8, 2))), (1, 33, ((4, 1), (3, 1), (2, 1))), (30, 30, ((12, 2),))
    ),
}


def tensors(spans, heads, kv_heads, head_dim, dtype, device="cpu", pages=22, width=None):
    """Random queries (a strided view, as models give them) and caches; rows of the cache that no span holds are NaN.

    width: of a value, if it is not that of a key.
    """
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(span.count for span in spans)
    queries = torch.randn(num_tokens, heads + 3, head_dim, generator=generator)
    caches = torch.randn(2, pages * PAGE_TOKENS, kv_heads, max(head_dim, width or 0), generator=generator)
    held = torch.zeros(pages * PAGE_TOKENS, dtype=torch.bool)
    for span in spans:
        places = [page for run in span.runs for page in range(run.start, run.start + run.count)]
        for position in range(span.length):
            held[places[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS] = True
    caches[:, ~held] = torch.nan
    queries, caches = queries.to(device, dtype), caches.to(device, dtype)
    return queries[:, :heads], caches[0][..., :head_dim], caches[1][..., : width or head_dim]
