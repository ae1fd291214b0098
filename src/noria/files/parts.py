"""The parts of an unfinished output: now and then finished rows go to a sealed file in the folder `OUTPUT.parts`.

A part is never changed once it has its name. Knows the order of parts, nothing of the run that fills them.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from noria.config import InputError
from noria.files.atomic import fsync, publish, temporary
from noria.files.generations import Generation, NewerVersion, blocks, open_generations, verify_checksums
from noria.files.schema import FORMAT, STATUS, VERSION, Scores, Writer, scores_of, write_attrs

TODO = STATUS.index("todo")
_NAME = re.compile(r"part-(\d{6,})\.h5")


def parts_folder(output: str | Path) -> Path:
    output = Path(output)
    return output.with_name(output.name + ".parts")


def merged_folder(output: str | Path) -> Path:
    """The name that the folder takes before it is deleted, so that a half-deleted one is never taken for parts."""
    output = Path(output)
    return output.with_name(output.name + ".parts.merged")


@dataclass(frozen=True, eq=False)
class Part:
    """What a sealed part holds, without its texts and tokens. [R] arrays, a value a row."""

    path: Path
    header: dict
    row: np.ndarray
    sample: np.ndarray
    status: np.ndarray
    num_tokens: np.ndarray
    num_prompt_tokens: np.ndarray
    scores: Scores


@dataclass(frozen=True, eq=False)
class Selection:
    """The finished rows of many parts, each once, ordered by (row, sample). [R] arrays."""

    part: np.ndarray
    position: np.ndarray
    row: np.ndarray
    sample: np.ndarray
    num_tokens: np.ndarray
    num_prompt_tokens: np.ndarray
    num_repeated: int  # finished rows left out because an earlier part has them
    num_todo: int  # rows that stopped half-way and are in no part as finished


def to_stderr(message: str) -> None:
    sys.stderr.write(message + "\n")


def part_files(folder: Path) -> list[Path]:
    """The sealed parts in the order in which they were sealed."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def scan(folder: Path, report: Callable[[str], None] = to_stderr, verify: bool = True) -> list[Part]:
    """What the parts of a folder hold; changes nothing there.

    A damaged part is reported and left out: its rows count as not generated. Raises NewerVersion; FileNotFoundError for
    a part that was there a moment ago (a job that runs has merged it).
    """
    parts = []
    for path in part_files(folder):
        try:
            parts.append(_scan_one(path, verify))
        except NewerVersion:
            raise
        except (InputError, OSError, KeyError, RuntimeError, ValueError) as error:
            if not path.exists():
                raise FileNotFoundError(f"{path} is gone") from error
            report(f"part left out, its rows are generated again: {error}")
    return parts


def _scan_one(path: Path, verify: bool) -> Part:
    with open_generations(path) as file:
        if verify:
            verify_checksums(file)
        header = json.loads(file.attrs["header"])
        numbers = (file.column(name) for name in ("row", "sample", "status"))
        return Part(path, header, *numbers, *file.lengths(), file.scores)


def select(parts: Sequence[Part]) -> Selection:
    """Each finished row once: where several parts have it, the first that was sealed wins."""
    empty = np.empty(0, np.int64)
    row, sample, status, num_tokens, num_prompt_tokens = (
        np.concatenate([empty, *(getattr(part, name).astype(np.int64) for part in parts)])
        for name in ("row", "sample", "status", "num_tokens", "num_prompt_tokens")
    )
    sizes = [len(part.row) for part in parts]
    number = np.repeat(np.arange(len(parts)), sizes)
    position = np.concatenate([empty, *(np.arange(size) for size in sizes)])
    # A stable sort: rows that are equal stay in the order of their parts, finished ones before those left half-way.
    order = np.lexsort((status == TODO, sample, row))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(row[order]) != 0) | (np.diff(sample[order]) != 0)
    finished = status[order] != TODO
    chosen = order[first & finished]
    repeated, todo = int((finished & ~first).sum()), int((first & ~finished).sum())
    arrays = (array[chosen] for array in (number, position, row, sample, num_tokens, num_prompt_tokens))
    return Selection(*arrays, repeated, todo)


def gather(parts: Sequence[Part], selection: Selection) -> Iterator[list[Generation]]:
    """The selected rows in order, a block at a time; of each part only the rows of that block are in memory."""
    width = 1 + max((part.scores.top for part in parts), default=0)
    for start, stop in blocks(selection.num_tokens * width, selection.num_prompt_tokens):
        numbers, positions = selection.part[start:stop], selection.position[start:stop]
        block: list = [None] * (stop - start)
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            wanted = positions[places]
            with open_generations(parts[number].path) as file:
                rows = file.read(int(wanted.min()), int(wanted.max()) + 1, wanted)
            for place, generation in zip(places, rows, strict=True):
                block[place] = generation
        yield block


