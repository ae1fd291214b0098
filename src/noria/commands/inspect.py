"""Says what a checkpoint or an output holds and, for an output that is not finished, how far its run has come."""

import argparse
import sys
from pathlib import Path
from typing import Any

from noria.checkpoint import checkpoint
from noria.checkpoint.encoding import check_encoded
from noria.checkpoint.summary import as_dict, describe
from noria.commands import flags
from noria.commands.parser import Parser
from noria.errors import InputError, require
from noria.output.schema import FORMAT as GENERATIONS
from noria.output.sealed import is_unfinished
from noria.output.summary import Summary, summary_of
from noria.output.unfinished import summary_of_unfinished
from noria.report.facts import spent_of
from noria.tools.container import format_of
from noria.tools.text import json_text, nbytes_words, plural, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE.h5", help="checkpoint or output, finished or not")
    parser.add_argument(
        "--verify", action="store_true", help="read the whole file and check every checksum, code and scale"
    )
    parser.add_argument("--all", action="store_true", help="show everything that the file records, measured times too")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, for scripts; later versions only add keys"
    )
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="inspect the output of a run, named by the arguments of noria run: RUN.toml [--key value ...]; must be last",
    )


def run(arguments: argparse.Namespace) -> int:
    require(
        (arguments.file is None) != (arguments.run is None),
        "noria inspect needs a file, or --run with the arguments of noria run",
    )
    output = arguments.file or _output_of(arguments.run)
    if output.suffix == ".parts" and not output.is_file():
        output = output.with_suffix("")
    if is_unfinished(output):
        return _output(summary_of_unfinished(output, arguments.verify), arguments)
    found = format_of(output)
    if found == checkpoint.FORMAT:
        return _checkpoint(output, arguments)
    if found == GENERATIONS:
        return _output(summary_of(output, arguments.verify), arguments)
    raise InputError(f"{output}: its format is {found!r}; known: {checkpoint.FORMAT!r}, {GENERATIONS!r}")


def _output_of(run: list[str]) -> Path:
    """Where the run with these arguments writes."""
    parser = Parser("noria inspect --run", allow_abbrev=False)
    flags.add_arguments(parser)
    return Path(flags.load(parser.parse_args(run)).output)


def _output(summary: Summary, arguments: argparse.Namespace) -> int:
    told = _checked(summary.as_dict() | _time_of(summary), arguments) if arguments.json else {}
    _write([json_text(told)] if arguments.json else summary.lines(arguments.all))
    return 0


def _time_of(summary: Summary) -> dict[str, Any]:
    """Where the time of the last job went, of a finished output that says so."""
    found = spent_of(summary.path) if summary.finished else None
    return {} if found is None else {"time": found.as_dict()}


def _checked(facts: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    return facts | ({"verified": True} if arguments.verify else {})


def _checkpoint(path: Path, arguments: argparse.Namespace) -> int:
    with checkpoint.open_checkpoint(path) as file:
        if not arguments.json:
            _write(describe(file))
        if arguments.verify:
            _verify(file, say=not arguments.json)
        if arguments.json:
            _write([json_text(_checked(as_dict(file), arguments))])
    return 0


def _verify(file: checkpoint.Checkpoint, say: bool) -> None:
    damaged = []
    for name in file.blocks:
        try:
            file.verify_block(name)
            check_encoded(file, name)
        except InputError as error:
            damaged.append(name)
            _write([str(error)] * say)
    if damaged:
        raise InputError(
            f"{file.path}: {len(damaged)} of {plural(len(file.blocks), 'block')} damaged: {', '.join(damaged)}"
        )
    words = f"{plural(len(file.blocks), 'block')}, {nbytes_words(file.nbytes)}: every checksum is right"
    words += ", and so is every code and scale" * any(block.encoded for block in file.blocks.values())
    _write([f"verified    {words}"] * say)


def _write(lines: list[str]) -> None:
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))
