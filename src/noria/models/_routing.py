"""Which experts a token goes to, and with which weights: the routing of every mixture, of a router's scores.

Scores and weights are float32 for half precisions and float64 in float64. Functions of tensors: knows no family, no rank
and no file. T tokens, E hidden, X experts, C choices a token, G groups of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from noria.errors import require
from noria.kernels import in_order
from noria.models import _config as read
from noria.models import _tiles
from noria.models._linear import linear

MAX_EXPERTS = 4096
LEAST_SUM = 1e-20  # what DeepSeek-V3 and its relatives divide by at least


@dataclass(frozen=True)
class Routing:
    """How scores become choices and weights.

    chosen: C. before: what is made of all scores before the choice, `softmax`, `sigmoid` or nothing. after: what is made of
    the chosen scores, the same. normalized: whether weights are divided by their sum, or by `least` if that is more. groups,
    kept, best: of G groups of neighbours a token's experts are in `kept`, those whose `best` best scores have the largest
    sum. scaling: of the weights. soft_cap: what scores are bent to stay within, by a tanh; 0: nothing.
    """

    chosen: int
    before: str = ""
    after: str = ""
    normalized: bool = False
    least: float = 0.0
    groups: int = 1
    kept: int = 1
    best: int = 2
    scaling: float = 1.0
    soft_cap: float = 0.0


def counts(config: Mapping[str, Any], key: str, chosen_key: str = "num_experts_per_tok") -> tuple[int, int]:
    """X and C of a config.json, by their keys. Raises InputError."""
    number, chosen = read.integer(config, key, most=MAX_EXPERTS), read.integer(config, chosen_key)
    require(chosen <= number, f"config.json: {chosen_key} ({chosen}) is more than {key} ({number})")
    return number, chosen


def groups_of(config: Mapping[str, Any], number: int, chosen: int) -> tuple[int, int]:
    """The groups of X experts, and how many of them a token's C are in. Raises InputError."""
    groups, kept = read.integer(config, "n_group", 1), read.integer(config, "topk_group", 1)
    read.multiple(("the number of experts", number), ("n_group", groups))
    require(kept <= groups, f"config.json: topk_group ({kept}) is more than n_group ({groups})")
    size = number // groups
    require(
        chosen <= kept * size, f"config.json: num_experts_per_tok ({chosen}) is more than topk_group ({kept}) x {size}"
    )
    return groups, kept


def corrected_sigmoid(config: Mapping[str, Any], number: int, chosen: int) -> Routing:
    """DeepSeek-V3's routing of X experts, of which a token goes to C, by the keys of its config.json. Raises InputError.

    Sigmoid scores; a correction counts for the choice alone; groups of which some are kept; weights over their sum, scaled.
    """
    groups, kept = groups_of(config, number, chosen)
    require(
        groups == 1 or number // groups >= 2,
        f"config.json: n_group is {groups}: a group must have at least 2 experts",
    )
    return Routing(
        chosen,
        before="sigmoid",
        normalized=read.flag(config, "norm_topk_prob", True),
        least=LEAST_SUM,
        groups=groups,
        kept=kept,
        scaling=read.number(config, "routed_scaling_factor", 1.0),
    )


def scores_of(hidden: torch.Tensor, router: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A router's scores [T, X] of hidden states [T, E], router [X, E], bias [X]: on GPUs in an order of its inputs that
    depends on nothing else."""
    wide = _wide(hidden.dtype)
    if hidden.is_cuda and not in_order.refuses(hidden.device, hidden.dtype):
        return in_order.product(hidden, router, bias, wide)
    return linear(hidden.to(wide), router.to(wide), None if bias is None else bias.to(wide))


def choose(
    routing: Routing, scores: torch.Tensor, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token [T, C], the best first, and their weights [T, C], from scores [T, X].

    correction [X]: what counts for the choice beside the score, and not in the weight.
    """
    scores = scores.to(_wide(scores.dtype))
    if _by_kernel(routing, scores):
        correction = None if correction is None else correction.to(scores.dtype)
        least = routing.least if routing.normalized else None
        squashes, groups = (routing.before, routing.after), (routing.groups, routing.kept, routing.best)
        return _tiles.choose(scores, correction, routing.chosen, squashes, least, routing.scaling, groups)
    if routing.soft_cap:
        scores = torch.tanh(scores / routing.soft_cap) * routing.soft_cap
    scores = _squashed(routing.before, scores)
    ranks = scores if correction is None else scores + correction.to(scores.dtype)
    if routing.groups > 1:
        ranks = _within_groups(routing, ranks)
    chosen = ranks.topk(routing.chosen, dim=-1).indices
    weights = _squashed(routing.after, scores.gather(1, chosen))
    if routing.normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=routing.least)
    return chosen, weights * routing.scaling if routing.scaling != 1.0 else weights


def sparse_mixer(scores: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The two experts of each token [T, 2] and their weights [T, 2], as SparseMixer-v2 has it (arXiv 2409.12136, eq. 11).

    Scores [T, X]. The weight of a choice is its softmax over the experts left that are as good as it, but for a share of
    2 x `tolerance`.
    """
    left, chosen, weights = scores, [], []
    for _ in range(2):
        best, expert = left.max(dim=-1, keepdim=True)
        far = (best - scores) / scores.abs().clamp(min=best) > 2 * tolerance
        near = torch.softmax(left.masked_fill(far, -torch.inf), dim=-1)
        chosen.append(expert)
        weights.append(near.gather(1, expert))
        left = left.scatter(1, expert, -torch.inf)
    return torch.cat(chosen, dim=-1), torch.cat(weights, dim=-1)


def _by_kernel(routing: Routing, scores: torch.Tensor) -> bool:
    """Whether one kernel chooses, whose result for a token is a function of its scores alone."""
    halved = all(its & (its - 1) == 0 for its in (scores.shape[1], routing.groups))  # powers of two
    plain = (routing.groups == 1 or halved) and not routing.soft_cap
    return plain and scores.is_cuda and scores.dtype == torch.float32 and _tiles.chooses(scores.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _squashed(function: str, scores: torch.Tensor) -> torch.Tensor:
    if function == "softmax":
        return torch.softmax(scores, dim=-1)
    return torch.sigmoid(scores) if function == "sigmoid" else scores


def _within_groups(routing: Routing, ranks: torch.Tensor) -> torch.Tensor:
    """The ranks [T, X], of experts outside a token's groups -inf."""
    groups = ranks.view(len(ranks), routing.groups, -1)
    of_group = groups.topk(routing.best, dim=-1).values.sum(dim=-1)
    kept = of_group.topk(routing.kept, dim=-1).indices
    outside = torch.ones_like(of_group, dtype=torch.bool).scatter_(1, kept, False)
    return groups.masked_fill(outside[:, :, None], -torch.inf).view_as(ranks)
