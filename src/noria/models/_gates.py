"""The gate between an expert's products, plain: what becomes of its gates and ups [..., 2 * I]."""

import torch
import torch.nn.functional as F

from noria.kernels.expert_layer import GELU_TANH, Gate


def inner(its: Gate, gate_up: torch.Tensor) -> torch.Tensor:
    """[..., I] of gates and ups [..., 2 * I], as the gate says; for half precisions in float32 if it is wide."""
    wide = torch.promote_types(gate_up.dtype, torch.float32) if its.wide else gate_up.dtype
    numbers = gate_up.to(wide)
    gate, up = (numbers[..., ::2], numbers[..., 1::2]) if its.alternating else numbers.chunk(2, dim=-1)
    if its.limit is not None:
        gate, up = gate.clamp(max=its.limit), up.clamp(-its.limit, its.limit)
    return _bent(its, gate).mul_(up + its.shift if its.shift else up).to(gate_up.dtype)


def _bent(its: Gate, gate: torch.Tensor) -> torch.Tensor:
    if its.function == GELU_TANH:
        return F.gelu(gate, approximate="tanh")
    return F.silu(gate) if its.alpha == 1 else torch.sigmoid(gate * its.alpha).mul_(gate)
