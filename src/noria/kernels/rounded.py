"""A cache in fewer bits on a CUDA device (Triton): pages decoded side by side, rows rounded into their places, a launch each.

Both give the bits of encodings/, whose `decode` and `quick` are their plain twins. `form`: fp8 (e4m3 under powers of two),
int8, or int4 with zeros. R rows of D numbers, of all heads and tokens; groups of the numbers share a scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from noria.kernels.decode_fp8 import e4m3, e8m0
from noria.kernels.decode_int4 import less_zero_times_scale

TILE = 4096  # numbers of a tile
INT4, INT8, FP8 = tl.constexpr(4), tl.constexpr(8), tl.constexpr(1)
FORMS = {"int4": 4, "int8": 8, "fp8_block": 1}


@triton.jit
def scaled(codes, zeros, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Codes [ROWS, COLUMNS] less the zeros and times the scales [ROWS, groups] of their groups."""
    values = tl.reshape(codes, (ROWS, COLUMNS // GROUP, GROUP))
    return tl.reshape((values - zeros[:, :, None]) * scales[:, :, None], (ROWS, COLUMNS))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["pages"])
def decode_rows(
    codes, scales, zeros, pages, into, rows, page_rows, numbers, width, groups, GROUP: tl.constexpr,
    FORM: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of pages, one page behind the other. `width`: bytes of a row of codes. EVEN: COLUMNS are whole groups, each of a
    power of two: a scale is loaded once for all of its numbers."""
    target = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = target < rows
    page = tl.load(pages + target // page_rows, mask=is_row, other=0)
    source = (page * page_rows + target % page_rows)[:, None]
    is_row, columns = is_row[:, None], tl.arange(0, COLUMNS)[None, :]
    at = into + target[:, None] * numbers + columns
    if EVEN:
        code = tl.load(codes + source * width + tl.arange(0, COLUMNS * BITS // 8)[None, :], mask=is_row, other=0)
        group = source * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)[None, :]
        scale = tl.load(scales + group, mask=is_row, other=0)
        if FORM == INT4:
            zero = tl.load(zeros + group, mask=is_row, other=0).to(tl.float32)
            lows = scaled((code & 15).to(tl.float32), zero, scale.to(tl.float32), ROWS, COLUMNS // 2, GROUP // 2)
            highs = scaled((code >> 4).to(tl.float32), zero, scale.to(tl.float32), ROWS, COLUMNS // 2, GROUP // 2)
            values = tl.interleave(lows, highs)
        elif FORM == INT8:
            middle = tl.full(scale.shape, 128.0, tl.float32)
            values = scaled(code.to(tl.float32), middle, scale.to(tl.float32), ROWS, COLUMNS, GROUP)
        else:
            values = scaled(e4m3(code), tl.zeros(scale.shape, tl.float32), e8m0(scale), ROWS, COLUMNS, GROUP)
    elif FORM == INT4:
        pairs = tl.arange(0, COLUMNS // 2)[None, :]
        inside = is_row & (pairs < width)
        code = tl.load(codes + source * width + pairs, mask=inside, other=0)
        group = source * groups + 2 * pairs // GROUP
        lows = less_zero_times_scale(code & 15, scales, zeros, group, inside, 0)
        if GROUP % 2 == 1:  # a whole row: another one has none of its numbers
            group = source * groups + (2 * pairs + 1) // GROUP
        highs = less_zero_times_scale(code >> 4, scales, zeros, group, inside & (2 * pairs + 1 < numbers), 0)
        values = tl.interleave(lows, highs)
    else:
        inside = is_row & (columns < numbers)
        code = tl.load(codes + source * width + columns, mask=inside, other=0)
        group = source * groups + columns // GROUP
        if FORM == INT8:
            values = less_zero_times_scale(code, scales, zeros, group, inside, 128)
        else:
            values = e4m3(code) * e8m0(tl.load(scales + group, mask=inside, other=0))
    tl.store(at, values.to(into.dtype.element_ty), mask=is_row & (columns < numbers))


@triton.jit
def whole(number):
    """The nearest whole number below 2 ** 22, of two as near the even one."""
    return (number + 12582912.0) - 12582912.0


@triton.jit
def bfloat16_bits(number):
    """The bits of the nearest bfloat16."""
    bits = number.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(number == number, nearest, 0x7FC0).to(tl.uint16)


@triton.jit
def e4m3_code(number):
    """The nearest e4m3 code of a magnitude up to 448."""
    bits = number.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    code = tl.where(number < 0.015625, whole(number * 512.0).to(tl.int32), normal)  # 2 ** -6: below it they are even
    return tl.where(number == number, tl.minimum(code, 126), 127)


@triton.jit
def power_of_two(number):
    """The e8m0 code of the least power of two that is no smaller, of normal numbers; 255 of none."""
    bits = number.to(tl.int32, bitcast=True)
    code = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return tl.where(number < float("inf"), tl.minimum(code, 254), 255)


@triton.jit
def steps_of(least, most, FORM: tl.constexpr):
    """The bits of a group's scale as they are stored, and its float32."""
    wanted = tl.where(most > -least, most, least) * -0.0078125
    if FORM == INT4:
        wanted = tl.math.div_rn(most - least, 15.0)
    wanted = tl.where(tl.abs(wanted) < 7.52316384526264e-37, 7.52316384526264e-37, wanted)  # 2 ** -120
    bits = bfloat16_bits(wanted)
    return bits, (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def round_group(
    new, places, codes, scales, zeros, rows, heads, group, numbers, width, groups, GROUP: tl.constexpr, FORM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A group of some rows [R] of `heads` a token, into the places of their tokens. COLUMNS: of a group, padded."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    target = tl.load(places + row // heads, mask=is_row, other=0) * heads + row % heads
    first = group * GROUP
    within = tl.arange(0, COLUMNS)[None, :]
    inside = is_row[:, None] & (within < GROUP) & (first + within < numbers)
    values = tl.load(new + row[:, None] * numbers + first + within, mask=inside, other=0).to(tl.float32)
    sick = tl.sum(tl.where(tl.abs(values) < float("inf"), 0, 1), 1) > 0
    scale_at = target * groups + group
    if FORM == FP8:
        largest = tl.maximum(tl.math.div_rn(tl.max(tl.abs(values), 1), 448.0), 1.1754943508222875e-38)
        stored = power_of_two(tl.where(sick, float("inf"), largest))
        scale = e8m0(stored)[:, None]
        magnitude = tl.minimum(tl.math.div_rn(tl.abs(values), scale), 448.0)
        sign = tl.where(values.to(tl.int32, bitcast=True) < 0, 128, 0)
        code = e4m3_code(magnitude) + sign
        tl.store(scales + scale_at, stored.to(tl.uint8), mask=is_row)
        tl.store(codes + target[:, None] * width + first + within, code.to(tl.uint8), mask=inside)
    else:
        least, most = tl.minimum(tl.min(values, 1), 0.0), tl.maximum(tl.max(values, 1), 0.0)
        stored, scale = steps_of(tl.where(sick, float("nan"), least), most, FORM)
        tl.store(scales + scale_at, stored, mask=is_row)
        if FORM == INT8:
            code = whole(tl.math.div_rn(values, scale[:, None]) + 128.0)
            code = tl.minimum(tl.maximum(code, 0.0), 255.0)
            tl.store(codes + target[:, None] * width + first + within, code.to(tl.uint8), mask=inside)
        else:
            zero = tl.minimum(tl.maximum(whole(-tl.math.div_rn(least, scale)), 0.0), 15.0)
            code = whole(tl.math.div_rn(values, scale[:, None]) + zero[:, None])
            code = tl.where(inside, tl.minimum(tl.maximum(code, 0.0), 15.0), 0.0).to(tl.uint8)
            low, high = tl.split(tl.reshape(code, (ROWS, COLUMNS // 2, 2)))
            pairs = tl.arange(0, COLUMNS // 2)[None, :]
            at = codes + target[:, None] * width + first // 2 + pairs
            tl.store(at, low | (high << 4), mask=is_row[:, None] & (2 * pairs < GROUP) & (first + 2 * pairs < numbers))
            tl.store(zeros + scale_at, zero.to(tl.uint8), mask=is_row)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["places"])
def round_rows(
    places, rows, heads, keys, key_codes, key_scales, key_zeros, key_numbers, key_width, key_groups,
    values, value_codes, value_scales, value_zeros, value_numbers, value_width, value_groups,
    KEY_GROUP: tl.constexpr, KEY_COLUMNS: tl.constexpr, VALUE_GROUP: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    FORM: tl.constexpr, ROWS: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Groups of some rows of two arrays, a group a program: those of the keys, then, if there are BOTH, those of the values."""
    group = tl.program_id(1)
    if group < key_groups:
        round_group(
            keys, places, key_codes, key_scales, key_zeros, rows, heads, group, key_numbers, key_width, key_groups,
            KEY_GROUP, FORM, ROWS, KEY_COLUMNS,
        )  # fmt: skip
    elif BOTH:
        round_group(
            values, places, value_codes, value_scales, value_zeros, rows, heads, group - key_groups, value_numbers,
            value_width, value_groups, VALUE_GROUP, FORM, ROWS, VALUE_COLUMNS,
        )  # fmt: skip


def decode(form: str, fields: Mapping[str, torch.Tensor], group: int, pages: torch.Tensor, into: torch.Tensor) -> None:
    """Pages [P] of fields [rows, Hkv, ...] into [P * page's tokens, Hkv, D]; on the current stream."""
    codes, scales, numbers = fields["codes"], fields["scales"], into.shape[-1]
    rows = into.numel() // numbers
    columns, size = max(triton.next_power_of_2(numbers), 2), min(group if group > 0 else numbers, numbers)
    tile, even = max(TILE // columns, 1), columns == numbers and size == triton.next_power_of_2(size) > 1
    decode_rows[(triton.cdiv(rows, tile),)](
        codes, scales, fields.get("zeros", codes), pages, into, rows, rows // max(len(pages), 1), numbers, codes.shape[-1],
        scales.shape[-1], size, FORMS[form], 4 if form == "int4" else 8, even, tile, columns, num_warps=4,
    )  # fmt: skip


def write(form: str, places: torch.Tensor, *given: tuple[Mapping[str, torch.Tensor], int, torch.Tensor]) -> None:
    """Rounds rows [T, Hkv, D] without gaps into fields [rows, Hkv, ...], at their places [T]: of one array or two, each given
    as its fields, its group and its rows; on the current stream."""
    tokens, heads, _ = given[0][2].shape
    arguments, sizes = list[Any](), list[int]()
    for fields, group, new in given:
        codes, scales, numbers = fields["codes"], fields["scales"], new.shape[2]
        stored = scales.view(torch.uint16) if scales.dtype == torch.bfloat16 else scales
        size = min(group if group > 0 else numbers, numbers)
        arguments += [new, codes, stored, fields.get("zeros", codes), numbers, codes.shape[-1], scales.shape[-1]]
        sizes += [size, max(triton.next_power_of_2(size), 2)]
    tile = max(TILE // max(sizes[1::2]) // 2, 1)
    groups = sum(fields["scales"].shape[-1] for fields, _, _ in given)
    more = 3 - len(given)  # one array stands for both
    round_rows[(triton.cdiv(tokens * heads, tile), groups)](
        places, tokens * heads, heads, *arguments * more, *sizes * more, FORMS[form], tile, more == 1, num_warps=4
    )
