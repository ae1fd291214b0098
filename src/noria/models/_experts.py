"""A mixture of experts: their parameters, and the products of the experts that a token goes to. Knows no family or file.

An expert is one piece of the parameter `experts`: its gate, its up and its down matrix. Plain ones are [3 * I, E], the
last matrix transposed, so that `h5dump -d experts -s` shows one; the products take each by a view, whichever way it lies.
T tokens, C choices a token, X experts, E hidden, I intermediate, P = T * C pairs of token and expert.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from noria.kernels import in_order
from noria.kernels.expert_layer import Arriving, ExpertLayer, Gate, Some
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _fused, _gates, _routing, _tiles
from noria.models._linear import linear
from noria.models._routing import Routing
from noria.models._sources import Slice, Transposed
from noria.pieces import Matrix, Wanted

SWIGLU = Gate()


@dataclass(frozen=True)
class Experts:
    """A family's experts, as its config.json says.

    number: X. inner: I. layers: those that have experts. shared: I of the expert that every token goes to beside its own,
    0 if there is none; gated: whether it has a gate of its own. corrected: whether the choice has a correction. wide: whether
    the router is float32 whatever the model's dtype. fused: whether checkpoints have an expert's gate and up as one matrix.
    gate: what lies between an expert's products. biased: whether they have biases.
    """

    number: int
    inner: int
    layers: Collection[int]
    routing: Routing
    shared: int = 0
    gated: bool = False
    corrected: bool = False
    wide: bool = False
    fused: bool = False
    gate: Gate = SWIGLU
    biased: bool = False

    def work_size(self, hidden: int) -> int:
        """Numbers that a token takes while its mixture is computed."""
        return self.routing.chosen * (4 * hidden + 3 * self.inner) + 4 * self.number + 3 * self.shared

    @property
    def share(self) -> float:
        """Of the experts, those that a token goes to."""
        return self.routing.chosen / self.number


def corrected(config: Mapping[str, Any], key: str, layers: Collection[int], shared: int = 0) -> Experts:
    """Experts routed as DeepSeek-V3's are, X by its key, beside `shared` that all tokens go to. Raises InputError."""
    number, chosen = _routing.counts(config, key)
    routing, inner = _routing.corrected_sigmoid(config, number, chosen), read.integer(config, "moe_intermediate_size")
    return Experts(number, inner, layers, routing, shared * inner, corrected=True, wide=True)


def parameters(experts: Experts, hidden: int) -> dict[str, tuple[int, ...] | Wanted]:
    """What a layer has of its mixture, in stored order; `experts` is computed as experts.gate_up and experts.down."""
    router, inner = (experts.number, hidden), experts.inner
    up = Matrix("gate_up", (inner, hidden))
    ups = (Matrix("gate_up", (2 * inner, hidden)),) if experts.fused else (up, up)
    matrices = (*ups, Matrix("down", (hidden, inner), transposed=True))
    wanted: dict[str, tuple[int, ...] | Wanted] = {"router": Wanted(router, "float32") if experts.wide else router}
    if experts.corrected:
        wanted["correction"] = Wanted((experts.number,), "float32")
    if experts.shared:
        wanted |= {"shared_gate_up": (2 * experts.shared, hidden), "shared_down": (hidden, experts.shared)}
    if experts.gated:
        wanted["shared_gate"] = (1, hidden)
    return wanted | {"experts": Wanted((experts.number, 3 * inner, hidden), matrices=matrices)}


def sources(folder: str, gate: str, up: str, down: str, prefix: str, number: int) -> tuple[str, ...]:
    """The tensors of so many experts in `folder` below a layer's prefix, by the names of an expert's modules."""
    return tuple(
        name
        for expert in range(number)
        for name in (
            f"{prefix}.{folder}.{expert}.{gate}.weight",
            f"{prefix}.{folder}.{expert}.{up}.weight",
            Transposed(f"{prefix}.{folder}.{expert}.{down}.weight"),
        )
    )


def sources_in_one(gate_up: str, down: str, inputs_first: bool, prefix: str, number: int) -> tuple[str, ...]:
    """The same where all experts are slices of two tensors, of gates and ups [X, 2 * I, E] and of downs [X, E, I].

    inputs_first: they are [X, E, 2 * I] and [X, I, E].
    """
    return tuple(
        Slice(f"{prefix}.{name}", expert, turned)
        for expert in range(number)
        for name, turned in ((gate_up, inputs_first), (down, not inputs_first))
    )


