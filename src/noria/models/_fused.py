"""What a layer does between its products, by kernels of few launches where they can be built; each beside its plain twin.

Kernels are used on CUDA devices in half precisions. Functions of tensors: nothing of ranks, streams or files.
T tokens, E hidden, H heads, Hkv key/value heads, N heads of a kind, D head dim, I intermediate.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from noria import kinds
from noria.kernels.trying import tried
from noria.model import ModelShape
from noria.models import _rotary
from noria.models._linear import ACTIVATIONS
from noria.models._rotary import Rotary

DTYPES = (torch.float16, torch.bfloat16)
WIDEST_ROW, WIDEST_HEAD = 16384, 512
LARGEST_ERROR = 0.03  # as a part of numbers in half precisions: more is no rounding
GATES = {"silu": "silu", "swish": "silu", "gelu": "gelu"}  # activations that the kernel of gates knows, by its names
GATES |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")


class Norming(NamedTuple):
    """How rows are normed: RMSNorm, or LayerNorm where they are `centered`. shift: what weights [E] are stored without."""

    weight: torch.Tensor
    eps: float
    bias: torch.Tensor | None = None
    centered: bool = False
    shift: float = 0.0


def norm(hidden: torch.Tensor, how: Norming) -> torch.Tensor:
    """The norms of rows [T, E]; by torch alone of heads [T, N, D]."""
    if hidden.dim() == 2 and hidden.shape[1] <= WIDEST_ROW and not refuses(hidden.device, hidden.dtype):
        normed: torch.Tensor = _kernel("norm").norm(hidden, how)
        return normed
    return plain_norm(hidden, how)


def plain_norm(hidden: torch.Tensor, how: Norming) -> torch.Tensor:
    weight, eps, bias, centered, shift = how
    if centered:
        return F.layer_norm(hidden, weight.shape, weight + shift if shift else weight, bias, eps)
    if not shift:
        return F.rms_norm(hidden, weight.shape, weight, eps)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.rms_norm(hidden.to(wide), weight.shape, weight.to(wide) + shift, eps).to(hidden.dtype)


def add_norm(branch: torch.Tensor, hidden: torch.Tensor, how: Norming) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of what a branch of a layer returned and the hidden states before it, [T, E], and its norms.

    The sum stands in the branch's memory; hidden states are left as they are.
    """
    if hidden.shape[1] <= WIDEST_ROW and not refuses(hidden.device, hidden.dtype):
        return branch, _kernel("norm").norm(hidden, how, branch)
    return plain_add_norm(branch, hidden, how)


def plain_add_norm(branch: torch.Tensor, hidden: torch.Tensor, how: Norming) -> tuple[torch.Tensor, torch.Tensor]:
    total = branch.add_(hidden)
    return total, plain_norm(total, how)


