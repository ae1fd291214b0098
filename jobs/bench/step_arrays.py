"""The host's part of a decode step before its first kernel, on every rank: rows as arrays beside rows one by one. On a CPU:

    python jobs/bench/step_arrays.py [--rows 1000] [--shared 0 2048]

Prints one JSON line a length of a beginning that all rows share, in ms, the least of 50 steps: the header decoded, the
step's arrays made, attention's lists made and filled up to the form of a graph; and `by_rows`, what the arrays hold made
from a Span of each row, as tests compare it.
"""

import argparse
import json
import time
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch

from noria.attention import items
from noria.attention._ragged import ragged
from noria.engine.batch import Batches, Network, cache_rows
from noria.engine.padding import Spare
from noria.kernels import forms, lists, placed
from noria.kernels.work import Packing
from noria.step import PAGE_TOKENS, Admitted, Run, Step

OWN_PAGES, SPARE_PAGE = 40, 1 << 20
PACKING = Packing(group=4, key_heads=8, programs=264)  # of Llama-8B's heads, on an H200
ROUNDS, FIRST = 60, 10


def header_of(round: int, rows: int, shared: int) -> bytes:
    """The header of a step of rows of 512 to 561 own tokens, all admitted in round 0."""
    beginning = (Run(1 << 16, shared // PAGE_TOKENS),) * bool(shared)
    admitted = [Admitted(row, (*beginning, Run(OWN_PAGES * row, OWN_PAGES)), {}) for row in range(rows)]
    every = np.arange(rows, dtype=np.int32)
    return Step(
        round,
        0,
        admitted=tuple(admitted) if round == 0 else (),
        slots=every,
        counts=np.ones_like(every),
        positions=shared + 512 + round + every % 50,
        token_ids=every,
        borders=np.array([0, rows], np.int32),
        sample_rows=every,
        sample_slots=every,
        uniforms=np.zeros(rows),
    ).encode()


def measure(rows: int, shared: int) -> dict[str, float]:
    """Milliseconds, the least of all steps but the first."""
    network = Network(SimpleNamespace(positional=lambda *_: None), items, SimpleNamespace(rings={}))
    batches = Batches(network, torch.bfloat16, torch.device("cpu"), spare=Spare(SPARE_PAGE, 0, 2 * rows))
    took, form = defaultdict(list), None
    for number in range(ROUNDS):
        header, began = header_of(number, rows, shared), time.perf_counter()

        def lap(name: str) -> None:
            nonlocal began
            took[name].append(1e3 * (time.perf_counter() - began))
            began = time.perf_counter()

        step = Step.decode(header)
        lap("header")
        batch = batches.make(step, step.borders.tolist(), (np.empty(0, np.int64), step.sample_rows, step.score_rows))
        lap("arrays")
        work = lists.make(batch.padded.plans[0].rows, PACKING)
        lap("lists")
        form = forms.joined(form, work)
        placed.packed(forms.padded(work, form))
        lap("form")
        spans = batches._pages.spans(step, 0, rows)
        cache_rows(spans), ragged(spans)
        lap("by_rows")
    return {name: round(min(its[FIRST:]), 3) for name, its in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--shared", type=int, nargs="+", default=[0, 2048])
    arguments = parser.parse_args()
    for shared in arguments.shared:
        its = {"rows": arguments.rows, "shared_tokens": shared, **measure(arguments.rows, shared)}
        print(json.dumps({"bench": "step_arrays", **its}), flush=True)


if __name__ == "__main__":
    main()
