"""Writes generations for other programs, in the order of the prompts: .jsonl, .csv or .parquet, by the file's name."""

import argparse
import sys

from noria.files.export import FORMATS, export
from noria.text import plural


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "output", metavar="OUT.h5", help="output of noria run; one that is not finished gives the rows it has so far"
    )
    parser.add_argument(
        "file", metavar="FILE", help="file to write: .jsonl, .csv or .parquet (needs pyarrow); replaced if it is there"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="rows", help="openai: responses to a batch, all samples of a prompt in one"
    )


def run(arguments: argparse.Namespace) -> int:
    count = export(arguments.output, arguments.file, format=arguments.format)
    sys.stderr.write(
        f"{plural(count, 'row' if arguments.format == 'rows' else 'response')} written to {arguments.file}\n"
    )
    return 0
