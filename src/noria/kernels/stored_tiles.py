"""Tiles of stored matrices, decoded in registers by the program that multiplies them (Triton).

To the bits of the kernels that decode whole matrices: a code's number in float32 times its scale, rounded once to the dtype of
the run.
"""

import triton
import triton.language as tl

from noria.kernels import stored
from noria.kernels.decode_e2m1 import e2m1
from noria.kernels.decode_fp8 import e4m3, e8m0
from noria.kernels.decode_tiles import above

E2M1, E4M3, HALVES = tl.constexpr(stored.E2M1), tl.constexpr(stored.E4M3), tl.constexpr(stored.HALVES)
POWERS, MULTIPLIED, DIVIDED = (tl.constexpr(its) for its in (stored.POWERS, stored.MULTIPLIED, stored.DIVIDED))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ABOVE = tl.constexpr(2.0**23 - 128)  # from what zeros are less to what HALVES_PAIRS gives

# Four bytes of two codes each: the bfloat16 numbers of their low halves in two words, and of their high ones in two. Bytes go to
# halves of words, so that each instruction makes two numbers. As `e2m1`: bits in the place of bfloat16's, times 2 ** 126.
E2M1_PAIRS = tl.constexpr("""{
    .reg .b32 a, b, x, y, two_126, nothing;
    mov.b32 two_126, 0x7E807E80;
    mov.b32 nothing, 0x80008000;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    shl.b32 x, a, 6;   and.b32 x, x, 0x01C001C0;   shl.b32 y, a, 12;   lop3.b32 x, y, 0x80008000, x, 0xEA;
    fma.rn.bf16x2 $0, x, two_126, nothing;
    shl.b32 x, b, 6;   and.b32 x, x, 0x01C001C0;   shl.b32 y, b, 12;   lop3.b32 x, y, 0x80008000, x, 0xEA;
    fma.rn.bf16x2 $1, x, two_126, nothing;
    shl.b32 x, a, 2;   and.b32 x, x, 0x01C001C0;   shl.b32 y, a, 8;   lop3.b32 x, y, 0x80008000, x, 0xEA;
    fma.rn.bf16x2 $2, x, two_126, nothing;
    shl.b32 x, b, 2;   and.b32 x, x, 0x01C001C0;   shl.b32 y, b, 8;   lop3.b32 x, y, 0x80008000, x, 0xEA;
    fma.rn.bf16x2 $3, x, two_126, nothing;
}""")
# The same of whole numbers, each and 128: the code is the mantissa.
HALVES_PAIRS = tl.constexpr("""{
    .reg .b32 a, b, x;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    lop3.b32 $0, a, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $1, b, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 x, a, 4;
    lop3.b32 $2, x, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 x, b, 4;
    lop3.b32 $3, x, 0x000F000F, 0x43004300, 0xEA;
}""")


@triton.jit
def fields_at(codes, scales, zeros, of_matrices, place, row, steps, SCALES: tl.constexpr):
    """The fields of the matrix at a place, its scale (1 where there is none), and the rows [N] of it that are wanted. steps: from
    a matrix to the next, of each field."""
    at = of_matrices + place * steps[3]
    whole = tl.load(at) if SCALES == MULTIPLIED or SCALES == DIVIDED else 1.0  # noqa: SIM109 -- Triton knows no `in`
    return codes + place * steps[0], scales + place * steps[1], zeros + place * steps[2], whole, row


