"""Blocks of keys and values as the program loads them that attends to them (Triton): plain, or decoded in registers.

Of a cache in fewer bits, to the bits of rounded.py, which decodes whole pages before: each number is a code less its zero,
times its scale, rounded once to the dtype of the run: a product of bfloat16 numbers is that as well as one of float32 ones.
"""

import triton
import triton.language as tl

from noria.arrays import KEY_GROUP
from noria.kernels.decode_fp8 import e8m0
from noria.kernels.rounded import FORMS
from noria.kernels.work import KEY_BLOCK

BLOCK, KEY_SCALED = tl.constexpr(KEY_BLOCK), tl.constexpr(KEY_GROUP)
MIDDLE = tl.constexpr(2.0**23 + 128)  # of codes of 8 bits, as `above` gives them
INT4, INT8, FP8 = tl.constexpr(FORMS["int4"]), tl.constexpr(FORMS["int8"]), tl.constexpr(FORMS["fp8_block"])


@triton.jit
def of_head(codes, scales, zeros, head, STRIDE: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr):
    """Where the numbers of a head begin, or its fields: codes, or what is plain, STRIDE apart, groups one after another."""
    if FORM > 0:
        first = head * ((D + GROUP - 1) // GROUP)
        fields = (codes + head * STRIDE, scales + first, zeros + first)
    else:
        fields = codes + head * STRIDE
    return fields


@triton.jit
def _held(pointers, seen, columns, LAST: tl.constexpr, MASKED: tl.constexpr):
    """Fields of some rows [N, 1] and columns [1, M], those up to LAST; without masks where all are there."""
    if MASKED:
        found = tl.load(pointers, mask=seen & (columns < LAST), other=0)
    elif LAST < columns.shape[1]:
        found = tl.load(pointers, mask=columns < LAST, other=0)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def _spread(of_groups, COLUMNS: tl.constexpr):
    """What groups [N, G] have, as each of their numbers [N, COLUMNS] has it."""
    ROWS: tl.constexpr = of_groups.shape[0]
    GROUPS: tl.constexpr = of_groups.shape[1]
    each = tl.broadcast_to(of_groups[:, :, None], (ROWS, GROUPS, COLUMNS // GROUPS))
    return tl.reshape(each, (ROWS, COLUMNS))


@triton.jit
def above(code):
    """2 ** 23 and a code, in float32: its bits are the code's, where a conversion would take several times as long."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _nibbles(words, zero, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Codes of 4 bits less their zeros: of words [N, M] of eight, those from the FIRST on, STEP apart, one after another."""
    if STEP == 8:
        found = above((words >> (4 * FIRST)) & 15) - zero
    else:
        found = tl.interleave(_nibbles(words, zero, FIRST, 2 * STEP), _nibbles(words, zero, FIRST + STEP, 2 * STEP))
    return found


@triton.jit
def _scaled(numbers, scale, KIND: tl.constexpr):
    """Whole numbers or e4m3 ones, in float32, times their scales; by bfloat16 products two at a time."""
    return numbers.to(KIND) * scale.to(KIND) if KIND == tl.bfloat16 else (numbers * scale.to(tl.float32)).to(KIND)


@triton.jit
def _groups(
    fields, first, seen, D: tl.constexpr, PAD: tl.constexpr, ROW: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr
):
    """Scales and zeros [N, groups] of one head in each of the rows `first + 0 .. N` that are `seen` [N]."""
    SCALES: tl.constexpr = (D + GROUP - 1) // GROUP
    of_row: tl.constexpr = ROW // (D // 2 if FORM == INT4 else D) * SCALES
    _, scales, zeros = fields
    GROUPS: tl.constexpr = PAD // min(GROUP, PAD)
    row, group = tl.arange(0, seen.shape[0])[:, None], tl.arange(0, GROUPS)[None, :]
    at, inside = first * of_row + row * of_row + group, seen[:, None] & (group < SCALES)
    scale = tl.load(scales + at, mask=inside, other=0)
    return scale, tl.load(zeros + at, mask=inside, other=0) if FORM == INT4 else scale


@triton.jit
def scales_of(
    keys, values, first, seen, query, D: tl.constexpr, V: tl.constexpr, VPAD: tl.constexpr, key_row: tl.constexpr,
    value_row: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of a block of keys and of one of values, as they are loaded; nothing where these are plain."""
    if FORM > 0:
        of_keys = _groups(keys, first, seen, D, query.shape[1], key_row, KEY_SCALED, FORM)
        found = (of_keys, _groups(values, first, seen, V, VPAD, value_row, VPAD, FORM))
    else:
        found = (0, 0)
    return found


@triton.jit
def decoded(
    fields, groups, first, seen, D: tl.constexpr, PAD: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr,
    FORM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Numbers [N, PAD], the D of one head in each of the rows `first + 0 .. N` that are `seen` [N]; others are any, but finite.

    fields: codes, scales and zeros of the head. groups: as `_groups` has loaded them. ROW: bytes of the codes of a row.
    """
    LOADED: tl.constexpr = 8 if FORM == INT4 else 1  # numbers of what is loaded at once: words of 4 bytes
    row, column = tl.arange(0, seen.shape[0])[:, None], tl.arange(0, PAD // LOADED)[None, :]
    of_codes, inside = fields[0] + first * ROW, seen[:, None]
    scale = _spread(groups[0], PAD)
    if FORM == INT4:
        words = of_codes.to(tl.pointer_type(tl.uint32)) + row * (ROW // 4) + column
        zero = _spread(above(groups[1]), PAD // LOADED)
        numbers = _scaled(_nibbles(_held(words, inside, column, D // LOADED, MASKED), zero, 0, 1), scale, KIND)
    elif FORM == INT8:
        code = _held(of_codes + row * ROW + column, inside, column, D, MASKED)
        numbers = _scaled(above(code) - MIDDLE, scale, KIND)
    else:
        code = _held(of_codes + row * ROW + column, inside, column, D, MASKED)
        numbers = _scaled(code.to(tl.float8e4nv, bitcast=True).to(tl.float32), e8m0(scale), KIND)
    return numbers


@triton.jit
def _read(pointers, seen, within, MASKED: tl.constexpr, PADDED: tl.constexpr):
    """A block of the cache; without masks where all of it is there."""
    if MASKED:
        block = tl.load(pointers, mask=seen & within, other=0.0)
    elif PADDED:
        block = tl.load(pointers, mask=within, other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def key_block(
    keys, scales, first, seen, D: tl.constexpr, PAD: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A block of keys [PAD, BLOCK], in columns: those from cache row `first` on. scales: of `scales_of`."""
    if FORM > 0:
        block = tl.trans(decoded(keys, scales[0], first, seen, D, PAD, ROW, KIND, FORM, MASKED))
    else:
        n, d = tl.arange(0, BLOCK)[None, :], tl.arange(0, PAD)[:, None]
        block = _read(keys + first * ROW + n * ROW + d, seen[None, :], d < D, MASKED, D < PAD)
    return block


@triton.jit
def value_block(
    values, scales, first, seen, V: tl.constexpr, PAD: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A block of values [BLOCK, PAD], in rows."""
    if FORM > 0:
        block = decoded(values, scales[1], first, seen, V, PAD, ROW, KIND, FORM, MASKED)
    else:
        n, v = tl.arange(0, BLOCK)[:, None], tl.arange(0, PAD)[None, :]
        block = _read(values + first * ROW + n * ROW + v, seen[:, None], v < V, MASKED, V < PAD)
    return block
