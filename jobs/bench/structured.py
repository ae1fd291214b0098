"""Constrained rows beside free ones: a Llama-8B shape with random weights, a made-up vocabulary, temperature 1, one GPU.

    python jobs/bench/structured.py [--rows 256] [--new-tokens 256] [--shape shape.json] [--times 2] [-- flags of noria run]
    python jobs/bench/structured.py --masks [--rows 256]      what the masks of a step cost this machine's CPU, without a model

Prints one JSON line: generated tokens per second of free and of constrained rows, in turn in one process, and their ratio;
or milliseconds a step. `--schema bounded` limits the length of strings: near its end a mask takes 100 times as long as
another, since no set of tokens that is known beforehand is allowed as a whole. Needs llguidance.
"""

import argparse
import json
import random
import string
import tempfile
import time
from pathlib import Path

import numpy as np
from resident import LLAMA_8B
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from noria import config
from noria.desk import examination
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.rows.constraints import Constraints
from noria.rows.guides import Guide, made
from noria.rows.tokenizer import Tokenizer
from noria.run import run

END = 1
STRINGS = {"person": {"type": "string"}, "bounded": {"type": "string", "maxLength": 20}}


def schema_of(name: str) -> dict[str, object]:
    """A list of persons that no row ends before its limit, with tags of one of STRINGS."""
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": STRINGS[name]},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": person, "minItems": 10_000}


def tokenizer_files(size: int) -> dict[str, bytes]:
    """A byte-level tokenizer of so many tokens: all bytes, and made-up words of two to eight letters and marks."""
    draw, letters = (
        random.Random(0),
        string.ascii_lowercase * 4 + string.ascii_uppercase + string.digits + 'Ġ_-"{}[]:,.' * 2,
    )
    vocab = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known = set(vocab)
    while len(vocab) < size:
        word = "".join(draw.choices(letters, k=draw.randint(2, 8)))
        if word not in known:
            known.add(word)
            vocab.append(word)
    backend = Backend(models.BPE({token: place for place, token in enumerate(vocab)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(vocab[:2])
    return {"tokenizer.json": backend.to_str().encode()}


def measure_masks(rows: int, size: int, schema: dict[str, object], steps: int = 100) -> dict[str, object]:
    """Milliseconds of a step's masks, by the clock and of CPU time, each row at a place of its own; the tokens are drawn from
    the masks."""
    tokenizer = Tokenizer(tokenizer_files(size), {}, {"eos_token_id": END})
    began = time.perf_counter()
    constraints = Constraints(tokenizer, size)
    copies = [constraints.copy({"json": schema}) for _ in range(rows)]
    guides = [Guide(None, matcher, (END,), copy_of) for matcher, copy_of in copies]
    compiled, draw = time.perf_counter() - began, np.random.default_rng(0)
    spent: dict[str, list[float]] = {"clock": [], "cpu": [], "told": []}
    ids: list[list[int]] = [[] for _ in range(rows)]
    for _ in range(steps):
        began, used = time.perf_counter(), time.process_time()
        wants = {row: (guide, want) for row, guide in enumerate(guides) if (want := guide.want(len(ids[row])))}
        masks = made(wants, constraints, size)
        message = masks.encode()
        spent["clock"].append(time.perf_counter() - began)
        spent["cpu"].append(time.process_time() - used)
        for row, guide in enumerate(guides):
            ids[row].append(int(draw.choice(np.flatnonzero(np.unpackbits(masks.bits[row], bitorder="little")))))
            used = time.process_time()
            guide.add(ids[row])
            spent["told"].append(time.process_time() - used)
    milliseconds = {
        "median": np.median(spent["clock"]),
        "worst": max(spent["clock"]),
        "cpu_median": np.median(spent["cpu"]),
        "cpu_of_tokens_taken_in": np.mean(spent["told"]) * rows,
    }
    rounded = {name: round(1e3 * float(value), 2) for name, value in milliseconds.items()}
    return {"milliseconds": rounded, "compiled_seconds": round(compiled, 2), "message_bytes": len(message)}


def measure_run(folder: Path, name: str, rows: int, arguments: argparse.Namespace) -> float:
    """Generated tokens a second of one run, from its first step to its last."""
    schema = schema_of(arguments.schema)
    own = {"structured_outputs": {"json": schema}} if name == "constrained" else {"logit_bias": {str(END): -1000}}
    draw = np.random.default_rng(0)
    with (folder / f"{name}.jsonl").open("w") as file:
        for _ in range(rows):
            file.write(json.dumps({"token_ids": draw.integers(300, 30_000, 64).tolist(), **own}) + "\n")
    flags = dict(zip(arguments.flags[::2], arguments.flags[1::2], strict=True))
    flags = {flag.removeprefix("--").replace("-", "_"): value for flag, value in flags.items()}
    files = {"random_weights": str(folder / "config.json"), "prompts": str(folder / f"{name}.jsonl")}
    more = {
        "output": str(folder / "run.h5"),
        "overwrite": True,
        "temperature": 1.0,
        "max_new_tokens": arguments.new_tokens,
    }
    assert run(config.load(None, {**files, **more, **flags}), Solo()) == 0
    with open_generations(folder / "run.h5") as output:
        generated, seconds = len(output.column("tokens")), float(output.file["timing/seconds"][:].max())
    assert generated == rows * arguments.new_tokens, f"{generated} tokens: a row ended early"
    return generated / seconds


def measure_runs(arguments: argparse.Namespace) -> dict[str, object]:
    shape = json.loads(arguments.shape.read_text()) if arguments.shape else LLAMA_8B
    shape = shape | {"eos_token_id": END}
    files, plain = tokenizer_files(shape["vocab_size"]), examination.random_checkpoint

    def with_tokenizer(*given: object) -> object:
        opened = plain(*given)
        opened.tokenizer = files
        return opened

    examination.random_checkpoint = with_tokenizer  # random weights come without one
    found: dict[str, list[float]] = {"free": [], "constrained": []}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        for _ in range(arguments.times):
            for name, speeds in found.items():
                speeds.append(round(measure_run(Path(folder), name, arguments.rows, arguments), 1))
    return {"tokens_per_second": found, "ratio": round(max(found["constrained"]) / max(found["free"]), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--schema", choices=STRINGS, default="person")
    parser.add_argument("--shape", type=Path, help="a config.json (default: Llama-8B)")
    parser.add_argument("--masks", action="store_true", help="only what the masks cost")
    parser.add_argument("flags", nargs="*", help="flags of noria run, after --")
    arguments = parser.parse_args()
    if arguments.masks:
        measured = measure_masks(arguments.rows, LLAMA_8B["vocab_size"], schema_of(arguments.schema))
    else:
        measured = measure_runs(arguments)
    asked = {"rows": arguments.rows, "schema": arguments.schema, "flags": arguments.flags}
    print(json.dumps({"bench": "structured", **asked, **measured}), flush=True)


if __name__ == "__main__":
    main()
