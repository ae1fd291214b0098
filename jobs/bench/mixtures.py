"""How long a mixture's layer takes on one GPU, by tiles, beside its bound and beside torch's grouped products:

    python jobs/bench/mixtures.py [--shape 128 2048 768 8] [--tokens 16 512 16384] [--dtype bfloat16] [--sweep]

shape: experts, hidden, intermediate, experts of a token. Prints a JSON line a number of tokens: milliseconds of the layer with
and without its router and choice, captured in a CUDA graph; of its parts; of the grouped products as the run would launch them;
the bound, which is the larger of two: bytes of the chosen experts by the rate of a copy, products by the rate of one of 8192^3,
both measured first; and whether the first rows have the bits that they have among most tokens. --sweep: beside it, the
fastest blocks of each product for tiles of each size.
"""

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from functools import partial

import torch

from noria.kernels import mix
from noria.kernels.expert_layer import ExpertLayer
from noria.kernels.shared_memory import shared_memory
from noria.models import _experts, _routing, _tiles

REPEATS = 15
WAIT = 2_000_000  # cycles, about a millisecond, in which the host launches what is timed
TILES = [its.tile for its in mix.TILINGS]
BLOCKS = [mix.Blocks(*its) for its in itertools.product((32, 64, 128, 256), (64, 128), (4, 8), (3, 4))]


def milliseconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Of the device, the median."""
    function()
    found = []
    for _ in range(repeats):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT)
        before.record()
        function()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after))
    return sorted(found)[repeats // 2]


def captured(function: Callable[[], object]) -> Callable[[], object]:
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes and operations a millisecond."""
    source, square = torch.ones(1 << 30, dtype=dtype, device="cuda"), torch.ones(8192, 8192, dtype=dtype, device="cuda")
    square.normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)), 2 * 8192**3 / milliseconds(
        lambda: square @ square
    )


