"""Shared beginnings and reservations that follow the run, on one GPU: a Llama-8B shape with random weights.

    python jobs/bench/prefixes.py [--case shared eight limit limit-24] [--prompts 512] [--shape shape.json] [-- flags of a run]

Cases: `shared`: 512 prompts of 2,000 shared and 200 own tokens, 64 generated; `eight`: the same with 8 beginnings of 64 prompts,
shuffled; `limit`: 2,048 prompts of 128 tokens, a limit of 4,096, ends at 300 on average by V / 300 random stop_token_ids;
`limit-24`: the same with --gpu-memory 24GiB. Each runs as it is and then beside itself: without sharing (--no-prefix-sharing), or
with reservations of the limit. Prints one JSON line a run; the second of a pair says how many times as fast the first was.
rows_in_flight: the median of the steps composed while other rows wait, without the first quarter of these. Starts noria itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from resident import LLAMA_8B, write_inputs

CASES = ("shared", "eight", "limit", "limit-24")
SHARED, OWN, GENERATED = 2000, 200, 64
PROMPT, LIMIT, ENDS_AT, NUM_ROWS = 128, 4096, 300, 2048
# What the run of the second kind does before it begins: no number of ended rows is enough to judge others by.
AT_LIMIT = "import noria.rows.reservations as r; r.ENOUGH = 1 << 62; "
# What each of a bench's runs does: it keeps how many rows are in flight at each step composed while others wait.
WATCH = """
import atexit, json, noria.rows.admission as watched
counts, plain = [], watched.Admission.compose
def compose(self, *place):
    if self._queue.first() is not None:
        counts.append(self.num_active)
    return plain(self, *place)
watched.Admission.compose = compose
atexit.register(lambda: open({path!r}, "w").write(json.dumps(counts)))
"""
START = "import sys; from noria.__main__ import main; sys.exit(main(sys.argv[1:]))"


def beginnings(num_prompts: int, count: int, vocab_size: int) -> Iterator[dict]:
    """Prompts with one of so many beginnings each, shuffled."""
    random = np.random.default_rng(1)
    shared = random.integers(10, vocab_size, (count, SHARED))
    for which in random.permutation(np.arange(num_prompts) % count):
        yield {"token_ids": [*shared[which].tolist(), *random.integers(10, vocab_size, OWN).tolist()]}


def ending(num_prompts: int, vocab_size: int) -> Iterator[dict]:
    """Prompts of random ids, which end at ENDS_AT tokens on average where any id is as likely as another."""
    random = np.random.default_rng(2)
    stops = random.choice(vocab_size, vocab_size // ENDS_AT, replace=False).tolist()
    for _ in range(num_prompts):
        yield {"token_ids": random.integers(10, vocab_size, PROMPT).tolist(), "stop_token_ids": stops}


def run(folder: Path, flags: list[str], before: str = "") -> dict:
    """One job; what its output measured. `before`: what its process does first."""
    files = [
        "--random-weights",
        folder / "config.json",
        "--prompts",
        folder / "prompts.jsonl",
        "--output",
        folder / "run.h5",
    ]
    watch = WATCH.format(path=str(folder / "counts.json"))
    command = [sys.executable, "-c", watch + before + START, "run", *files, "--ignore-eos", "--overwrite", *flags]
    subprocess.run([str(word) for word in command], check=True, timeout=560, env=os.environ)
    with h5py.File(folder / "run.h5") as output:
        generated, prompts = len(output["tokens"]), len(output["prompt_tokens"])
        shared, seconds = int(output["cached_tokens"][:].sum()), float(output["timing/seconds"][:].max())
        rounds = float(output["timing/rounds"][:].max())
        device = json.loads(output.attrs["devices"])[0]
    computed = prompts - shared + generated
    counts = json.loads((folder / "counts.json").read_text())
    return {
        "device": device,
        "generated_tokens": generated,
        "shared_tokens": shared,
        "seconds": round(seconds, 2),
        "generated_per_second": round(generated / seconds, 1),
        "computed_per_second": round(computed / seconds, 1),
        "rows_a_round": round(generated / rounds, 1),
        "rows_in_flight": int(np.median(counts[len(counts) // 4 :])) if counts else 0,
    }


def measure(case: str, folder: Path, num_prompts: int, shape: dict, flags: list[str]) -> None:
    """Both runs of a case, a line each."""
    vocab_size = shape["vocab_size"]
    if case.startswith("limit"):
        write_inputs(folder, shape, ending(min(NUM_ROWS, 4 * num_prompts), vocab_size))
        flags = ["--max-new-tokens", str(LIMIT), "--temperature", "1", "--seed", "1", *flags]
        flags += ["--gpu-memory", "24GiB"] if case == "limit-24" else []
        kinds = {"reservations follow": (flags, ""), "reservations of the limit": (flags, AT_LIMIT)}
    else:
        write_inputs(folder, shape, beginnings(num_prompts, 8 if case == "eight" else 1, vocab_size))
        flags = ["--max-new-tokens", str(GENERATED), *flags]
        kinds = {"sharing": (flags, ""), "no sharing": ([*flags, "--no-prefix-sharing"], "")}
    first = 0.0
    for kind, (its, before) in kinds.items():
        measured = run(folder, its, before)
        beside = {"times_as_fast": round(measured["seconds"] / first, 3)} if first else {}
        first = first or measured["seconds"]
        print(
            json.dumps({"bench": "prefixes", "case": case, "kind": kind, **measured, **beside, "flags": its}),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--shape", type=Path, help="a config.json (default: Llama-8B)")
    parser.add_argument("flags", nargs="*", help="flags of noria run, after --")
    arguments = parser.parse_args()
    shape = json.loads(arguments.shape.read_text()) if arguments.shape else LLAMA_8B
    for case in arguments.case:
        with tempfile.TemporaryDirectory() as folder:
            measure(case, Path(folder), arguments.prompts, shape, arguments.flags)


if __name__ == "__main__":
    main()
