"""`noria export OUT.h5 FILE.jsonl`: generations for other programs, in the order of the prompts."""

import argparse
import sys

from noria.files.export import export
from noria.text import plural

HELP = "write generations as JSON lines, in the order of the prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "output", metavar="OUT.h5", help="output of noria run; one that is not finished gives the rows it has so far"
    )
    parser.add_argument(
        "file", metavar="FILE.jsonl", help="file to write, one JSON object a row; replaced if it is there"
    )


def run(arguments: argparse.Namespace) -> int:
    count = export(arguments.output, arguments.file)
    sys.stderr.write(f"{plural(count, 'row')} written to {arguments.file}\n")
    return 0
