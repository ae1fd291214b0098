"""Writes generations for other programs, in the order of the prompts. The file's name gives the format."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from noria.desk.token_texts import NO_MODEL, token_texts
from noria.errors import InputError
from noria.output.export import FORMATS, ExportSettings, export
from noria.output.generations import open_generations
from noria.output.schema import FINISH_REASON, STATUS
from noria.output.sealed import part_files, parts_folder
from noria.output.wanted import WantedRows, read_ids
from noria.rows.prompt_files import content_hash, content_key
from noria.tools.looking import Looker
from noria.tools.text import plural


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT.h5", help="output of noria run; if it is not finished, its rows so far")
    parser.add_argument(
        "file",
        metavar="FILE",
        help="file to write: .jsonl, .jsonl.gz, .csv or .parquet (needs pyarrow); an existing file is replaced",
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
    if output.is_file():
        with Looker() as looker:
            looker.look(output)
    for target in filter(None, (file, errors)):
        _check_prompts(output, target)
    wanted = WantedRows(arguments.status, arguments.finish_reason, ids)
    settings = ExportSettings(arguments.format, errors, wanted, token_texts(arguments.model))
    count = export(output, file, settings=settings)
    what = "row" if arguments.format == "rows" else "response"
    apart = f", those that are errors to {errors}" if errors else ""
    sys.stderr.write(f"{plural(count, what)} written to {file}{apart}\n")
    return 0


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises InputError for flags that do not go together."""
    if arguments.model is not None and arguments.format != "openai":
        raise InputError("--model is for --format openai: rows have token ids, which need no checkpoint")
    listed, files = arguments.ids, filter(None, (arguments.file, arguments.errors))
    if listed is not None and any(Path(file).exists() and Path(file).samefile(listed) for file in files):
        raise InputError(f"{listed} holds the ids, which would be lost: name another file")


def _check_prompts(output: Path, target: Path) -> None:
    """Raises InputError if the file to write is the run's own prompts, which would be lost."""
    if not target.is_file():
        return
    prompts, files = None, []
    with contextlib.suppress(InputError, OSError, LookupError, ValueError):  # export says what is wrong with the output
        first = output if output.exists() else part_files(parts_folder(output))[0]
        with Looker() as looker, open_generations(first, looker) as file:
            prompts = str(json.loads(file.attrs["header"])["prompts"])
            files = [Path(one["file"]).resolve() for one in json.loads(file.attrs.get("prompt_files", "[]"))]
    same_size = prompts is not None and prompts.endswith(f" of {target.stat().st_size} bytes")
    if target.resolve() in files or (same_size and prompts == content_key(target, content_hash(target))):
        raise InputError(f"{target} holds the prompts of {output}, which would be lost: name another file")
