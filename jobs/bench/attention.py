"""The attention kernel over work items beside a copy's rate, a product's rate and torch's flash kernel, on one GPU:

    python jobs/bench/attention.py [--dtype bfloat16] [--cache int8] [--only decode] [--sweep [--compile 0/8]]

Prints a JSON line a case. 32 query heads, 8 key heads, head dim 128. `share`: of the time that the case takes at least,
its keys at the copy's rate or its products at that of 8192 x 8192 x 8192, whichever is longer; both rates are measured
first. Kernels are timed behind one that sleeps, so that the host's launches cost nothing, as in a captured graph.
--cache: keys and values in fewer bits, decoded by the kernel; `before_ms`: where whole pages are decoded before.
--sweep tries warps, stages, tiles, orders of programs and splits; eight processes with --compile fill Triton's cache
before.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from noria.arrays import ENCODINGS
from noria.attention import items as kind
from noria.engine.rounding import RoundedArray, RoundedAttention
from noria.kernels import attend, lists
from noria.kernels.attend import Tuned, Tuning
from noria.kernels.coded import zeros
from noria.kernels.scoring import HeadShape, Scoring
from noria.kernels.work import KEY_BLOCK, LEAST_TILE, NONE, SECTION, WIDE_TILE, Packing, RaggedRows
from noria.step import PAGE_TOKENS

HEADS, KEY_HEADS, DIM = 32, 8, 128
KEY_NBYTES = KEY_HEADS * DIM * 2 * 2  # a key and its value
SCALE = DIM**-0.5
SHAPE = HeadShape(HEADS, KEY_HEADS, DIM, DIM)


@dataclass(frozen=True)
class Case:
    """Rows of a step, the cache that they lie in, what they read at least and what they compute."""

    name: str
    rows: RaggedRows
    cache_rows: int
    nbytes: int
    flops: float

    @property
    def many_queries(self) -> bool:
        return int(self.rows.counts.max()) > 1


def device() -> torch.device:
    return torch.device("cuda", 0)


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


def timed(function: Callable[[], object], repeats: int = 9, warm_up: int = 2) -> float:
    """Milliseconds of the device, the median."""
    for _ in range(warm_up):
        function()
    found = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # a millisecond, in which the host launches what is timed
        before.record()
        function()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after))
    return sorted(found)[repeats // 2]


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """TB/s of a copy, read and written bytes counted, and TFLOP/s of a product."""
    source = torch.empty(1 << 31, device=device(), dtype=torch.int32).random_()
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e9
    square = torch.randn(8192, 8192, device=device(), dtype=dtype)
    return copy, 2 * 8192**3 / timed(lambda: square @ square) / 1e9


def alike(rows: int, count: int, length: int) -> Case:
    """Rows of one length, of which the last `count` tokens are new, in one run each."""
    room = (length // KEY_BLOCK + 2) * KEY_BLOCK
    every, none = np.full(rows, 1), np.zeros(0, np.int64)
    starts = np.arange(rows) * room
    its = RaggedRows(
        every * count, every * length, np.arange(rows + 1), starts, starts * 0, every * room, every * NONE, none, none
    )
    seen = rows * (count * (length - count) + count * (count + 1) / 2)
    name = f"{rows} chunks of {count} behind {length - count}"
    if count in (1, length):
        name = f"{'decode' if count == 1 else 'prefill'} {rows} x {length}"
    return Case(name, its, rows * room, rows * length * KEY_NBYTES, seen * HEADS * DIM * 4)


def shared(rows: int, families: int, beginning: int, own: int) -> Case:
    """Decoding rows that begin alike, family by family; whole blocks of the beginning are shared."""
    whole, room = beginning // KEY_BLOCK * KEY_BLOCK, (own // KEY_BLOCK + 2) * KEY_BLOCK
    own += beginning - whole
    every, family = np.full(rows, 1), np.arange(rows) // (rows // families)
    starts = np.stack([family * whole, families * whole + np.arange(rows) * room], axis=1).ravel()
    positions, held = np.tile([0, whole], rows), np.tile([whole, room], rows)
    prefixes = np.full(families, whole), np.full(families, NONE)
    its = RaggedRows(every, every * (whole + own), np.arange(rows + 1) * 2, starts, positions, held, family, *prefixes)
    name = f"decode {rows} behind {families} beginnings of {whole}, {own} own"
    nbytes = (families * whole + rows * own) * KEY_NBYTES
    return Case(name, its, families * whole + rows * room, nbytes, rows * (whole + own) * HEADS * DIM * 4)


def cases() -> list[Case]:
    decode = [(1024, 1, 576), (512, 1, 232), (16, 1, 576), (4, 1, 32768), (64, 1, 4096)]
    chunks = [(8, 2048, 2048), (2, 8192, 8192), (80, 200, 2200)]
    return [alike(*case) for case in decode + chunks] + [shared(512, families, 2000, 232) for families in (1, 8, 64)]


def tensors(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = int(case.rows.counts.sum()), HEADS, DIM
    cache = case.cache_rows, KEY_HEADS, DIM
    return tuple(torch.empty(size, device=device(), dtype=dtype).normal_() for size in (sizes, cache, cache))


def rounded(case: Case, cache: str, plain: Sequence[torch.Tensor]) -> list[RoundedArray]:
    """Keys and values in fewer bits."""
    entry, found = attend.arrays(SHAPE, ENCODINGS[cache]), []
    for array, numbers in zip(entry, plain, strict=True):
        found.append(RoundedArray(array, zeros(array, case.cache_rows, device()).fields))
        for first in range(0, case.cache_rows, 1 << 16):
            part = numbers[first : first + (1 << 16)]
            found[-1].write(torch.arange(first, first + len(part), device=device()), part)
    return found


def before(case: Case, dtype: torch.dtype, queries: torch.Tensor, *coded: RoundedArray) -> float:
    """Milliseconds where pages are decoded into a buffer of 512 MiB, as runs have it, and attended to there."""
    over = RoundedAttention(kind, 2**29 // (PAGE_TOKENS * KEY_NBYTES), KEY_NBYTES, dtype, device())
    plan = over.of_rows(case.rows, device())
    return timed(lambda: over.attention(plan, queries, coded[0], coded[1], Scoring(SCALE)))


def flash(case: Case, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float | None:
    """Milliseconds of torch's kernel, which reads one run a row."""
    rows = case.rows
    if len(rows.run_rows) > len(rows.counts):
        return None
    starts, firsts, lengths = (
        torch.from_numpy(array.astype(np.int32)).to(device())
        for array in (np.append(0, np.cumsum(rows.counts)), np.append(rows.run_rows, 0), rows.lengths)
    )
    most, longest = int(rows.counts.max()), int(rows.lengths.max())
    given = queries, keys, values, starts, firsts, most, longest, 0.0, case.many_queries, False
    named = {"scale": SCALE, "window_size_left": -1, "window_size_right": -1, "seqused_k": lengths}
    return timed(lambda: torch.ops.aten._flash_attention_forward(*given, **named))