def gated(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """[..., I] of gates and ups [..., 2 * I], the gates first: activation(gate) * up. activation: a name in ACTIVATIONS."""
    kind = GATES.get(activation)
    if kind is not None and gate_up.dim() == 2 and not refuses(gate_up.device, gate_up.dtype):
        inner: torch.Tensor = _kernel("gated").gated(gate_up, kind)
        return inner
    return plain_gated(gate_up, activation)


def plain_gated(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else ACTIVATIONS[activation](gate)).mul_(up)


def rotate_and_write(
    queries: torch.Tensor,
    rotary: Rotary,
    new: Sequence[torch.Tensor],
    arrays: Sequence[torch.Tensor],
    rows: torch.Tensor,
) -> torch.Tensor:
    """Queries [T, H, D] as they attend, once the `new` of each token is written to these rows of a layer's arrays.

    The first of the new are keys, which become what queries do: normed, each head, and turned (see Rotary).
    """
    if _writes(queries, new, arrays):
        made: torch.Tensor = _kernel("rotary").rotate_and_write(queries, rotary, new, arrays, rows)
        return made
    return plain_rotate_and_write(queries, rotary, new, arrays, rows)


def plain_rotate_and_write(
    queries: torch.Tensor,
    rotary: Rotary,
    new: Sequence[torch.Tensor],
    arrays: Sequence[torch.Tensor],
    rows: torch.Tensor,
) -> torch.Tensor:
    cosines, sines, pairs, norms, eps = rotary
    made = [queries, *new[:1]]
    if norms is not None:
        made = [plain_norm(heads, Norming(weight, eps)) for heads, weight in zip(made, norms, strict=False)]
    if cosines is not None and sines is not None:
        turn = _rotary.rotate_pairs if pairs else _rotary.rotate
        made = [turn(heads, cosines, sines) for heads in made]
    for array, its in zip(arrays, [*made[1:], *new[1:]], strict=True):
        array.index_copy_(0, rows, its if its.dim() == 3 else its[:, None])
    return made[0]


def by_kernels(like: torch.Tensor) -> bool:
    """Whether numbers in this dtype on this device are computed by kernels."""
    return not refuses(like.device, like.dtype)


def _writes(queries: torch.Tensor, new: Sequence[torch.Tensor], arrays: Sequence[torch.Tensor]) -> bool:
    """Keys and values of heads, and nothing else, written as they are computed."""
    if len(new) != 2 or new[0].dim() != 3 or not by_kernels(queries):
        return False
    return max(queries.shape[2], new[1].shape[2]) <= WIDEST_HEAD and arrays[0].dtype == queries.dtype


@lru_cache
def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why kernels do not compute in this dtype on this device; empty where they do. They are built and tried once."""
    if device.type != "cuda":
        return f"they need a CUDA device, this is the {device.type.upper()}"
    if dtype not in DTYPES:
        return f"they compute float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"

    def trial() -> str:
        return "" if _largest_error(device, dtype) < LARGEST_ERROR else "they give other results than torch"

    return tried(trial, "they")


def _largest_error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of a kernel to its plain twin, in parts of 1 and the number, for rows that fill no block."""
    draw = torch.Generator().manual_seed(0)
    hidden, branch, weight, bias = (
        torch.randn(size, generator=draw).to(device, dtype) for size in ((3, 200), (3, 200), (200,), (200,))
    )
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for how in (Norming(weight, 1e-6), Norming(weight, 1e-6, bias, centered=True, shift=1.0)):
        sums = branch.clone(), branch.clone()
        found = sums[0], _kernel("norm").norm(hidden, how, sums[0])
        pairs += zip(found, plain_add_norm(sums[1], hidden, how), strict=True)
    for name, kind in GATES.items():
        pairs.append((_kernel("gated").gated(hidden, kind), plain_gated(hidden.clone(), name)))
    pairs += _heads_both_ways(hidden, weight)
    return max(float(((one - other).abs() / (1 + other.abs())).max()) for one, other in pairs)


def _heads_both_ways(numbers: torch.Tensor, weight: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Heads normed and turned in part, and the keys and values that are written, by the kernel and without it."""
    queries, keys, values = numbers.view(len(numbers), -1, 20).split((6, 2, 2), dim=1)
    rows = torch.arange(len(numbers), device=numbers.device)
    turn = _rotary.tables(1e4, (), 12, rows, numbers.dtype)
    rotary, made = Rotary(*turn, norms=(weight[:20], weight[20:40]), eps=1e-6), []
    for function in (_kernel("rotary").rotate_and_write, plain_rotate_and_write):
        arrays = [torch.zeros_like(one, memory_format=torch.contiguous_format) for one in (keys, values)]
        made.append([function(queries, rotary, (keys, values), arrays, rows), *arrays])
    return list(zip(*made, strict=True))


def build(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> str:
    """Builds what the layers of a model launch. Returns why nothing is built and used; empty where it is."""
    why = refuses(device, dtype)
    if why:
        return why
    if shape.hidden_size <= WIDEST_ROW:
        row = torch.zeros(1, shape.hidden_size, dtype=dtype, device=device)
        norm(row, Norming(row[0], 1e-6))
        add_norm(row.clone(), row, Norming(row[0], 1e-6))
    experts = shape.details.get("experts")
    for width in filter(None, {shape.details.get("intermediate_size"), experts.shared if experts else 0}):
        gated(torch.zeros(1, 2 * width, dtype=dtype, device=device))
    for layer in {shape.arrays(layer): layer for layer in range(shape.num_layers)}.values():
        _build_heads(shape, layer, torch.zeros(1, dtype=dtype, device=device))
    return ""


def _build_heads(shape: ModelShape, layer: int, zero: torch.Tensor) -> None:
    """What writes the keys and values of a layer that turns halves; others are built when they are launched first."""
    rows = [array.row for array in shape.arrays(layer) if array.per == "token"]
    if [len(row) for row in rows] != [2, 2]:
        return
    dim, details, norms = rows[0][1], shape.details, None
    turn = details["turns"][layer] if "turns" in details else None
    size = turn[2] if turn else details.get("rope_size", 0)
    if details.get("head_norms"):
        norms = zero.new_zeros(dim), zero.new_zeros(dim)
    turned = zero.new_zeros(1, 1, size), zero.new_zeros(1, 1, size // 2)
    rotary = Rotary(*turned, norms=norms, eps=1e-6) if size else Rotary(norms=norms, eps=1e-6)
    new = [zero.new_zeros(1, *row) for row in rows]
    queries = zero.new_zeros(1, shape.num_heads, dim)
    rotate_and_write(
        queries, rotary, new, [one.clone() for one in new], torch.zeros(1, dtype=torch.int64, device=zero.device)
    )


@lru_cache
def _kernel(name: str) -> ModuleType:
    """What launches a kernel: it needs triton, which is there where there is a GPU."""
    return kinds.load("kernels", name)
