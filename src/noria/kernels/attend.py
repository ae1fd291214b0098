"""Launches the attention kernels over a step's lists of work: what is compiled, where partial results lie, in which order.

T queries, H heads, Hkv key heads, D head dim, V width of a value.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
import triton

from noria.arrays import KEY_GROUP, Array, encoded
from noria.kernels import coded, items
from noria.kernels.coded import Coded
from noria.kernels.placed import DeviceWork, to_device
from noria.kernels.rounded import FORMS
from noria.kernels.scoring import VALUES_WITHIN, HeadShape, Scoring, ScoringKind, lie_within
from noria.kernels.shared_memory import shared_memory
from noria.kernels.work import (
    KEY_BLOCK,
    LEAST_TILE,
    PIECE_COLUMNS,
    WIDE_TILE,
    Item,
    Launch,
    Merge,
    Packing,
    Wave,
    Work,
)
from noria.limits import PARTIAL_NBYTES

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Tuning:
    """How a launch is compiled; it changes no bit."""

    warps: int
    stages: int
    one_loop: bool  # all blocks with their masks in one loop, which never drains: for rows bound by memory
    # Neighbours share an item; else a head, so that the keys in flight are few and stay in the L2 cache.
    heads_first: bool


Tuned: TypeAlias = Callable[[Launch, int], Tuning]


def packing(device: torch.device, heads: HeadShape, window: int | None = None) -> Packing:
    """How this device's lists are packed. Wide heads leave no registers for wide tiles."""
    widest = LEAST_TILE if max(heads.dim, heads.width) > 128 and heads.group <= LEAST_TILE else WIDE_TILE
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    slots = PARTIAL_NBYTES // partial_nbytes(1, heads.num_heads, heads.width)
    return Packing(heads.group, heads.num_key_heads, programs, slots, widest, window)


def partial_nbytes(slots: int, heads: int, width: int) -> int:
    """Memory that `attend` takes beside its result: a sum of V numbers, a maximum and a weight for each slot and head."""
    return slots * heads * (width + 2) * 4


def coded_tuning(launch: Launch, widest: int) -> Tuning:
    """The same of a cache in fewer bits, for which rows are bound by what decodes it: no masks where none are needed."""
    return replace(tuning(launch, widest), one_loop=False)


def tuning(launch: Launch, widest: int) -> Tuning:
    """The fastest on an H200. `widest`: the wider of a key and a value, padded."""
    few = launch.tile == LEAST_TILE
    if widest > 128:
        return Tuning(8, 2, few, few)
    return Tuning(4, 3, True, True) if few else Tuning(8, 3, False, False)


def build(device: torch.device, dtype: torch.dtype, heads: HeadShape, scored: ScoringKind, form: str = "") -> None:
    """Compiles what lists of such heads may launch, with no items. form: of a cache in fewer bits."""
    tiles = {LEAST_TILE, packing(device, heads).widest}
    none, no_merges = np.empty((0, len(Item)), np.int32), np.empty((0, len(Merge)), np.int32)
    launches = tuple(
        Launch(none, tile, *flags) for tile in tiles for flags in itertools.product((False, True), repeat=2)
    )
    one = np.zeros((1, PIECE_COLUMNS), np.int32)  # so that the lists lie somewhere
    lists = Work(one[:, 0], one[:, 0], one, (Wave(launches, no_merges),), 0)
    queries = torch.empty(1, heads.num_heads, heads.dim, dtype=dtype, device=device)
    sizes = heads.dim, heads.width
    keys: torch.Tensor | Coded
    values: torch.Tensor | Coded
    if heads.within:
        keys = torch.empty(1, heads.num_key_heads, heads.dim, dtype=dtype, device=device)
        values = keys[..., : heads.width]
    elif form:
        keys, values = (coded.zeros(array, 1, device) for array in arrays(heads, form))
    else:
        keys, values = (torch.empty(1, heads.num_key_heads, size, dtype=dtype, device=device) for size in sizes)
    sinks = torch.zeros(heads.num_heads, dtype=dtype, device=device) if scored.sinks else None
    scores = Scoring(1.0, scored.window, 1.0 if scored.capped else None, sinks)
    attend(to_device(lists, device), queries, keys, values, scores)


def arrays(heads: HeadShape, form: str) -> tuple[Array, ...]:
    """What a layer of such heads leaves in a cache in fewer bits: a key and a value."""
    rows = ((heads.num_key_heads, size) for size in (heads.dim, heads.width))
    found = encoded(tuple(map(Array, ("key", "value"), rows)), form)
    assert not isinstance(found, int)
    return found


