"""The parts of an unfinished output: now and then finished rows go to a sealed file in the folder `OUTPUT.parts`.

A part is never changed once it has its name. Knows the order of parts, nothing of the run that fills them.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from noria.output.agreement import difference, differing
from noria.output.generations import open_generations
from noria.output.schema import FORMAT, STATUS, VERSION, Generation, RowWriter, scores_of, write_attrs
from noria.output.sealed import (
    DONE,
    PART_NAME,
    TODO,
    Part,
    RowSet,
    merged_folder,
    part_files,
    parts_folder,
    scan,
    select,
    to_stderr,
)
from noria.output.segments import SEGMENT_NAME, Segment
from noria.tools.atomic import fsync, real, remove_leftovers, write_whole
from noria.tools.trailer import with_trailer
from noria.tools.writing import WriteError, writing

MAX_PENDING = 2**14  # rows: a run of short ones holds no more of them in memory, however long it may wait with a seal
_ALIVE_SECONDS = 5.0  # at most so often a job says that it is alive while no row is finished


class Parts:
    """The parts of one output, opened to add to them. One process at a time; its threads may seal at any moment.

    `header`: what must agree when a run is resumed (prompts and checkpoint hashes, dtype, sampling), stored in every
    part. Parts that are there are read back; damaged ones are reported and left out, temporary files and parts that a
    later one replaces are removed.
    """

    def __init__(
        self,
        output: str | Path,
        header: Mapping[str, Any],
        report: Callable[[str], None] = to_stderr,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.output, self.header, self.clock = real(output), json.loads(json.dumps(header)), clock
        self.folder = parts_folder(output)
        _finish_removal(self.folder, merged_folder(output))
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        _remove_temporaries(self.folder)
        self.parts = scan(self.folder, report)
        for name in (name for part in self.parts for name in part.replaces):
            (self.folder / name).unlink(missing_ok=True)
        self.pending: list[Generation] = []
        self.sealed_at = self.seen_at = clock()
        self.segment: Segment | None = None
        # Tokens of each row that stopped half-way: they are not this job's.
        self._before = {
            (int(part.row[place]), int(part.sample[place])): int(part.num_tokens[place])
            for part in self.parts
            for place in np.flatnonzero(part.status == TODO)
        }
        self.lock = threading.RLock()
        self._reserved = -1

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Records this job among those that worked on the output: see segments.py. `facts`: provenance.segment_of."""
        self.segment = Segment(self.folder, self.header, facts)

    def withdraw(self) -> None:
        """Takes the record of this job away again, and the folder if nothing else is in it: the run is refused."""
        with contextlib.suppress(OSError):
            if self.segment:
                self.segment.path.unlink(missing_ok=True)
                self.segment = None
            self.folder.rmdir()

    def taken_away(self) -> bool:
        """Whether somebody has removed the folder, or the latest part."""
        with self.lock:  # parts that were put together leave the list before their files go
            return not self.folder.is_dir() or bool(self.parts and not self.parts[-1].path.exists())

    def add(self, generation: Generation) -> None:
        """Keeps a finished row, or one that stopped half-way (status todo), in memory until the next seal."""
        self.pending.append(generation)

    def expect(self, num_rows: int) -> None:
        """The whole job has so many rows, as far as its prompts are read: with the next seal `inspect` knows. Never waits."""
        if self.segment:
            self.segment.facts["of"] = num_rows

    def end(self, reason: str) -> None:
        """Records why this job stops: `finished`, `walltime`, a signal's name, what failed."""
        with self.lock:
            if self.segment:
                self.segment.end(reason)

    def reserve(self) -> Path:
        """The path of the next part in order."""
        with self.lock:
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
            taken = [
                int(match[1]) for path in part_files(self.folder)[-1:] if (match := PART_NAME.fullmatch(path.name))
            ]
            self._reserved = max([self._reserved, *taken]) + 1
            return self.folder / f"part-{self._reserved:06}.h5"

    def seal(self) -> Path | None:
        """Writes the rows that wait to a new part and brings it to the disk. None if no row waits.

        A WriteError (a full disk) leaves the rows waiting, so that a later seal can try again.
        """
        with self.lock:
            self.sealed_at = self.clock()
            if not self.pending:
                return None
            rows, path = list(self.pending), self.reserve()
            try:
                write_whole(path, _image(rows, self.header))
            except WriteError:
                if self.segment:
                    self.segment.told = True
                raise
            self.parts.append(_part(path, self.header, rows))
            del self.pending[: len(rows)]
            if self.segment:
                finished = [one for one in rows if one.status != "todo"]
                errors = sum(one.status == "error" for one in finished)
                self.segment.sealed(len(finished), errors, sum(map(self._new_tokens, rows)))
            return path

    def is_due(self, seconds: float) -> bool:
        """Whether `seal_if_due` has something to seal. Never waits."""
        pending = self.pending
        return bool(pending) and (self.clock() - self.sealed_at >= seconds or len(pending) >= MAX_PENDING)

    @property
    def is_full(self) -> bool:
        """Whether so many rows wait that no more should be added before a seal."""
        return len(self.pending) >= 2 * MAX_PENDING

    def _new_tokens(self, row: Generation) -> int:
        """How many of a row's tokens are this job's."""
        return max(0, len(row.token_ids) - self._before.get((row.row, row.sample), 0))

    def computed(self, prompt_tokens: int, tokens: int) -> None:
        """So many tokens of prompts more are computed, so many generated: with the next seal `inspect` knows. Never waits."""
        if self.segment:
            self.segment.computed(prompt_tokens, tokens)

    def seal_if_due(self, seconds: float) -> Path | None:
        """Seals if a row waits and the last seal is `seconds` ago or more, or if MAX_PENDING rows wait."""
        moment = self.clock()
        if self.is_due(seconds):
            self.seen_at = moment
            return self.seal()
        if self.segment and moment - self.seen_at >= max(seconds, _ALIVE_SECONDS):
            self.seen_at = moment
            with self.lock:
                self.segment.seen()
        return None

    def replace(self, old: Sequence[Part], new: Part) -> None:
        """Lets `new`, which is sealed and holds their rows, stand for parts that follow each other; deletes those."""
        with self.lock:
            start = self.parts.index(old[0])
            self.parts[start : start + len(old)] = [new]
        for part in old:
            part.path.unlink(missing_ok=True)

    def finished(self) -> RowSet:
        """(row, sample) of every row that is done or an error in a sealed part."""
        selection = select(self.parts)
        return RowSet(selection.row, selection.sample)

    def done(self) -> RowSet:
        """(row, sample) of every row that is done, errors left out, in a sealed part."""
        done = [(part.row[its], part.sample[its]) for part in self.parts if (its := part.status == DONE).any()]
        rows, samples = zip(*done, strict=True) if done else ((), ())
        empty = np.empty(0, np.int64)
        return RowSet(np.concatenate([empty, *rows]), np.concatenate([empty, *samples]))

    @property
    def num_finished(self) -> int:
        """Number of rows that are done or an error in a sealed part, each counted once."""
        return len(select(self.parts).row)

    def unfinished(self) -> dict[tuple[int, int], Generation]:
        """The rows that stopped half-way, as they were last sealed; a row that was finished since is not among them."""
        finished = self.finished()
        found: dict[tuple[int, int], Generation] = {}
        for part in self.parts:
            wanted = np.flatnonzero(part.status == TODO)
            if len(wanted):
                with open_generations(part.path) as file:
                    rows = file.read(int(wanted[0]), int(wanted[-1]) + 1, wanted)
                found |= {(one.row, one.sample): one for one in rows if (one.row, one.sample) not in finished}
        return found

    def differences(self) -> list[str]:
        """Where the parts were made by another run than `header` describes: a line a key, empty if they agree."""
        lines: dict[str, str] = {}
        for part in self.parts:
            for name in differing(part.header, self.header):
                lines.setdefault(name, difference(name, part.header, f"in {part.path.name}", self.header))
        return list(lines.values())

    def adopt(self) -> None:
        """Takes the parts for those of this run, as they are: `differences` found none."""
        for part in self.parts:
            part.header.clear()
            part.header.update(self.header)

    def remove(self) -> None:
        """Deletes the folder. It is renamed first: a kill leaves all parts or none."""
        remove_parts(self.output)
        self.parts.clear()


