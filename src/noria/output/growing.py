"""A file of exported rows that grows line by line: what it has already, its last line where a kill cut it, its one writer.

Knows exported rows as lines; nothing of the output that they come from.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from noria.errors import InputError
from noria.output.schema import Generation
from noria.tools.lock import PATIENCE
from noria.tools.writing import write_error, writing

_KEYS = ("id", "sample", "status", "finish_reason", "prompt", "text", "token_ids")  # of every exported row
_BEGINNING = re.compile(rb'\{"id": "(?:[^"\\]|\\.)*"(?=(.*))', re.DOTALL)
_BUSY = (errno.EAGAIN, errno.EACCES)


class RowsHad:
    """The rows of a file, as hashes of their lines: 200 bytes a row, until it is met."""

    def __init__(self) -> None:
        self._lines: dict[int, list[int]] = {}
        self.num_rows = self.num_met = 0
        self._other: dict[int, str] = {}  # the ids of rows that stand there otherwise

    def add(self, row: dict[str, Any], line: bytes) -> None:
        self._lines.setdefault(_key(row["id"], row["sample"], row["status"]), []).append(digest_of(line))
        self.num_rows += 1

    def meet(self, row: Generation, line: bytes) -> bool:
        """Whether the row stands there. Each line is met once."""
        key, digest = _key(row.id, row.sample, row.status), digest_of(line)
        lines = self._lines.get(key, [])
        if digest in lines:
            lines.remove(digest)
            if not lines:
                del self._lines[key]
            self.num_met += 1
            return True
        if lines and row.status == "done":  # an error may be another, after it was tried again
            self._other[key] = row.id
        return False

    def other(self) -> str | None:
        """The id of a row that stands there otherwise than it was met, if there is one."""
        return next((id for key, id in self._other.items() if key in self._lines), None)


class GrowingFile:
    """A `.jsonl` file to which exported rows are appended, this process alone. A context manager.

    `had`: the rows that it holds. `repair` takes a last line away that was cut; before it nothing is changed. Raises
    InputError for a link, for what is no regular file, for one that holds anything else than exported rows, and for one that
    another process writes or that cannot be made.
    """

    def __init__(self, path: Path):
        self.path, self.had = path, RowsHad()
        self._cut_at: int | None = None
        self._lacks_end = False
        if path.is_symlink():
            raise InputError(f"{path} is a link: name the file itself")
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise InputError(str(write_error(error, path))) from error
        try:
            self._open()
        except BaseException:
            os.close(self._handle)
            raise

    def __str__(self) -> str:
        return str(self.path)

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def repair(self) -> bool:
        """Makes the last line whole, or takes it away. Returns whether there was something to do. Raises as `append`."""
        found = self._lacks_end or self._cut_at is not None
        if self._cut_at is not None:
            os.ftruncate(self._handle, self._cut_at)
        if self._lacks_end:
            self.append([b"\n"])
        self._cut_at, self._lacks_end = None, False
        return found

    def append(self, lines: Sequence[bytes]) -> None:
        """Adds whole lines and brings them to the disk. Raises WriteError; OSError if the file was moved away meanwhile."""
        if not self._is_there():
            raise FileNotFoundError(
                errno.ENOENT, "it was removed or replaced: follow again to write it anew", str(self.path)
            )
        data = memoryview(b"".join(lines))
        with writing(self.path, len(data)):
            while data:
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)

    def _open(self) -> None:
        if not stat.S_ISREG(os.fstat(self._handle).st_mode):
            raise InputError(f"{self.path} is not a regular file: name a file")
        self._lock()
        end = 0
        for number, line in enumerate(self._lines(), 1):
            if line.endswith(b"\n"):
                self.had.add(self._row(line, number), line)
                end += len(line)
            elif _is_cut(line):
                self._cut_at = end
            else:
                self.had.add(self._row(line, number), line + b"\n")
                self._lacks_end = True

    def _lock(self) -> None:
        """Raises InputError where another process has the file still after PATIENCE seconds: one that was killed may take a
        moment to end. A file system without locks is used without."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _BUSY and time.monotonic() > end:
                    raise InputError(f"{self.path} is being written by another process: name another file") from error
                if error.errno in _BUSY:
                    time.sleep(0.05)
                    continue
            return

    def _lines(self) -> Iterator[bytes]:
        with open(self._handle, "rb", closefd=False) as file:
            yield from file

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or any(name not in row for name in _KEYS):
            raise InputError(f"{self.path}, line {number}: it is no exported row: name a file of its own for them")
        return row

    def _is_there(self) -> bool:
        with contextlib.suppress(OSError):
            named, own = os.lstat(self.path), os.fstat(self._handle)
            return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)
        return False


class GrowingStream:
    """The same on stdout, which holds nothing yet."""

    def __init__(self) -> None:
        self.had = RowsHad()

    def __str__(self) -> str:
        return "stdout"

    def __enter__(self) -> "GrowingStream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def repair(self) -> bool:
        """Nothing is to be done."""
        return False

    def append(self, lines: Sequence[bytes]) -> None:
        """Writes lines, for whoever reads them now."""
        sys.stdout.buffer.writelines(lines)
        sys.stdout.buffer.flush()


def _is_cut(line: bytes) -> bool:
    """Whether a line without an end is the beginning of an exported row, and no JSON of its own."""
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(line)
        return False
    found, first, then = _BEGINNING.match(line), b'{"id": "', b', "sample": '
    return found[1][: len(then)] == then[: len(found[1])] if found else line[: len(first)] == first[: len(line)]


def _key(id: object, sample: object, status: object) -> int:
    return xxhash.xxh3_64_intdigest(f"{id}\0{sample}\0{status}".encode(errors="surrogatepass"))


def digest_of(line: bytes) -> int:
    """What stands for a line where it need not be kept."""
    return xxhash.xxh3_64_intdigest(line)
