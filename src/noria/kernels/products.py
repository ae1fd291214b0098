"""Products with weights that add along the inputs in one order, whatever the number of rows (Triton).

A block of inputs after a block through the tensor cores, in tiles of at least 64 rows, so that any number of rows is
multiplied by one instruction: the order of cuBLASLt without a split of the inputs, and its bits. Tiles of few columns make
many programs where rows are few and inputs many, and read the weights at the rate of the memory.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from noria.kernels.shared_memory import shared_memory

LEAST_ROWS = 64


@triton.jit(do_not_specialize=["rows"])  # one variant for any number of them
def multiply_in_order(
    hidden, weight, bias, product, rows, outputs, inputs, hidden_row, weight_row, HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of hidden [rows, inputs] times weight [outputs, inputs], summed in float32. WHOLE: inputs are whole blocks.

    WIDE: weights are float32, and three products of parts of them make one.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column, at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    there, wanted = row < rows, column < outputs
    left_at = hidden + row.to(tl.int64)[:, None] * hidden_row + at[None, :]
    right_at = weight + column.to(tl.int64)[None, :] * weight_row + at[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, inputs, BLOCK):
        if WHOLE:
            left = tl.load(left_at, mask=there[:, None], other=0.0)
            right = tl.load(right_at, mask=wanted[None, :], other=0.0)
        else:
            known = begin + at < inputs
            left = tl.load(left_at, mask=there[:, None] & known[None, :], other=0.0)
            right = tl.load(right_at, mask=wanted[None, :] & known[:, None], other=0.0)
        if WIDE:
            left = left.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision="tf32x3")
        left_at += BLOCK
        right_at += BLOCK
    if HAS_BIAS:
        sums += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    to = product + row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(to, sums.to(product.dtype.element_ty), mask=there[:, None] & wanted[None, :])


@dataclass(frozen=True)
class ProductTile:
    """How a product is cut; it changes no bit."""

    rows: int
    columns: int
    block: int
    warps: int
    stages: int


MANY_ROWS = ProductTile(128, 128, 64, 8, 4)
OF_FLOAT32 = ProductTile(64, 32, 64, 4, 3)
# For few rows, by the most outputs that they serve: the more programs, the wider their tiles (measured on an H200).
FEW_ROWS = {
    2112: ProductTile(64, 16, 128, 4, 5),
    4224: ProductTile(64, 32, 128, 4, 6),
    8192: ProductTile(64, 32, 64, 4, 6),
    1 << 31: ProductTile(64, 64, 64, 4, 5),
}


def tile_of(rows: int, outputs: int, dtype: torch.dtype) -> ProductTile:
    """The tile for so many rows and outputs of weights in this dtype."""
    if dtype == torch.float32:
        return OF_FLOAT32  # in one block alone: parts of a block meet before those of the next one
    if rows > 4 * LEAST_ROWS and triton.cdiv(rows, MANY_ROWS.rows) * triton.cdiv(outputs, MANY_ROWS.columns) >= 64:
        return MANY_ROWS
    return next(its for most, its in FEW_ROWS.items() if outputs <= most)


def fitted(its: ProductTile, shared: int, of_weights: torch.dtype) -> ProductTile:
    """With as many stages as so many bytes of shared memory hold blocks of hidden states and weights."""
    of_stage = its.block * (2 * its.rows + of_weights.itemsize * its.columns)
    return replace(its, stages=max(1, min(its.stages, shared // of_stage)))


def product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    its: ProductTile | None = None,
) -> torch.Tensor:
    """[T, O] = hidden [T, I] times weight [O, I], plus bias [O], in this dtype (None: hidden's).

    hidden is float16 or bfloat16; weight and bias are of its dtype or float32. Rows of both are contiguous.
    """
    (outputs, inputs), rows = weight.shape, len(hidden)
    found = torch.empty(rows, outputs, dtype=dtype or hidden.dtype, device=hidden.device)
    its = fitted(its or tile_of(rows, outputs, weight.dtype), shared_memory(hidden.device), weight.dtype)
    if rows:
        multiply_in_order[(triton.cdiv(outputs, its.columns), triton.cdiv(rows, its.rows))](
            hidden, weight, weight if bias is None else bias, found, rows, outputs, inputs, hidden.stride(0),
            weight.stride(0), bias is not None, weight.dtype == torch.float32, inputs % its.block == 0,
            its.rows, its.columns, its.block, num_warps=its.warps, num_stages=its.stages,
        )  # fmt: skip
    return found