@triton.jit
def groups_at(
    fields,
    begin,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    OF_ROWS: tl.constexpr,
    ZEROED: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Scales and zeros [N, groups] of rows [N], of the DEPTH inputs from `begin` on, as they are stored; behind the last group
    its own. fields: of `fields_at`. GROUPS: of a row."""
    _, scales, zeros, _, row = fields
    COUNT: tl.constexpr = max(DEPTH // GROUP, 1)
    group = tl.minimum(begin // GROUP + tl.arange(0, COUNT), GROUPS - 1)
    at = (row // OF_ROWS * GROUPS)[:, None] + group[None, :]
    scale = tl.load(scales + at)
    return scale, tl.load(zeros + at) if ZEROED else scale


@triton.jit
def add_product(
    total, x, fields, scale, zero, begin, WIDTH: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, ZEROED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """`total` [M, N] and x [M, DEPTH] times the N rows of a matrix, of the inputs from `begin` on."""
    numbers = decoded(fields, scale, zero, begin, WIDTH, CODES, SCALES, ZEROED, MASKED, x.shape[1], x.dtype)
    return tl.dot(x, tl.trans(numbers), total, input_precision="ieee")


@triton.jit
def summed(
    given, valid, fields, INPUTS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, CODES: tl.constexpr,
    SCALES: tl.constexpr, GROUP: tl.constexpr, OF_ROWS: tl.constexpr, ZEROED: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[M, N] in float32: the rows at `given` [M, DEPTH], the `valid` [M] of them, times the N rows of a matrix, along all inputs;
    scales are loaded a block ahead."""
    k = tl.arange(0, DEPTH)
    scale, zero = groups_at(fields, 0, GROUPS, GROUP, OF_ROWS, ZEROED, DEPTH)
    total = tl.zeros((valid.shape[0], fields[4].shape[0]), tl.float32)
    for at in tl.range(0, INPUTS // DEPTH * DEPTH, DEPTH):
        x = tl.load(given + at, mask=valid[:, None], other=0.0)
        total = add_product(total, x, fields, scale, zero, at, WIDTH, CODES, SCALES, ZEROED, False)
        scale, zero = groups_at(fields, at + DEPTH, GROUPS, GROUP, OF_ROWS, ZEROED, DEPTH)
    if INPUTS % DEPTH != 0:
        last: tl.constexpr = INPUTS // DEPTH * DEPTH
        x = tl.load(given + last, mask=valid[:, None] & (last + k < INPUTS)[None, :], other=0.0)
        total = add_product(total, x, fields, scale, zero, last, WIDTH, CODES, SCALES, ZEROED, True)
    return total


@triton.jit
def _scale(scale, of_matrix, SCALES: tl.constexpr):
    """Scales [N, G] as they are stored, in float32."""
    if SCALES == POWERS:
        found = e8m0(scale)
    elif SCALES == MULTIPLIED:
        found = e4m3(scale) * of_matrix
    elif SCALES == DIVIDED:
        found = tl.div_rn(e4m3(scale), tl.full(scale.shape, 1.0, tl.float32) * of_matrix)
    else:
        found = scale.to(tl.float32)
    return found


@triton.jit
def _numbers(code, zero, CODES: tl.constexpr):
    """What codes [N, G, n] stand for, in float32; zeros [N, G] are 2 ** 23 and the zero."""
    if CODES == E2M1:
        number = e2m1(code)
    elif CODES == E4M3:
        number = e4m3(code) if INTERPRETED else code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        number = above(code) - zero[:, :, None]
    return number


@triton.jit
def _by_group(numbers, scale):
    """Numbers [N, M] as [N, G, n], of the groups that have these scales [N, G]."""
    ROWS: tl.constexpr = numbers.shape[0]
    COLUMNS: tl.constexpr = numbers.shape[1]
    COUNT: tl.constexpr = scale.shape[1]
    return tl.reshape(numbers, (ROWS, COUNT, COLUMNS // COUNT))


@triton.jit
def _scaled(code, zero, scale, CODES: tl.constexpr, EXACT: tl.constexpr, KIND: tl.constexpr):
    """Numbers [N, M] of codes [N, M] of the groups that have these zeros and scales [N, G], rounded once. EXACT: scales and
    numbers are ones of KIND, which has their product then, rounded, too."""
    numbers = _numbers(_by_group(code, scale), zero, CODES)
    found = numbers.to(KIND) * scale.to(KIND)[:, :, None] if EXACT else (numbers * scale[:, :, None]).to(KIND)
    return tl.reshape(found, code.shape)


@triton.jit
def _pairs(code, zero, scale, CODES: tl.constexpr):
    """The same of both codes of bytes [N, M], in bfloat16, two numbers an instruction."""
    ASM: tl.constexpr = E2M1_PAIRS if CODES == E2M1 else HALVES_PAIRS
    low, high = tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,r", [code], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
    )
    low, high = _by_group(low, scale), _by_group(high, scale)
    if CODES != E2M1:
        zero = (zero - ABOVE).to(tl.bfloat16)[:, :, None]
        low, high = low - zero, high - zero
    scale = scale.to(tl.bfloat16)[:, :, None]
    return tl.reshape(low * scale, code.shape), tl.reshape(high * scale, code.shape)


@triton.jit
def decoded(
    fields, scale, zero, begin, WIDTH: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr,
    ZEROED: tl.constexpr, MASKED: tl.constexpr, DEPTH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Numbers [N, DEPTH] of rows [N], of the inputs from `begin` on. fields: of `fields_at`; scale, zero: of `groups_at`.
    WIDTH: bytes of a row of codes.

    MASKED: behind the last input they are any, but finite.
    """
    codes, _, _, of_matrix, row = fields
    EXACT: tl.constexpr = KIND == tl.bfloat16 and (SCALES == POWERS or scale.dtype == tl.bfloat16)
    PACKED: tl.constexpr = 2 if CODES == E2M1 or CODES == HALVES else 1  # noqa: SIM109 -- Triton knows no `in`
    at = begin // PACKED + tl.arange(0, DEPTH // PACKED)
    pointers = codes + (row * WIDTH)[:, None] + at[None, :]
    code = tl.load(pointers, mask=(at < WIDTH)[None, :], other=0) if MASKED else tl.load(pointers)
    scale = _scale(scale, of_matrix, SCALES)
    middle: tl.constexpr = 8388616.0 if CODES == HALVES else 8388736.0  # 2 ** 23 and 8, or 128
    zero = above(zero) if ZEROED else tl.full(scale.shape, middle, tl.float32)
    if PACKED == 1:
        numbers = _scaled(code, zero, scale, CODES, EXACT, KIND)
    elif EXACT and not INTERPRETED:
        low, high = _pairs(code, zero, scale, CODES)
        numbers = tl.interleave(low, high)
    else:
        low, high = (
            _scaled(code & 15, zero, scale, CODES, EXACT, KIND),
            _scaled(code >> 4, zero, scale, CODES, EXACT, KIND),
        )
        numbers = tl.interleave(low, high)
    return numbers
