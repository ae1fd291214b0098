"""A mixture's two products on a CUDA device (Triton) of experts as they are stored: a program decodes its own tiles of weights.

As experts.py has them for plain ones, and with the bits of those: numbers are decoded to the same bits as before, and are added
along the inputs in the same order. For few pairs an expert: each tile of pairs decodes its expert's weights again.
P pairs, X experts, E hidden, I intermediate.
"""

import triton
import triton.language as tl

from noria.kernels.experts import LISTS, activated, tile_of
from noria.kernels.stored_tiles import add_product, fields_at, groups_at, summed


@triton.jit(do_not_specialize_on_alignment=LISTS)
def first_stored(
    rows, gates, gate_scales, gate_zeros, of_gates, ups, up_scales, up_zeros, of_ups, biases, order, tiles, inner,
    row: tl.constexpr, codes_step: tl.constexpr, scales_step: tl.constexpr, zeros_step: tl.constexpr, of_step: tl.constexpr,
    AHEAD: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr,
    GROUP: tl.constexpr, OF_ROWS: tl.constexpr, ZEROED: tl.constexpr, E: tl.constexpr, INNER: tl.constexpr,
    SHARING: tl.constexpr, ALTERNATING: tl.constexpr, BIASED: tl.constexpr, GELU: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile times COLUMNS of its expert's gates and ups, and their gate: into `inner` [P, INNER], in order.

    Steps are from an expert's field to the next one's. AHEAD: outputs from a gate to its up, where both lie in one field.
    """
    blocks: tl.constexpr = (INNER + COLUMNS - 1) // COLUMNS
    step: tl.constexpr = 2 if ALTERNATING else 1
    tile, there_is, place = tile_of(tiles, tiles, tl.program_id(0) // blocks, 0, 0, 0, False)
    if there_is:
        first, m, k = tl.load(tile + 1), tl.arange(0, TILE), tl.arange(0, DEPTH)
        valid, n = m < tl.load(tile + 2), tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        pair = tl.load(order + first + m, mask=valid, other=0)
        given = rows + (pair // SHARING).to(tl.int64)[:, None] * row + k[None, :]
        there = n if INNER % COLUMNS == 0 else tl.where(n < INNER, n, 0)
        steps = (codes_step, scales_step, zeros_step, of_step)
        its = fields_at(gates, gate_scales, gate_zeros, of_gates, place, there * step, steps, SCALES)
        other = fields_at(ups, up_scales, up_zeros, of_ups, place, there * step + AHEAD, steps, SCALES)
        gate_scale, gate_zero = groups_at(its, 0, GROUPS, GROUP, OF_ROWS, ZEROED, DEPTH)
        up_scale, up_zero = groups_at(other, 0, GROUPS, GROUP, OF_ROWS, ZEROED, DEPTH)
        gate, up = tl.zeros((TILE, COLUMNS), tl.float32), tl.zeros((TILE, COLUMNS), tl.float32)
        for at in tl.range(0, E // DEPTH * DEPTH, DEPTH):
            x = tl.load(given + at, mask=valid[:, None], other=0.0)
            gate = add_product(gate, x, its, gate_scale, gate_zero, at, WIDTH, CODES, SCALES, ZEROED, False)
            gate_scale, gate_zero = groups_at(its, at + DEPTH, GROUPS, GROUP, OF_ROWS, ZEROED, DEPTH)
            up = add_product(up, x, other, up_scale, up_zero, at, WIDTH, CODES, SCALES, ZEROED, False)
            up_scale, up_zero = groups_at(other, at + DEPTH, GROUPS, GROUP, OF_ROWS, ZEROED, DEPTH)
        if E % DEPTH != 0:
            last: tl.constexpr = E // DEPTH * DEPTH
            x = tl.load(given + last, mask=valid[:, None] & (last + k < E)[None, :], other=0.0)
            gate = add_product(gate, x, its, gate_scale, gate_zero, last, WIDTH, CODES, SCALES, ZEROED, True)
            up = add_product(up, x, other, up_scale, up_zero, last, WIDTH, CODES, SCALES, ZEROED, True)
        if BIASED:
            bias = biases + place * (2 * INNER) + there * step
            ahead: tl.constexpr = 1 if ALTERNATING else INNER
            gate, up = gate + tl.load(bias).to(tl.float32)[None, :], up + tl.load(bias + ahead).to(tl.float32)[None, :]
        result = activated(gate, up, GELU, ALPHA, LIMIT, SHIFT).to(inner.dtype.element_ty)
        to = inner + (first + m).to(tl.int64)[:, None] * INNER + n[None, :]
        tl.store(to, result, mask=valid[:, None] & (n < INNER)[None, :])


@triton.jit(do_not_specialize_on_alignment=LISTS)
def second_stored(
    inner, downs, down_scales, down_zeros, of_downs, biases, order, tiles, products,
    codes_step: tl.constexpr, scales_step: tl.constexpr, zeros_step: tl.constexpr, of_step: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr,
    OF_ROWS: tl.constexpr, ZEROED: tl.constexpr, E: tl.constexpr, INNER: tl.constexpr, BIASED: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of `inner` [P, INNER] times COLUMNS of its expert's downs: into `products` [P, E], in the order of choices."""
    blocks: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    tile, there_is, place = tile_of(tiles, tiles, tl.program_id(0) // blocks, 0, 0, 0, False)
    if there_is:
        first, m, k = tl.load(tile + 1), tl.arange(0, TILE), tl.arange(0, DEPTH)
        valid, n = m < tl.load(tile + 2), tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        pair = tl.load(order + first + m, mask=valid, other=0).to(tl.int64)
        given = inner + (first + m).to(tl.int64)[:, None] * INNER + k[None, :]
        there = n if E % COLUMNS == 0 else tl.where(n < E, n, 0)
        steps = (codes_step, scales_step, zeros_step, of_step)
        its = fields_at(downs, down_scales, down_zeros, of_downs, place, there, steps, SCALES)
        total = summed(given, valid, its, INNER, WIDTH, GROUPS, CODES, SCALES, GROUP, OF_ROWS, ZEROED, DEPTH)
        if BIASED:
            total += tl.load(biases + place * E + there).to(tl.float32)[None, :]
        to = products + pair[:, None] * E + n[None, :]
        tl.store(to, total.to(products.dtype.element_ty), mask=valid[:, None] & (n < E)[None, :])
