"""Ragged work on a CPU beside transformers: 64 prompts of 16-256 tokens, 16-128 new tokens each by its own limit.

    python jobs/bench/cpu_generate.py [--threads 2] [--batch-sizes 16 32 64]

A random Llama of 134 million parameters in float32, one rank. transformers' generate pads: it is given the rows sorted by
prompt length and by limit, in each of the batch sizes, and its best counts. Useful tokens are those below a row's own limit.
Both make the same tokens, which is checked. Prints one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 1024,
}


def rows(num_rows: int) -> list[dict]:
    random = np.random.default_rng(0)
    lengths, limits = random.integers(16, 257, num_rows), random.integers(16, 129, num_rows)
    return [
        {"token_ids": random.integers(3, SHAPE["vocab_size"], length).tolist(), "max_new_tokens": int(limit)}
        for length, limit in zip(lengths, limits, strict=True)
    ]


def padded(model, work: list[dict], order: str, batch_size: int) -> tuple[float, dict]:
    """Seconds of transformers' generate in batches, and the tokens by row."""
    keys = {"prompt": lambda row: len(work[row]["token_ids"]), "limit": lambda row: work[row]["max_new_tokens"]}
    numbers, tokens = sorted(range(len(work)), key=keys[order]), {}
    started = time.perf_counter()
    for first in range(0, len(work), batch_size):
        batch = [work[row] for row in numbers[first : first + batch_size]]
        width = max(len(row["token_ids"]) for row in batch)
        ids = torch.tensor([[0] * (width - len(row["token_ids"])) + row["token_ids"] for row in batch])
        mask = torch.tensor([[0] * (width - len(row["token_ids"])) + [1] * len(row["token_ids"]) for row in batch])
        limit = max(row["max_new_tokens"] for row in batch)
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=limit, min_new_tokens=limit, **settings
        )
        for row, new in zip(numbers[first : first + batch_size], found[:, width:].tolist(), strict=True):
            tokens[row] = new[: work[row]["max_new_tokens"]]
    return time.perf_counter() - started, tokens


def noria(folder: Path, threads: int) -> tuple[float, dict]:
    """Seconds from the first step to the last of one rank, and the tokens by row."""
    command = [
        sys.executable,
        "-m",
        "noria",
        "run",
        "--model",
        folder / "model.h5",
        "--prompts",
        folder / "prompts.jsonl",
    ]
    command += ["--output", folder / "run.h5", "--ignore-eos", "--device", "cpu", "--overwrite"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment)
    with h5py.File(folder / "run.h5") as output:
        offsets, tokens = output["offsets"][:], output["tokens"][:]
        seconds = float(output["timing/seconds"][0])
    return seconds, {row: tokens[offsets[row] : offsets[row + 1]].tolist() for row in range(len(offsets) - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)).eval()
    work = rows(arguments.rows)
    useful = sum(row["max_new_tokens"] for row in work)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "hf")
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in work))
        subprocess.run([sys.executable, "-m", "noria", "convert", folder / "hf", folder / "model.h5"], check=True)
        ours, found = noria(folder, arguments.threads)
        peers = {}
        for order, batch_size in product(("prompt", "limit"), arguments.batch_sizes):
            peers[f"{order}, {batch_size}"], expected = padded(model, work, order, batch_size)
        again, _ = noria(folder, arguments.threads)
    same = sum(found[row] == expected[row] for row in found)
    best = min(peers, key=peers.get)
    line = {
        "bench": "cpu_generate",
        "threads": arguments.threads,
        "useful_tokens": useful,
        "noria_tokens_per_second": round(useful / min(ours, again), 1),
        "transformers_tokens_per_second": round(useful / peers[best], 1),
        "transformers_best": f"sorted by {best} a batch",
        "ratio": round(peers[best] / min(ours, again), 2),
        "all_seconds": {
            "noria": [round(ours, 1), round(again, 1)],
            **{key: round(value, 1) for key, value in peers.items()},
        },
        "rows_with_the_same_tokens": f"{same}/{len(work)}",
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
