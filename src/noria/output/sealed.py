"""Reads the sealed parts of an output: what each holds, and each row once where several have it.

A run may put parts together, or merge all of them, while they are read. Knows the order of parts, nothing of how they are
written nor of the run that fills them.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from noria.errors import InputError
from noria.output.generations import Generations, NewerVersion, blocks, open_generations, verify_checksums
from noria.output.schema import STATUS, Generation, Scores
from noria.tools.atomic import real
from noria.tools.damage import damaged_is_input_error
from noria.tools.looking import Looker
from noria.tools.trailer import agrees

TODO, DONE, ERROR = STATUS.index("todo"), STATUS.index("done"), STATUS.index("error")
FINISHED_LEVEL = 2**30  # of an output that was finished once
MAX_SAMPLES = 2**20  # of one prompt, more than a run may have
PART_NAME = re.compile(r"part-(\d{6,})\.h5")
_TRIES = 5  # of who reads parts, which a run puts together a few times an hour
T = TypeVar("T")


def parts_folder(output: str | Path) -> Path:
    """Where the parts of an output lie; of one that is a link, beside the file that it leads to."""
    output = real(output)
    return output.with_name(output.name + ".parts")


def merged_folder(output: str | Path) -> Path:
    """The name that the folder takes before it is deleted, so that a half-deleted one is never taken for parts."""
    output = real(output)
    return output.with_name(output.name + ".parts.merged")


@dataclass(frozen=True, eq=False)
class Part:
    """What a sealed part holds, without its texts and tokens. [R] arrays, a value a row."""

    path: Path
    header: dict[str, Any]
    row: np.ndarray
    sample: np.ndarray
    status: np.ndarray
    num_tokens: np.ndarray
    num_prompt_tokens: np.ndarray
    scores: Scores
    level: int = 0  # how often its rows were put together from smaller parts
    replaces: tuple[str, ...] = ()  # the names of those parts, which may still be there after a kill


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows of many parts, each once, ordered by (row, sample). [R] arrays."""

    part: np.ndarray
    position: np.ndarray
    row: np.ndarray
    sample: np.ndarray
    num_tokens: np.ndarray
    num_prompt_tokens: np.ndarray
    num_repeated: int  # rows left out because an earlier part has them finished in the same way
    num_todo: int  # rows that stopped half-way and are in no part as finished


