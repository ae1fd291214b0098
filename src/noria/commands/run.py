"""Generates: reads a file of prompts, runs the model over the ring of ranks, writes the generations to HDF5.

Start it with mpirun, one rank per GPU; without mpirun it runs as one rank. Every key of the run file is a flag too.
"""

import argparse
import sys
import traceback
import typing
from dataclasses import MISSING, fields

from noria import config as configuration
from noria import progress
from noria.config import SECTIONS, Config, InputError
from noria.launch import mpi
from noria.run import run as run_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", nargs="?", metavar="RUN.toml", help="the run file; flags go over it")
    _add_flags(parser.add_argument_group("run"), Config)
    for section, kind in SECTIONS.items():
        _add_flags(parser.add_argument_group(f"[{section}]"), kind)


def run(arguments: argparse.Namespace) -> int:
    """The exit code of this rank. An exception other than a user's error ends all ranks at once."""
    try:
        flags = {name: value for name, value in vars(arguments).items() if name != "run_file" and value is not None}
        config = configuration.load(arguments.run_file, flags)
        return run_job(config, mpi.start())
    except InputError as error:
        if mpi.launched_rank() == 0:
            sys.stderr.write(f"noria: {error}\n")
        return 2
    except BaseException as error:
        rank, size = mpi.launched_rank(), max(mpi.launched(), 1)
        progress.log(rank, size, f"failed: {type(error).__name__}: {error}\n{traceback.format_exc()}")
        mpi.abort(1)
        return 1


def _add_flags(group, kind: type) -> None:
    hints = typing.get_type_hints(kind)
    for key in fields(kind):
        if key.name in SECTIONS:
            continue
        default = "" if key.default in (None, MISSING) else f" (default: {key.default})"
        flag, help = "--" + key.name.replace("_", "-"), key.metadata["help"].replace("%", "%%") + default
        if hints[key.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            choices = f"{{{','.join(key.metadata['choices'])}}}" if key.metadata["choices"] else key.name.upper()
            group.add_argument(flag, type=_reader(hints[key.name], flag), metavar=choices, help=help)


def _reader(kind, flag: str):
    """Turns a flag's text into the key's type. Raises InputError that names the flag."""
    kinds = typing.get_args(kind) or (kind,)

    def read(text: str):
        if list in kinds and text.replace(",", "").isdigit():
            return [int(part) for part in text.split(",")]
        number = next((k for k in (int, float) if k in kinds), str)
        try:
            return number(text)
        except ValueError:
            raise InputError(f"{flag} {text}: it must be {number.__name__}") from None

    return read
