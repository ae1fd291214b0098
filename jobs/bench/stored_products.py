"""Products of few rows with dense weights as they are stored, beside decoding them and torch's product, on one GPU:

    python jobs/bench/stored_products.py [--only int4] [--sweep] [--workers 14]

Prints a JSON line a form and shape: milliseconds by rows of the kernel (`stored`), of decoding and torch's product (`decoded`),
of torch's product alone (`torch`), and of the kernel of fixed order (`ordered`), each behind a write of 256 MiB, so that
nothing is left in a cache. `numbers`: of weights a second, by the kernel; `other_bits`: numbers of rows with which some are not
those of torch's product of most rows, which is not split, as in a run. --sweep: the kernel in tiles of 16 to 128 columns, 64
and 128 inputs, 4 and 8 warps, 2 to 4 stages, the fastest first; so many processes compile it before.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from noria import encodings, kinds
from noria.blocks import Parameter
from noria.kernels import products, products_stored
from noria.kernels.products import ProductTile
from noria.kernels.stored import StoredMatrices
from noria.launch import few_rows
from noria.launch.exact import products_in_one_order
from noria.pieces import Matrix

FORMS: dict[str, dict[str, Any]] = {"int4": {}, "fp8_block": {}, "mxfp4": {}}
SHAPES = [((8192,), 8192), ((28672, 28672), 8192), ((8192,), 28672)]  # outputs of each part, inputs
ROWS, SWEPT_ROWS = (1, 16, 64, 128, 256), (1, 64, 256)
TILES = [
    ProductTile(64, columns, depth, warps, stages)
    for columns in (16, 32, 64, 128)
    for depth in (64, 128)
    for warps in (4, 8)
    for stages in (2, 3, 4)
    if columns >= 64 or (warps == 4 and depth * columns >= 2048)
]
FLUSHED = 1 << 28  # bytes


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


def milliseconds(function: Callable[[], object], flushed: torch.Tensor, repeats: int = 9) -> float:
    """Of the device, the median, with nothing in its cache."""
    found = []
    for _ in range(repeats + 2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(300_000)
        flushed.zero_()
        before.record()
        function()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after))
    return round(sorted(found[2:])[repeats // 2], 4)


def weight_of(encoding: str, parts: tuple[int, ...], inputs: int) -> Parameter:
    settings = kinds.load("encodings", encoding).DEFAULTS | FORMS[encoding]
    matrices = [Matrix("", (outputs, inputs)) for outputs in parts]
    piece = encodings.capacity(encoding, matrices, "bfloat16", settings)
    return Parameter("weight", (sum(parts), inputs), "bfloat16", encoding, 1, piece, settings=settings)


def measure(encoding: str, parts: tuple[int, ...], inputs: int, flushed: torch.Tensor) -> tuple[StoredMatrices, Any]:
    """Says the line of a weight; returns it as it is stored, and its products of most rows."""
    weight, device = weight_of(encoding, parts, inputs), flushed.device
    pieces, numbers = (
        few_rows.random_pieces(weight, device),
        torch.empty(weight.shape, dtype=torch.bfloat16, device=device),
    )
    stored = encodings.in_tiles(weight, pieces, "weight")
    assert stored is not None
    encodings.decode(weight, pieces, {"weight": numbers})
    hidden = torch.randn(max(ROWS), inputs, device=device).bfloat16()
    expected = F.linear(hidden, numbers)

    def decode_and_multiply(rows: int) -> torch.Tensor:
        encodings.decode(weight, pieces, {"weight": numbers})
        return F.linear(hidden[:rows], numbers)

    ways: dict[str, Callable[[int], torch.Tensor]] = {
        "stored": lambda rows: products_stored.product(hidden[:rows], stored),
        "decoded": decode_and_multiply,
        "torch": lambda rows: F.linear(hidden[:rows], numbers),
        "ordered": lambda rows: products.product(hidden[:rows], numbers),
    }
    found: dict[str, dict[int, float]] = {
        name: {rows: milliseconds(lambda way=way, rows=rows: way(rows), flushed) for rows in ROWS}
        for name, way in ways.items()
    }
    other = [rows for rows in ROWS if not torch.equal(ways["stored"](rows), expected[:rows])]
    rate = {rows: f"{weight.numbers / took / 1e9:.3g}e12" for rows, took in found["stored"].items()}
    say(encoding=encoding, outputs=parts, inputs=inputs, **found, numbers=rate, other_bits=other)
    return stored, (hidden, expected)


def sweep(encoding: str, stored: StoredMatrices, its: Any, flushed: torch.Tensor) -> None:
    """Says of each number of rows how long each tile takes, the fastest first."""
    hidden, expected = its
    for rows in SWEPT_ROWS:
        found, wrong = {}, []
        for tile in TILES:
            name = f"{tile.columns} {tile.block} {tile.warps} {tile.stages}"
            try:
                same = torch.equal(products_stored.product(hidden[:rows], stored, None, tile), expected[:rows])
            except Exception as error:  # noqa: BLE001 -- a tile that does not fit on this device
                wrong.append(f"{name}: {type(error).__name__}")
                continue
            wrong += [] if same else [f"{name}: other bits"]
            found[name] = milliseconds(
                lambda tile=tile, rows=rows: products_stored.product(hidden[:rows], stored, None, tile), flushed, 5
            )
        best = dict(sorted(found.items(), key=lambda one: one[1]))
        say(encoding=encoding, shape=stored.shape[1:], rows=rows, columns_depth_warps_stages=best, wrong=wrong)


def swept(only: str | None) -> Iterator[tuple[str, tuple[int, ...], int, ProductTile]]:
    for encoding in FORMS:
        for parts, inputs in SHAPES if only in (None, encoding) else ():
            for tile in TILES:
                yield encoding, parts, inputs, tile


def build(only: str | None, number: int, workers: int) -> None:
    """Compiles every so-manieth kernel of a sweep, into the folder where Triton keeps them, on one row."""
    device, made = torch.device("cuda", 0), {}
    for place, (encoding, parts, inputs, tile) in enumerate(swept(only)):
        if place % workers != number:
            continue
        key = encoding, parts, inputs
        if key not in made:
            made.clear()
            weight = weight_of(*key)
            pieces = torch.zeros(1, weight.piece.nbytes, dtype=torch.uint8, device=device)
            made[key] = encodings.in_tiles(weight, pieces, "weight")
        try:
            products_stored.product(torch.zeros(1, inputs, dtype=torch.bfloat16, device=device), made[key], None, tile)
        except Exception:  # noqa: BLE001 -- the sweep says so
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(FORMS), help="one form")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 2, 1))
    parser.add_argument("--build", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build is not None:
        build(given.only, given.build, given.workers)
        return
    builders = []
    if given.sweep:
        command = [sys.executable, *sys.argv, "--workers", str(given.workers), "--build"]
        builders = [subprocess.Popen([*command, str(number)]) for number in range(given.workers)]
    for builder in builders:
        builder.wait()
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    say(bench="stored products", device=torch.cuda.get_device_name(), torch=torch.__version__)
    for encoding in FORMS:
        for parts, inputs in SHAPES if given.only in (None, encoding) else ():
            with products_in_one_order(torch.bfloat16):
                stored, its = measure(encoding, parts, inputs, flushed)
            if given.sweep:
                sweep(encoding, stored, its, flushed)


if __name__ == "__main__":
    main()
