"""Drawing of tokens and their log-probabilities on a CUDA device (Triton): one program a row.

What a row gets depends on its own logits and settings alone, to the bit: its program adds its weights in one order. Rows
with different settings go in one launch. Weights are exp((logit - largest) / temperature) in float64; an id's place among
the others is that of its logit, of equal ones the lower id first, as a stable sort has it, but nothing is sorted: limits
are searched for among logits taken as whole numbers, whose order is theirs. A row's logits are read two times to draw
from all ids, and once more for each two bits of a search.
"""

import triton
import triton.language as tl

from noria.step import NO_TOKEN as NO_TOKEN_ID
from noria.step import NONE_LEFT as NONE_LEFT_ID

NO_TOKEN, NONE_LEFT = tl.constexpr(NO_TOKEN_ID), tl.constexpr(NONE_LEFT_ID)
LOWEST = tl.constexpr(-(2**31))  # a key below that of any number
OF_MINUS_INFINITY = tl.constexpr(-2139095041)
OF_LOGPROBS = ["rows", "ids", "logprobs", "top_ids", "top_logprobs"]  # one variant for any alignment
BLOCKS = tl.constexpr(4)  # of ids whose amounts are summed as one
BY_NUMBER = tl.constexpr(4)  # quarters of numbers that a search takes
ROUNDS = tl.constexpr(1.5 * 2**52)  # added to a number of float64, it leaves no room for fractions
LOG2E = tl.constexpr(1.4426950408889634)
MOST_RATE = tl.constexpr(1e308)  # a rate is finite: what is 0 below the largest stays so


