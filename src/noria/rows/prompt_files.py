"""The files of a run's prompts, in order: which they are, how many rows they have, and what tells them from others.

Knows no key of a row.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import xxhash

from noria import readers
from noria.errors import InputError, require
from noria.readers import AnyPath, BadRow, Known
from noria.rows.columns import Columns
from noria.tools.changes import look_of
from noria.tools.text import plural

EXTENDABLE = (".jsonl", ".ndjson", ".txt")  # more bytes after a line's end leave its rows as they were
MAX_FILES = 10_000


@dataclass(frozen=True)
class PromptFiles:
    """Where a run's prompts come from. `limit`: rows that are read at most (None: all). `known`: the files as they were
    when they were hashed, which are read as such; or nothing."""

    paths: tuple[str, ...]
    columns: Columns = Columns()
    limit: int | None = None
    strict_keys: bool = False
    known: tuple[Known, ...] = ()

    @property
    def readable(self) -> Sequence[AnyPath]:
        """What readers are given."""
        return self.known or self.paths

    def __str__(self) -> str:
        if len(self.paths) == 1:
            return self.paths[0]
        return f"{plural(len(self.paths), 'file')} ({self.paths[0]} to {self.paths[-1]})"

    @property
    def names(self) -> tuple[str, ...]:
        """What each file is called in ids and errors: its name, or its path where two files have one name."""
        short = [Path(file).name for file in self.paths]
        return tuple(short if len(set(short)) == len(short) else self.paths)


def as_files(prompts: PromptFiles | str | Path) -> PromptFiles:
    """These files, or one file as such."""
    return prompts if isinstance(prompts, PromptFiles) else PromptFiles((str(prompts),))


def files_of(prompts: str | list[str]) -> tuple[str, ...]:
    """The files that a run names, in the order that it names them in; those of a pattern by name, numbers by their value.

    Raises InputError for a pattern that no file matches, and for a file that is named twice.
    """
    files = [file for pattern in ([prompts] if isinstance(prompts, str) else prompts) for file in _matches(pattern)]
    require(
        len(files) <= MAX_FILES, f"prompts: {len(files):,} files, at most {MAX_FILES:,} are read: join some of them"
    )
    seen: set[str] = set()
    for file in files:
        require(file not in seen, f"prompts {file}: the file is named twice")
        seen.add(file)
    return tuple(files)


def _matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [pattern]
    found = sorted((file for file in glob.glob(pattern, recursive=True) if Path(file).is_file()), key=_natural)
    require(found, f"prompts {pattern}: no file matches")
    return found


def _natural(name: str) -> list[Any]:
    """The order in which people number files: part-2 before part-10."""
    pieces = re.split(r"([0-9]+)", name)
    return [(int(piece), piece) if place % 2 else piece for place, piece in enumerate(pieces)]


def records(files: PromptFiles) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """The rows of all files in order, each with the number of its file. Raises InputError as the readers do."""

    def of_all_files() -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        for number, file in enumerate(files.readable):
            for record in readers.for_path(file).read(file, files.columns.of_a_table):
                yield number, record

    return islice(of_all_files(), files.limit)


def check_files(files: PromptFiles) -> None:
    """Raises InputError for a file that is missing or of an unknown kind."""
    for file in files.readable:
        readers.for_path(file)
        with readers.opened(file):
            pass


def hashed(files: PromptFiles) -> PromptFiles:
    """The files, with what its files hold now: from here on that is read, or errors.Changed is raised.

    Raises InputError as check_files, and for a file that cannot be read.
    """
    check_files(files)
    return replace(files, known=tuple(map(_know, files.paths)))


def _know(file: str) -> Known:
    try:
        return readers.know(file)
    except OSError as error:
        raise InputError(f"prompts {file}: {error.strerror or error}") from error


class Watch:
    """Looks whether files that were hashed are what they were. A mere touch, and a copy of the same, is no change."""

    def __init__(self, files: PromptFiles):
        self._looks = {known: known.look for known in files.known}

    def changed(self) -> Known | None:
        """The first file that is another now: one that looks otherwise, and holds other bytes."""
        for known, before in self._looks.items():
            try:
                look = look_of(os.stat(known.path))
            except OSError:
                return known
            if look != before:
                if not known.is_same():
                    return known
                self._looks[known] = look
        return None


def counts(prompts: PromptFiles | str | Path) -> list[int]:
    """The number of rows of each file, counted without parsing them. Raises InputError as open_prompts does."""
    files = as_files(prompts)
    check_files(files)
    if files.limit is not None:
        found = [0] * len(files.paths)
        for number, _ in records(files):
            found[number] += 1
        return found
    return [readers.for_path(file).count(file, files.columns.of_a_table) for file in files.readable]


def count(prompts: PromptFiles | str | Path) -> int:
    """The number of rows of all files."""
    return sum(counts(prompts))


def prompt_files(files: PromptFiles, by_file: list[int]) -> list[dict[str, Any]]:
    """The files of several, their first rows and numbers of rows, as an output tells them; of one file nothing."""
    firsts = accumulate(by_file, initial=0)
    told = zip(files.paths, firsts, by_file, strict=False)
    return [{"file": file, "first_row": first, "rows": rows} for file, first, rows in told] if len(by_file) > 1 else []


def content_hash(prompts: PromptFiles | str | Path) -> str:
    """XXH3 (128 bits, hex) of a file's bytes as they are on disk; of several files that of their hashes and sizes.

    Raises InputError if one cannot be read.
    """
    files = as_files(prompts)
    if files.known:
        pairs = [(known.hash, known.nbytes) for known in files.known]
        return pairs[0][0] if len(pairs) == 1 else _hash_of(pairs)
    paths = files.paths
    return _file_hash(paths[0]) if len(paths) == 1 else _joined([(path, None) for path in paths])


def content_key(prompts: PromptFiles | str | Path, content: str) -> str:
    """What tells these prompts from others, with all that `extends` must know: the hash, its bytes and its files."""
    files = as_files(prompts)
    several = f" in {len(files.paths)} files" if len(files.paths) > 1 else ""
    sizes = [known.nbytes for known in files.known] or [Path(file).stat().st_size for file in files.paths]
    return f"{content} of {sum(sizes)} bytes{several}"


def extends(prompts: PromptFiles | str | Path, key: str) -> bool:
    """Whether the prompts begin with those that had this key: whole files, of which the last may have become longer by
    whole lines, and perhaps more files after them.

    Raises InputError for formats in which more bytes can change an old row: an open quotation mark of a CSV, a line that
    goes on in the next piece of a gzip file.
    """
    files = as_files(prompts).paths
    told = re.fullmatch(r"(\w+) of (\d+) bytes(?: in (\d+) files)?", key)
    if not told or int(told[3] or 1) > len(files):
        return False
    files = files[: int(told[3] or 1)]
    last = Path(files[-1])
    nbytes = int(told[2]) - sum(Path(file).stat().st_size for file in files[:-1])
    if not 0 <= nbytes <= last.stat().st_size:
        return False
    cut = [*((file, None) for file in files[:-1]), (files[-1], nbytes)]
    found = _file_hash(last, nbytes) if len(files) == 1 else _joined(cut)
    return found == told[1] and (nbytes == last.stat().st_size or _ends_a_line(last, nbytes))


def _ends_a_line(path: Path, nbytes: int) -> bool:
    """Whether a file's first bytes end with a line. Raises InputError if it has no rows that are lines."""
    if path.suffix not in EXTENDABLE:
        raise InputError(
            f"prompts {path}: job.extend needs a format whose rows are lines ({', '.join(EXTENDABLE)}), or new files after"
            f" the old ones: in {path.suffix} an old row may change; put the new rows in a file of their own"
        )
    with open(path, "rb") as file:
        file.seek(max(nbytes - 1, 0))
        border = file.read(2)
    return b"\n" in border


def _joined(files: list[tuple[str, int | None]]) -> str:
    """The hash of several files' hashes and sizes; of each file its first bytes, or all (None)."""
    sizes = [Path(file).stat().st_size if nbytes is None else nbytes for file, nbytes in files]
    return _hash_of([(_file_hash(*one), size) for one, size in zip(files, sizes, strict=True)])


def _hash_of(files: list[tuple[str, int]]) -> str:
    digest = xxhash.xxh3_128()
    for found, nbytes in files:
        digest.update(f"{found} of {nbytes} bytes\n".encode())
    return digest.hexdigest()


def _file_hash(path: str | Path, nbytes: int | None = None) -> str:
    digest, left = xxhash.xxh3_128(), 2**63 if nbytes is None else nbytes
    try:
        with open(path, "rb", buffering=0) as file:
            while left and (piece := file.read(min(2**22, left))):
                digest.update(piece)
                left -= len(piece)
    except OSError as error:
        raise InputError(f"prompts {path}: {error.strerror or error}") from error
    return digest.hexdigest()
