"""Writes what is made of the help texts: the man page src/noria.1, and the table of keys in inputs/README.md.

    python jobs/local/manuals.py

The wheel installs the man page. tests/test_manuals.py compares both with what this script makes.
"""

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import noria
from noria.__main__ import COMMANDS
from noria.commands import flags, keys
from noria.commands.parser import Parser

ROOT = Path(__file__).parent.parent.parent
MAN_PAGE, PROMPTS = ROOT / "src" / "noria.1", ROOT / "inputs" / "README.md"
TABLE = re.compile(r"(?<=<!-- keys of a row -->\n\n).*(?=\n<!-- end of the keys -->)", re.DOTALL)
EXIT_STATUS = {
    "0": "the run is finished",
    "65": "the run is finished, but every row is an error (with --fail-on-errors: at least one row)",
    "75": "the run stopped before its end, by its walltime or a signal; the same command continues it",
    "2": "the input is wrong; one line says what, where and how to correct it",
    "1": "any other failure",
}
FILES = {
    "RUN.toml": "a run file: model, prompts and output, and any other key of a run",
    "OUT.h5": "the output of a finished run",
    "OUT.h5.parts/": "the rows of a run that is not finished; noria inspect, noria export and the next noria run read it",
}
EXAMPLES = (
    "noria convert HF_DIR model.h5",
    "noria validate RUN.toml",
    "noria plan RUN.toml --ranks 4",
    "mpirun -n 4 noria run RUN.toml",
    "noria inspect run.h5",
    "noria export run.h5 run.jsonl",
)


def man_page() -> str:
    """The man page noria(1) as roff."""
    lines = [f'.TH NORIA 1 "" "noria {noria.__version__}" "User Commands"']
    lines += [".SH NAME", "noria \\- generates text with language models too large for one GPU, as an MPI batch job"]
    lines += [".SH SYNOPSIS"]
    for name in COMMANDS:
        lines += [f"\\fBnoria {name}\\fR {_roff(' '.join(_arguments(name)))}", ".br"]
    lines += ["\\fBnoria help\\fR [COMMAND|keys]", ".SH COMMANDS"]
    for name in COMMANDS:
        lines += _command(name)
    lines += [".SH KEYS", "Every key of a run file is a flag of noria run, noria validate and noria plan.", *_keys()]
    for title, entries in (("EXIT STATUS", EXIT_STATUS), ("FILES", FILES)):
        lines += [f".SH {title}"]
        for name, words in entries.items():
            lines += _entry(f"\\fB{_roff(name)}\\fR", words)
    lines += [".SH EXAMPLES", ".nf", *map(_roff, EXAMPLES), ".fi"]
    lines += [".SH SEE ALSO", "\\fBmpirun\\fR(1), \\fBsbatch\\fR(1), \\fBqsub\\fR(1)"]
    return "\n".join(lines) + "\n"


def row_table() -> str:
    """The keys that a row may have, as a table in Markdown."""
    lines = ["| key | type | default | vLLM | meaning |", "|---|---|---|---|---|"]
    for key in keys.table():
        if key.row == "yes":
            cells = (f"`{key.name}`", key.type, key.default, key.vllm, key.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', ' or ') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _parser(name: str) -> Parser:
    command = importlib.import_module(f"noria.commands.{name}")
    parser = Parser(f"noria {name}", description=command.__doc__)
    command.add_arguments(parser)
    return parser


def _own(name: str) -> list[argparse.Action]:
    """The arguments of a command that are no keys of a run."""
    actions = [action for action in _parser(name)._actions if action.dest != "help"]
    if not any(action.dest == "run_file" for action in actions):
        return actions
    known = {key.flag for key in keys.table()}
    return [action for action in actions if not known & set(action.option_strings)]


def _arguments(name: str) -> Iterator[str]:
    """The words of a command's usage."""
    flagged = [action for action in _own(name) if action.option_strings]
    yield from (f"{action.option_strings[0]} {action.metavar}" for action in flagged if action.required)
    if any(not action.required for action in flagged):
        yield "[options]"
    for action in _own(name):
        if not action.option_strings:
            yield f"[{action.metavar}]" if action.nargs == "?" else f"{action.metavar}{' ...' * (action.nargs == '+')}"
        if action.dest == "run_file":
            yield "[--key value ...]"


def _command(name: str) -> Iterator[str]:
    yield f".SS noria {name}"
    for paragraph in (_parser(name).description or "").strip().split("\n\n"):
        yield from (".PP", _roff(" ".join(paragraph.split())))
    for action in _own(name):
        value = str(action.metavar or "|".join(action.choices or ()))
        flag = ", ".join(f"\\fB{_roff(flag)}\\fR" for flag in action.option_strings)
        taken = f"\\fI{_roff(value)}\\fR" if action.nargs != 0 else ""
        yield from _entry(f"{flag} {taken}".strip(), action.help or "")


def _keys() -> Iterator[str]:
    """Every key: its flag, with the help of that, whether a row may have it, and its name in vLLM."""
    parser, section = argparse.ArgumentParser(), ""
    flags.add_arguments(parser)
    help_of = {action.option_strings[0]: action.help or "" for action in parser._actions if action.option_strings}
    for key in keys.table():
        if key.section != section:
            section = key.section
            yield f".SS {'top of the run file' if section == '-' else f'[{section}]'}"
        switch = f", \\fB{_roff('--no-' + key.flag[2:])}\\fR"
        value = switch if key.type == "true|false" else f" \\fI{_roff(key.type)}\\fR"
        notes = [help_of[key.flag] + ".", *["A row may have this key."] * (key.row == "yes")]
        notes += [f"In vLLM: {key.vllm}."] * (key.vllm not in ("-", key.name))
        yield from _entry(f"\\fB{_roff(key.flag)}\\fR{value}", " ".join(notes))


def _entry(term: str, words: str) -> list[str]:
    return [".TP", term, _roff(words.replace("%%", "%"))]


def _roff(text: str) -> str:
    """Text that roff prints as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("'", "\\(aq")
    return re.sub(r"^(?=[.'])", r"\\&", text)


if __name__ == "__main__":
    MAN_PAGE.write_text(man_page())
    PROMPTS.write_text(TABLE.sub(lambda _: row_table(), PROMPTS.read_text()))
