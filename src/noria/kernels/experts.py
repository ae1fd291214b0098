"""A mixture's layer on a CUDA device (Triton): pairs of token and expert, sorted by expert, in tiles of one expert each.

Of as many programs as any routing may need, those past the last tile return: the host never learns how many tiles there
are. A pair's numbers do not depend on its tile: every product adds along its inputs in one order, whatever the size of a
tile. Compiled without fused multiply-add.
P pairs, T tokens, X experts, E hidden, I intermediate.
"""

import triton
import triton.language as tl

# Of a tile: its expert, its first pair in order, how many pairs it has, the place of its expert among those that have pairs;
# the first row is the number of tiles.
TILE_COLUMNS = 4
FIELDS = tl.constexpr(TILE_COLUMNS)
TILES_AT_ONCE = tl.constexpr(64)
LISTS = ["order", "tiles", "counts", "chosen", "named", "starts"]  # one variant for any alignment
RUNS = ["from_place", "most", "experts"]


@triton.jit(do_not_specialize=["pairs", "span"], do_not_specialize_on_alignment=LISTS)
def count_pairs(chosen, counts, pairs, span, BLOCK: tl.constexpr):
    """The pairs of an expert in a section of `span` pairs, one a program. `chosen` [P]: experts; `counts` [sections, X]."""
    expert, total = tl.program_id(0), tl.zeros((BLOCK,), tl.int32)
    begin = tl.program_id(1) * span
    for first in tl.range(begin, tl.minimum(begin + span, pairs), BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += (tl.load(chosen + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts + tl.program_id(1) * tl.num_programs(0) + expert, tl.sum(total, 0))


@triton.jit(do_not_specialize=["pairs", "span", "size"], do_not_specialize_on_alignment=LISTS)
def sort_pairs(
    chosen, counts, order, tiles, named, starts, pairs, span, size, SECTIONS: tl.constexpr, PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The places of an expert's pairs in a section, in order, behind those of the experts and sections before.

    The first section's program makes the expert's tiles of `size` pairs too. named [X]: the experts that have pairs, then -1;
    starts [X]: their first tiles, then the number of tiles.
    """
    expert, section, experts, x = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.arange(0, PAD)
    sections = tl.arange(0, SECTIONS)[:, None]
    its = tl.load(counts + sections * experts + x[None, :], mask=(x < experts)[None, :], other=0)
    count = tl.sum(its, 0)
    first, own = tl.sum(tl.where(x < expert, count, 0), 0), tl.sum(tl.where(x == expert, count, 0), 0)
    if section == 0:
        needed = (count + size - 1) // size
        begin, total = tl.sum(tl.where(x < expert, needed, 0), 0), tl.sum(needed, 0)
        tile, before = tiles + (1 + begin) * FIELDS, tl.sum(((x < expert) & (count > 0)).to(tl.int32), 0)
        if expert == 0:
            tl.store(tiles, total)
        place = tl.where(own > 0, before, tl.sum((count > 0).to(tl.int32), 0) + expert - before)
        tl.store(named + place, tl.where(own > 0, expert, -1))
        tl.store(starts + place, tl.where(own > 0, begin, total))
        for number in tl.range(0, (own + size - 1) // size, TILES_AT_ONCE):
            index = number + tl.arange(0, TILES_AT_ONCE)
            valid = index * size < own
            tl.store(tile + index * FIELDS, expert, mask=valid)
            tl.store(tile + index * FIELDS + 1, first + index * size, mask=valid)
            tl.store(tile + index * FIELDS + 2, tl.minimum(own - index * size, size), mask=valid)
            tl.store(tile + index * FIELDS + 3, before, mask=valid)
    if own > 0:
        first += tl.sum(tl.sum(tl.where((sections < section) & (x == expert)[None, :], its, 0), 1), 0)
        for ahead in tl.range(section * span, tl.minimum(section * span + span, pairs), BLOCK):
            at = ahead + tl.arange(0, BLOCK)
            mine = (tl.load(chosen + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
            tl.store(order + first + tl.cumsum(mine, 0) - mine, at, mask=mine > 0)
            first += tl.sum(mine, 0)


@triton.jit
def tile_of(tiles, starts, number, from_place, most, experts, RUN: tl.constexpr):
    """Of the tiles of `most` experts that have pairs, from that at `from_place` on, the `number`-th: where it stands in the
    list, and whether there is one; and the place of its expert's matrices. Without RUN all matrices are there."""
    stop, begin = tl.load(tiles), 0
    if RUN:
        begin = tl.load(starts + from_place)
        stop = tl.minimum(stop, tl.load(starts + from_place + most, mask=from_place + most < experts, other=1 << 30))
    tile = tiles + (1 + begin + number) * FIELDS
    there = begin + number < stop
    place = tl.load(tile + 3, mask=there, other=0) - from_place if RUN else tl.load(tile, mask=there, other=0)
    return tile, there, place.to(tl.int64)


@triton.jit
def activated(gate, up, GELU: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    if LIMIT > 0:  # by choices, so that what is no number stays none
        gate, up = tl.where(gate > LIMIT, LIMIT, gate), tl.where(up > LIMIT, LIMIT, up)
        up = tl.where(up < -LIMIT, -LIMIT, up)
    # 0.5 (1 + tanh z) is the sigmoid of 2 z
    bent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else ALPHA * gate
    return gate / (1.0 + tl.exp(-bent)) * (up + SHIFT)


@triton.jit(do_not_specialize=RUNS, do_not_specialize_on_alignment=LISTS)
def first_product(
    rows, gate_up, biases, order, tiles, starts, inner, from_place, most, experts,
    row: tl.constexpr, piece: tl.constexpr, output: tl.constexpr, column: tl.constexpr,
    E: tl.constexpr, INNER: tl.constexpr, SHARING: tl.constexpr, ALTERNATING: tl.constexpr, BIASED: tl.constexpr,
    GELU: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    RUN: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile times COLUMNS of its expert's gates and ups, and their gate: into `inner` [P, INNER], in order.

    SHARING pairs that follow one another have one row of `rows`.
    """
    blocks: tl.constexpr = (INNER + COLUMNS - 1) // COLUMNS
    n, k = tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    tile, there_is, place = tile_of(tiles, starts, tl.program_id(0) // blocks, from_place, most, experts, RUN)
    if there_is:
        expert, first, m = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.arange(0, TILE)
        valid, n = m < tl.load(tile + 2), tl.program_id(0) % blocks * COLUMNS + n
        pair = tl.load(order + first + m, mask=valid, other=0)
        given = rows + (pair // SHARING).to(tl.int64)[:, None] * row + k[None, :]
        step: tl.constexpr = 2 if ALTERNATING else 1
        ahead: tl.constexpr = 1 if ALTERNATING else INNER
        there = n if INNER % COLUMNS == 0 else tl.where(n < INNER, n, 0)
        gates = gate_up + place * piece + (there * step)[None, :] * output + k[:, None] * column
        ups = gates + ahead * output
        gate, up = tl.zeros((TILE, COLUMNS), tl.float32), tl.zeros((TILE, COLUMNS), tl.float32)
        for at in tl.range(0, E // DEPTH * DEPTH, DEPTH):
            x = tl.load(given + at, mask=valid[:, None], other=0.0)
            gate = tl.dot(x, tl.load(gates + at * column), gate, input_precision="ieee")
            up = tl.dot(x, tl.load(ups + at * column), up, input_precision="ieee")
        if E % DEPTH != 0:
            last: tl.constexpr = E // DEPTH * DEPTH
            x = tl.load(given + last, mask=valid[:, None] & (last + k < E)[None, :], other=0.0)
            left = (last + k < E)[:, None]
            gate = tl.dot(x, tl.load(gates + last * column, mask=left, other=0.0), gate, input_precision="ieee")
            up = tl.dot(x, tl.load(ups + last * column, mask=left, other=0.0), up, input_precision="ieee")
        if BIASED:
            bias = biases + expert * (2 * INNER) + there * step
            gate, up = gate + tl.load(bias).to(tl.float32)[None, :], up + tl.load(bias + ahead).to(tl.float32)[None, :]
        result = activated(gate, up, GELU, ALPHA, LIMIT, SHIFT).to(inner.dtype.element_ty)
        to = inner + (first + m).to(tl.int64)[:, None] * INNER + n[None, :]
        tl.store(to, result, mask=valid[:, None] & (n < INNER)[None, :])


@triton.jit(do_not_specialize=RUNS, do_not_specialize_on_alignment=LISTS)
def second_product(
    inner, down, biases, order, tiles, starts, products, from_place, most, experts,
    piece: tl.constexpr, output: tl.constexpr, column: tl.constexpr, E: tl.constexpr, INNER: tl.constexpr,
    BIASED: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of `inner` [P, INNER] times COLUMNS of its expert's downs: into `products` [P, E], in the order of choices."""
    blocks: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    n, k = tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    tile, there_is, place = tile_of(tiles, starts, tl.program_id(0) // blocks, from_place, most, experts, RUN)
    if there_is:
        expert, first, m = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.arange(0, TILE)
        valid, n = m < tl.load(tile + 2), tl.program_id(0) % blocks * COLUMNS + n
        pair = tl.load(order + first + m, mask=valid, other=0).to(tl.int64)
        given = inner + (first + m).to(tl.int64)[:, None] * INNER + k[None, :]
        there = n if E % COLUMNS == 0 else tl.where(n < E, n, 0)
        downs = down + place * piece + there[None, :] * output + k[:, None] * column
        total = tl.zeros((TILE, COLUMNS), tl.float32)
        for at in tl.range(0, INNER // DEPTH * DEPTH, DEPTH):
            x = tl.load(given + at, mask=valid[:, None], other=0.0)
            total = tl.dot(x, tl.load(downs + at * column), total, input_precision="ieee")
        if INNER % DEPTH != 0:
            last: tl.constexpr = INNER // DEPTH * DEPTH
            x = tl.load(given + last, mask=valid[:, None] & (last + k < INNER)[None, :], other=0.0)
            left = tl.load(downs + last * column, mask=(last + k < INNER)[:, None], other=0.0)
            total = tl.dot(x, left, total, input_precision="ieee")
        if BIASED:
            total += tl.load(biases + expert * E + there).to(tl.float32)[None, :]
        to = products + pair[:, None] * E + n[None, :]
        tl.store(to, total.to(products.dtype.element_ty), mask=valid[:, None] & (n < E)[None, :])


@triton.jit
def sum_choices(
    products, weights, mixed, E: tl.constexpr, CHOSEN: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """A token's sum over its choices, in their order, each times its weight."""
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOSEN):
        pair = token * CHOSEN + choice
        product = tl.load(products + pair * E + n, mask=n < E, other=0.0).to(tl.float32)
        if WEIGHTED:
            product = product * tl.load(weights + pair).to(tl.float32)
        total += product
    tl.store(mixed + token * E + n, total.to(mixed.dtype.element_ty), mask=n < E)
