"""Writes generations for other programs, in the order of the prompts. The file's name gives the format."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noria.desk.exports import check_not_prompts, check_prefix
from noria.desk.token_texts import NO_MODEL, token_texts
from noria.errors import InputError, require
from noria.job import OPENAI
from noria.launch.signals import Signals
from noria.output.export import FORMATS, ExportSettings, export
from noria.output.following import Following, follow
from noria.output.growing import GrowingFile, GrowingStream
from noria.output.schema import FINISH_REASON, STATUS
from noria.output.sealed import to_stderr
from noria.output.wanted import WantedRows, read_ids
from noria.tools.looking import Looker
from noria.tools.text import plural

STOPPED = 75  # launch/stopping.py, which this process does not need
LOOK_SECONDS = 1.0  # between two looks at what is sealed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT.h5", help="output of noria run; if it is not finished, its rows so far")
    parser.add_argument(
        "file",
        metavar="FILE",
        help="file to write: .jsonl, .jsonl.gz, .csv or .parquet (needs pyarrow); an existing file is replaced. With --follow"
        " a .jsonl file, to which rows are added, or - for stdout",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="rows",
        help="rows: one line for each row; openai: batch responses, all samples of a prompt in one (default: rows)",
    )
    parser.add_argument(
        "--errors",
        metavar="FILE",
        help="with --format openai: write the responses that are errors to this file, as OpenAI's batch does, and the others"
        " alone to the first one (default: all in one file)",
    )
    parser.add_argument(
        "--model",
        metavar="FILE",
        help="with --format openai: the checkpoint, whose tokenizer gives log-probabilities the texts of their tokens;"
        f" {NO_MODEL}: write token_id:N (default: the one that the run named)",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="write each finished row as soon as the run has sealed it, until the output is whole; may be started before the"
        " run, and again: rows that FILE has are not written twice. Exit code 75 after Ctrl-C or SIGTERM",
    )
    parser.add_argument("--status", choices=STATUS[1:], help="only rows of this status (default: all)")
    parser.add_argument(
        "--finish-reason", choices=FINISH_REASON[1:], help="only rows that ended for this reason (default: all)"
    )
    parser.add_argument(
        "--ids",
        metavar="FILE",
        help="only rows whose ids are in this file: a line each, or a .jsonl file of objects with an id (default: all)",
    )


def run(arguments: argparse.Namespace) -> int:
    output, file = Path(arguments.output), Path(arguments.file)
    errors = Path(arguments.errors) if arguments.errors is not None else None
    ids = read_ids(Path(arguments.ids)) if arguments.ids is not None else None
    _check_flags(arguments)
    wanted = WantedRows(arguments.status, arguments.finish_reason, ids)
    if arguments.follow:
        return _follow(output, file, wanted)
    if output.is_file():
        with Looker() as looker:
            looker.look(output)
    for target in filter(None, (file, errors)):
        check_not_prompts(output, target)
    settings = ExportSettings(arguments.format, errors, wanted, token_texts(arguments.model))
    count = export(output, file, settings=settings)
    what = "row" if arguments.format == "rows" else "response"
    apart = f", those that are errors to {errors}" if errors else ""
    sys.stderr.write(f"{plural(count, what)} written to {file}{apart}\n")
    return 0


def _follow(output: Path, file: Path, wanted: WantedRows) -> int:
    """Follows the output to a file or stdout. Returns the exit code."""
    require(output.parent.is_dir(), f"{output}: there is no folder {output.parent}, so no run writes there")
    growing_file = GrowingStream() if str(file) == "-" else GrowingFile(file)
    with Signals() as signals, growing_file as growing, Looker() as looker:
        came: list[object] = []

        def stopped(seconds: float = 0.0) -> bool:
            """Whether a signal came, within so many seconds; a second Ctrl-C ends the process at once."""
            came.extend(filter(None, [None if came else signals.wait(seconds)]))
            return bool(came)

        had = growing.had.num_rows

        def check(header: Mapping[str, Any]) -> None:
            if str(file) != "-":
                check_not_prompts(output, file, str(header.get("prompts")))

        following = Following(output, growing, wanted, looker, to_stderr, check, stopped)
        whole = follow(following, lambda: not stopped(LOOK_SECONDS))
    if missing := wanted.missing():
        require(not whole or had or wanted.found_any, f"{output} is whole: {missing}")
        to_stderr(f"{output}: {missing}")
    before = f", {had:,} were there" if had else ""
    end = f"{output} is whole" if whole else f"{output} is not whole yet: the same command goes on"
    to_stderr(f"{plural(following.num_written, 'row')} written to {growing}{before}; {end}")
    return 0 if whole else STOPPED


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises InputError for flags that do not go together."""
    if arguments.file.startswith(OPENAI):
        own = arguments.file.removeprefix(OPENAI) or "FILE"
        raise InputError(f"{arguments.file} is a name for noria run --export: give --format openai and the file {own}")
    check_prefix(arguments.file, arguments.file)
    if arguments.model is not None and arguments.format != "openai":
        raise InputError("--model is for --format openai: rows have token ids, which need no checkpoint")
    if arguments.errors is not None and arguments.format != "openai":
        raise InputError(
            "--errors is for --format openai: rows with errors are among the others, or --status error exports them"
        )
    if arguments.follow and arguments.format != "rows":
        raise InputError(
            f"--follow writes rows as JSON lines, not --format {arguments.format}: noria export makes that when the run is whole"
        )
    if arguments.follow and not arguments.file.endswith((".jsonl", "-")):
        raise InputError(
            "--follow writes rows as JSON lines: name a file .jsonl, or - for stdout; noria export makes the other formats"
            " when the run is whole"
        )
    listed, files = arguments.ids, filter(None, (arguments.file, arguments.errors))
    if listed is not None and any(Path(file).exists() and Path(file).samefile(listed) for file in files):
        raise InputError(f"{listed} holds the ids, which would be lost: name another file")
