"""Attention over work items on a CUDA device (Triton): one kernel for decode, chunks, prefill and shared beginnings.

work.py says which queries an item has, which keys, and in which order results meet; here that is computed. Each product
and sum is rounded where it is written (compiled without fused multiply-add; `tl.fma` stands where one is meant), so that
all variants give a row the same bits: they differ in masks that let everything pass and in partial results of no keys.
"""

import triton
import triton.language as tl

from noria.kernels.decode_tiles import KEY_SCALED, key_block, of_head, scales_of, value_block
from noria.kernels.scoring import VALUES_WITHIN
from noria.kernels.work import KEY_BLOCK, PIECE_COLUMNS, Item, Merge
from noria.kernels.work import SECTION as SECTION_KEYS

BLOCK, SECTION = tl.constexpr(KEY_BLOCK), tl.constexpr(SECTION_KEYS)
WITHIN = tl.constexpr(VALUES_WITHIN)
# A maximum before the first key: finite, so that a block without visible keys leaves no NaN.
FAR = tl.constexpr(-1.0e38)
COLUMNS, OF_MERGE, OF_PIECE = tl.constexpr(len(Item)), tl.constexpr(len(Merge)), tl.constexpr(PIECE_COLUMNS)
FIRST, COUNT, FIRST_PIECE, LAST_PIECE, START, STOP, LOWEST, HIGHEST = (tl.constexpr(int(c)) for c in list(Item)[:8])
TOTAL_FROM, SECTION_FROM, TOTAL_TO, SECTION_TO = (tl.constexpr(int(c)) for c in list(Item)[8:])
PLACE, TO, TOTAL, WHOLE, FIRST_SLOT, STRIDE, SLOTS = (tl.constexpr(int(c)) for c in Merge)
LISTS = ["order", "positions", "items", "merges", "pieces"]  # one variant for any alignment


@triton.jit
def _fold(sums, maximum, weight, its_sums, its_maximum, its_weight, scale):
    """Two partial results as one. Either may be of no keys, and then the other comes out to the bit."""
    top = tl.maximum(maximum, its_maximum)
    old, new = tl.exp2((maximum - top) * scale), tl.exp2((its_maximum - top) * scale)
    return tl.fma(sums, old[:, None], its_sums * new[:, None]), top, tl.fma(weight, old, its_weight * new)


@triton.jit
def _finish(sums, maximum, weight, sinks, head, valid, scale, per_unit, shift, SINKS: tl.constexpr):
    """The attended values; a sink is a key without a value that enters here, in the units of scores."""
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * per_unit - shift
        top = tl.maximum(maximum, sink)
        old = tl.exp2((maximum - top) * scale)
        weight = tl.fma(weight, old, tl.exp2((sink - top) * scale))
        sums = sums * old[:, None]
    return sums / weight[:, None]


