"""Mixtures by tiles of sorted pairs against plain sums in float64: for Triton's interpreter and for GPUs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from noria.kernels.expert_layer import GELU_TANH, ExpertLayer, Gate
from noria.models import _routing
from noria.models._routing import LEAST_SUM, Routing

LEAST_SHARED = 99 << 10  # bytes of shared memory that every card of compute capability 8.0 gives a program
CLAMPED = Gate(alpha=1.702, limit=1.0, shift=1.0, alternating=True)


@dataclass(frozen=True)
class Case:
    experts: int
    hidden: int
    inner: int
    chosen: int
    tokens: int
    gate: Gate = Gate()
    biased: bool = False
    routing: str = "random"  # or `one`: all tokens go to the same experts; `few`: to few of them
    lies: str = "plain"  # down matrices transposed; `decoded`: not; `turned`: those of gates and ups too


# Sizes that are no multiples of anything, experts without rows, one row, more pairs than a program looks through at once.
CASES = [
    Case(8, 96, 40, 2, 5),
    Case(8, 130, 24, 3, 1, lies="decoded"),
    Case(40, 64, 16, 8, 3),
    Case(3, 33, 17, 1, 7, lies="turned"),
    Case(5, 48, 136, 3, 60, CLAMPED, biased=True),
    Case(7, 72, 65, 4, 40, CLAMPED, biased=True, lies="decoded"),
    Case(16, 40, 24, 2, 80, Gate(GELU_TANH), routing="few"),
    Case(9, 64, 32, 2, 150, Gate(limit=0.5), routing="one"),
]


def made(case, dtype, device="cpu", seed=0):
    """Rows [T, E], choices and weights [T, C], and the layer."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=draw)  # noqa: E731
    gate_up = normal(case.experts, 2 * case.inner, case.hidden) * case.hidden**-0.5
    down = normal(case.experts, case.hidden, case.inner) * case.inner**-0.5
    biases = normal(case.experts, 2 * case.inner), normal(case.experts, case.hidden)
    scores = normal(case.tokens, case.experts)
    if case.routing == "one":
        scores = scores[:1].repeat(case.tokens, 1)
    if case.routing == "few":
        scores[:, case.chosen + 1 :] = -torch.inf
    weights, chosen = scores.softmax(-1).topk(case.chosen)
    to = lambda tensor: tensor.to(device, dtype)  # noqa: E731
    turned = lambda tensor: to(tensor).transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    gate_up = turned(gate_up) if case.lies == "turned" else to(gate_up)
    down = to(down) if case.lies == "decoded" else turned(down)
    layer = ExpertLayer(gate_up, down, case.gate, (to(biases[0]), to(biases[1])) if case.biased else None)
    return to(normal(case.tokens, case.hidden)), chosen.to(device), weights.to(device), layer


def inner(gate, numbers):
    gates, ups = (numbers[::2], numbers[1::2]) if gate.alternating else numbers.chunk(2)
    if gate.limit is not None:
        gates, ups = gates.clamp(max=gate.limit), ups.clamp(-gate.limit, gate.limit)
    bent = (
        F.gelu(gates, approximate="tanh") if gate.function == GELU_TANH else gates * torch.sigmoid(gate.alpha * gates)
    )
    return bent * (ups + gate.shift)


def exact(rows, chosen, weights, layer):
    """[T, E] in float64: one token and one choice after another."""
    chosen, mixed = chosen.tolist(), torch.zeros(len(chosen), rows.shape[1], dtype=torch.float64, device=rows.device)
    gate_up, down = layer.gate_up.double(), layer.down.double()
    biases = layer.biases or (torch.zeros(len(down), len(gate_up[0])), torch.zeros(len(down), rows.shape[1]))
    of_first, of_second = (bias.to(rows.device).double() for bias in biases)
    for token, experts in enumerate(chosen):
        for choice, expert in enumerate(experts):
            numbers = inner(layer.gate, gate_up[expert] @ rows[token].double() + of_first[expert])
            mixed[token] += weights[token, choice].double() * (down[expert] @ numbers + of_second[expert])
    return mixed


def error(found, rows, chosen, weights, layer):
    """The largest error, as a part of the largest number."""
    right = exact(rows, chosen, weights, layer)
    return float((found.double() - right).abs().max() / right.abs().max())


ROUTINGS = [
    Routing(8, before="softmax", normalized=True),
    Routing(3, before="softmax"),
    Routing(4, after="softmax"),
    Routing(6, before="sigmoid", normalized=True, least=LEAST_SUM, scaling=2.5),
    Routing(1, after="sigmoid"),
]


IN_GROUPS = [
    Routing(8, before="sigmoid", normalized=True, least=LEAST_SUM, groups=8, kept=4, scaling=2.5),
    Routing(3, before="softmax", groups=4, kept=2, best=1),
    Routing(2, before="sigmoid", groups=2, kept=1),
]


def routed(routing, tokens, experts, corrected, device, choose):
    """What a kernel chooses of random scores, and what torch does in float64."""
    draw = torch.Generator().manual_seed(experts)
    scores, correction = torch.randn(tokens, experts, generator=draw) * 3, torch.randn(experts, generator=draw)
    correction = correction if corrected else None
    least = routing.least if routing.normalized else None
    to = lambda its: None if its is None else its.to(device)  # noqa: E731
    squashes, groups = (routing.before, routing.after), (routing.groups, routing.kept, routing.best)
    found = choose(to(scores), to(correction), routing.chosen, squashes, least, routing.scaling, groups)
    return [its.cpu() for its in found], _routing.choose(routing, scores.double(), correction)
