"""Mixtures by tiles of sorted pairs (kernels/): where these kernels can be built and are right. Knows no family.

X experts, E hidden, I intermediate, C choices a token.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from noria import kinds
from noria.kernels.expert_layer import ExpertLayer
from noria.kernels.stored import StoredMatrices, TileForm, random
from noria.kernels.trying import tried
from noria.limits import STORED_PAIRS

DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)  # Ampere
LARGEST = 1 << 31  # numbers of an expert's matrix: places in it are of 32 bits
LARGEST_ERROR = 0.1  # of numbers of about 1 in half precisions: more is no rounding


def fits(rows: torch.Tensor, layer: ExpertLayer[Any]) -> bool:
    """Whether this mixture of rows [T, E] is computed by tiles; matrices that are decoded a few at a time are of its dtype."""
    if not rows.is_cuda or refuses(rows.device, rows.dtype):
        return False
    its = layer.gate_up
    return not isinstance(its, torch.Tensor) or (its.dtype == rows.dtype and its.shape[1] * its.shape[2] < LARGEST)


def mix(
    rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor | None, layer: ExpertLayer[Any]
) -> torch.Tensor:
    """[T, E]: each token's sum over its experts `chosen` [T, C] in their order, times its weights [T, C] if given.

    rows: [T, E], or of each pair of token and expert [T * C, E].
    """
    mixed: torch.Tensor = _kernel().mix(rows.contiguous(), chosen, weights, layer)
    return mixed


def choose(
    scores: torch.Tensor,
    correction: torch.Tensor | None,
    count: int,
    squashes: tuple[str, str],
    least: float | None,
    scaling: float,
    groups: tuple[int, int, int] = (1, 1, 1),
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` experts of each token [T, C] and their weights [T, C], of its scores [T, X] (kernels/routing.py)."""
    found: tuple[torch.Tensor, torch.Tensor] = kinds.load("kernels", "routing").choose(
        scores, correction, count, squashes, least, scaling, groups
    )
    return found


@lru_cache
def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why mixtures are not computed by tiles here; empty where they are."""
    if device.type != "cuda":
        return f"they need a CUDA device, this is the {device.type.upper()}"
    if dtype not in DTYPES:
        return f"they compute float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return _tried(device, lambda: _largest_error(device, dtype))


def stored(rows: torch.Tensor, chosen: torch.Tensor, layer: ExpertLayer[Any]) -> ExpertLayer[StoredMatrices] | None:
    """The layer with its matrices as they are stored, where this mixture is computed so."""
    if chosen.numel() > STORED_PAIRS * len(layer.gate_up):
        return None
    gate_up, down = layer.gate_up.stored, layer.down.stored
    if gate_up is None or down is None or not _halves(gate_up, layer.gate.alternating) or len(down.parts) > 1:
        return None
    if any(refuses_stored(rows.device, rows.dtype, *its.kind) for its in (gate_up, down)):
        return None
    return ExpertLayer(gate_up, down, layer.gate, layer.biases)


def _halves(gate_up: StoredMatrices, alternating: bool) -> bool:
    """Whether gates and ups are one matrix, or one each."""
    outputs = [part.codes.shape[1] for part in gate_up.parts]
    return len(outputs) == 1 or (len(outputs) == 2 and outputs[0] == outputs[1] and not alternating)


@lru_cache
def refuses_stored(device: torch.device, dtype: torch.dtype, form: TileForm, of_scales: torch.dtype) -> str:
    """Why experts in this form, with scales of this dtype, are not multiplied as they are stored here; empty where they are:
    then they give the bits of those decoded before."""

    def trial() -> str:
        draw = torch.Generator().manual_seed(0)
        gate_up, down = (random(form, of_scales, shape, draw, device) for shape in ((2, 144, 200), (2, 200, 72)))
        rows, chosen = (
            torch.randn(70, 200, generator=draw).to(device, dtype),
            torch.arange(140, device=device).view(70, 2) % 2,
        )
        weights = torch.rand(70, 2, generator=draw).to(device)
        decoded = ExpertLayer(gate_up.plain(dtype), down.plain(dtype))
        found, expected = (mix(rows, chosen, weights, its) for its in (ExpertLayer(gate_up, down), decoded))
        return "" if torch.equal(found, expected) else "they give other bits"

    return tried(trial, "they")


@lru_cache
def chooses(device: torch.device) -> bool:
    """Whether a kernel chooses experts here."""
    return device.type == "cuda" and not _tried(device, lambda: _error_of_choices(device))


def _tried(device: torch.device, error: Callable[[], float]) -> str:
    """Why kernels cannot be built or are wrong, which is tried by what tells their error; empty where they are right."""
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "they need a GPU of compute capability 8.0"
    return tried(lambda: "" if error() < LARGEST_ERROR else "they give other results than torch", "they")


def build(rows: torch.Tensor, chosen: torch.Tensor, layer: ExpertLayer[Any], number: int) -> None:
    """Compiles what a layer of such matrices may launch, for any rows and choices: give few of each, and of experts."""
    for pairs in (1, _kernel().FEW_PAIRS + 1):
        _kernel().sort(chosen.new_zeros(pairs, 1), number, pairs)
    layers, tilings = [layer], _kernel().TILINGS
    if not isinstance(layer.gate_up, torch.Tensor):  # some at a time, all that were asked for, and as they are stored
        every = range(len(layer.gate_up))
        layers.append(ExpertLayer(layer.gate_up.of(every), layer.down.of(every), layer.gate, layer.biases))
        its = stored(rows, chosen, layer)
        if its is not None:
            mix(rows, chosen, chosen.to(torch.float32), its)
            tilings = tilings[-1:]  # others are for as few pairs as these
    for one, its in product(layers, tilings):
        _kernel().mix(rows, chosen, chosen.to(torch.float32), one, lambda _, its=its: its)


def _largest_error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference to dense products in float32, of a few tokens that go to all experts."""
    draw = torch.Generator().manual_seed(0)
    rows, gate_up, down = (
        torch.randn(*size, generator=draw).to(device, dtype) for size in ((3, 64), (2, 64, 64), (2, 64, 32))
    )
    layer, weights = ExpertLayer(gate_up * 0.125, down * 0.125), rows[:, :2].float().softmax(dim=-1)
    found = mix(rows, torch.arange(2, device=device).repeat(3, 1), weights, layer)
    gate, up = torch.einsum("te,xie->xti", rows.float(), layer.gate_up.float()).chunk(2, dim=-1)
    exact = torch.einsum("tx,xti,xei->te", weights, F.silu(gate) * up, layer.down.float())
    return float((found - exact).abs().max())


def _error_of_choices(device: torch.device) -> float:
    """The largest difference of weights to those that torch gives; 1 where experts differ."""
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(device)
    (chosen, weights), best = choose(scores, None, 2, ("", "softmax"), None, 1.0), scores.topk(2)
    same = torch.equal(chosen, best.indices)
    return float((weights - best.values.softmax(dim=-1)).abs().max()) if same else 1.0


@lru_cache
def _kernel() -> ModuleType:
    """What launches the kernels: it needs triton, which is there where there is a GPU."""
    return kinds.load("kernels", "mix")
