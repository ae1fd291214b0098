"""Launches the kernels of a mixture's layer: what is compiled, how pairs are cut into tiles, where results lie.

T tokens, C choices a token, P = T * C pairs of token and expert, X experts, E hidden, I intermediate.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
import triton

from noria.kernels import experts, stored_experts
from noria.kernels.expert_layer import GELU_TANH, ExpertLayer
from noria.kernels.shared_memory import shared_memory
from noria.kernels.stored import StoredMatrices, StoredPart, TileForm

PAIRS_AT_ONCE = 4096  # that a program looks through for those of its expert
FEW_PAIRS, SECTIONS = 4 * PAIRS_AT_ONCE, 16  # more than so many pairs are sorted in sections
NUMBERS_AT_ONCE = 1024  # of a token's sum


@dataclass(frozen=True)
class Blocks:
    """How a product is compiled: outputs and inputs that are multiplied at once. It changes no bit."""

    columns: int
    depth: int
    warps: int
    stages: int

    def fitting(self, tile: int, matrices: int, itemsize: int, shared: int) -> "Blocks":
        """With as many stages as so much shared memory holds of a tile's rows and of so many matrices' columns."""
        stage = (tile + matrices * self.columns) * self.depth * itemsize
        most = max(1, shared // stage)
        return self if self.stages <= most else replace(self, stages=most)


@dataclass(frozen=True)
class Tiling:
    """Pairs of a tile, and how its two products are compiled."""

    tile: int
    first: Blocks
    second: Blocks


Tiled: TypeAlias = Callable[[float], Tiling]  # of how many pairs an expert has on average
FEW = Tiling(16, Blocks(64, 128, 4, 4), Blocks(64, 128, 4, 4))
SOME = Tiling(64, Blocks(64, 64, 4, 4), Blocks(128, 64, 4, 4))
MANY = Tiling(128, Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3))
TILINGS = (FEW, SOME, MANY)
# Of stored matrices, at any number of pairs. A tile of fewer rows is not computed by Hopper's instructions, and Triton then gives
# those that are there the inputs in another order where these come from bytes: other bits.
STORED = Tiling(64, Blocks(64, 64, 4, 3), Blocks(128, 64, 4, 3))


def tiling(pairs: float) -> Tiling:
    """The fastest on an H200."""
    return FEW if pairs <= 6 else SOME if pairs <= 128 else MANY


@dataclass(frozen=True)
class Sorted:
    """Lists of the device, int32. order [P]: the pairs sorted by expert, by their places among the choices [T, C].

    tiles: their number, then of each its expert, its first pair, its pairs, and which of the experts that have pairs it is of;
    `most`: more there cannot be. named [X]: these experts, then -1; starts [X]: their first tiles.
    """

    order: torch.Tensor
    tiles: torch.Tensor
    named: torch.Tensor
    starts: torch.Tensor
    most: int


class ExpertRun(NamedTuple):
    """Experts that have pairs: `most` of them, from that at `place` on."""

    place: int
    most: int


def sort(chosen: torch.Tensor, num_experts: int, tile: int) -> Sorted:
    """The pairs of choices [T, C], sorted and cut into tiles without a wait of the host."""
    pairs = chosen.numel()
    most, sections = min(pairs, num_experts) + pairs // tile, 1 if pairs <= FEW_PAIRS else SECTIONS
    span = _blocks(pairs, sections * PAIRS_AT_ONCE) * PAIRS_AT_ONCE
    sizes = [sections * num_experts, pairs, experts.TILE_COLUMNS * (1 + most), num_experts, num_experts]
    counts, order, tiles, named, starts = torch.empty(sum(sizes), dtype=torch.int32, device=chosen.device).split(sizes)
    experts.count_pairs[(num_experts, sections)](chosen, counts, pairs, span, PAIRS_AT_ONCE, num_warps=8)
    experts.sort_pairs[(num_experts, sections)](
        chosen, counts, order, tiles, named, starts, pairs, span, tile, sections,
        max(16, triton.next_power_of_2(num_experts)), PAIRS_AT_ONCE, num_warps=8,
    )  # fmt: skip
    return Sorted(order, tiles, named, starts, most)


def mix(
    rows: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor | None,
    layer: ExpertLayer[Any],
    tiled: Tiled = tiling,
    shared: int | None = None,
) -> torch.Tensor:
    """[T, E]: each token's sum over its experts `chosen` [T, C], in the order of its choices, each times its weight [T, C].

    rows: [T, E], or [P, E], a row for each pair. Matrices that are decoded a few at a time come as objects whose `listed`
    gives those that a list of the device names: as many runs as any routing may need. shared: bytes of shared memory of a
    program; the device's if not given. Capturable: the host waits for nothing, and shapes say what is launched.
    """
    if not len(chosen):
        return rows.new_empty(0, rows.shape[1])
    its = STORED if isinstance(layer.down, StoredMatrices) else tiled(chosen.numel() / len(layer.down))
    pairs = sort(chosen.contiguous(), len(layer.down), its.tile)
    products = multiply(rows, pairs, layer, its, shared or shared_memory(rows.device))
    return summed(products.view(*chosen.shape, -1), weights)


def summed(products: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """[T, E]: the sums over choices of products [T, C, E], in their order, each times its weight [T, C]."""
    tokens, count, hidden = products.shape
    mixed = products.new_empty(tokens, hidden)
    experts.sum_choices[(tokens, _blocks(hidden, NUMBERS_AT_ONCE))](
        products, mixed if weights is None else weights.contiguous(), mixed, hidden, count, weights is not None,
        NUMBERS_AT_ONCE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return mixed


def multiply(rows: torch.Tensor, pairs: Sorted, layer: ExpertLayer[Any], its: Tiling, shared: int) -> torch.Tensor:
    """[P, E]: what each pair's expert returns, in the order of the choices."""
    if isinstance(layer.down, StoredMatrices):
        return second_of_stored(first_of_stored(rows, pairs, layer, its, shared), pairs, layer, its, shared)
    products = rows.new_empty(len(pairs.order), rows.shape[1])
    for run, these in _runs(pairs, layer):
        second(first(rows, pairs, these, its, shared, run), pairs, these, its, shared, run, products)
    return products