class Layer:
    """Random experts, and rows for them."""

    def __init__(self, shape: list[int], most: int, dtype: torch.dtype):
        self.number, self.hidden, self.inner, count = shape
        normal = lambda *size, std: torch.empty(*size, dtype=dtype, device="cuda").normal_(std=std)  # noqa: E731
        pieces = normal(self.number, 3 * self.inner, self.hidden, std=0.02)
        self.layer = ExpertLayer(pieces[:, : 2 * self.inner], pieces[:, 2 * self.inner :].transpose(1, 2))
        self.rows, self.router = normal(most, self.hidden, std=1.0), normal(self.number, self.hidden, std=0.02)
        self.routing = _routing.Routing(count, "softmax", normalized=True)

    def choose(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = self.rows[:tokens]
        return rows, *_routing.choose(self.routing, _routing.scores_of(rows, self.router))

    def nbytes(self, chosen: torch.Tensor) -> int:
        return len(chosen.unique()) * 3 * self.inner * self.hidden * self.rows.itemsize

    def operations(self, pairs: int) -> int:
        return 2 * pairs * 3 * self.inner * self.hidden


def parts(its: Layer, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> dict[str, float]:
    """Milliseconds of sorting, of both products, of the sums."""
    tiling, shared = mix.tiling(chosen.numel() / its.number), shared_memory(rows.device)
    pairs = mix.sort(chosen, its.number, tiling.tile)
    products = mix.multiply(rows, pairs, its.layer, tiling, shared).view(*chosen.shape, -1)
    timed = {
        "sort": lambda: mix.sort(chosen, its.number, tiling.tile),
        "first": lambda: mix.first(rows, pairs, its.layer, tiling, shared),
        "products": lambda: mix.multiply(rows, pairs, its.layer, tiling, shared),
        "sums": lambda: mix.summed(products, weights),
    }
    return {name: round(milliseconds(captured(function)), 4) for name, function in timed.items()}


def grouped(its: Layer, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> float:
    """Milliseconds of torch's grouped products."""
    fits = _tiles.fits
    _tiles.fits = lambda rows, layer: False
    try:
        return milliseconds(lambda: _experts.mixture(rows, chosen, weights, its.layer.gate_up, its.layer.down))
    finally:
        _tiles.fits = fits


def candidates(tile: int, matrices: int, itemsize: int, shared: int) -> list[mix.Blocks]:
    """Blocks whose sums and rows find room in registers and shared memory."""
    numbers = [(tile * its.columns * matrices / (32 * its.warps), its) for its in BLOCKS]
    return [its for most, its in numbers if most <= 128 and its == its.fitting(tile, matrices, itemsize, shared)]


def compiled(shape: list[int], dtype: torch.dtype, tile: int, blocks: mix.Blocks) -> None:
    """Compiles both products of such blocks into Triton's cache."""
    its = Layer([1, *shape[1:3], 1], 1, dtype)
    pairs, tiling = (
        mix.sort(torch.zeros(1, 1, dtype=torch.int64, device="cuda"), 1, tile),
        mix.Tiling(tile, blocks, blocks),
    )
    for matrices, product, given in ((2, mix.first, its.rows), (1, mix.second, its.rows.new_zeros(1, its.inner))):
        if blocks in candidates(tile, matrices, its.rows.itemsize, shared_memory(its.rows.device)):
            product(given, pairs, its.layer, tiling, shared_memory(its.rows.device))


def compile_all(shape: list[int], dtype: torch.dtype) -> None:
    """What a sweep tries, on all cores."""
    workers = min(os.cpu_count() or 1, 14)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(compiled, shape, dtype, *one) for one in itertools.product(TILES, BLOCKS)]:
            future.result()


def sweep(its: Layer, rows: torch.Tensor, chosen: torch.Tensor) -> dict[str, list[object]]:
    """For tiles of each size and for each product, milliseconds of the three fastest blocks, and these."""
    found: dict[str, list[object]] = {}
    shared = shared_memory(rows.device)
    for tile in TILES:
        pairs = mix.sort(chosen, its.number, tile)
        inner = rows.new_zeros(chosen.numel(), its.inner)
        for name, matrices, product, given in (("first", 2, mix.first, rows), ("second", 1, mix.second, inner)):
            times = []
            for blocks in candidates(tile, matrices, rows.itemsize, shared):
                run = partial(product, given, pairs, its.layer, mix.Tiling(tile, blocks, blocks), shared)
                times.append((round(milliseconds(run, 3), 4), *astuple(blocks)))
            found[f"{name} {tile}"] = [" ".join(map(str, its)) for its in sorted(times)[:3]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=[128, 2048, 768, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 512, 16384])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    copied, multiplied = rates(getattr(torch, arguments.dtype))
    if arguments.sweep:
        compile_all(arguments.shape, getattr(torch, arguments.dtype))
    its = Layer(arguments.shape, max(arguments.tokens), getattr(torch, arguments.dtype))
    _, all_chosen, all_weights = its.choose(max(arguments.tokens))
    whole = mix.mix(its.rows, all_chosen, all_weights, its.layer)
    for tokens in arguments.tokens:
        rows, chosen, weights = its.rows[:tokens], all_chosen[:tokens], all_weights[:tokens]
        alone = captured(lambda rows=rows, chosen=chosen, weights=weights: mix.mix(rows, chosen, weights, its.layer))
        routed = captured(lambda tokens=tokens: mix.mix(*its.choose(tokens), its.layer))
        same = torch.equal(mix.mix(rows, chosen, weights, its.layer), whole[:tokens])
        bound = max(its.nbytes(chosen) / copied, its.operations(chosen.numel()) / multiplied)
        line = {"routed_ms": round(milliseconds(routed), 4), "layer_ms": round(milliseconds(alone), 4)}
        line |= {"grouped_ms": round(grouped(its, rows, chosen, weights), 4), "bound_ms": round(bound, 4)}
        line |= {"share": round(bound / line["layer_ms"], 3), "same_bits": same, **parts(its, rows, chosen, weights)}
        if arguments.sweep:
            line["sweep"] = sweep(its, rows, chosen)
        print(json.dumps({"bench": "mixtures", "shape": arguments.shape, "tokens": tokens, **line}), flush=True)


if __name__ == "__main__":
    main()
