"""Gates times ups of one product, in one reading of it (Triton).

T rows, I numbers of a gate.
"""

import torch
import triton
import triton.language as tl

BLOCK = 2048  # numbers of a program


@triton.jit
def gate_rows(gate_up, into, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """A block of a row: the activation in float32, rounded as it is stored, times the up."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = gate_up + row * row_stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # gelu_tanh; (1 + tanh(x)) / 2 is the sigmoid of 2 x
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        gate = gate / (1.0 + tl.exp(-inner))
    kind = into.dtype.element_ty
    tl.store(into + row * WIDTH + column, (gate.to(kind).to(tl.float32) * up).to(kind), mask=inside)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[T, I] of gates and ups [T, 2 * I], the gates first. Numbers of a row are contiguous; rows have any stride.

    activation: silu, gelu or gelu_tanh.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    into, block = gate_up.new_empty(rows, width), min(BLOCK, 1 << (width - 1).bit_length())
    gate_rows[(rows * -(-width // block),)](
        gate_up, into, gate_up.stride(0), width, block, activation, num_warps=4, enable_fp_fusion=False
    )
    return into