def remove_parts(output: str | Path) -> None:
    """Deletes the parts of an output that is finished, and what an earlier deletion left. A folder that is a link stays,
    empty of what is Noria's."""
    folder, merged = parts_folder(output), merged_folder(output)
    _finish_removal(folder, merged)
    if folder.is_dir():
        os.rename(folder, merged)
        fsync(folder.parent)
        _finish_removal(folder, merged)


def _finish_removal(folder: Path, merged: Path) -> None:
    """Deletes the folder that was renamed for it; a link is emptied and gets its name back, if that is free."""
    if not merged.is_symlink():
        shutil.rmtree(merged, ignore_errors=True)
        return
    _remove_temporaries(merged)
    for path in own_files(merged):
        path.unlink(missing_ok=True)
    if os.path.lexists(folder):
        merged.unlink()
    else:
        os.rename(merged, folder)


def own_files(folder: Path) -> list[Path]:
    """The parts and segments in a folder, which may be a link to one that holds other files too."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if PART_NAME.fullmatch(path.name) or SEGMENT_NAME.fullmatch(path.name)]


def _remove_temporaries(folder: Path) -> None:
    """Deletes what writers left that were killed, those of earlier versions too. For the holder of the output's lock."""
    remove_leftovers(folder, of_all=True)
    for pattern in ("part-*.h5.tmp", "segment-*.json.tmp"):
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)


def _image(rows: Sequence[Generation], header: dict[str, Any]) -> bytes:
    # Built in memory: one sequential write, and a full disk is an OSError of write(), not a broken HDF5 file.
    with h5py.File("part", "w", driver="core", backing_store=False) as file:
        write_attrs(file, {"format": FORMAT, "version": VERSION, "complete": False, "header": json.dumps(header)})
        tokens, prompt_tokens = (
            sum(len(getattr(one, name)) for one in rows) for name in ("token_ids", "prompt_token_ids")
        )
        writer = RowWriter(file, len(rows), tokens, prompt_tokens, scores_of(rows))
        writer.append(rows)
        writer.finish()
        file.flush()
        return with_trailer(file.id.get_file_image())


def _part(path: Path, header: dict[str, Any], rows: Sequence[Generation]) -> Part:
    # As narrow as they are in the file: they are kept for every row of the run.
    return Part(
        path,
        header,
        row=np.array([one.row for one in rows], np.int64),
        sample=np.array([one.sample for one in rows], np.int32),
        status=np.array([STATUS.index(one.status) for one in rows], np.int8),
        num_tokens=np.array([len(one.token_ids) for one in rows], np.int32),
        num_prompt_tokens=np.array([len(one.prompt_token_ids) for one in rows], np.int32),
        scores=scores_of(rows),
    )