def build(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, encoded: Sequence[tuple[Some, Some]] = ()
) -> str:
    """Builds the kernels that a family's mixtures launch here; why torch computes them, empty if it does not.

    encoded: matrices of gates and ups and of downs, few of them, of each kind that the model has encoded.
    """
    why, its = _tiles.refuses(device, dtype), shape.details.get("experts")
    if not why and isinstance(its, Experts):
        inner, hidden = its.inner, shape.hidden_size
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        piece, chosen = zeros((1, 3 * inner, hidden)), zeros((1, its.routing.chosen)).long()
        biases = (zeros((2, 2 * inner)), zeros((2, hidden))) if its.biased else None
        plain: tuple[Any, Any] = piece[:, : 2 * inner], piece[:, 2 * inner :].transpose(1, 2)
        for gate_up, down in (plain, *encoded):
            layer = ExpertLayer(gate_up, down, its.gate, biases)
            _tiles.build(zeros((1, hidden)), chosen, layer, its.number)
        _routing.choose(its.routing, zeros((1, its.number)), zeros(its.number) if its.corrected else None)
    if isinstance(its, Experts) and not in_order.refuses(device, dtype):
        router = torch.zeros(its.number, shape.hidden_size, dtype=torch.float32 if its.wide else dtype, device=device)
        in_order.build(dtype, router, router[:, 0] if its.biased else None)
    return why


