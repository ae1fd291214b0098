"""The formats of prompts, one a file: SUFFIXES, read(path, names) -> rows, count(path, names) -> number of rows. A table
that has none of the columns `names` is refused.

Here is what they share: finding the reader of a file, a bad row, and lines in bounded memory. Knows no key of a row.
"""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeAlias

from noria import kinds
from noria.errors import InputError, require
from noria.readers._known import Known, KnownFile, for_library, know
from noria.readers._published import OWN, flag_for, folded, table_without
from noria.readers._zstd import MAGIC, Decompressed

__all__ = [
    "OWN",
    "PROMPT_NAMES",
    "AnyPath",
    "BadRow",
    "Known",
    "flag_for",
    "folded",
    "for_library",
    "for_path",
    "know",
    "lines",
    "opened",
    "table_without",
    "too_long",
]

AnyPath: TypeAlias = str | os.PathLike[str]  # of a file as it is, or a Known one
MAX_LINE_NBYTES = 16 * 2**20  # a longer line is a bad row: memory must not grow with the file
PROMPT_NAMES = OWN[1:]  # a table has a column of one of these names, if a run names no other
DAMAGED = (OSError, EOFError, zlib.error)  # what reading on may raise where a file is damaged
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read, and why; `id`: the id that it gave itself, if it came so far."""

    error: str
    id: str | int | None = None


def own_id(value: object) -> str | int | None:
    """A row's id as BadRow has it: None for what is no id."""
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


class Request(dict[str, Any]):
    """A row that was a line of OpenAI's batch format: what it leaves open is OpenAI's default."""


def for_path(path: AnyPath) -> ModuleType:
    """The reader of this file, by its suffix. Raises InputError that names the known ones."""
    readers = [kinds.load("readers", name) for name in kinds.names("readers")]
    for reader in readers:
        if str(path).lower().endswith(reader.SUFFIXES):
            return reader
    known = ", ".join(suffix for reader in readers for suffix in reader.SUFFIXES)
    raise InputError(f"prompts {path}: unknown kind of file; its name must end in one of {known}")


def lines(path: AnyPath, ends: bool = False) -> Iterator[bytes | None]:
    """The lines of a file without a BOM, decompressed as `opened` does; without their ends (\\n or \\r\\n), or with `ends`.

    None stands for a line above MAX_LINE_NBYTES. Raises InputError for a file that cannot be read or is damaged.
    """
    with opened(path) as file:
        number = 0
        try:
            while line := file.readline(MAX_LINE_NBYTES):
                number += 1
                if number == 1:
                    line = line.removeprefix(_BOM)
                whole = line.endswith(b"\n") or len(line) < MAX_LINE_NBYTES
                if not whole:
                    _skip_line(file)
                line = line if ends else line.removesuffix(b"\n").removesuffix(b"\r")
                yield line if whole else None
        except DAMAGED as error:
            raise damaged(path, f"line {number}", error) from error


def damaged(path: AnyPath, place: str, error: Exception) -> InputError:
    """What is said of a file that cannot be read on."""
    return InputError(f"prompts {path}: cannot be read after {place} ({error}): the file is damaged or was cut short")


def too_long(number: int) -> str:
    """The error of a line that `lines` left out."""
    return f"line {number} is longer than {MAX_LINE_NBYTES // 2**20} MiB"


@contextmanager
def opened(path: AnyPath) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed if it begins as gzip or Zstandard do. Raises InputError for what is no file of text."""
    known, path = path, Path(path)
    try:
        require(path.exists(), f"prompts {path}: no such file")
        require(path.is_file(), f"prompts {path}: not a regular file; it is read more than once")
        raw = KnownFile(known) if isinstance(known, Known) else io.FileIO(path)
        with io.BufferedReader(raw, 2**20) as plain:
            start = plain.peek(2)[:2]
            require(
                start not in (b"\xff\xfe", b"\xfe\xff"),
                f"prompts {path}: UTF-16 text; convert it with: iconv -f UTF-16 -t UTF-8",
            )
            if plain.peek(4)[:4] == MAGIC:
                yield io.BufferedReader(Decompressed(plain, str(path)), 2**20)
            else:
                zipped = start == b"\x1f\x8b"
                yield io.BufferedReader(gzip.GzipFile(fileobj=plain), 2**20) if zipped else plain
    except OSError as error:
        raise InputError(f"prompts {path}: {error.strerror or error}") from error


def _skip_line(file: BinaryIO) -> None:
    while rest := file.readline(2**20):
        if rest.endswith(b"\n"):
            return