@triton.jit
def _load(
    state, rows, slot, ahead, head, valid,
    HEADS: tl.constexpr, V: tl.constexpr, VPAD: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """The partial results in the slots `slot + ahead`; those of no keys where `slot` is negative or there are none."""
    if PARTIAL:
        row, valid, v = (slot + ahead).to(tl.int64) * HEADS + head, valid & (slot >= 0), tl.arange(0, VPAD)
        sums = tl.load(state + row[:, None] * V + v[None, :], mask=valid[:, None] & (v < V)[None, :], other=0.0)
        maximum = tl.load(state + rows * V + row, mask=valid, other=FAR)
        weight = tl.load(state + rows * (V + 1) + row, mask=valid, other=0.0)
    else:
        sums = tl.full((ahead.shape[0], VPAD), 0.0, tl.float32)
        maximum, weight = tl.full((ahead.shape[0],), FAR, tl.float32), tl.full((ahead.shape[0],), 0.0, tl.float32)
    return sums, maximum, weight


@triton.jit
def _store(state, rows, slot, ahead, head, valid, sums, maximum, weight, HEADS: tl.constexpr, V: tl.constexpr):
    """Leaves partial results in the slots `slot + ahead`, unless `slot` is negative."""
    row, valid, v = (slot + ahead).to(tl.int64) * HEADS + head, valid & (slot >= 0), tl.arange(0, sums.shape[1])
    tl.store(state + row[:, None] * V + v[None, :], sums, mask=valid[:, None] & (v < V)[None, :])
    tl.store(state + rows * V + row, maximum, mask=valid)
    tl.store(state + rows * (V + 1) + row, weight, mask=valid)


@triton.jit
def _query(rows, valid, D: tl.constexpr, V: tl.constexpr, PAD: tl.constexpr, VPAD: tl.constexpr, FORM: tl.constexpr):
    """A tile of queries that begin at `rows`: as one, or where values lie within keys what meets the value, and the rest."""
    d, v = tl.arange(0, PAD), tl.arange(0, VPAD)
    if FORM == WITHIN:
        its = tl.load(rows[:, None] + v[None, :], mask=valid[:, None] & (v < V)[None, :], other=0.0)
        rest = tl.load(rows[:, None] + V + d[None, :], mask=valid[:, None] & (d < D - V)[None, :], other=0.0)
        query = its, rest
    else:
        query = tl.load(rows[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
    return query


@triton.jit
def _blocks(
    begin, end, zeroth, stop, query, sums, maximum, weight, keys, values, position, window, scale, soften,
    key_row: tl.constexpr, value_row: tl.constexpr, D: tl.constexpr, V: tl.constexpr, FORM: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The keys at positions `begin .. end`, block after block; position 0 would be in cache row `zeroth`."""
    VPAD: tl.constexpr = sums.shape[1]
    n = tl.arange(0, BLOCK)
    coming = scales_of(keys, values, zeroth + begin, n + begin < stop, query, D, V, VPAD, key_row, value_row, FORM)
    for at in tl.range(begin, end, BLOCK):
        # scales of the next block are loaded while this one is computed with: they are too small to be copied ahead
        seen, ahead, scales = at + n < stop, at + BLOCK, coming
        coming = scales_of(keys, values, zeroth + ahead, n + ahead < stop, query, D, V, VPAD, key_row, value_row, FORM)
        if FORM == WITHIN:  # what is read for scores is the value too
            its, rest = query
            value = value_block(keys, scales, zeroth + at, seen, V, VPAD, key_row, its.dtype, 0, MASKED)
            last = key_block(keys + V, scales, zeroth + at, seen, D - V, rest.shape[1], key_row, its.dtype, 0, MASKED)
            score = tl.dot(its, tl.trans(value), tl.dot(rest, last))
        else:
            block = key_block(keys, scales, zeroth + at, seen, D, query.shape[1], key_row, query.dtype, FORM, MASKED)
            score = tl.dot(query, block)
        if CAP:  # the capped score is cap * tanh; tanh - 1 does as well, because a constant in exponents cancels
            score = -2.0 / (tl.exp2(score * soften) + 1.0)
        if MASKED:
            visible = seen[None, :] & ((at + n)[None, :] <= position[:, None])
            if WINDOW:
                visible = visible & ((at + n)[None, :] > position[:, None] - window)
            score = tl.where(visible, score, float("-inf"))
        top = tl.maximum(maximum, tl.max(score, 1))
        share, old = tl.exp2((score - top[:, None]) * scale), tl.exp2((maximum - top) * scale)
        weight, maximum = tl.fma(weight, old, tl.sum(share, 1)), top
        if FORM != WITHIN:
            value = value_block(values, scales, zeroth + at, seen, V, VPAD, value_row, query.dtype, FORM, MASKED)
        sums = tl.dot(share.to(value.dtype), value, sums * old[:, None])  # type: ignore[possibly-undefined]
    return sums, maximum, weight


@triton.jit
def _pieces(
    first, last, pieces, start, stop, lowest, highest,
    query, sums, maximum, weight, keys, values, position, window, scale, soften,
    key_row: tl.constexpr, value_row: tl.constexpr, D: tl.constexpr, V: tl.constexpr, FORM: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, ONE_LOOP: tl.constexpr,
):  # fmt: skip
    """Pieces of one section: without masks where all queries, from `lowest` to `highest`, see a whole block."""
    for number in range(first, last):
        piece = pieces + number * OF_PIECE
        row, at, held = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
        zeroth = (row - at).to(tl.int64)
        low, high = tl.maximum(at, start), tl.minimum(at + held, stop)
        if WINDOW:
            low = tl.minimum(tl.maximum(low, (lowest - window + 1) // BLOCK * BLOCK), high)
        end = low
        if not ONE_LOOP:
            begin = low
            if WINDOW:
                begin = tl.minimum(tl.maximum(low, (highest - window + BLOCK) // BLOCK * BLOCK), high)
                sums, maximum, weight = _blocks(
                    low, begin, zeroth, high, query, sums, maximum, weight, keys, values, position, window, scale, soften,
                    key_row, value_row, D, V, FORM, True, WINDOW, CAP,
                )  # fmt: skip
            end = tl.maximum(begin, tl.minimum(high, lowest + 1) // BLOCK * BLOCK)
            sums, maximum, weight = _blocks(
                begin, end, zeroth, high, query, sums, maximum, weight, keys, values, position, window, scale, soften,
                key_row, value_row, D, V, FORM, False, WINDOW, CAP,
            )  # fmt: skip
        sums, maximum, weight = _blocks(
            end, high, zeroth, high, query, sums, maximum, weight, keys, values, position, window, scale, soften,
            key_row, value_row, D, V, FORM, True, WINDOW, CAP,
        )  # fmt: skip
    return sums, maximum, weight


@triton.jit
def _sections(
    item, state, state_rows, ahead, head, valid, pieces,
    query, keys, values, position, window, scale, soften,
    key_row: tl.constexpr, value_row: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    FORM: tl.constexpr, VPAD: tl.constexpr, PARTIAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    ONE_LOOP: tl.constexpr,
):  # fmt: skip
    """An item of several sections, each folded into the total as it ends.

    Sums begin anew in every section, never by a choice between old and new ones: that would serialize the products.
    """
    start, stop, lowest, highest = (
        tl.load(item + START),
        tl.load(item + STOP),
        tl.load(item + LOWEST),
        tl.load(item + HIGHEST),
    )
    piece, last, slot = tl.load(item + FIRST_PIECE), tl.load(item + LAST_PIECE), tl.load(item + SECTION_FROM)
    total, total_maximum, total_weight = _load(
        state, state_rows, tl.load(item + TOTAL_FROM), ahead, head, valid, HEADS, V, VPAD, PARTIAL
    )
    if PARTIAL:  # noqa: SIM102  decided when this is compiled
        if start % SECTION == 0:
            sums, maximum, weight = _load(state, state_rows, slot, ahead, head, valid, HEADS, V, VPAD, PARTIAL)
            total, total_maximum, total_weight = _fold(total, total_maximum, total_weight, sums, maximum, weight, scale)
            slot = -1
    while piece < last:
        sums, maximum, weight = _load(state, state_rows, slot, ahead, head, valid, HEADS, V, VPAD, PARTIAL)
        slot = -1
        border = tl.minimum(piece + tl.load(pieces + piece * OF_PIECE + 3), last)
        sums, maximum, weight = _pieces(
            piece, border, pieces, start, stop, lowest, highest,
            query, sums, maximum, weight, keys, values, position, window, scale, soften,
            key_row, value_row, D, V, FORM, WINDOW, CAP, ONE_LOOP,
        )  # fmt: skip
        piece = border
        if PARTIAL:  # noqa: SIM102
            if piece == last:
                to, total_to = tl.load(item + SECTION_TO), tl.load(item + TOTAL_TO)
                _store(state, state_rows, to, ahead, head, valid, sums, maximum, weight, HEADS, V)
                _store(state, state_rows, total_to, ahead, head, valid, total, total_maximum, total_weight, HEADS, V)
        total, total_maximum, total_weight = _fold(total, total_maximum, total_weight, sums, maximum, weight, scale)
    return total, total_maximum, total_weight


@triton.jit(do_not_specialize=["window", "state_rows"], do_not_specialize_on_alignment=LISTS)
def attend_items(
    queries, keys, values, key_scales, key_zeros, value_scales, value_zeros, attended, order, positions, items, pieces, state,
    sinks, state_rows, scale, per_unit, shift, soften, window, query_row, query_head, key_row: tl.constexpr,
    key_head: tl.constexpr, value_row: tl.constexpr, value_head: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, PAD: tl.constexpr, VPAD: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr,
    MANY: tl.constexpr, PARTIAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr,
    ONE_LOOP: tl.constexpr, HEADS_FIRST: tl.constexpr,
):  # fmt: skip
    """One item and key head a program. Row m of its tile is query m // GROUP of the item, head m % GROUP of the key head's.

    FORM: of a cache in fewer bits; or WITHIN, where the first V numbers of a key are its value, and PAD is of the others.
    """
    if HEADS_FIRST:
        of_keys, number = tl.program_id(0) % (HEADS // GROUP), tl.program_id(0) // (HEADS // GROUP)
    else:
        num_items = tl.num_programs(0) // (HEADS // GROUP)
        of_keys, number = tl.program_id(0) // num_items, tl.program_id(0) % num_items
    item = items + number * COLUMNS
    if tl.load(item + COUNT) == 0:  # what fills a list
        return
    ahead, v = tl.arange(0, TILE) // GROUP, tl.arange(0, VPAD)
    head, valid = of_keys * GROUP + tl.arange(0, TILE) % GROUP, ahead < tl.load(item + COUNT)
    place = tl.load(item + FIRST) + ahead
    token = tl.load(order + place, mask=valid, other=0).to(tl.int64)
    position = tl.load(positions + place, mask=valid, other=-1)
    query_at = queries + token * query_row + head * query_head
    query = _query(query_at, valid, D, V, PAD, VPAD, FORM)
    keys = of_head(keys, key_scales, key_zeros, of_keys, key_head, D, KEY_SCALED, FORM)
    values, to = of_head(values, value_scales, value_zeros, of_keys, value_head, V, V, FORM), tl.load(item + SECTION_TO)
    if MANY:
        sums, maximum, weight = _sections(
            item, state, state_rows, ahead, head, valid, pieces, query, keys, values, position, window, scale, soften,
            key_row, value_row, HEADS, D, V, FORM, VPAD, PARTIAL, WINDOW, CAP, ONE_LOOP,
        )  # fmt: skip
    else:
        slot = tl.load(item + SECTION_FROM)
        sums, maximum, weight = _load(state, state_rows, slot, ahead, head, valid, HEADS, V, VPAD, PARTIAL)
        sums, maximum, weight = _pieces(
            tl.load(item + FIRST_PIECE), tl.load(item + LAST_PIECE), pieces,
            tl.load(item + START), tl.load(item + STOP), tl.load(item + LOWEST), tl.load(item + HIGHEST),
            query, sums, maximum, weight, keys, values, position, window, scale, soften,
            key_row, value_row, D, V, FORM, WINDOW, CAP, ONE_LOOP,
        )  # fmt: skip
        if PARTIAL:
            _store(state, state_rows, to, ahead, head, valid, sums, maximum, weight, HEADS, V)
    result = _finish(sums, maximum, weight, sinks, head, valid, scale, per_unit, shift, SINKS).to(
        attended.dtype.element_ty
    )
    attended_at = attended + (token * HEADS + head) * V
    tl.store(attended_at[:, None] + v[None, :], result, mask=(valid & (to < 0))[:, None] & (v < V)[None, :])


@triton.jit(do_not_specialize=["state_rows"], do_not_specialize_on_alignment=LISTS)
def merge_parts(
    merges, order, attended, state, sinks, state_rows, scale, per_unit, shift,
    HEADS: tl.constexpr, V: tl.constexpr, VPAD: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One query and head a program: what came before, then the sections that were computed apart, in order."""
    merge, v = merges + (tl.program_id(0) // HEADS) * OF_MERGE, tl.arange(0, VPAD)
    if tl.load(merge + PLACE) < 0:
        return
    ahead = tl.full((1,), 0, tl.int32)  # one row, where an item's tile has many
    head, valid, to = tl.program_id(0) % HEADS + ahead, ahead == 0, tl.load(merge + TO)
    first, stride = tl.load(merge + FIRST_SLOT), tl.load(merge + STRIDE)
    total, whole = tl.load(merge + TOTAL), tl.load(merge + WHOLE)
    sums, maximum, weight = _load(state, state_rows, total, ahead, head, valid, HEADS, V, VPAD, True)
    part, its_maximum, its_weight = _load(state, state_rows, whole, ahead, head, valid, HEADS, V, VPAD, True)
    sums, maximum, weight = _fold(sums, maximum, weight, part, its_maximum, its_weight, scale)
    for number in tl.range(0, tl.load(merge + SLOTS), num_stages=4):
        slot = first + number * stride
        part, its_maximum, its_weight = _load(state, state_rows, slot, ahead, head, valid, HEADS, V, VPAD, True)
        sums, maximum, weight = _fold(sums, maximum, weight, part, its_maximum, its_weight, scale)
    _store(state, state_rows, to, ahead, head, valid, sums, maximum, weight, HEADS, V)
    result = _finish(sums, maximum, weight, sinks, head, valid, scale, per_unit, shift, SINKS).to(
        attended.dtype.element_ty
    )
    attended_at = attended + (tl.load(order + tl.load(merge + PLACE)).to(tl.int64) * HEADS + head) * V
    tl.store(attended_at[:, None] + v[None, :], result, mask=(valid & (to < 0))[:, None] & (v < V)[None, :])