def items(case: Case, its_packing: Packing, tuned: Tuned | None, *given: Any) -> Callable[[], torch.Tensor]:
    on_device = attend.to_device(lists.make(case.rows, its_packing), device())
    queries, keys, values = given
    return lambda: attend.attend(on_device, queries, keys, values, Scoring(SCALE), tuned)


def variants(case: Case) -> Iterator[tuple[int, int, Tuning, Tuning]]:
    """(widest tile, programs, tuning of the least tile, tuning of wide ones) worth trying."""
    least, wide = Tuning(4, 3, True, True), Tuning(8, 3, False, False)
    if case.many_queries:
        for stages, one_loop, heads_first in itertools.product((2, 3), (False, True), (False, True)):
            yield LEAST_TILE, 264, Tuning(4, stages, one_loop, heads_first), wide
        for stages, heads_first in itertools.product((2, 3, 4), (False, True)):
            yield WIDE_TILE, 264, least, Tuning(8, stages, False, heads_first)
        return
    tiles = (LEAST_TILE, WIDE_TILE) if len(case.rows.shared) else (LEAST_TILE,)
    splits = (1, 264, 1 << 20) if int(case.rows.lengths.max()) > SECTION else (264,)
    for stages, one_loop, widest, programs in itertools.product((2, 3, 4), (False, True), tiles, splits):
        yield widest, programs, Tuning(4, stages, one_loop, True), wide
    yield tiles[0], splits[-1], Tuning(8, 3, False, True), wide


def sweep(case: Case, least_ms: float, given: tuple[Any, ...], part: tuple[int, int] | None) -> None:
    """All variants; or one part of them once, to have them compiled."""
    for number, (widest, programs, least, wide) in enumerate(variants(case)):
        its_packing = Packing(HEADS // KEY_HEADS, KEY_HEADS, programs, widest=widest)
        call = items(case, its_packing, lambda launch, _, of=(least, wide): of[launch.tile > LEAST_TILE], *given)
        if part is None:
            ms, what = (
                timed(call, 5, 1),
                {"widest": widest, "programs": programs, "least": str(least), "wide": str(wide)},
            )
            say(case=case.name, ms=round(ms, 4), share=round(least_ms / ms, 3), **what)
        elif number % part[1] == part[0]:
            call()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    arguments.add_argument("--cache", choices=sorted(ENCODINGS), help="how keys and values are kept")
    arguments.add_argument("--only", default="", help="cases whose name has this in it")
    arguments.add_argument("--sweep", action="store_true")
    arguments.add_argument("--compile", metavar="I/N", help="with --sweep: run this part of the variants once each")
    given = arguments.parse_args()
    dtype = getattr(torch, given.dtype)
    part = tuple(map(int, given.compile.split("/"))) if given.compile else None
    copy, product = rates(dtype) if part is None else (1.0, 1.0)
    say(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        copy_tbs=round(copy, 2),
        product_tflops=round(product, 1),
    )
    for case in cases():
        if given.only not in case.name:
            continue
        kept = (
            sum(array.nbytes(given.dtype) for array in attend.arrays(SHAPE, ENCODINGS[given.cache]))
            if given.cache
            else 0
        )
        at_least = {
            "copy": case.nbytes * (kept or KEY_NBYTES) / KEY_NBYTES / copy / 1e9,
            "product": case.flops / product / 1e9,
        }
        by = max(at_least, key=at_least.__getitem__)
        its: tuple[Any, ...] = tensors(case, dtype)
        if given.cache:
            its = its[0], *rounded(case, given.cache, its[1:])
        if given.sweep:
            sweep(case, at_least[by], its, part)
        else:
            its_packing = attend.packing(device(), SHAPE)
            ms = timed(items(case, its_packing, None, *its))
            if given.cache:
                before_ms = before(case, dtype, *its)
                say(
                    case=case.name,
                    cache=given.cache,
                    ms=round(ms, 4),
                    share=round(at_least[by] / ms, 3),
                    of=by,
                    before_ms=round(before_ms, 4),
                )
                continue
            flash_ms = flash(case, *its)
            against = {"flash_ms": round(flash_ms, 4), "times_flash": round(flash_ms / ms, 2)} if flash_ms else {}
            say(case=case.name, ms=round(ms, 4), share=round(at_least[by] / ms, 3), of=by, **against)


if __name__ == "__main__":
    main()