def _runs(pairs: Sorted, layer: ExpertLayer[Any]) -> Iterator[tuple[ExpertRun | None, ExpertLayer[torch.Tensor]]]:
    """The matrices of all experts, or of some after others."""
    if isinstance(layer.gate_up, torch.Tensor):
        yield None, layer
        return
    for place in range(0, min(len(pairs.order), len(pairs.named)), layer.gate_up.most):
        run = ExpertRun(place, layer.gate_up.most)
        named = pairs.named[place : place + run.most]
        yield run, replace(layer, gate_up=layer.gate_up.listed(named), down=layer.down.listed(named))


def first(
    rows: torch.Tensor,
    pairs: Sorted,
    layer: ExpertLayer[torch.Tensor],
    its: Tiling,
    shared: int,
    run: ExpertRun | None = None,
) -> torch.Tensor:
    """[P, I]: what the down matrices are given, in the order of the sorted pairs; those of a run's experts."""
    num_pairs, (_, hidden, size), gate = len(pairs.order), layer.down.shape, layer.gate
    inner, blocks = rows.new_empty(num_pairs, size), its.first.fitting(its.tile, 2, rows.itemsize, shared)
    experts.first_product[(_tiles(pairs, its, run) * _blocks(size, blocks.columns),)](
        rows, layer.gate_up, layer.biases[0] if layer.biases else inner, pairs.order, pairs.tiles, pairs.starts, inner,
        *(run or (0, 0)), len(pairs.named), rows.stride(0), *layer.gate_up.stride(), hidden, size, num_pairs // len(rows),
        gate.alternating, layer.biases is not None, gate.function == GELU_TANH, gate.alpha, gate.limit or 0.0, gate.shift,
        run is not None, its.tile, blocks.columns, blocks.depth, **_options(blocks),
    )  # fmt: skip
    return inner


