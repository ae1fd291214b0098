"""Says what a checkpoint or an output holds; of an output that is not finished, how far its run has come."""

import argparse
import sys
from pathlib import Path

from noria.config import InputError
from noria.files import checkpoint, generations, unfinished
from noria.files.container import format_of
from noria.files.outcome import how_to_read, outcome_of
from noria.files.schema import FORMAT as GENERATIONS
from noria.text import plural, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.h5", help="checkpoint or output, finished or not")
    parser.add_argument("--verify", action="store_true", help="read all of it and check every checksum")


def run(arguments: argparse.Namespace) -> int:
    output = arguments.file
    if output.suffix == ".parts" and not output.is_file():
        output = output.with_suffix("")
    if unfinished.is_unfinished(output):
        _write(unfinished.describe_unfinished(output, arguments.verify))
        return 0
    found = format_of(output)
    if found == checkpoint.FORMAT:
        return _checkpoint(output, arguments.verify)
    if found == GENERATIONS:
        _write([*generations.describe(output, arguments.verify), *_outcome(output)])
        return 0
    raise InputError(f"{output}: its format is {found!r}; known: {checkpoint.FORMAT!r}, {GENERATIONS!r}")


def _outcome(output: Path) -> list[str]:
    try:
        return [*outcome_of(output).lines(), how_to_read(output)]
    except InputError as error:
        return [f"why rows are in error cannot be read: {error}"]


def _checkpoint(path: Path, verify: bool) -> int:
    with checkpoint.open_checkpoint(path) as file:
        _write(checkpoint.describe(file))
        damaged = []
        for name in file.blocks if verify else ():
            try:
                file.verify_block(name)
            except InputError as error:
                damaged.append(name)
                _write([str(error)])
        if damaged:
            raise InputError(
                f"{path}: {len(damaged)} of {plural(len(file.blocks), 'block')} damaged: {', '.join(damaged)}"
            )
        if verify:
            _write([f"verified    {plural(len(file.blocks), 'block')}, {file.nbytes} bytes: every checksum is right"])
    return 0


def _write(lines: list[str]) -> None:
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))
