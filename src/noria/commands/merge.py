"""Joins the finished outputs of all shards of a run (noria run --shard i/n) into one output.

The result is the output that the run without shards would have written.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

from noria.launch.schedulers import job_ids
from noria.output.merge_shards import merge_shards
from noria.output.outcome import outcome_of
from noria.output.sealed import to_stderr
from noria.tools.lock import OutputLock
from noria.tools.provenance import now
from noria.tools.text import plural, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUT.h5", help="file to write; it must not exist")
    parser.add_argument(
        "shards",
        type=Path,
        nargs="+",
        metavar="SHARD.h5",
        help="the outputs of all shards, in any order; they are not changed",
    )
    parser.add_argument(
        "--fail-on-errors", action="store_true", help="exit with 65 if any row is an error (default: only if all are)"
    )


def run(arguments: argparse.Namespace) -> int:
    output, shards = arguments.output, arguments.shards
    job = next(iter(job_ids().values()), "")
    holder = {"job": job, "host": socket.gethostname(), "process": os.getpid(), "start": now()}
    with OutputLock(output, holder, to_stderr):
        count = merge_shards(shards, output, sys.argv)
    words = " is already the merge of these shards"
    if count is not None:
        words = f": {plural(count, 'row')} of {len(shards)} shards"
    outcome = outcome_of(output)
    said = [f"{output}{words}", *outcome.lines()]
    sys.stderr.write("".join(f"{printable(line)}\n" for line in said))
    return outcome.code(arguments.fail_on_errors)
