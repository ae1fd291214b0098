"""The experts that a token goes to, and their weights, from its router's scores, on a CUDA device (Triton): a token a program.

T tokens, X experts, C choices a token.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def squashed(scores, valid, SOFTMAX: tl.constexpr, SIGMOID: tl.constexpr):
    """Scores as probabilities, where they are valid; or as they are."""
    if SOFTMAX:
        shares = tl.exp(scores - tl.max(tl.where(valid, scores, float("-inf")), 0))
        scores = shares / tl.sum(tl.where(valid, shares, 0.0), 0)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-scores))
    return scores


@triton.jit
def within_groups(rank, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr):
    """The ranks, those outside the KEPT groups whose BEST best have the largest sums minus infinity."""
    of_groups = tl.reshape(rank, (GROUPS, rank.shape[0] // GROUPS))
    within, group = tl.arange(0, rank.shape[0] // GROUPS)[None, :], tl.arange(0, GROUPS)
    left, total, kept = of_groups, tl.zeros((GROUPS,), tl.float32), tl.zeros((GROUPS,), tl.int32)
    for _ in tl.static_range(BEST):
        total += tl.max(left, 1)
        left = tl.where(within == tl.argmax(left, 1)[:, None], float("-inf"), left)
    for _ in tl.static_range(KEPT):
        best = tl.argmax(tl.where(kept == 0, total, float("-inf")), 0)
        kept = tl.where(group == best, 1, kept)
    return tl.reshape(tl.where(kept[:, None] == 1, of_groups, float("-inf")), (rank.shape[0],))


@triton.jit
def choose_experts(
    scores, correction, chosen, weights, row, least, scaling, X: tl.constexpr, CHOSEN: tl.constexpr,
    BEFORE_SOFTMAX: tl.constexpr, BEFORE_SIGMOID: tl.constexpr, AFTER_SOFTMAX: tl.constexpr, AFTER_SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr, NORMALIZED: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
    PAD: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """The best of a token's experts, of equal ones the first. What is no number is chosen last."""
    token, x, place = tl.program_id(0).to(tl.int64), tl.arange(0, PAD), tl.arange(0, PLACES)
    known, wanted = x < X, place < CHOSEN
    its = squashed(tl.load(scores + token * row + x, mask=known, other=0.0), known, BEFORE_SOFTMAX, BEFORE_SIGMOID)
    rank = its + tl.load(correction + x, mask=known, other=0.0) if CORRECTED else its
    rank = tl.where(known & (rank == rank), rank, float("-inf"))
    if GROUPS > 1:
        rank = within_groups(rank, GROUPS, KEPT, BEST)
    expert, weight = tl.zeros((PLACES,), tl.int64), tl.zeros((PLACES,), tl.float32)
    for choice in tl.static_range(CHOSEN):
        best = tl.argmax(rank, 0)
        expert = tl.where(place == choice, best.to(tl.int64), expert)
        weight = tl.where(place == choice, tl.sum(tl.where(x == best, its, 0.0), 0), weight)
        rank = tl.where(x == best, float("-inf"), rank)
    weight = squashed(weight, wanted, AFTER_SOFTMAX, AFTER_SIGMOID)
    if NORMALIZED:
        weight = weight / tl.maximum(tl.sum(tl.where(wanted, weight, 0.0), 0), least)
    tl.store(chosen + token * CHOSEN + place, expert, mask=wanted)
    tl.store(weights + token * CHOSEN + place, weight * scaling, mask=wanted)


def choose(
    scores: torch.Tensor,
    correction: torch.Tensor | None,
    count: int,
    squashes: tuple[str, str],
    least: float | None,
    scaling: float,
    groups: tuple[int, int, int] = (1, 1, 1),
) -> tuple[torch.Tensor, torch.Tensor]:
    """C = `count` experts of each token [T, C] int64, the best first, and their weights [T, C], of float32 scores [T, X].

    squashes: what is made of all scores, and then of the chosen ones: `softmax`, `sigmoid` or nothing. correction [X] counts
    for the choice alone. least: weights are divided by their sum, or by this if that is more; None: they are not.
    groups: of so many, each a power of two of experts, those are kept in number whose so many best ranks have the largest sums.
    """
    tokens, number = scores.shape
    chosen = torch.empty(tokens, count, dtype=torch.int64, device=scores.device)
    weights = torch.empty(tokens, count, dtype=torch.float32, device=scores.device)
    if tokens:
        before, after = squashes
        choose_experts[(tokens,)](
            scores, scores if correction is None else correction, chosen, weights, scores.stride(0), least or 0.0, scaling,
            number, count, before == "softmax", before == "sigmoid", after == "softmax", after == "sigmoid",
            correction is not None, least is not None, *groups, triton.next_power_of_2(number), triton.next_power_of_2(count),
            num_warps=1 if number <= 512 else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return chosen, weights
