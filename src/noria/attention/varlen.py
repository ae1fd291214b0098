"""Attention of a whole microbatch in a few kernels: CUDA, half precisions, through torch's own flash attention.

Keys are read where they lie in the cache: a start row and a length per sequence; only sequences in several runs of
pages are copied together. Knows nothing of models and steps.
T tokens, N sequences, H heads, Hkv key/value heads, D head dim.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from noria.attention import pieces
from noria.kernels.scoring import Scoring
from noria.step import Span

# The arguments that torch's kernel is given, in order and by name.
GIVEN = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask".split()
NAMED = ("scale", "window_size_left", "window_size_right", "seqused_k")

Rows: TypeAlias = tuple[tuple[int, int], ...]  # start .. stop of the pieces of the cache that hold a sequence's keys


@dataclass(frozen=True)
class KernelCall:
    """Sequences that one kernel computes. Tensors on the device: starts and lengths int32, rows and gather int64."""

    rows: slice | torch.Tensor  # which of the microbatch's tokens are their queries
    query_starts: torch.Tensor  # [N + 1]
    key_starts: torch.Tensor  # [N + 1] first row of each sequence's keys; the last entry only completes the shape
    lengths: torch.Tensor  # [N] keys of each sequence
    gather: torch.Tensor | None  # rows of the cache to copy together first, or None to read the cache as it lies
    max_queries: int
    max_length: int


def usable(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Flash attention computes float16 and bfloat16 from Ampere on, head dims up to 256 that are multiples of 8."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return False
    available = getattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)()
    return available and takes_what_flash_gives() and torch.cuda.get_device_capability(device) >= (8, 0)


def takes_what_flash_gives() -> bool:
    """Whether this torch's kernel, which is private and may change, has the arguments that it is called with here."""
    kernel = getattr(getattr(torch.ops.aten, "_flash_attention_forward", None), "default", None)
    if kernel is None:
        return False
    arguments = kernel._schema.arguments
    given = [argument.name for argument in arguments if not argument.kwarg_only]
    named = {argument.name: argument.has_default_value() for argument in arguments if argument.kwarg_only}
    needed = {name for name, has_default in named.items() if not has_default}
    return given == GIVEN and needed <= set(NAMED) <= set(named)


def prepare(spans: list[Span], device: torch.device) -> tuple[KernelCall, ...]:
    """At most four calls: one new token or several, keys in one piece or in several. One copy to the device."""
    if not spans:
        return ()
    sorts: dict[tuple[bool, bool], list[tuple[Span, Rows]]] = {}
    for span in spans:
        rows = pieces(span)
        sorts.setdefault((span.count == 1, len(rows) == 1), []).append((span, rows))
    arrays = [array for (_, whole), members in sorts.items() for array in _arrays(members, whole)]
    long, short = _to_device(arrays, device)
    calls = []
    for index, ((_, whole), members) in enumerate(sorts.items()):
        queries, gather = long[5 * index], long[5 * index + 4]
        counts = [span.count for span, _ in members]
        first, total = members[0][0].first, sum(counts)
        together = members[-1][0].first + counts[-1] == first + total
        query_starts, key_starts, lengths = short[5 * index + 1 : 5 * index + 4]
        calls.append(
            KernelCall(
                slice(first, first + total) if together else queries,
                query_starts,
                key_starts,
                lengths,
                None if whole else gather,
                max(counts),
                max(span.length for span, _ in members),
            )
        )
    return tuple(calls)


def _arrays(members: list[tuple[Span, Rows]], whole: bool) -> list[np.ndarray]:
    """Of one call: rows of its queries, starts of queries, starts of keys, lengths, rows of the cache to gather."""
    counts = np.array([span.count for span, _ in members])
    lengths = np.array([span.length for span, _ in members])
    queries = np.concatenate([np.arange(span.first, span.first + span.count) for span, _ in members])
    if whole:
        starts = np.array([rows[0][0] for _, rows in members])
        return [queries, _starts(counts), np.append(starts, starts[-1] + lengths[-1]), lengths, np.empty(0, np.int64)]
    gather = np.concatenate([np.arange(start, stop) for _, rows in members for start, stop in rows])
    return [queries, _starts(counts), _starts(lengths), lengths, gather]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _to_device(arrays: list[np.ndarray], device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The arrays on the device as int64 and as int32, in one copy that the host does not wait for."""
    packed = torch.from_numpy(np.concatenate(arrays).astype(np.int64))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    sizes = [len(array) for array in arrays]
    return list(packed.split(sizes)), list(packed.to(torch.int32).split(sizes))


def attention(
    plan: tuple[KernelCall, ...],
    queries: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scores: Scoring,
) -> torch.Tensor:
    """[T, H, D]: each query attends to its own sequence's keys up to itself, the last `window` of them if given.

    queries [T, H, D]; caches [rows, Hkv, D] of one layer, in which the new tokens already lie.
    Raises NotImplementedError for a soft cap or sinks.
    """
    if not scores.plain:
        raise NotImplementedError("varlen computes no soft caps and no sinks")
    if len(plan) == 1 and isinstance(plan[0].rows, slice):
        return _compute(plan[0], queries, key_cache, value_cache, scores)
    attended = queries.new_empty(queries.shape)
    for call in plan:
        part = _compute(call, queries[call.rows], key_cache, value_cache, scores)
        attended[call.rows] = part
    return attended


def _compute(
    call: KernelCall,
    queries: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scores: Scoring,
) -> torch.Tensor:
    """One kernel. With fewer queries than keys its causal mask ends at the last key, as a chunk with a past needs."""
    keys, values, window = key_cache, value_cache, scores.window
    if call.gather is not None:
        keys, values = keys.index_select(0, call.gather), values.index_select(0, call.gather)
    return flash(
        queries,
        keys,
        values,
        call.query_starts,
        call.key_starts,
        call.max_queries,
        call.max_length,
        0.0,
        call.max_queries > 1,
        False,
        scale=scores.scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=-1 if window is None else 0,
        seqused_k=call.lengths,
    )[0]


def flash(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    """torch's flash attention over sequences side by side (FlashAttention-2, arXiv 2307.08691)."""
    return torch.ops.aten._flash_attention_forward(*arguments, **options)