class Parts:
    """The parts of one output, opened to add to them. One process at a time.

    `header`: what must agree when a run is resumed (prompts and checkpoint hashes, dtype, sampling), stored in every
    part. Parts that are there are read back; damaged ones are reported and left out, temporary files are removed.
    """

    def __init__(
        self,
        output: str | Path,
        header: Mapping,
        report: Callable[[str], None] = to_stderr,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.output, self.header, self.clock = Path(output), json.loads(json.dumps(header)), clock
        self.folder = parts_folder(output)
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("part-*.h5.tmp"):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(merged_folder(output), ignore_errors=True)
        self.parts = scan(self.folder, report)
        self.pending: list[Generation] = []
        self.sealed_at = clock()

    def add(self, generation: Generation) -> None:
        """Keeps a finished row, or one that stopped half-way (status todo), in memory until the next seal."""
        self.pending.append(generation)

    def seal(self) -> Path | None:
        """Writes the rows that wait to a new part and brings it to the disk. None if no row waits.

        An OSError (a full disk) leaves the rows waiting, so that a later seal can try again.
        """
        self.sealed_at = self.clock()
        if not self.pending:
            return None
        self.folder.mkdir(exist_ok=True)
        names = [int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        path = self.folder / f"part-{max(names, default=-1) + 1:06}.h5"
        rows = list(self.pending)
        image = _image(rows, self.header)
        unsealed = temporary(path)
        try:
            with unsealed.open("wb") as file:
                file.write(image)
                file.flush()
                os.fsync(file.fileno())
            publish(unsealed, path)
        except OSError:
            if not path.exists():
                unsealed.unlink(missing_ok=True)
            raise
        self.parts.append(_part(path, self.header, rows))
        del self.pending[: len(rows)]
        return path

    def seal_if_due(self, seconds: float) -> Path | None:
        """Seals if the last seal is `seconds` ago or more and a row waits."""
        if self.pending and self.clock() - self.sealed_at >= seconds:
            return self.seal()
        return None

    def finished(self) -> set[tuple[int, int]]:
        """(row, sample) of every row that is done or an error in a sealed part."""
        selection = select(self.parts)
        return set(zip(selection.row.tolist(), selection.sample.tolist(), strict=True))

    @property
    def num_finished(self) -> int:
        """Number of rows that are done or an error in a sealed part, each counted once."""
        return len(select(self.parts).row)

    def unfinished(self) -> dict[tuple[int, int], Generation]:
        """The rows that stopped half-way, as they were last sealed; a row that was finished since is not among them."""
        finished, found = self.finished(), {}
        for part in self.parts:
            wanted = np.flatnonzero(part.status == TODO)
            if len(wanted):
                with open_generations(part.path) as file:
                    rows = file.read(int(wanted[0]), int(wanted[-1]) + 1, wanted)
                found |= {(one.row, one.sample): one for one in rows if (one.row, one.sample) not in finished}
        return found

    def differences(self, header: Mapping | None = None) -> list[str]:
        """Where the parts were made by another run than `header` describes: a line a key, empty if they agree."""
        ours = self.header if header is None else json.loads(json.dumps(header))
        lines = {}
        for part in self.parts:
            for name in [*ours, *(name for name in part.header if name not in ours)]:
                theirs, mine = part.header.get(name), ours.get(name)
                if theirs != mine and name not in lines:
                    lines[name] = f"{name}: {json.dumps(theirs)} in {part.path.name}, {json.dumps(mine)} now"
        return list(lines.values())

    def remove(self) -> None:
        """Deletes the folder. It is renamed first: a kill leaves all parts or none."""
        remove_parts(self.output)
        self.parts.clear()


def remove_parts(output: str | Path) -> None:
    """Deletes the parts of an output that is finished, and what an earlier deletion left."""
    folder, merged = parts_folder(output), merged_folder(output)
    shutil.rmtree(merged, ignore_errors=True)
    if folder.is_dir():
        os.rename(folder, merged)
        fsync(folder.parent)
        shutil.rmtree(merged, ignore_errors=True)


def _image(rows: Sequence[Generation], header: dict) -> bytes:
    # Built in memory: one sequential write, and a full disk is an OSError of write(), not a broken HDF5 file.
    with h5py.File("part", "w", driver="core", backing_store=False) as file:
        attrs = {"format": FORMAT, "version": VERSION, "complete": False, "header": json.dumps(header)}
        write_attrs(file, attrs)
        tokens, prompt_tokens = (
            sum(len(getattr(one, name)) for one in rows) for name in ("token_ids", "prompt_token_ids")
        )
        writer = Writer(file, len(rows), tokens, prompt_tokens, scores_of(rows))
        writer.append(rows)
        writer.finish()
        file.flush()
        return file.id.get_file_image()


def _part(path: Path, header: dict, rows: Sequence[Generation]) -> Part:
    def array(values) -> np.ndarray:
        return np.fromiter(values, np.int64, len(rows))

    return Part(
        path,
        header,
        array(one.row for one in rows),
        array(one.sample for one in rows),
        array(STATUS.index(one.status) for one in rows),
        array(len(one.token_ids) for one in rows),
        array(len(one.prompt_token_ids) for one in rows),
        scores_of(rows),
    )
