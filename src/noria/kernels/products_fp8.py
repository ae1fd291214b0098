"""Products in fp8 on a CUDA device (Triton): activations are rounded, a program some rows; then codes are multiplied by codes.

Sums of a block of 128 inputs are of the tensor cores; they are added in float32, times the scales of their blocks, in the
order of the inputs. Every tile has at least 64 rows, so that one instruction multiplies any number of them.
"""

import torch
import triton
import triton.language as tl

from noria.kernels.decode_fp8 import e8m0
from noria.kernels.fp8 import Fp8Matrix, Fp8Weight
from noria.kernels.products import LEAST_ROWS, ProductTile, fitted
from noria.kernels.rounded import e4m3_code
from noria.kernels.shared_memory import shared_memory

ROUNDED = 2048  # numbers of a tile that is rounded
FEW_ROWS = {2112: ProductTile(64, 16, 128, 4, 5), 1 << 31: ProductTile(64, 32, 128, 4, 5)}  # by the most outputs
SOME_ROWS = ProductTile(64, 128, 128, 4, 4)
MANY_ROWS = ProductTile(128, 128, 128, 8, 4)  # of sums a block, which are kept beside the sums of all
WIDE_ROWS = ProductTile(128, 256, 128, 8, 3)  # of sums of all alone


