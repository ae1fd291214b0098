"""Latent attention of a DeepSeek-V3 layer, absorbed as Noria computes it, beside keys and values expanded first, on one GPU:

    python jobs/bench/latent.py [--dtype bfloat16] [--only prefill]

Prints a JSON line a case: milliseconds of attention over latents by work items, of the products of each head that are absorbed
into queries and outputs, and of both; `share` of the time that they take at least, the latents at a copy's rate or the
products at a product's. Of prompts also what the other way takes: a key of 192 and a value of 128 numbers made for each
token and head, and attention over these by the same kernel.
"""

import argparse

import attention as bench
import torch

from noria.attention import items
from noria.kernels.scoring import Scoring

HEADS, RANK, TURNED, PLAIN, VALUE = 128, 512, 64, 128, 128
CASES = [
    (512, 1, 528),
    (64, 1, 2048),
    (4, 1, 32768),
    (32, 512, 512),
    (8, 2048, 2048),
    (2, 8192, 8192),
]  # as bench.alike's


def random(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(sizes, device=bench.device(), dtype=dtype).normal_()


def absorbed(case: bench.Case, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of what every step does."""
    tokens = int(case.rows.counts.sum())
    queries, cache = (
        random(tokens, HEADS, RANK + TURNED, dtype=dtype),
        random(case.cache_rows, 1, RANK + TURNED, dtype=dtype),
    )
    plan, scores = items.of_rows(case.rows, bench.device()), Scoring((PLAIN + TURNED) ** -0.5)
    attended = items.attention(plan, queries, cache, cache[..., :RANK], scores)
    up, plain = random(HEADS, PLAIN + VALUE, RANK, dtype=dtype), random(tokens, HEADS, PLAIN, dtype=dtype)

    def products() -> None:
        torch.bmm(plain.transpose(0, 1), up[:, :PLAIN])
        torch.bmm(attended.transpose(0, 1), up[:, PLAIN:].transpose(1, 2))

    found = {
        "attention_ms": bench.timed(lambda: items.attention(plan, queries, cache, cache[..., :RANK], scores)),
        "products_ms": bench.timed(products),
    }
    return found | {"absorbed_ms": sum(found.values())}


def expanded(case: bench.Case, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds where keys and values of all heads are made of the latents first, of a part of the rows at a time."""
    tokens, cache = int(case.rows.counts.sum()), random(case.cache_rows, RANK + TURNED, dtype=dtype)
    queries, up = random(tokens, HEADS, PLAIN + TURNED, dtype=dtype), random(HEADS * (PLAIN + VALUE), RANK, dtype=dtype)
    keys = torch.empty(case.cache_rows, HEADS, PLAIN + TURNED, device=bench.device(), dtype=dtype)
    made = torch.empty(case.cache_rows, HEADS, PLAIN + VALUE, device=bench.device(), dtype=dtype)
    plan, scores = items.of_rows(case.rows, bench.device()), Scoring((PLAIN + TURNED) ** -0.5)

    def expand() -> None:
        torch.mm(cache[:, :RANK], up.T, out=made.view(case.cache_rows, -1))
        keys[..., :PLAIN].copy_(made[..., :PLAIN])
        keys[..., PLAIN:].copy_(cache[:, None, RANK:])

    expand()
    found = {
        "expand_ms": bench.timed(expand),
        "expanded_attention_ms": bench.timed(lambda: items.attention(plan, queries, keys, made[..., PLAIN:], scores)),
    }
    return found | {"expanded_ms": sum(found.values())}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    arguments.add_argument("--only", default="", help="cases whose name has this in it")
    given = arguments.parse_args()
    dtype = getattr(torch, given.dtype)
    copy, product = bench.rates(dtype)
    bench.say(
        bench="latent", gpu=torch.cuda.get_device_name(), copy_tbs=round(copy, 2), product_tflops=round(product, 1)
    )
    for rows, count, length in CASES:
        case = bench.alike(rows, count, length)
        if given.only not in case.name:
            continue
        seen = case.flops / (bench.HEADS * bench.DIM * 4)  # pairs of a query and a key
        flops = HEADS * (seen * 2 * (2 * RANK + TURNED) + rows * count * 2 * RANK * (PLAIN + VALUE))
        least = max(rows * length * (RANK + TURNED) * 2 / copy / 1e9, flops / product / 1e9)
        found = absorbed(case, dtype)
        found |= {"share": least / found["absorbed_ms"]} | (expanded(case, dtype) if case.many_queries else {})
        bench.say(case=case.name, **{name: round(value, 4) for name, value in found.items()})


if __name__ == "__main__":
    main()