def compute(experts: Experts, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """[T, E]: the mixture of a layer with these parameters, with what the shared expert adds."""
    scores = _routing.scores_of(hidden, parameters["router"])
    chosen, weights = _routing.choose(experts.routing, scores, parameters.get("correction"))
    matrices = parameters["experts.gate_up"], parameters["experts.down"]
    mixed = mixture(hidden, chosen, weights, *matrices, experts.gate)
    return mixed.add_(shared(parameters, hidden)) if experts.shared else mixed


def shared(parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """[T, E] of the expert that all tokens go to, times the sigmoid of its gate if it has one."""
    output = linear(swiglu(linear(hidden, parameters["shared_gate_up"])), parameters["shared_down"])
    gate = parameters.get("shared_gate")
    return output if gate is None else output.mul_(torch.sigmoid(linear(hidden, gate)))


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., I] of gates and ups [..., 2 * I], the gates first."""
    return _fused.gated(gate_up)


@dataclass(frozen=True)
class Pairs:
    """Pairs of token and expert, sorted by expert, so that an expert is one product over all its tokens.

    experts: [P] the pairs' experts. order: [P] their places among the choices [T, C]. ends: [X] the pairs of the experts
    up to each. count: C.
    """

    experts: torch.Tensor
    order: torch.Tensor
    ends: torch.Tensor
    count: int

    @property
    def tokens(self) -> torch.Tensor:
        """[P]"""
        return self.order // self.count


def pairs_of(chosen: torch.Tensor, num_experts: int) -> Pairs:
    """Of the experts of each token [T, C]."""
    experts, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(num_experts, device=chosen.device), right=True)
    return Pairs(experts, order, ends, chosen.shape[1])


def mixture(
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Any,
    down: Any,
    gate: Gate = SWIGLU,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """[T, E]: each token's weighted sum over its experts; gate_up [X, 2 * I, E], down [X, E, I], any strides, Some or Arriving.

    biases: [X, 2 * I] of gates and ups, [X, E] of downs. A token's sum is over its choices in their order, whatever other
    tokens there are. On CUDA in half precisions by tiles of sorted pairs, where the host waits for nothing; where these
    cannot be built, in bfloat16 by grouped products; elsewhere the host reads how many tokens each expert has.
    """
    layer = _all_or_some(hidden, chosen, ExpertLayer(gate_up, down, gate, biases))
    if _tiles.fits(hidden, layer):
        return _tiles.mix(hidden, chosen, weights, layer)
    pairs = pairs_of(chosen, len(layer.gate_up))
    products = products_of(hidden[pairs.tokens], pairs, layer)
    return (_by_choice(products, pairs) * weights.to(hidden.dtype)[:, :, None]).sum(dim=1)


def mixture_of_weighted(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: Any, down: Any
) -> torch.Tensor:
    """[T, E]: the same, but that a weight multiplies what its expert is given and not what it returns (Llama 4)."""
    layer = _all_or_some(hidden, chosen, ExpertLayer(gate_up, down))
    if _tiles.fits(hidden, layer):
        rows = hidden[:, None] * weights.to(hidden.dtype)[:, :, None]
        return _tiles.mix(rows.flatten(0, 1), chosen, None, layer)
    pairs = pairs_of(chosen, len(layer.gate_up))
    rows = hidden[pairs.tokens] * weights.to(hidden.dtype).flatten()[pairs.order, None]
    return _by_choice(products_of(rows, pairs, layer), pairs).sum(dim=1)


def _all_or_some(hidden: torch.Tensor, chosen: torch.Tensor, layer: ExpertLayer[Any]) -> ExpertLayer[Any]:
    """Matrices that are decoded where they are chosen: on a GPU as they are stored, where an expert has few rows and kernels
    take them so; else all at once where all are there and find room, unless rows are few."""
    arriving = isinstance(layer.gate_up, Arriving)
    if arriving:
        layer.gate_up.bring(chosen)
        layer = replace(layer, gate_up=layer.gate_up.there, down=layer.down.there)
    its = layer.gate_up
    if isinstance(its, torch.Tensor) or not hidden.is_cuda:
        return layer
    fits = _tiles.fits(hidden, layer)
    if fits and (stored := _tiles.stored(hidden, chosen, layer)):
        return stored
    if arriving or its.most < len(its) or (fits and chosen.numel() <= len(its)):
        return layer
    every = range(len(its))
    return ExpertLayer(its.of(every), layer.down.of(every), layer.gate, layer.biases)


def products_of(rows: torch.Tensor, pairs: Pairs, layer: ExpertLayer[torch.Tensor] | ExpertLayer[Some]) -> torch.Tensor:
    """[P, E] of each pair's row [P, E]: what its expert returns. Matrices that are decoded a few at a time come as Some."""
    if not isinstance(layer.gate_up, torch.Tensor):
        return _in_runs(rows, pairs, layer)
    biases = layer.biases
    multiplied = _grouped(pairs.ends) if _groups(rows) else _one_by_one(pairs.ends)
    inner = multiplied(rows, layer.gate_up)
    inner = _gates.inner(layer.gate, inner if biases is None else inner.add_(biases[0][pairs.experts]))
    output = multiplied(inner, layer.down)
    return output if biases is None else output.add_(biases[1][pairs.experts])


def _in_runs(rows: torch.Tensor, pairs: Pairs, layer: ExpertLayer[Some]) -> torch.Tensor:
    """products_of, run by run of the experts that have rows. The host waits to know which."""
    bounds, products = [0, *pairs.ends.tolist()], torch.empty_like(rows)
    wanted = [expert for expert in range(len(layer.gate_up)) if bounds[expert + 1] > bounds[expert]]
    for first in range(0, len(wanted), layer.gate_up.most):
        run = wanted[first : first + layer.gate_up.most]
        begin, end = bounds[run[0]], bounds[run[-1] + 1]
        ends = torch.tensor([bounds[expert + 1] - begin for expert in run], device=rows.device)
        its = Pairs(pairs.experts[begin:end], pairs.order[begin:end], ends, pairs.count)
        these = ExpertLayer(layer.gate_up.of(run), layer.down.of(run), layer.gate, layer.biases)
        products[begin:end] = products_of(rows[begin:end], its, these)
    return products


def _by_choice(products: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """[T, C, E]: the pairs' rows [P, E] in the order of the choices."""
    by_choice = torch.empty_like(products)
    by_choice[pairs.order] = products
    return by_choice.view(-1, pairs.count, products.shape[1])


Multiplied: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # rows [P, inputs] by [X, outputs, inputs]


def _one_by_one(ends: torch.Tensor) -> Multiplied:
    bounds = ends.tolist()

    def multiplied(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        products, first = rows.new_empty(len(rows), matrices.shape[1]), 0
        for matrix, last in zip(matrices, bounds, strict=True):
            if last > first:
                torch.mm(rows[first:last], matrix.t(), out=products[first:last])
            first = last
        return products

    return multiplied


def _groups(hidden: torch.Tensor) -> bool:
    """Whether torch multiplies groups of rows in one kernel here: bfloat16 from Hopper on."""
    usable = hidden.is_cuda and hidden.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    return usable and torch.cuda.get_device_capability(hidden.device) >= (9, 0)


def _grouped(ends: torch.Tensor) -> Multiplied:
    ends = ends.to(torch.int32)
    return lambda rows, matrices: F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)
