"""The flags of a run: every key of the run file, for the commands that take a run."""

import argparse
import json
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, replace
from typing import Any

from noria import config as configuration
from noria.commands.parser import once_for_each
from noria.config import SECTIONS, Config
from noria.errors import InputError
from noria.output.export import SUFFIXES
from noria.rows.prompt_files import files_of
from noria.tools.keys import WORDS, types_of

# What a flag takes: by its name where the type does not tell, else by the first of these types that it has.
_METAVARS = {
    **dict.fromkeys(
        ("model", "prompts", "output", "random_weights", "trace", "machine", "export", "json_schema"), "FILE"
    ),
    **dict.fromkeys(("gpu_memory", "cpu_memory"), "SIZE"),
    **dict.fromkeys(("weights", "cache"), "TIER=SHARE,..."),
    **dict.fromkeys(("prompt_column", "id_column", "messages_column"), "NAME"),
    "logit_bias": "ID=NUMBER,...",
    "planned": "NAME=NUMBER,...",
    "partition": "greedy|INT,...",
    "scratch": "DIR",
    "choice": "TEXT,...",
    "reasoning_markers": "START,END",
    "shard": "I/N",
    "walltime": "HH:MM:SS",
}
_WORDS = {str: "TEXT", list: "INT,...", int: "INT", float: "NUMBER"}


def add_arguments(parser: argparse.ArgumentParser, own: str = "") -> None:
    """Every key of a run as a flag. `own`: flags of the command's own that its usage names."""
    parser.usage = f"{parser.prog} {own}[RUN.toml] [--key value ...]"
    parser.add_argument("run_file", nargs="?", metavar="RUN.toml", help="the run file; flags override its keys")
    _add_flags(parser.add_argument_group("run"), Config)
    for section, kind in SECTIONS.items():
        _add_flags(parser.add_argument_group(f"[{section}]"), kind)


def load(arguments: argparse.Namespace, *own: str) -> Config:
    """The run that these arguments ask for, without those that are the command's `own`. Raises InputError.

    Patterns among the prompts become the files that they match now, so that a file that comes later changes no run.
    """
    flags = {name: value for name, value in vars(arguments).items() if name not in own and value is not None}
    run_file, prompts = flags.pop("run_file", None), flags.get("prompts", [])
    if run_file is None and len(prompts) > 1 and prompts[-1].endswith(".toml"):
        run_file, flags["prompts"] = prompts[-1], prompts[:-1]  # --prompts FILE RUN.toml
    exported = flags.get("export")
    if exported and run_file is not None and run_file.endswith(SUFFIXES):
        raise InputError(f"{run_file} is read as the run file: {once_for_each('--export', exported[-1], run_file)}")
    if len(flags.get("prompts", [])) == 1:
        flags["prompts"] = flags["prompts"][0]
    config = configuration.load(run_file, flags)
    files = files_of(config.prompts)
    return replace(config, prompts=list(files) if len(files) > 1 else files[0])


def _add_flags(group: argparse._ActionsContainer, kind: type) -> None:
    hints = types_of(kind)
    for key in fields(kind):
        if key.name in SECTIONS:
            continue
        default = "" if key.default in (None, MISSING) else f" (default: {key.default})"
        flag, help = flag_of(key.name), key.metadata["help"].replace("%", "%%") + default
        if key.name == "prompts":
            group.add_argument(flag, nargs="+", metavar="FILE", help=help)
        elif key.name == "export":
            group.add_argument(flag, action="append", metavar="FILE", help=help)
        elif hints[key.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            reader = _json if key.metadata["json"] else _reader(hints[key.name], key.metadata["text"])
            group.add_argument(flag, type=reader, metavar=metavar(key, hints[key.name]), help=help)


def metavar(key: Field[Any], kind: Any) -> str:
    """What kind of value a flag takes, as its help shows it."""
    kinds = typing.get_args(kind) or (kind,)
    if key.metadata["choices"]:
        return f"{{{','.join(key.metadata['choices'])}}}"
    if key.metadata["json"]:
        return "JSON"
    if key.name in _METAVARS:
        return _METAVARS[key.name]
    return next(word for one, word in _WORDS.items() if one in kinds)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _reader(kind: Any, is_text: bool) -> Callable[[str], Any]:
    """Turns a flag's text into the key's type. Raises ArgumentTypeError, to which argparse adds the flag."""
    kinds = typing.get_args(kind) or (kind,)

    def read(text: str) -> Any:
        number: type = next((k for k in (int, float) if k in kinds), str)
        if is_text and dict not in kinds:
            return text
        try:
            if dict in kinds:
                pairs = [one.partition("=") for one in text.split(",")]
                names = [name.strip() for name, _, _ in pairs]
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice:
                    raise argparse.ArgumentTypeError(f"{text!r}: {twice} is given twice")
                return {name.strip(): _share(value) if is_text else float(value) for name, _, value in pairs}
            if list in kinds and text.replace(",", "").isdigit():
                return [int(part) for part in text.split(",")]
            return number(text)
        except ValueError:
            wanted = "a list such as 10,10,9" if list in kinds else WORDS[number]
            if dict in kinds:
                wanted = (
                    "shares or sizes by tier, such as gpu=60,cpu=40"
                    if is_text
                    else "numbers by name, such as 50=-100,7=2.5"
                )
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {wanted}") from None

    return read


def _json(text: str) -> dict[str, Any]:
    """The JSON object of a flag. Raises ArgumentTypeError, to which argparse adds the flag."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text[:100]!r}: it must be a JSON object, such as '{{\"key\": false}}'")
    return value


def _share(text: str) -> float | str:
    """A share in %, or the text of a size. Raises ValueError for nothing."""
    if not text.strip():
        raise ValueError(text)
    try:
        return float(text)
    except ValueError:
        return text.strip()
