"""Norms of rows, and the residual sum before them, a program a row (Triton): a row's result depends on its row alone.

T rows, E numbers a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl

WIDEST = 16384  # numbers that the registers of a program hold


@triton.jit
def norm_rows(
    hidden, branch, weight, bias, normed, hidden_row, branch_row, eps, shift,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CENTERED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A row's norm in float32. ADD: of its sum with `branch`, which is stored there, rounded as it is normed."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < WIDTH
    its = tl.load(hidden + row * hidden_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        at = branch + row * branch_row + column
        total = (its + tl.load(at, mask=inside, other=0.0).to(tl.float32)).to(branch.dtype.element_ty)
        tl.store(at, total, mask=inside)
        its = total.to(tl.float32)
    if CENTERED:
        its = tl.where(inside, its - tl.sum(its, 0) / WIDTH, 0.0)
    its = its * (1.0 / tl.sqrt(tl.sum(its * its, 0) / WIDTH + eps))
    its = its * (tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + shift)
    if BIAS:
        its = its + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * WIDTH + column, its.to(normed.dtype.element_ty), mask=inside)


def norm(hidden: torch.Tensor, how: Any, branch: torch.Tensor | None = None) -> torch.Tensor:
    """[T, E]: the norms of rows [T, E], or of their sums with `branch`, which then stand in `branch`.

    how: weights [E], epsilon, bias [E] or None, whether rows are centered (LayerNorm, else RMSNorm), what is added to weights.
    Numbers of a row are contiguous; rows have any stride.
    """
    (weight, eps, bias, centered, shift), (rows, width) = how, hidden.shape
    assert width <= WIDEST, f"rows of {width} numbers: {WIDEST} at most"
    normed, other = hidden.new_empty(rows, width), hidden if branch is None else branch
    block = 1 << (width - 1).bit_length()
    norm_rows[(rows,)](
        hidden, other, weight, weight if bias is None else bias, normed, hidden.stride(0), other.stride(0), eps, shift,
        width, block, branch is not None, centered, bias is not None,
        num_warps=min(16, max(1, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return normed