def second(
    inner: torch.Tensor,
    pairs: Sorted,
    layer: ExpertLayer[torch.Tensor],
    its: Tiling,
    shared: int,
    run: ExpertRun | None = None,
    products: torch.Tensor | None = None,
) -> torch.Tensor:
    """[P, E] of `inner` [P, I], in the order of the choices; those of a run's experts go into `products`."""
    _, hidden, size = layer.down.shape
    products = inner.new_empty(len(inner), hidden) if products is None else products
    blocks = its.second.fitting(its.tile, 1, inner.itemsize, shared)
    experts.second_product[(_tiles(pairs, its, run) * _blocks(hidden, blocks.columns),)](
        inner, layer.down, layer.biases[1] if layer.biases else inner, pairs.order, pairs.tiles, pairs.starts, products,
        *(run or (0, 0)), len(pairs.named), *layer.down.stride(), hidden, size, layer.biases is not None,
        run is not None, its.tile, blocks.columns, blocks.depth, **_options(blocks),
    )  # fmt: skip
    return products


def first_of_stored(
    rows: torch.Tensor, pairs: Sorted, layer: ExpertLayer[StoredMatrices], its: Tiling, shared: int
) -> torch.Tensor:
    """`first`, of matrices as they are stored."""
    num_pairs, (_, hidden, size), gate, form = len(pairs.order), layer.down.shape, layer.gate, layer.gate_up.form
    inner, blocks = rows.new_empty(num_pairs, size), its.first.fitting(its.tile, 2, rows.itemsize, shared)
    gates, ups = layer.gate_up.parts[0], layer.gate_up.parts[-1]
    ahead = 0 if gates is not ups else 1 if gate.alternating else size
    stored_experts.first_stored[(pairs.most * _blocks(size, blocks.columns),)](
        rows, *_fields(gates), *_fields(ups), layer.biases[0] if layer.biases else inner, pairs.order, pairs.tiles, inner,
        rows.stride(0), *gates.steps, ahead, *_form(form, gates), hidden, size, num_pairs // len(rows), gate.alternating,
        layer.biases is not None, gate.function == GELU_TANH, gate.alpha, gate.limit or 0.0, gate.shift, its.tile,
        blocks.columns, blocks.depth, **_options(blocks),
    )  # fmt: skip
    return inner


def second_of_stored(
    inner: torch.Tensor, pairs: Sorted, layer: ExpertLayer[StoredMatrices], its: Tiling, shared: int
) -> torch.Tensor:
    """`second`, of matrices as they are stored."""
    (_, hidden, size), (downs,), form = layer.down.shape, layer.down.parts, layer.down.form
    products, blocks = inner.new_empty(len(inner), hidden), its.second.fitting(its.tile, 1, inner.itemsize, shared)
    stored_experts.second_stored[(pairs.most * _blocks(hidden, blocks.columns),)](
        inner, *_fields(downs), layer.biases[1] if layer.biases else inner, pairs.order, pairs.tiles, products, *downs.steps,
        *_form(form, downs), hidden, size, layer.biases is not None, its.tile, blocks.columns, blocks.depth,
        **_options(blocks),
    )  # fmt: skip
    return products


def _fields(part: StoredPart) -> tuple[torch.Tensor, ...]:
    return part.codes, part.scales, part.zeros, part.of_matrices


def _form(form: TileForm, part: StoredPart) -> tuple[int, ...]:
    """Bytes of a row of codes, groups of a row of scales, and what they mean."""
    return part.codes.shape[2], part.scales.shape[2], form.codes, form.scales, form.group, form.rows, form.zeroed


def _tiles(pairs: Sorted, its: Tiling, run: ExpertRun | None) -> int:
    """The most tiles that a run may have."""
    return pairs.most if run is None else min(pairs.most, run.most + len(pairs.order) // its.tile)


def _blocks(size: int, block: int) -> int:
    """As many blocks as a size has; `triton.cdiv` takes the host several microseconds."""
    return -(-size // block)


def _options(its: Blocks) -> dict[str, Any]:
    return {"num_warps": its.warps, "num_stages": its.stages, "enable_fp_fusion": False}