def attend(
    lists: DeviceWork,
    queries: torch.Tensor,
    keys: torch.Tensor | Coded,
    values: torch.Tensor | Coded,
    scores: Scoring,
    tuned: Tuned | None = None,
) -> torch.Tensor:
    """[T, H, V]: each query attends to its own row's keys up to itself.

    queries [T, H, D]; keys [rows, Hkv, D] and values [rows, Hkv, V] of one layer, in which the new tokens already lie;
    both may be coded, in one form, or values be the first numbers of the keys, which are then read once. The last dimension
    of each is contiguous; the others have any stride.
    """
    (tokens, heads, dim), width = queries.shape, values.shape[2]
    attended = queries.new_empty(tokens, heads, width)
    state = torch.empty(
        1 + partial_nbytes(lists.work.slots, heads, width) // 4, dtype=torch.float32, device=queries.device
    )
    soften, of_scores = _in_powers_of_two(scores)
    sinks = state if scores.sinks is None else scores.sinks
    of_cache, strides, form = _cache(keys, values)
    own = dim - width if form == VALUES_WITHIN else dim  # numbers of a key that are read for its score alone
    pads = max(16, triton.next_power_of_2(own)), max(16, triton.next_power_of_2(width))
    of_state = state, sinks, lists.work.slots * heads, *of_scores
    options = scores.window is not None, scores.soft_cap is not None, scores.sinks is not None
    tuned = tuned or (coded_tuning if form > 0 else tuning)
    for launches, merges in lists.waves:
        for launch, its_items in launches:
            its = _fitting(tuned(launch, max(pads)), launch.tile * (max(dim, pads[0])), sum(pads), queries.device)
            items.attend_items[(len(launch.items) * keys.shape[1],)](
                queries, *of_cache, attended, lists.order, lists.positions, its_items, lists.pieces,
                *of_state, soften, scores.window or 0,
                *queries.stride()[:2], *strides,
                heads, heads // keys.shape[1], dim, width, *pads, form, launch.tile, launch.many, launch.partial, *options,
                its.one_loop, its.heads_first, num_warps=its.warps, num_stages=its.stages, enable_fp_fusion=False,
            )  # fmt: skip
        if len(merges):
            items.merge_parts[(len(merges) * heads,)](
                merges, lists.order, attended, *of_state, heads, width, pads[1], scores.sinks is not None,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    return attended


def _cache(keys: torch.Tensor | Coded, values: torch.Tensor | Coded) -> tuple[list[torch.Tensor], list[int], int]:
    """Keys and values, scales and zeros of the keys, of the values; strides of keys and values; the form (0: they are plain)."""
    if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
        form = VALUES_WITHIN if lie_within(values, keys) else 0
        return [keys, values, *[keys] * 4], [*keys.stride()[:2], *values.stride()[:2]], form
    assert isinstance(keys, Coded) and isinstance(values, Coded) and keys.form == values.form, (
        "both or none, in one form"
    )
    groups = keys.array.group, values.array.group
    assert groups == (KEY_GROUP, -1), f"keys and values in groups of {groups[0]} and {groups[1]}"
    fields = [its.fields[name] for name in ("codes", "scales") for its in (keys, values)]
    codes, zeros = fields[:2], [its.fields.get("zeros", its.fields["codes"]) for its in (keys, values)]
    more = [fields[2], zeros[0], fields[3], zeros[1]]
    return [*codes, *more], [stride for one in codes for stride in one.stride()[:2]], FORMS[keys.form]


def _fitting(its: Tuning, queries: int, numbers: int, device: torch.device) -> Tuning:
    """As many stages as the shared memory of the device holds blocks of keys and values, `numbers` a key, beside so many
    numbers of queries."""
    stages = (shared_memory(device) - queries * 2) // (KEY_BLOCK * numbers * 2)
    return replace(its, stages=max(1, min(its.stages, stages)))


def _in_powers_of_two(scores: Scoring) -> tuple[float, tuple[float, float, float]]:
    """The factor of the capped tanh's exponent of 2; that of the scores', and what makes scores of sinks: factor, shift."""
    if scores.soft_cap is None:
        return 0.0, (scores.scale * LOG2E, 1.0 / scores.scale, 0.0)
    cap = scores.soft_cap
    return 2.0 * scores.scale / cap * LOG2E, (cap * LOG2E, 1.0 / cap, 1.0)
