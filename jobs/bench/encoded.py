"""Weights and caches in fewer bits: how fast rounds are, and what they cost in error and in bits a character.

    python jobs/bench/encoded.py rounds [--shape opt-30b] [--prompts 64] [--forms plain exponent fp8 int4] [--layers 24]
        [--ranks 2] [-- flags]
    python jobs/bench/encoded.py quality --text kjv.txt [--characters 40000] [--only bfloat16 "cache int4"]

`rounds` (a GPU a rank): all weights on the CPU, random ones, as in streamed.py: a JSON line a form with the share of the link
that decode rounds reach and how many times as fast as plain bfloat16 they are. The link is measured once, before. `exponent` is
coded while it loads even where that takes longer than a run may: the log tells the rate of coding. `quality` (any machine): the
demo model in each form, the relative error of the weights that are encoded (Frobenius), and bits a character of chapters that
it was not trained on, by prompt_logprobs. inputs/demo/README.md says how kjv.txt is made. FlexGen's form is a minimum and a
step of float16 for each 64 inputs. `cache int8`: plain weights with --kv-cache-dtype int8; bits are those of a key and value
together.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from math import log
from pathlib import Path
from typing import Any

import safetensors.torch
import streamed
import torch

from noria import config
from noria.arrays import ENCODINGS
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.quantization import Quantization
from noria.desk.examination import with_cache
from noria.engine.decoding import Decoder
from noria.engine.parameters import Undecoded
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.run import run

DEMO = Path(__file__).parent.parent.parent / "inputs" / "demo"
ROUNDS: dict[str, tuple[dict[str, Any] | None, list[str]]] = {  # what config.json says, and flags of noria run
    "plain": (None, ["--compress-weights", "off"]),
    "exponent": (None, []),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, []),
    "int8": ({"quant_method": "int8"}, []),
    "int4": ({"quant_method": "int4"}, []),
    "mxfp4": ({"quant_method": "mxfp4"}, []),
}
# Random weights are made faster than files are read, which what is coded while it loads must keep up with.
CODES = ("-c", "from noria.engine import coding; coding.LONGER = 1e9; from noria.__main__ import main; exit(main())")
CACHES = {f"cache {kind}": kind for kind in ENCODINGS}
QUALITY: dict[str, tuple[str, dict[str, Any]] | None] = {
    "bfloat16": None,
    "flexgen 4 bits, groups of 64": None,
    "fp8_block": ("fp8_block", {}),
    "fp8_channel": ("fp8_channel", {}),
    "int8": ("int8", {}),
    **{f"int4, groups of {size}": ("int4", {"group_size": size}) for size in (32, 64, 128)},
    "int4, groups of 64, symmetric": ("int4", {"symmetric": True}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
    **dict.fromkeys(CACHES),
}


def rounds(arguments: argparse.Namespace) -> None:
    """A run a form."""
    plain, config_of = None, streamed.config_of
    arguments.constant, arguments.mixed, arguments.disk = False, False, None
    link = streamed.link_rate(arguments.ranks)
    given = arguments.flags
    cut = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    for form in arguments.forms:
        said, flags = ROUNDS[form]
        streamed.config_of = lambda *shape, said=said: (
            config_of(*shape) | cut | ({"quantization_config": said} if said else {})
        )
        arguments.flags = ["--dtype", "bfloat16", "--weights", "cpu=100", *flags, *given]
        with tempfile.TemporaryDirectory() as folder:
            program = CODES if form == "exponent" else streamed.NORIA
            figures = streamed.run(Path(folder), arguments, arguments.ranks, link, program)
        seconds = figures["decode_seconds_a_round"]
        plain = seconds if form == "plain" else plain
        line = {"bench": "encoded", "form": form, "shape": arguments.shape, "ranks": arguments.ranks, **figures}
        print(json.dumps(line | {"times_as_fast": round(plain / seconds, 3) if plain else None}), flush=True)


def quality(arguments: argparse.Namespace) -> None:
    """The model in each form."""
    passages = _passages(arguments.text, arguments.characters, arguments.model == DEMO / "model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"prompt": passage, "max_new_tokens": 0, "prompt_logprobs": True}) for passage in passages]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
        convert(arguments.model, folder / "plain.h5")
        for form, chosen in QUALITY.items():
            if arguments.only and form not in arguments.only:
                continue
            source = _as_flexgen(arguments.model, folder) if form.startswith("flexgen") else arguments.model
            choose = Quantization(*chosen) if chosen else None
            convert(source, folder / "model.h5", overwrite=True, forms=choose)
            error = error_of(folder, flexgen=form.startswith("flexgen"))
            line = {"bench": "quality", "form": form, **(error if form not in CACHES else bits_of_cache(folder, form))}
            bits = bits_of(folder, sum(map(len, passages)), CACHES.get(form, "auto"))
            line["bits_a_character"] = round(bits, 4)
            print(json.dumps(line), flush=True)


def _passages(text: Path, characters: int, held_out: bool) -> list[str]:
    """So many characters of a text: chapters that the demo model was not trained on, or 1,500 at a time from its beginning."""
    if not held_out:
        whole = text.read_text()[:characters]
        return [whole[first : first + 1500] for first in range(0, len(whole), 1500)]
    sys.path.insert(0, str(DEMO))
    import train

    passages: list[str] = []
    for passage in train.documents(train.split(train.read_chapters(text))[1]):
        if "\n" in passage and sum(map(len, passages)) < characters:  # with its heading
            passages.append(passage)
    return passages


def _as_flexgen(model: Path, folder: Path) -> Path:
    """The model with its layers' matrices as FlexGen's compression leaves them: 4 bits, groups of 64 inputs."""
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    for name, its in tensors.items():
        if ".layers." in name and its.dim() == 2:
            groups = torch.nn.functional.pad(its.float(), (0, -its.shape[1] % 64)).unflatten(1, (-1, 64))
            least = groups.amin(2, keepdim=True).half().float()
            step = ((groups.amax(2, keepdim=True) - least) / 15).half().float().clamp(min=1e-8)
            codes = ((groups - least) / step).round().clamp(0, 15)
            tensors[name] = (codes * step + least).flatten(1)[:, : its.shape[1]].contiguous()
    target = folder / "flexgen"
    target.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_bytes(file.read_bytes())
    safetensors.torch.save_file(tensors, target / "model.safetensors")
    return target


def _layers(path: Path) -> dict[str, tuple[torch.Tensor, float]]:
    """Each matrix of the layers, as it is computed, and its bits a number."""
    found = {}
    with open_checkpoint(path) as checkpoint:
        for name, block in checkpoint.blocks.items():
            buffer = torch.empty(block.nbytes, dtype=torch.uint8)
            checkpoint.read_block(name, buffer.numpy())
            cast = Undecoded(block, buffer)
            its = Decoder(block.decoded_nbytes, torch.device("cpu")).parameters(name, cast) if block.encoded else None
            for one in block.parameters if name.startswith("layers/") else ():
                if len(one.shape) == 2:
                    content = buffer[one.offset : one.offset + one.nbytes]
                    plain = content.view(getattr(torch, one.dtype)).view(one.shape) if its is None else its[one.name]
                    found[f"{name}/{one.name}"] = plain.double().clone(), 8 * one.nbytes / one.numbers
    return found


def error_of(folder: Path, flexgen: bool) -> dict[str, float]:
    """Of all matrices of layers together: the relative error, and bits a number."""
    before, after = _layers(folder / "plain.h5"), _layers(folder / "model.h5")
    wrong = sum(float((after[name][0] - its).square().sum()) for name, (its, _) in before.items())
    whole = sum(float(its.square().sum()) for its, _ in before.values())
    numbers = sum(its.numel() for its, _ in before.values())
    bits = sum(its.numel() * bits for its, bits in after.values()) / numbers
    return {"bits": 4.5 if flexgen else round(bits, 3), "error": round((wrong / whole) ** 0.5, 5)}


def bits_of_cache(folder: Path, form: str) -> dict[str, float]:
    """Bits of a number in the cache."""
    with open_checkpoint(folder / "model.h5") as checkpoint:
        shape = checkpoint.shape
    kept, plain = (its.cache_nbytes([range(1)], "bfloat16") for its in (with_cache(shape, CACHES[form]), shape))
    return {"bits": round(16 * kept / plain, 3)}


def bits_of(folder: Path, characters: int, cache: str) -> float:
    """Bits a character of the passages, without their first token."""
    files = {"model": "model.h5", "prompts": "prompts.jsonl", "output": "run.h5"}
    keys = {key: str(folder / file) for key, file in files.items()} | {"dtype": "float32", "device": "cpu"}
    keys |= {"kv_cache_dtype": cache}
    with contextlib.redirect_stderr(io.StringIO()):
        assert run(config.load(None, keys | {"overwrite": True}), Solo()) == 0
    with open_generations(folder / "run.h5") as file:
        total = sum(float(row.prompt_logprobs[1:].sum()) for row in file.rows())
    return -total / log(2) / characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("rounds")
    timed.add_argument("--shape", choices=streamed.SHAPES, default="opt-30b")
    timed.add_argument("--layers", type=int, help="of the shape, the first so many (default: all)")
    timed.add_argument("--ranks", type=int, default=1, help="GPUs (default: 1)")
    timed.add_argument("--forms", nargs="+", choices=ROUNDS, default=["plain", "exponent", "fp8", "int4"])
    streamed.lengths.add_arguments(timed, prompts=64, max_new_tokens=8)
    timed.add_argument("flags", nargs="*", help="flags of noria run, after --")
    judged = commands.add_parser("quality")
    judged.add_argument("--text", type=Path, required=True, help="kjv.txt of inputs/demo/README.md, for the demo model")
    judged.add_argument("--model", type=Path, default=DEMO / "model", help="a directory (default: the demo model)")
    judged.add_argument("--characters", type=int, default=40_000, help="of held-out passages")
    judged.add_argument("--only", nargs="+", choices=QUALITY, help="these forms alone")
    arguments = parser.parse_args()
    {"rounds": rounds, "quality": quality}[arguments.command](arguments)


if __name__ == "__main__":
    main()
