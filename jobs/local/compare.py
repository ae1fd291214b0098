#!/usr/bin/env python3
"""Compares a model of your own with transformers, on your machine: logits, greedy tokens, speed.

    python jobs/local/compare.py HF_DIR [--dtype float32] [--device cpu] [--prompt TEXT ...] [--max-new-tokens 32]

Converts HF_DIR to a checkpoint in a temporary folder, computes the same prompts with both, and says where the logits
first differ by more than the tolerance, where the tokens first differ, and how fast each is. Needs `transformers`, and
memory for the model twice. Exit codes: 0 they agree, 1 they do not, 2 the input is wrong.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from noria import attention, models, run
from noria import config as configuration
from noria.blocks import layer_name
from noria.checkpoint.checkpoint import block_names, open_checkpoint
from noria.checkpoint.convert import convert
from noria.engine.assembly import weights_of
from noria.engine.batch import Batches, Network
from noria.engine.kv_cache import KvCache
from noria.engine.layer_cache import LayerCache
from noria.engine.loading import Loader
from noria.engine.parameters import TORCH_DTYPES
from noria.engine.timing import Traffic
from noria.engine.weights import Weights
from noria.errors import InputError
from noria.launch.mpi import Solo
from noria.limits import DTYPES
from noria.output.generations import open_generations
from noria.step import NO_STATE, PAGE_TOKENS, Admitted, Run, Step
from noria.streams import streams_of

PROMPTS = ["The quick brown fox jumps over the lazy dog.", "1, 2, 3, 4, 5,", "def main():\n", "Once upon a time"]
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 5e-2, "bfloat16": 5e-1}  # transformers rotates in float32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, metavar="HF_DIR")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--tolerance", type=float, help="of logits; default by dtype")
    arguments = parser.parse_args()
    try:
        import transformers
    except ImportError:
        print("compare: transformers is not installed: pip install transformers", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory(prefix="noria-compare-") as folder, torch.inference_mode():
            return compare(arguments, transformers, Path(folder))
    except (InputError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2


def compare(arguments, transformers, folder: Path) -> int:
    """The whole comparison. Returns the exit code."""
    convert(arguments.source, folder / "model.h5", arguments.dtype)
    prompts = token_ids(arguments, transformers)
    kind = {"torch_dtype" if transformers.__version__ < "4.56" else "dtype": TORCH_DTYPES[arguments.dtype]}
    if transformers.__version__ >= "5":  # its grouped products of experts know no float64
        kind["experts_implementation"] = "eager"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(arguments.source, **kind).eval().to(arguments.device)
    references = [theirs(torch.tensor([ids], device=arguments.device)).logits[0].double().cpu() for ids in prompts]
    expected, gaps, their_rate = generate(theirs, prompts, arguments)
    del theirs
    agree, largest = compare_logits(arguments, folder / "model.h5", prompts, references)
    found, our_rate = generate_with_noria(arguments, folder, prompts)
    agree &= compare_tokens(expected, found, gaps, largest, agree)
    print(f"speed: {their_rate:.1f} tokens/s transformers (one prompt at a time), {our_rate:.1f} noria (one rank, all)")
    print("agree" if agree else "DIFFER")
    return 0 if agree else 1


def token_ids(arguments, transformers) -> list[list[int]]:
    """The prompts as token ids, by the model's tokenizer; without one, ids by rule."""
    try:
        if not any((arguments.source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise OSError(f"none in {arguments.source}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.source)
        return [tokenizer(prompt)["input_ids"] or [0] for prompt in arguments.prompt or PROMPTS]
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        print(f"no tokenizer ({str(error).splitlines()[0][:100]}): token ids by rule")
        vocabulary = transformers.AutoConfig.from_pretrained(arguments.source).get_text_config().vocab_size
        return [[(7 * row + 13 * index) % vocabulary for index in range(5 + 9 * row)] for row in range(4)]


def generate(model, prompts: list[list[int]], arguments) -> tuple[list[list[int]], list[list[float]], float]:
    """Greedy token ids, end tokens ignored, the gap of each to the second-best logit, and tokens per second."""
    found, gaps, started = [], [], time.perf_counter()
    for ids in prompts:
        tokens, margins, cache, step = [], [], None, torch.tensor([ids], device=arguments.device)
        for _ in range(arguments.max_new_tokens):
            output = model(step, past_key_values=cache, use_cache=True)
            best = output.logits[0, -1].double().topk(2)
            cache, step = output.past_key_values, best.indices[None, :1]
            tokens.append(int(step))
            margins.append(float(best.values[0] - best.values[1]))
        found.append(tokens)
        gaps.append(margins)
    return found, gaps, len(prompts) * arguments.max_new_tokens / (time.perf_counter() - started)


def compare_logits(arguments, checkpoint_path: Path, prompts, references) -> tuple[bool, float]:
    """Prints each prompt's largest difference and the first place beyond the tolerance: (agree, largest of all)."""
    tolerance, agree, largest = arguments.tolerance or TOLERANCE[arguments.dtype], True, 0.0
    with contextlib.closing(open_checkpoint(checkpoint_path)) as checkpoint:
        device = torch.device(arguments.device)
        tiers, layers = dict.fromkeys(block_names(checkpoint.shape), "gpu"), range(checkpoint.shape.num_layers)
        streams = streams_of(device)
        placed = Loader(checkpoint, tiers, arguments.dtype, streams).load()
        weights = weights_of(placed, [layers], 1, 0, streams, Traffic())
        for row, (ids, expected) in enumerate(zip(prompts, references, strict=True)):
            found = logits(checkpoint, weights, ids, TORCH_DTYPES[arguments.dtype], device).double().cpu()
            difference = (found - expected).abs()
            largest = max(largest, float(difference.max()))
            line = f"prompt {row} ({len(ids)} tokens): logits differ by at most {difference.max():.2e}"
            beyond = (difference > tolerance).nonzero()
            if len(beyond) or not torch.isfinite(found).all():
                agree = False
                position, token = beyond[0].tolist() if len(beyond) else (0, 0)
                line += (
                    f"; first beyond {tolerance:g} at position {position}, token {token}:"
                    f" {expected[position, token]:.6f} transformers, {found[position, token]:.6f} noria"
                )
            print(line)
    return agree, largest


def logits(checkpoint, weights: Weights, ids: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[T, V] of one prompt through the model's own functions."""
    shape, model = checkpoint.shape, models.for_config(models.text_of(checkpoint.config))
    num_pages = -(-len(ids) // PAGE_TOKENS)
    kind, _ = attention.fitting(device, dtype, shape)
    cache = KvCache(
        shape, list(range(shape.num_layers)), (num_pages, 1), str(dtype).removeprefix("torch."), streams_of(device)
    )
    admitted = (Admitted(0, (Run(0, num_pages),), {}),)
    arrays = {"slots": [0], "counts": [len(ids)], "positions": [0], "token_ids": ids}
    if shape.has_states:
        arrays |= {"reads": [NO_STATE], "writes": [0], "kept": [len(ids)]}
    step = Step(0, 0, admitted=admitted, **{name: np.array(array, np.int32) for name, array in arrays.items()})
    none = np.empty(0, np.int64)
    batch = Batches(Network(model, kind, shape), dtype, device).make(step, [0, 1], (none, none, none))
    (microbatch,) = batch.microbatches
    hidden = model.embed(shape, weights.wait("embed"), batch.token_ids, batch.positions)
    for layer in range(shape.num_layers):
        source = shape.reads(layer)
        entry = shape.arrays(source), source != layer
        its = LayerCache(kind, microbatch, cache.tensors(layer, 0, None), *entry)
        hidden = model.layer(shape, layer, weights.wait(layer_name(layer)), hidden, microbatch.positional, its)
        its.commit()
    return model.head(shape, weights.wait("head"), hidden)


def generate_with_noria(arguments, folder: Path, prompts) -> tuple[list[list[int]], float]:
    """The same through a whole run of one rank."""
    lines = [f'{{"token_ids": {ids}}}\n' for ids in prompts]
    (folder / "prompts.jsonl").write_text("".join(lines))
    files = {"model": "model.h5", "prompts": "prompts.jsonl", "output": "o.h5"}
    flags = {name: str(folder / file) for name, file in files.items()}
    flags |= {"dtype": arguments.dtype, "device": arguments.device, "max_new_tokens": arguments.max_new_tokens}
    greedy = {"ignore_eos": True, "generation_config": "none"}
    with contextlib.redirect_stderr(io.StringIO()):  # it would name files that are gone when the comparison ends
        run.run(configuration.load(None, flags | greedy), Solo())
    with open_generations(folder / "o.h5") as output:
        found = [row.token_ids.tolist() for row in output.rows()]
        seconds = float(output.file["timing/seconds"][0])  # from the first step to the last, as transformers' are
    return found, len(prompts) * arguments.max_new_tokens / seconds


def compare_tokens(expected, found, gaps, largest: float, alike: bool) -> bool:
    """Prints where tokens first differ. If logits are `alike`, they agree still at a tie within rounding."""
    agree = True
    for row, (one, other, margins) in enumerate(zip(expected, found, gaps, strict=True)):
        at = next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))
        if at == len(one):
            print(f"prompt {row}: {at} new tokens are equal")
            continue
        tie = alike and margins[at] < 2 * largest
        agree &= tie
        print(
            f"prompt {row}: tokens differ from new token {at} on: {one[at : at + 5]} transformers,"
            f" {other[at : at + 5]} noria; transformers' two best logits are {margins[at]:.2e} apart there"
            + (", a tie within rounding" if tie else "")
        )
    return agree


if __name__ == "__main__":
    sys.exit(main())