@triton.jit
def _read(row, begin, vocab, BLOCK: tl.constexpr):
    at = begin + tl.arange(0, BLOCK)
    return at, tl.load(row + at, mask=at < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _key(number, SHIFT: tl.constexpr):
    """Whole numbers in the order of float32 numbers; SHIFT bits of them say nothing, as the numbers had fewer."""
    bits = tl.where(number == 0, 0.0, number).to(tl.int32, bitcast=True)  # no -0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _number(key, SHIFT: tl.constexpr):
    """The number whose key this is."""
    bits = key << SHIFT
    bits = tl.where(key < 0, (bits | ((1 << SHIFT) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _weight(number, largest, rate):
    """2 to the power of how far a number is below the largest, times the rate: in float64, to 2e-15, and 1 exactly.

    A power of the nearest whole number, which is added to the exponent, times a polynomial of the rest, from -0.5 to 0.5.
    """
    power = (number.to(tl.float64) - largest) * rate
    moved = power + ROUNDS  # its last bits are the whole number
    rest = power - (moved - ROUNDS)
    found = 6.767963482574983e-09 * rest + 1.0206977921453389e-07
    found = found * rest + 1.3217210256367588e-06
    found = found * rest + 1.525266622014565e-05
    found = found * rest + 1.5403526882354606e-04
    found = found * rest + 1.3333558214738293e-03
    found = found * rest + 9.61812911053657e-03
    found = found * rest + 5.5504108664544756e-02
    found = found * rest + 0.24022650695901254
    found = found * rest + 0.6931471805599483
    found = found * rest + 1.0
    bits = found.to(tl.int64, bitcast=True) + (moved.to(tl.int64, bitcast=True) << 52)
    return tl.where(power > -1020.0, bits.to(tl.float64, bitcast=True), 0.0)


@triton.jit
def _largest(row, vocab, BLOCK: tl.constexpr):
    """The largest logit, the first id that has it (-1 where a logit is NaN or all are infinite), and the least finite one."""
    best, least = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), float("inf"), tl.float32)
    place, bad = tl.full((BLOCK,), 0, tl.int32), tl.full((BLOCK,), 0, tl.int32)
    for begin in range(0, vocab, BLOCK):
        at, number = _read(row, begin, vocab, BLOCK)
        better = number > best
        best, place = tl.where(better, number, best), tl.where(better, at, place)
        least = tl.where((number > float("-inf")) & (number < least), number, least)
        bad = bad | (number != number).to(tl.int32)
    largest = tl.max(best, 0)
    first = tl.min(tl.where(best == largest, place, 0x7FFFFFFF), 0)
    usable = (largest > float("-inf")) & (largest < float("inf")) & (tl.max(bad, 0) == 0)
    return largest, tl.where(usable, first, NO_TOKEN), tl.min(least, 0)


@triton.jit
def _above(
    row, vocab, largest, rate, first, second, third, COUNT: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """What the ids weigh whose keys are above each of three; or how many they are."""
    of_first = tl.full((BLOCK,), 0, tl.int32 if COUNT else tl.float64)
    of_second, of_third = of_first, of_first
    for begin in range(0, vocab, BLOCK):
        _at, number = _read(row, begin, vocab, BLOCK)
        key = _key(number, SHIFT)
        if COUNT:
            of_first += (key > first).to(tl.int32)
            of_second += (key > second).to(tl.int32)
            of_third += (key > third).to(tl.int32)
        else:
            weight = _weight(number, largest, rate)
            of_first += tl.where(key > first, weight, 0.0)
            of_second += tl.where(key > second, weight, 0.0)
            of_third += tl.where(key > third, weight, 0.0)
    return tl.sum(of_first, 0).to(tl.float64), tl.sum(of_second, 0).to(tl.float64), tl.sum(of_third, 0).to(tl.float64)


@triton.jit
def _between(low, high, bottom, share, SHIFT: tl.constexpr):
    """A key from `low` to `high`, that of the number that is this share of the way from `bottom` to the number of `high`."""
    number = bottom + share * (_number(high.to(tl.int32), SHIFT).to(tl.float64) - bottom)
    return tl.minimum(tl.maximum(_key(number.to(tl.float32), SHIFT).to(tl.int64), low), high)


@triton.jit
def _search(
    row, vocab, largest, least, rate, goal, low, high, COUNT: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The smallest key with less than `goal` above it, and what is above it. `low` has as much, `high` has nothing.

    In quarters: at first of the numbers, as logits lie; then of the keys, which come to an end.
    """
    low, high, above, tries = low.to(tl.int64), high.to(tl.int64), goal * 0.0, tl.program_id(0) * 0
    while high - low > 1:
        gap = high - low
        first, second, third = low + gap // 4, low + gap // 2, low + 3 * gap // 4
        if tries < BY_NUMBER:
            known = low > (OF_MINUS_INFINITY >> SHIFT)
            bottom = tl.where(known, _number(low.to(tl.int32), SHIFT).to(tl.float64), least)
            first, second = _between(low, high, bottom, 0.25, SHIFT), _between(low, high, bottom, 0.5, SHIFT)
            third, tries = _between(low, high, bottom, 0.75, SHIFT), tries + 1
        of_first, of_second, of_third = _above(
            row, vocab, largest, rate, first.to(tl.int32), second.to(tl.int32), third.to(tl.int32), COUNT, SHIFT, BLOCK
        )
        if of_third >= goal:
            low = third
        elif of_second >= goal:
            low, high, above = second, third, of_third
        elif of_first >= goal:
            low, high, above = first, second, of_second
        else:
            high, above = first, of_first
    return high.to(tl.int32), above


@triton.jit
def _amounts(at, number, vocab, largest, rate, threshold, last, min_p, TIES: tl.constexpr, SHIFT: tl.constexpr):
    """The weights of the ids that are kept, of others 0; or 1 for those at the threshold."""
    key = _key(number, SHIFT)
    if TIES:
        return ((key == threshold) & (at < vocab)).to(tl.float64)
    weight = _weight(number, largest, rate)
    kept = (key > threshold) | ((key == threshold) & (at <= last))
    return tl.where(kept & (weight >= min_p), weight, 0.0)


@triton.jit
def _tiles(
    row, vocab, largest, rate, threshold, last, min_p, TIES: tl.constexpr, SHIFT: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of amounts, a sum for each BLOCKS x BLOCK ids."""
    tiles = tl.arange(0, TILES)
    sums = tl.full((TILES,), 0.0, tl.float64)
    for tile in range(tl.cdiv(vocab, BLOCKS * BLOCK)):
        of_tile = tl.full((BLOCK,), 0.0, tl.float64)
        for block in tl.static_range(BLOCKS):
            at, number = _read(row, (tile * BLOCKS + block) * BLOCK, vocab, BLOCK)
            of_tile += _amounts(at, number, vocab, largest, rate, threshold, last, min_p, TIES, SHIFT)
        sums = tl.where(tiles == tile, tl.sum(of_tile, 0), sums)
    return sums


@triton.jit
def _passing(
    row, sums, target, vocab, largest, rate, threshold, last, min_p, TIES: tl.constexpr, SHIFT: tl.constexpr,
    TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first id whose amount lifts the sum of all up to it beyond the target; else the last one that has an amount."""
    tiles, cumulated = tl.arange(0, TILES), tl.cumsum(sums, 0)
    tile = tl.min(tl.where((cumulated > target) & (sums > 0), tiles, TILES), 0)
    tile = tl.minimum(tile, tl.max(tl.where(sums > 0, tiles, 0), 0))
    before = tl.sum(tl.where(tiles == tile - 1, cumulated, 0.0), 0)
    first, furthest = tl.program_id(0) * 0 + 0x7FFFFFFF, tl.program_id(0) * 0
    for block in range(BLOCKS):
        at, number = _read(row, (tile * BLOCKS + block) * BLOCK, vocab, BLOCK)
        amounts = _amounts(at, number, vocab, largest, rate, threshold, last, min_p, TIES, SHIFT)
        beyond = (before + tl.cumsum(amounts, 0) > target) & (amounts > 0)
        first = tl.minimum(first, tl.min(tl.where(beyond, at, 0x7FFFFFFF), 0))
        furthest = tl.maximum(furthest, tl.max(tl.where(amounts > 0, at, 0), 0))
        before += tl.sum(amounts, 0)
    return tl.minimum(first, furthest)


@triton.jit
def _limits(
    row, vocab, largest, least, temperature, rate, top_k, top_p, SHIFT: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The key of the least likely id that top_k and then top_p keep, and the last kept id of those that have it."""
    high, far = _key(largest.to(tl.float32), SHIFT), tl.program_id(0) * 0 + ((OF_MINUS_INFINITY >> SHIFT) - 1)
    threshold, ties, low, total = tl.program_id(0) * 0 + LOWEST, top_p * 0.0 + vocab, far, top_p * 0.0
    if (top_k > 0) & (top_k < vocab):
        threshold, above = _search(row, vocab, largest, least, rate, top_k, far, high, True, SHIFT, BLOCK)
        ties, low = top_k - above, threshold - 1
        total = ties * _weight(_number(threshold, SHIFT), largest, rate)
    if top_p < 1:
        total_above, _second, _third = _above(
            row, vocab, largest, rate, threshold, threshold, threshold, False, SHIFT, BLOCK
        )
        total += total_above
        # Ids of this weight and less are too few to be kept, were they all.
        lowest = largest + temperature * tl.log((1.0 - top_p) * total / vocab)
        low, goal = tl.maximum(low, _key(lowest.to(tl.float32), SHIFT) - 1), top_p * total
        key, above = _search(row, vocab, largest, least, rate, goal, low, high, False, SHIFT, BLOCK)
        kept = tl.ceil((goal - above) / _weight(_number(key, SHIFT), largest, rate))
        kept = tl.minimum(tl.maximum(kept, 1.0), 0.0 + vocab)
        ties = tl.where(key == threshold, tl.minimum(ties, kept), kept)
        threshold = key
    sums = _tiles(row, vocab, largest, rate, threshold, vocab, 0.0, True, SHIFT, TILES, BLOCK)
    last = tl.program_id(0) * 0 + vocab
    if ties < tl.sum(sums, 0):
        last = _passing(row, sums, ties - 1.0, vocab, largest, rate, threshold, vocab, 0.0, True, SHIFT, TILES, BLOCK)
    return threshold, last


@triton.jit(do_not_specialize_on_alignment=["settings", "rows", "ids"])
def draw_rows(
    logits, settings, rows, ids, vocab, stride, EDITED: tl.constexpr, COLUMNS: tl.constexpr, SHIFT: tl.constexpr,
    TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The id of each row, by its settings: temperature, top_k, top_p, min_p and a number from 0 to 1.

    NO_TOKEN where its logits are not finite. EDITED: row number i of the logits is what became of row rows[i], whose id
    this is unless that had NO_TOKEN; NONE_LEFT where nothing is finite.
    """
    number = tl.program_id(0)
    row, its = logits + number.to(tl.int64) * stride, settings + number * COLUMNS
    temperature, top_k, top_p = tl.load(its), tl.load(its + 1), tl.load(its + 2)
    found_largest, found, least = _largest(row, vocab, BLOCK)
    if (temperature > 0) & (found >= 0):
        largest, min_p = found_largest.to(tl.float64), tl.load(its + 3)
        rate = tl.minimum(LOG2E / temperature, MOST_RATE)
        threshold, last = tl.program_id(0) * 0 + LOWEST, tl.program_id(0) * 0 + vocab
        if ((top_k > 0) & (top_k < vocab)) | (top_p < 1):
            threshold, last = _limits(
                row, vocab, largest, least.to(tl.float64), temperature, rate, top_k, top_p, SHIFT, TILES, BLOCK
            )
        sums = _tiles(row, vocab, largest, rate, threshold, last, min_p, False, SHIFT, TILES, BLOCK)
        target = tl.load(its + 4) * tl.sum(sums, 0)
        found = _passing(row, sums, target, vocab, largest, rate, threshold, last, min_p, False, SHIFT, TILES, BLOCK)
    if EDITED:
        number = tl.load(rows + number)
        before = tl.load(ids + number).to(tl.int32)
        found = tl.where(before == NO_TOKEN, before, tl.where(found == NO_TOKEN, NONE_LEFT, found))
    tl.store(ids + number, found.to(tl.int64))


@triton.jit(do_not_specialize=["top"], do_not_specialize_on_alignment=OF_LOGPROBS)
def logprobs_of_rows(
    logits, rows, ids, logprobs, top_ids, top_logprobs, vocab, stride, top, BLOCK: tl.constexpr
):  # fmt: skip
    """The log-probability of an id of each of these rows, and the `top` most likely ids with theirs, lower ids first."""
    number = tl.load(rows + tl.program_id(0)).to(tl.int64)
    row = logits + number * stride
    its_largest, _first, _least = _largest(row, vocab, BLOCK)
    largest = its_largest.to(tl.float64)
    sums = tl.full((BLOCK,), 0.0, tl.float64)
    for begin in range(0, vocab, BLOCK):
        _at, value = _read(row, begin, vocab, BLOCK)
        sums += _weight(value, largest, LOG2E)
    shift = largest + tl.log(tl.sum(sums, 0))
    chosen = tl.load(row + tl.maximum(tl.load(ids + number), 0)).to(tl.float64)
    tl.store(logprobs + number, chosen - shift)
    before, place = (largest * 0 + float("inf")).to(tl.float32), tl.program_id(0) * 0 - 1
    for rank in range(top):
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        where = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
        for begin in range(0, vocab, BLOCK):
            at, value = _read(row, begin, vocab, BLOCK)
            left = (at < vocab) & ((value < before) | ((value == before) & (at > place)))
            better = left & ((value > best) | (where == 0x7FFFFFFF))
            best, where = tl.where(better, value, best), tl.where(better, at, where)
        before = tl.max(best, 0)
        place = tl.min(tl.where(best == before, where, 0x7FFFFFFF), 0)
        place = tl.where(place == 0x7FFFFFFF, 0, place)  # where logits are NaN, fewer have a place
        tl.store(top_ids + number * top + rank, place.to(tl.int64))
        tl.store(top_logprobs + number * top + rank, before.to(tl.float64) - shift)


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["rows", "bits"])
def mask_rows(scores, rows, bits, vocab, width, BLOCK: tl.constexpr):
    """Ids without their bit become impossible in these rows of the scores; those beyond all bits too."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(bits + tl.program_id(0).to(tl.int64) * width + at // 8, mask=at // 8 < width, other=0)
    its = scores + tl.load(rows + tl.program_id(0)).to(tl.int64) * vocab
    tl.store(its + at, float("-inf"), mask=(at < vocab) & ((byte.to(tl.int32) >> (at % 8)) & 1 == 0))