@triton.jit
def round_rows(
    hidden, codes, scales, inputs, hidden_row, columns, groups, TILE_GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    """The codes of some blocks of a row, and their scales [T, groups]. BLOCK divides a block, or is of one row-wide block."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    at, within = group[:, None] * columns, tl.arange(0, BLOCK)[None, :]
    is_group, given = (group < groups)[:, None], hidden + row * hidden_row
    largest = tl.zeros((TILE_GROUPS, BLOCK), tl.float32)
    for first in range(0, columns, BLOCK):
        inside = is_group & (first + within < columns) & (at + first + within < inputs)
        numbers = tl.abs(tl.load(given + at + first + within, mask=inside, other=0.0).to(tl.float32))
        largest = tl.where((numbers > largest) | (numbers != numbers), numbers, largest)  # none stays none
    none = tl.max(tl.where(largest < float("inf"), 0, 1), 1) > 0
    most = tl.maximum(
        tl.math.div_rn(tl.max(tl.where(largest < float("inf"), largest, 0.0), 1), 448.0), 1.1754943508222875e-38
    )
    scale = tl.where(none, float("nan"), most)
    tl.store(scales + row * groups + group, scale, mask=group < groups)
    for first in range(0, columns, BLOCK):
        inside = is_group & (first + within < columns) & (at + first + within < inputs)
        numbers = tl.load(given + at + first + within, mask=inside, other=0.0).to(tl.float32)
        code = e4m3_code(tl.minimum(tl.math.div_rn(tl.abs(numbers), scale[:, None]), 448.0))
        code += tl.where(numbers.to(tl.int32, bitcast=True) < 0, 128, 0)
        tl.store(codes + row * inputs + at + first + within, code.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["rows", "first_column", "product_row"], do_not_specialize_on_alignment=["scales"])
def multiply_codes(
    given, given_scales, codes, scales, bias, product, rows, outputs, inputs, groups, block_rows, block_columns,
    first_column, product_row, HAS_BIAS: tl.constexpr, POWERS: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
    ONE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of given [rows, inputs] times codes [outputs, inputs]. BLOCKS: scales change along the inputs.

    WHOLE: inputs are whole blocks. ONE: all columns of a tile are in one block of outputs. The product's columns begin at
    `first_column` of its rows.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column, at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    there, wanted = row < rows, column < outputs
    left_at = given + row.to(tl.int64)[:, None] * inputs + at[None, :]
    right_at = codes + column.to(tl.int64)[None, :] * inputs + at[:, None]
    left_scale, right_scale = given_scales + row * groups, scales + (column // block_rows) * groups
    tile_scale = scales + (tl.program_id(0) * COLUMNS // block_rows) * groups
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, inputs, BLOCK):
        if WHOLE:
            left = tl.load(left_at, mask=there[:, None], other=0)
            right = tl.load(right_at, mask=wanted[None, :], other=0)
        else:
            known = begin + at < inputs
            left = tl.load(left_at, mask=there[:, None] & known[None, :], other=0)
            right = tl.load(right_at, mask=wanted[None, :] & known[:, None], other=0)
        left, right = left.to(tl.float8e4nv, bitcast=True), right.to(tl.float8e4nv, bitcast=True)
        if BLOCKS:
            group = begin // block_columns
            ours = tl.load(left_scale + group, mask=there, other=0.0)
            theirs = tl.load(tile_scale + group) if ONE else tl.load(right_scale + group, mask=wanted, other=0)
            if POWERS:
                theirs = e8m0(theirs)
            if ONE:
                sums += tl.dot(left, right) * (ours * theirs)[:, None]
            else:
                sums += tl.dot(left, right) * (ours[:, None] * theirs[None, :])
        else:
            sums += tl.dot(left, right)
        left_at += BLOCK
        right_at += BLOCK
    if not BLOCKS:
        theirs = tl.load(right_scale, mask=wanted, other=0)
        if POWERS:
            theirs = e8m0(theirs)
        sums = sums * (tl.load(left_scale, mask=there, other=0.0)[:, None] * theirs[None, :])
    if HAS_BIAS:
        sums += tl.load(bias + first_column + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    to = product + row.to(tl.int64)[:, None] * product_row + (first_column + column)[None, :]
    tl.store(to, sums.to(product.dtype.element_ty), mask=there[:, None] & wanted[None, :])


def tile_of(rows: int, outputs: int, blocks: bool) -> ProductTile:
    """The tile for so many rows and outputs; it changes no bit. blocks: scales change along the inputs."""
    if rows <= LEAST_ROWS:
        return next(its for most, its in FEW_ROWS.items() if outputs <= most)
    if rows <= 4 * LEAST_ROWS:
        return SOME_ROWS
    return MANY_ROWS if blocks or outputs < WIDE_ROWS.columns else WIDE_ROWS


def block_of(columns: int) -> int:
    """Inputs that are multiplied at once under one scale."""
    return next(size for size in (128, 64, 32) if columns % size == 0)


def round_hidden(hidden: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes [T, I] of activations, uint8, and the scales [T, blocks] of so many inputs each, float32."""
    rows, inputs = hidden.shape
    groups = triton.cdiv(inputs, columns)
    codes = torch.empty(rows, inputs, dtype=torch.uint8, device=hidden.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=hidden.device)
    block = ROUNDED if groups == 1 else block_of(columns)
    together = 1 if groups == 1 else ROUNDED // block
    round_rows[(rows, triton.cdiv(groups, together))](
        hidden, codes, scales, inputs, hidden.stride(0), columns, groups, together, block, num_warps=4
    )
    return codes, scales


def product(
    hidden: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None, its: ProductTile | None = None
) -> torch.Tensor:
    """[T, O] in hidden's dtype, float16 or bfloat16. Rows of hidden are contiguous."""
    rows, found, first = len(hidden), hidden.new_empty(len(hidden), weight.outputs), 0
    if rows:
        rounded = round_hidden(hidden, weight.block[1])
        for matrix in weight.matrices:
            _multiply(
                rounded,
                matrix,
                weight.block,
                bias,
                found,
                first,
                its or tile_of(rows, len(matrix.codes), rounded[1].shape[1] > 1),
            )
            first += len(matrix.codes)
    return found


def _multiply(
    rounded: tuple[torch.Tensor, torch.Tensor],
    matrix: Fp8Matrix,
    block: tuple[int, int],
    bias: torch.Tensor | None,
    found: torch.Tensor,
    first: int,
    its: ProductTile,
) -> None:
    """One matrix of a weight, into its columns of `found`."""
    (codes, scales), (outputs, inputs) = rounded, matrix.codes.shape
    groups, rows, its = scales.shape[1], len(codes), fitted(its, shared_memory(codes.device), codes.dtype)
    depth = 128 if groups == 1 else block_of(block[1])
    multiply_codes[(triton.cdiv(outputs, its.columns), triton.cdiv(rows, its.rows))](
        codes, scales, matrix.codes, matrix.scales, found if bias is None else bias, found, rows, outputs, inputs,
        groups, *block, first, found.stride(0), bias is not None, matrix.scales.dtype == torch.uint8, groups > 1,
        inputs % depth == 0, block[0] % its.columns == 0, its.rows, its.columns, depth, num_warps=its.warps,
        num_stages=its.stages,
    )  # fmt: skip