class RowSet(Set[tuple[int, int]]):
    """A set of (row, sample), 8 bytes each."""

    def __init__(self, row: np.ndarray, sample: np.ndarray):
        possible = (row >= 0) & (row < 2**63 // MAX_SAMPLES) & (sample >= 0) & (sample < MAX_SAMPLES)
        self._keys = np.unique(row[possible].astype(np.int64) * MAX_SAMPLES + sample[possible])

    def __contains__(self, row_and_sample: Any) -> bool:
        key = row_and_sample[0] * MAX_SAMPLES + row_and_sample[1]
        place = self._keys.searchsorted(key)
        return bool(place < len(self._keys) and self._keys[place] == key)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (divmod(key, MAX_SAMPLES) for key in map(int, self._keys))

    def __len__(self) -> int:
        return len(self._keys)

    @classmethod
    def _from_iterable(cls, pairs: Iterable[Any]) -> "RowSet":  # type: ignore[override]  # pairs alone, not any set's
        rows = np.array(list(pairs), np.int64).reshape(-1, 2)
        return cls(rows[:, 0], rows[:, 1])


def to_stderr(message: str) -> None:
    sys.stderr.write(message + "\n")


class Gone(FileNotFoundError):
    """A part went away while it was read: a job that runs has put it together with others, or merged them all."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """The body reads a part, or their folder, and does nothing else. Raises Gone where that is not there any more."""
    try:
        yield
    except (InputError, OSError) as error:
        if os.path.lexists(path):  # a link that leads nowhere stays: it is no part
            raise
        raise Gone(f"{path} is gone") from error


def tried_again(output: Path, read: Callable[[], T]) -> T:
    """What `read` makes of an output, which is called again where it raises Gone. Raises InputError where that has no end."""
    gone = Gone()
    for _ in range(_TRIES):
        try:
            return read()
        except Gone as error:
            gone = error
    raise InputError(f"{output}: its parts change too fast to be read ({gone}): try again") from gone


def is_unfinished(output: Path) -> bool:
    """Whether a run left parts at this place, and no output yet."""
    return not output.exists() and parts_folder(output).is_dir()


def part_files(folder: Path) -> list[Path]:
    """The sealed parts in the order in which they were sealed. Raises Gone for a folder that goes away."""
    if not folder.is_dir():
        return []
    with reading(folder):
        found = [(int(match[1]), path) for path in folder.iterdir() if (match := PART_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def scan(folder: Path, report: Callable[[str], None] = to_stderr, verify: bool = True) -> list[Part]:
    """What the parts of a folder hold; changes nothing there.

    A damaged part is reported and left out: its rows count as not generated. A part that a later one replaces is left
    out too. Raises NewerVersion, Gone.
    """
    parts: list[Part] = []
    damaged: list[str] = []
    replaced: set[str] = set()
    with Looker() as looker:
        for path in reversed(part_files(folder)):
            if path.name in replaced:
                continue
            try:
                with reading(path):
                    parts.append(scan_one(path, verify, looker))
                replaced.update(parts[-1].replaces)
            except (NewerVersion, Gone):
                raise
            except (InputError, OSError) as error:
                damaged.append(f"part left out, its rows are generated again: {error}")
    for message in reversed(damaged):
        report(message)
    return parts[::-1]


def unfinished_parts(output: Path, report: Callable[[str], None] = to_stderr, verify: bool = True) -> list[Part]:
    """The parts of an output that is not finished, as `scan`. Raises Gone where it is finished by now, too."""
    parts = scan(parts_folder(output), report, verify)
    if output.exists():
        raise Gone(f"{parts_folder(output)} is merged")
    return parts


def scan_one(path: Path, verify: bool = True, looker: Looker | None = None) -> Part:
    """What one file holds, a part or a finished output. `verify`: its checksum is compared before HDF5 opens it, or those
    of its columns if it has none. Raises as open_generations and verify_checksums."""
    if os.path.lexists(path) and not path.is_file():  # to open a pipe would wait for its writer
        raise InputError(f"{path} is not a regular file")
    whole = agrees(path) if verify else None
    if whole is False:
        raise InputError(f"{path} is damaged: it does not agree with its checksum")
    with open_generations(path, None if whole else looker) as file, damaged_is_input_error(path):
        if verify and not whole:
            verify_checksums(file)
        header = json.loads(file.attrs["header"])
        if not isinstance(header, dict):
            raise InputError(f"{path} is damaged: its header is not a table")
        row, sample, status = (file.column(name) for name in ("row", "sample", "status"))
        level = FINISHED_LEVEL if file.complete else int(file.attrs.get("level", 0))
        replaces = tuple(json.loads(file.attrs.get("replaces", "[]")))
        return Part(path, header, row, sample, status, *file.lengths(), file.scores, level, replaces)


def select(parts: Sequence[Part], half_way: bool = False) -> Selection:
    """Each finished row once: the first that was sealed as done wins, else the last error.

    With `half_way` also each row that is nowhere finished, as it was last sealed.
    """
    empty = np.empty(0, np.int64)
    row, sample, status, num_tokens, num_prompt_tokens = (
        np.concatenate([empty, *(getattr(part, name).astype(np.int64) for part in parts)])
        for name in ("row", "sample", "status", "num_tokens", "num_prompt_tokens")
    )
    sizes = [len(part.row) for part in parts]
    number = np.repeat(np.arange(len(parts)), sizes)
    position = np.concatenate([empty, *(np.arange(size) for size in sizes)])
    todo, error, age = status == TODO, status == ERROR, np.arange(len(row))
    order = np.lexsort((np.where(todo | error, -age, age), error, todo, sample, row))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(row[order]) != 0) | (np.diff(sample[order]) != 0)
    finished = ~todo[order]
    winner = np.maximum.accumulate(np.where(first, age, 0))  # the place in `order` of what stands for this row
    repeated = finished & ~first & (status[order] == status[order][winner])
    chosen = order[first if half_way else first & finished]
    return Selection(
        number[chosen],
        position[chosen],
        row[chosen],
        sample[chosen],
        num_tokens[chosen],
        num_prompt_tokens[chosen],
        num_repeated=int(repeated.sum()),
        num_todo=int((first & ~finished).sum()),
    )


def gather(
    parts: Sequence[Part], selection: Selection, opened: Sequence[Generations] | None = None
) -> Iterator[list[Generation]]:
    """The selected rows in order, a block at a time; of each part only the rows of that block are in memory.

    `opened`: the parts' files, if they are open already; else each is opened for each block. Raises Gone.
    """
    width = 1 + max((part.scores.top for part in parts), default=0)
    for start, stop in blocks(selection.num_tokens * width, selection.num_prompt_tokens):
        numbers, positions = selection.part[start:stop], selection.position[start:stop]
        block: list[Any] = [None] * (stop - start)
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            wanted, path = positions[places], parts[number].path
            with reading(path), nullcontext(opened[number]) if opened else open_generations(path) as file:
                rows = file.read(int(wanted.min()), int(wanted.max()) + 1, wanted)
            for place, generation in zip(places, rows, strict=True):
                block[place] = generation
        yield block
