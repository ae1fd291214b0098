"""Makes a checkpoint of a Hugging Face model directory."""

import argparse
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.encoding import Choose
from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.quantization import GROUP_SIZES, WORDS, compressed, quantization
from noria.checkpoint.vocabularies import tokenizer_files
from noria.desk.examination import doubts
from noria.errors import InputError, require
from noria.limits import CODED, DTYPES
from noria.rows.chat import Chat
from noria.rows.template import template_helper
from noria.rows.tokenizer import Tokenizer, tokenizer_of
from noria.tools.text import printable

LINE_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="directory with config.json, weights and tokenizer")
    parser.add_argument("target", type=Path, metavar="MODEL.h5", help="checkpoint to make")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="number format of the checkpoint (auto: the source's)",
    )
    parser.add_argument(
        "--lora", type=Path, metavar="ADAPTER_DIR", help="merge this LoRA adapter of peft into the model's weights"
    )
    parser.add_argument(
        "--quantization",
        choices=tuple(WORDS),
        help="store the matrices of layers in fewer bits: FP8 with a scale for 128 x 128 of them or for an output, or whole"
        " numbers of 8 or 4 bits with a scale for a group of inputs",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        metavar="32|64|128",
        help="inputs of a group, of int8 and int4 (64)",
    )
    parser.add_argument(
        "--compress-weights",
        choices=(CODED,),
        help="store large matrices of bfloat16 without loss in 11.3 bits a number: exponents as distances from each other",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the target if it exists")


def run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    choose = _quantization(arguments)
    _check_tokenizer(arguments.source)
    report = _Bar() if sys.stderr.isatty() else _Lines()
    try:
        asked = arguments.source, arguments.target, arguments.dtype
        made = convert(*asked, report, arguments.overwrite, choose, arguments.lora)
    finally:
        report.close()
    notes = [] if choose is None or made.forms else [_unchanged(arguments)]
    for note in notes + made.notes + _doubts(arguments.target):
        sys.stderr.write(f"noria: {printable(note)}\n")
    seconds = time.monotonic() - started
    sys.stdout.write(
        f"{arguments.target}: {made.shape.family}, {made.shape.num_layers} layers, {made.dtype},"
        f"{f' stored as {made.forms},' if made.forms else ''}"
        f" {made.nbytes / 2**30:.2f} GiB in {seconds:.1f} s ({made.nbytes / 1e9 / seconds:.2f} GB/s)\n"
    )
    return 0


def _quantization(arguments: argparse.Namespace) -> Choose | None:
    """How the user wants parameters stored."""
    word, size, lossless = arguments.quantization, arguments.group_size, arguments.compress_weights
    require(
        word is None or lossless is None,
        f"--quantization {word} with --compress-weights {lossless}: a matrix is stored in one way, give one of them",
    )
    require(word is not None or size is None, f"--group-size {size} without --quantization: give both, or neither")
    if word is not None:
        return quantization(word, size)
    return None if lossless is None else compressed


def _unchanged(arguments: argparse.Namespace) -> str:
    """What to say where no parameter took the form that was asked for."""
    flags = {"--quantization": arguments.quantization, "--compress-weights": arguments.compress_weights}
    asked = " ".join(f"{flag} {word}" for flag, word in flags.items() if word)
    return (
        f"{asked} changed nothing: no matrix of this model is of the kind that it stores in fewer bits, or large enough"
    )


def _check_tokenizer(source: Path) -> None:
    """Raises InputError for a tokenizer that no run could use, before anything is written."""
    directory = Directory(source)
    found = [directory.json(name) for name in ("config.json", "generation_config.json")]
    config, generation = (tree[1] if tree else {} for tree in found)
    try:
        Tokenizer(tokenizer_files(directory)[0], config, generation)
    except InputError as error:
        raise InputError(
            f"{source}: {error} (if all rows have token_ids, convert it without its tokenizer's files)"
        ) from error


def _doubts(target: Path) -> list[str]:
    """What a run would find wrong with the tokenizer and the template that were converted."""
    with open_checkpoint(target) as checkpoint:
        try:
            tokenizer = tokenizer_of(checkpoint)
            with template_helper() as helper:
                chat = Chat(checkpoint.tokenizer, tokenizer.special_tokens, datetime.now(), helper)
                return doubts(tokenizer, chat, checkpoint.shape.vocab_size)
        except InputError as error:
            return [str(error)]


class _Bar:
    """Progress on a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, block: str, done: int, total: int) -> None:
        self._bar = self._bar or tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr)
        self._bar.set_description(block, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar:
            self._bar.close()


class _Lines:
    """Progress in a log: a line now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, block: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            sys.stderr.write(f"noria: {block}: {done / 2**30:.2f} of {total / 2**30:.2f} GiB converted\n")

    def close(self) -> None:
        pass
