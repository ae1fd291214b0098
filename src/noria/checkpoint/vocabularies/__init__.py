"""Tokenizers in the formats of their makers' own programs, made into a tokenizer.json. A format a file.

A file has

    NAMES           of the files that it reads
    has(content)    whether a file's bytes are of this format: files of several have the same name
    made(directory, name, settings) -> Made     of the file of this name; `settings`: tokenizer_config.json

`made` raises InputError, naming the file, for what it does not understand. What a directory has in Python is read where a
format says so, and never run.
"""

import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from noria import kinds
from noria.checkpoint.checkpoint import parse_json
from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.vocabularies._made import REMEDY, Made
from noria.errors import InputError

PACKAGE = "checkpoint.vocabularies"
_SETTINGS = "tokenizer_config.json"


def tokenizer_files(directory: Directory) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's files by name, as a checkpoint has them, and notes for the user.

    Where there is no tokenizer.json, nor what one is made of at a run's start, it is made here of a file of another format.
    Raises InputError for one that cannot be understood.
    """
    files = directory.tokenizer()
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= set(files):
        return files, []
    settings = parse_json(files.get(_SETTINGS, b"{}"), str(directory.path / _SETTINGS))
    tried = []
    for name, kind in _candidates():
        content = directory.content(name)
        if content is None:
            continue
        if not kind.has(content):
            tried.append(name)
            continue
        made: Made = kind.made(directory, name, settings)
        made_files = {"tokenizer.json": made.tokenizer, _SETTINGS: json.dumps(made.settings).encode()}
        return files | made_files, [f"tokenizer.json is made of {name}: {made.words}"]
    if tried:
        raise InputError(f"{directory.path / tried[0]} is a tokenizer of a format that is not known: {REMEDY}")
    return files, []


def file_names() -> list[str]:
    """The files that a tokenizer may be made of."""
    return [name for name, _ in _candidates()]


def _candidates() -> list[tuple[str, ModuleType]]:
    """Files and their formats, in the order in which they are looked for: by name."""
    formats = [kinds.load(PACKAGE, name) for name in kinds.names(PACKAGE)]
    return sorted(((name, kind) for kind in formats for name in kind.NAMES), key=lambda pair: pair[0])


def has_tokenizer(files: Mapping[str, Any]) -> bool:
    """Whether text can be made token ids by these files."""
    return "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= set(files)
