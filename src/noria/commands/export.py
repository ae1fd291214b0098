"""Writes generations for other programs, in the order of the prompts. The file's name gives the format."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from noria.errors import InputError
from noria.output.export import FORMATS, export
from noria.output.generations import open_generations
from noria.output.sealed import part_files, parts_folder
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


def run(arguments: argparse.Namespace) -> int:
    if Path(arguments.output).is_file():
        with Looker() as looker:
            looker.look(Path(arguments.output))
    _check_prompts(Path(arguments.output), Path(arguments.file))
    count = export(arguments.output, arguments.file, format=arguments.format)
    sys.stderr.write(
        f"{plural(count, 'row' if arguments.format == 'rows' else 'response')} written to {arguments.file}\n"
    )
    return 0


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
