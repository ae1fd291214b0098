"""Tells how a run went: what ran, planned against measured, where each rank's time went, tokens/s over time, lengths, finish
reasons, errors and some generations; of a run that is not finished, as far as it is.
"""

import argparse
import sys
from pathlib import Path

from noria.errors import require
from noria.report.facts import facts_of
from noria.report.page import page_of
from noria.report.terminal import lines_of
from noria.tools.atomic import check_file, write_whole
from noria.tools.text import nbytes_words

SUFFIXES = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUT.h5", help="output of noria run, finished or not")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write the report as one page of HTML, without scripts; an existing file is replaced",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.html is None:
        sys.stdout.writelines(f"{line}\n" for line in lines_of(facts_of(arguments.output)))
        return 0
    target = arguments.html
    require(
        target.suffix.lower() in SUFFIXES,
        f"--html {target}: a page is a file of HTML: name it {target.stem or 'run'}.html",
    )
    check_file(target)
    content = page_of(facts_of(arguments.output)).encode(errors="replace")
    write_whole(target, content)
    sys.stderr.write(f"report written to {target} ({nbytes_words(len(content))})\n")
    return 0
