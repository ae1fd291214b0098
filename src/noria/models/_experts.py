"""A mixture of experts: which experts a token goes to, and their SwiGLU products. Knows no family, rank or file.

An expert is one piece of the parameter `experts`: its gate, its up and its down matrix. Plain ones are [3 * I, E], the
last matrix transposed, so that `h5dump -d experts -s` shows one; the products take each by a view, whichever way it lies.
T tokens, C choices a token, X experts, E hidden, I intermediate.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from noria.errors import require
from noria.models import _config as read
from noria.models._sources import Transposed
from noria.pieces import Matrix, Wanted

MAX_EXPERTS = 4096


def settings(
    config: Mapping[str, Any], key: str, number: int, chosen: int, inner: int, normalized: bool, layers: Collection[int]
) -> dict[str, Any]:
    """A family's experts as _decoder.shape takes them: how many (by `key`), and how many a token goes to."""
    number = read.integer(config, key, number, MAX_EXPERTS)
    chosen = read.integer(config, "num_experts_per_tok", chosen)
    require(chosen <= number, f"config.json: num_experts_per_tok ({chosen}) is more than {key} ({number})")
    return {"number": number, "chosen": chosen, "inner": inner, "normalized": normalized, "layers": layers}


def parameters(num_experts: int, hidden: int, inner: int) -> dict[str, tuple[int, ...] | Wanted]:
    """The router and the experts as parameters of a layer; `experts` is computed as experts.gate_up and experts.down."""
    up = Matrix("gate_up", (inner, hidden))
    matrices = (up, up, Matrix("down", (hidden, inner), transposed=True))
    return {"router": (num_experts, hidden), "experts": Wanted((num_experts, 3 * inner, hidden), matrices=matrices)}


def work_size(experts: Mapping[str, Any], hidden: int) -> int:
    """Numbers that a token takes while its mixture is computed."""
    return experts["chosen"] * (4 * hidden + 3 * experts["inner"]) + 4 * experts["number"]


def sources(prefix: str, num_experts: int, gate: str, up: str, down: str) -> tuple[str, ...]:
    """The tensors of the experts that lie under `prefix`, by the modules' names."""
    return tuple(
        name
        for expert in range(num_experts)
        for name in (
            f"{prefix}.{expert}.{gate}.weight",
            f"{prefix}.{expert}.{up}.weight",
            Transposed(f"{prefix}.{expert}.{down}.weight"),
        )
    )


def choose(scores: torch.Tensor, count: int, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token [T, C] and their weights [T, C], from the router's scores [T, X].

    Weights are softmax probabilities over all experts (float32 for half precisions), over their sum if normalized.
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    weights, chosen = torch.softmax(wide, dim=-1).topk(count, dim=-1)
    if normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return chosen, weights.to(scores.dtype)


def mixture(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """[T, E]: each token's weighted sum over its experts; gate_up [X, 2 * I, E], down [X, E, I], in any strides.

    Pairs of token and expert are sorted by expert, so that an expert is one product over all its tokens; a token's sum
    is over its choices in their order, whatever other tokens there are. On CUDA in bfloat16 one grouped product does
    all experts and the host waits for nothing (H100, 128 experts of 2048 x 768, 8 a token: 0.7 ms for 512 tokens, where
    one by one takes 14); elsewhere the host reads how many tokens each expert has: one wait a layer.
    """
    (num_tokens, count), num_experts = chosen.shape, len(gate_up)
    sorted_experts, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_experts, torch.arange(num_experts, device=chosen.device), right=True)
    products = (_grouped if _groups(hidden) else _one_by_one)(hidden[order // count], ends, gate_up, down)
    by_choice = torch.empty_like(products)
    by_choice[order] = products
    return (by_choice.view(num_tokens, count, hidden.shape[1]) * weights[:, :, None]).sum(dim=1)


def _one_by_one(rows: torch.Tensor, ends: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """[T * C, E] products of rows sorted by expert, of which expert x has those before ends[x]."""
    products, first = torch.empty_like(rows), 0
    for its_gate_up, its_down, last in zip(gate_up, down, ends.tolist(), strict=True):
        if last > first:
            gate, up = F.linear(rows[first:last], its_gate_up).chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up), its_down.t(), out=products[first:last])
        first = last
    return products


def _groups(hidden: torch.Tensor) -> bool:
    """Whether torch multiplies groups of rows in one kernel here: bfloat16 from Hopper on."""
    usable = hidden.is_cuda and hidden.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    return usable and torch.cuda.get_device_capability(hidden.device) >= (9, 0)


def _grouped(rows: torch.Tensor, ends: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    ends = ends.to(torch.int32)
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate).mul_(up), down.transpose(1, 2), offs=ends)
