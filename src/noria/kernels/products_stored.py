"""Products with weights as they are stored, for few rows (Triton): a program decodes its own tiles of weights.

As products.py has them for plain ones, and with the bits of those: numbers are decoded to the same bits as before, and are added
along the inputs in the same order, in tiles of as many rows. Tiles of more rows decode the weights again.
T tokens, O outputs, I inputs.
"""

import torch
import triton
import triton.language as tl

from noria.kernels.products import LEAST_ROWS, ProductTile, fitted
from noria.kernels.shared_memory import shared_memory
from noria.kernels.stored import StoredMatrices
from noria.kernels.stored_tiles import fields_at, summed

FEW_OUTPUTS, FEW = 8192, ProductTile(LEAST_ROWS, 32, 128, 4, 3)  # so that there are many programs
MANY = ProductTile(LEAST_ROWS, 64, 64, 4, 3)
TILES = (FEW, MANY)


@triton.jit(do_not_specialize=["rows"])  # one variant for any number of them
def multiply_stored(
    hidden, codes, scales, zeros, of_matrices, bias, product, rows, outputs, hidden_row, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr,
    OF_ROWS: tl.constexpr, ZEROED: tl.constexpr, INPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of hidden [rows, INPUTS] times the weight's parts, whose outputs follow one another, summed in float32.

    PARTS: of each its first program, its first output and how many it has, and where its codes, scales, zeros and the scale of
    the matrix lie behind those of the first part, in their elements.
    """
    program = tl.program_id(0)
    first, before, count = 0, 0, PARTS[0][2]
    codes_at, scales_at, zeros_at, of_at = 0, 0, 0, 0
    for part in tl.static_range(1, len(PARTS)):
        its = program >= PARTS[part][0]
        first, before = tl.where(its, PARTS[part][0], first), tl.where(its, PARTS[part][1], before)
        count, codes_at = tl.where(its, PARTS[part][2], count), tl.where(its, PARTS[part][3], codes_at)
        scales_at, zeros_at = tl.where(its, PARTS[part][4], scales_at), tl.where(its, PARTS[part][5], zeros_at)
        of_at = tl.where(its, PARTS[part][6], of_at)
    row, k = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    valid, n = row < rows, (program - first) * COLUMNS + tl.arange(0, COLUMNS)
    there = tl.where(n < count, n, 0)
    given = hidden + row.to(tl.int64)[:, None] * hidden_row + k[None, :]
    fields = fields_at(codes, scales, zeros, of_matrices, 1, there, (codes_at, scales_at, zeros_at, of_at), SCALES)
    sums = summed(given, valid, fields, INPUTS, WIDTH, GROUPS, CODES, SCALES, GROUP, OF_ROWS, ZEROED, DEPTH)
    if HAS_BIAS:
        sums += tl.load(bias + before + there).to(tl.float32)[None, :]
    to = product + row.to(tl.int64)[:, None] * outputs + (before + n)[None, :]
    tl.store(to, sums.to(product.dtype.element_ty), mask=valid[:, None] & (n < count)[None, :])


def tile_of(outputs: int) -> ProductTile:
    """The tile for so many outputs."""
    return FEW if outputs <= FEW_OUTPUTS else MANY


def product(
    hidden: torch.Tensor, weight: StoredMatrices, bias: torch.Tensor | None = None, its: ProductTile | None = None
) -> torch.Tensor:
    """[T, O] in hidden's dtype = hidden [T, I] times the only matrix of a weight [1, O, I], plus bias [O].

    hidden is float16 or bfloat16, its rows are contiguous. Capturable: shapes say what is launched.
    """
    (_, outputs, inputs), rows, form, part = weight.shape, len(hidden), weight.form, weight.parts[0]
    found = hidden.new_empty(rows, outputs)
    its = fitted(its or tile_of(outputs), shared_memory(hidden.device), hidden.dtype)
    if rows:
        parts, programs = _parts(weight, its.columns)
        multiply_stored[(programs, -(-rows // its.rows))](
            hidden, part.codes, part.scales, part.zeros, part.of_matrices, found if bias is None else bias, found, rows,
            outputs, hidden.stride(0), parts, part.codes.shape[2], part.scales.shape[2], form.codes, form.scales, form.group,
            form.rows, form.zeroed, inputs, bias is not None, its.rows, its.columns, its.block, num_warps=its.warps,
            num_stages=its.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return found


def _parts(weight: StoredMatrices, columns: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """What programs know of each part, and how many programs there are."""
    found, program, before = [], 0, 0
    bases = _places(weight, 0)
    for number, part in enumerate(weight.parts):
        outputs = part.codes.shape[1]
        behind = (at - base for at, base in zip(_places(weight, number), bases, strict=True))
        found.append((program, before, outputs, *behind))
        program, before = program - (-outputs // columns), before + outputs
    return tuple(found), program


def _places(weight: StoredMatrices, number: int) -> tuple[int, ...]:
    """Where the fields of a part lie in the memory that they all lie in, in their elements."""
    part = weight.parts[number]
    fields = part.codes, part.scales, part.zeros, part.of_matrices
    return tuple(int(its.storage_offset()) for its in fields)
