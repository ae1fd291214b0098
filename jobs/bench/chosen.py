"""Few rows on a mixture of experts that streams: whole layers beside the chosen experts alone, Qwen3-30B-A3B's shape in bfloat16:

    python jobs/bench/chosen.py [--rows 8] [--layers 12] [--tier cpu] [--forms plain exponent fp8]

Prints one JSON line a form and way: seconds of a decode round and what the plan said, bytes over the link in all decode rounds,
those of the experts that the routers chose and of the rest of each layer, and whether tokens and log-probabilities are the
bits of whole layers. Weights are random, so that tokens go to more experts than those of a trained model may. The first blocks
of the first decode round set out whole, while prompts were computed.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import h5py
import torch
from planned import QWEN3_30B

from noria import config
from noria.blocks import Block
from noria.checkpoint.random_weights import random_checkpoint
from noria.launch.mpi import Solo
from noria.models import _routing
from noria.plan import costs
from noria.run import run

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}


@contextmanager
def watched(whole: bool) -> Iterator[list[torch.Tensor]]:
    """Runs in here load whole layers, or as their plan says; gives the choices of all routers, in order."""
    choices, choose, most = list[torch.Tensor](), _routing.choose, costs.chosen_tokens

    def watching(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = choose(*given)
        choices.append(found[0])
        return found

    with (
        patch.object(_routing, "choose", watching),
        patch.object(costs, "chosen_tokens", lambda *its: 0 if whole else most(*its)),
    ):
        yield choices


def measured(folder: Path, arguments: argparse.Namespace, form: str, whole: bool) -> tuple[dict[str, Any], list[Any]]:
    """The figures of a run, and its tokens with their log-probabilities."""
    name = f"{form}-{'whole' if whole else 'chosen'}"
    shape = (
        QWEN3_30B | {"num_hidden_layers": arguments.layers} | ({"quantization_config": FP8} if form == "fp8" else {})
    )
    (folder / "config.json").write_text(json.dumps(shape))
    files = {"random_weights": "config.json", "prompts": "prompts.jsonl", "output": f"{name}.h5"}
    keys: dict[str, Any] = {key: str(folder / file) for key, file in files.items()}
    keys |= {
        "weights": {arguments.tier: 100},
        "compress_weights": "auto" if form == "exponent" else "off",
        "logprobs": 1,
    }
    keys |= {"max_new_tokens": arguments.new, "ignore_eos": True, "temperature": 0.0}
    keys |= {"stage": True, "scratch": str(folder)} if arguments.tier == "disk" else {}
    with watched(whole) as choices:
        assert run(config.load(None, keys), Solo()) == 0
    with h5py.File(folder / f"{name}.h5") as output:
        timing = {key: float(column[0]) for key, column in output["timing"].items()}
        plan, rounds = json.loads(output.attrs["plan"]), timing["decode_rounds"]
        results = [output[key][:].tobytes() for key in ("tokens", "logprobs")]
    blocks = random_checkpoint(shape, "bfloat16").blocks
    figures = {
        "decode_rounds": rounds,
        "seconds_a_round": round(timing["decode_seconds"] / rounds, 4),
        "predicted": round(plan["predicted"]["decode"]["round_seconds"], 4),
        "chosen_tokens": plan["chosen_tokens"],
        "nbytes": timing["decode_host_to_gpu_nbytes"],
        "gigabytes_a_second": round(timing["decode_host_to_gpu_nbytes"] / timing["decode_seconds"] / 1e9, 2),
    }
    if form != "exponent":  # how large these blocks became is known to the run alone
        figures["nbytes_of_the_chosen"] = wanted(blocks, choices, int(rounds), arguments.rows)
        figures["nbytes_of_whole_layers"] = int(rounds) * sum(
            its.nbytes for key, its in blocks.items() if key != "embed"
        )
    return figures, results


def wanted(blocks: Mapping[str, Block], choices: list[torch.Tensor], rounds: int, rows: int) -> int:
    """Bytes of the experts that were chosen in the decode rounds, and of all else that streams."""
    layer = blocks["layers/0000"]
    experts = next(one for one in layer.parameters if one.name == "experts")
    rest = sum(its.nbytes for key, its in blocks.items() if key != "embed") - (len(blocks) - 2) * experts.nbytes
    decoded = [its for its in choices if len(its) == rows][-rounds * (len(blocks) - 2) :]
    return rounds * rest + sum(len(its.unique()) for its in decoded) * experts.piece.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new", type=int, default=33, help="new tokens of a row")
    parser.add_argument("--tier", choices=("cpu", "disk"), default="cpu")
    parser.add_argument("--forms", nargs="+", choices=("plain", "exponent", "fp8"), default=["plain"])
    arguments = parser.parse_args()
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(10, QWEN3_30B["vocab_size"], (arguments.rows, arguments.prompt_tokens), generator=draw).tolist()
    for form in arguments.forms:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "prompts.jsonl").write_text("".join(json.dumps({"token_ids": its}) + "\n" for its in ids))
            first: list[Any] = []
            for whole in (True, False):
                figures, results = measured(folder, arguments, form, whole)
                first = first or results
                found = {"form": form, "whole": whole, **figures, "same_bits": results == first}
                print(
                    json.dumps({"bench": "chosen", "rows": arguments.rows, "layers": arguments.layers, **found}),
                    flush=True,
                )


if __name__ == "__main__":
    main()
