"""Follows the output of a run while it works: each finished row goes to a file as soon as it is sealed.

Reads sealed parts and the finished output, changes nothing there, and knows no run: it may begin before one, go on over
several jobs, and ends when the output is whole.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from noria.errors import InputError
from noria.output.agreement import differing
from noria.output.export import as_object, line_of
from noria.output.generations import NewerVersion, open_generations
from noria.output.growing import GrowingFile, GrowingStream, digest_of
from noria.output.schema import Generation
from noria.output.sealed import (
    MAX_SAMPLES,
    TODO,
    Gone,
    Part,
    gather,
    part_files,
    parts_folder,
    reading,
    scan_one,
    select,
)
from noria.output.wanted import WantedRows
from noria.tools.looking import Looker
from noria.tools.text import plural

_ANOTHER = "name another file"
_MAY_CHANGE = ("prompts", "chat.date", "sampling.seed")  # in a run that goes on


@dataclass(eq=False)
class Following:
    """The rows of one output that are written already. `check` is told the header of the run before anything is written;
    `stopped` says whether to leave off."""

    source: Path
    file: GrowingFile | GrowingStream
    wanted: WantedRows
    looker: Looker
    report: Callable[[str], None]
    check: Callable[[Mapping[str, Any]], None] = lambda header: None
    stopped: Callable[[], bool] = lambda: False
    num_written: int = 0
    _read: set[tuple[object, ...]] = field(default_factory=set)  # parts that need not be read again
    # Keys of the rows that are written as done.
    _done: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _errors: dict[int, int] = field(default_factory=dict)  # the lines, as digests, of those that are written as errors
    _header: dict[str, Any] | None = None

    def begin(self) -> None:
        """Compares the rows of the file with those that are there. Raises InputError if they are another run's."""
        while self.file.had.num_rows and not self.stopped():
            with contextlib.suppress(Gone):
                self._compare()
                break

    def _compare(self) -> None:
        had, found = self.file.had, 0
        for path in self._places():
            part = self._open(path)
            if part is not None:
                found += int((part.status != TODO).sum())
                self._take(part, write=False)
        if self.stopped():
            return
        self._check_rows()
        if found and not had.num_met:
            rows = plural(had.num_rows, "row")
            raise InputError(f"{self.file} holds {rows}, and none is of {self.source}: {_ANOTHER}")

    def _check_rows(self) -> None:
        if (other := self.file.had.other()) is not None:
            raise InputError(
                f"{self.file} holds row {other!r} otherwise than {self.source}, of another run: {_ANOTHER}"
            )

    def step(self) -> bool:
        """Writes the rows that were sealed since. Returns whether the output is whole, and all of it written."""
        with contextlib.suppress(Gone):
            for path in self._places():
                key, part = _key(path), self._open(path)
                if part is not None:
                    self._take(part, write=True)
                    if self.stopped():
                        return False
                    self._read.add(key)
                if path == self.source:
                    return True
        return False

    def _places(self) -> list[Path]:
        """The finished output alone, else its parts that are not read yet, in order."""
        if self.source.exists():
            return [self.source]
        return [path for path in part_files(parts_folder(self.source)) if _key(path) not in self._read]

    def _open(self, path: Path) -> Part | None:
        """The part; None if it is damaged, which is told once: its rows are generated again. Raises Gone."""
        key = _key(path)
        try:
            with reading(path):
                part = scan_one(path, looker=self.looker)
        except (NewerVersion, Gone):
            raise
        except (InputError, OSError) as error:
            if path == self.source:
                raise
            self.report(f"part left out, its rows are generated again: {error}")
            self._read.add(key)
            return None
        self._check_run(part)
        return part

    def _check_run(self, part: Part) -> None:
        if self._header is None:
            self.check(part.header)
            self._header = part.header
            if self.file.repair():
                self.report(f"{self.file}: its last line was not whole and is repaired")
        names = differing(self._header, part.header, but=_MAY_CHANGE)
        if names:
            raise InputError(f"{self.source} is of another run now ({', '.join(names)} differ): {_ANOTHER}")

    def _take(self, part: Part, write: bool) -> None:
        """Writes the part's rows that are not written yet, or only meets those that the file has. Raises Gone."""
        selection = select([part])
        fresh = np.flatnonzero(~np.isin(selection.row * MAX_SAMPLES + selection.sample, self._done))
        names = ("part", "position", "row", "sample", "num_tokens", "num_prompt_tokens")
        fields = {name: getattr(selection, name)[fresh] for name in names}
        done: list[int] = []
        try:
            with reading(part.path):
                file = open_generations(part.path)
            with file:
                for block in gather([part], replace(selection, **fields), [file]):
                    if self.stopped():
                        break
                    done += self._take_rows(block, write)
        finally:
            self._done = np.union1d(self._done, np.array(done, np.int64))

    def _take_rows(self, block: list[Generation], write: bool) -> list[int]:
        """Writes these rows, or only meets them. Returns the keys of those that are written as done now."""
        lines: list[bytes] = []
        done: list[int] = []
        errors: dict[int, int] = {}
        for row in block:
            line, key = line_of(as_object(row)) if self.wanted.takes(row) else b"", row.row * MAX_SAMPLES + row.sample
            met = bool(line) and self.file.had.meet(row, line)
            again = row.status == "error" and self._errors.get(key) == digest_of(line)
            if not again and (write or met or not line):
                lines += [line] if line and not met else []
                done += [key] if row.status == "done" else []
                errors |= {key: digest_of(line)} if row.status == "error" else {}
        if write:
            self._check_rows()
        if lines:
            self.file.append(lines)
        self.num_written += len(lines)
        self._errors.update(errors)
        return done


def _key(path: Path) -> tuple[object, ...]:
    """What tells a part from another one that has its name later, in a run that began anew."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return path.name, found.st_size, found.st_mtime_ns
    return (path.name,)


def follow(following: Following, wait: Callable[[], bool]) -> bool:
    """Writes rows until the output is whole; then True. `wait` lets time pass between two looks, and says whether to go on.

    Raises InputError for what is no output and for another run's, OSError where the file takes no more.
    """
    following.begin()
    told = False
    while not following.step():
        if not told and not parts_folder(following.source).is_dir() and not following.source.exists():
            following.report(f"{following.source} is not there yet: waiting for its run")
            told = True
        if not wait():
            return False
    return True
