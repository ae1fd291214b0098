"""Where the bytes of the disk tier lie, and how a transfer is cut into slots, and a slot into chunks for threads.

Knows files, offsets and memory; nothing of threads or streams.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeAlias

import torch

from noria.blocks import ALIGNMENT, round_up
from noria.errors import Changed, InputError
from noria.tools.direct import CHUNK_NBYTES, DirectFile, chunks


class Check(Protocol):
    """Takes the bytes of a region in order, in pieces of any size; `finish` raises InputError if they are damaged."""

    def update(self, data: memoryview, /) -> None: ...

    def finish(self) -> None: ...


@dataclass
class Region:
    """`nbytes` at byte `offset` of a file. The tier's own offsets count through its regions, one after another.

    check: called once, when the whole region is first loaded as one piece, for what checks its bytes; or None.
    again: called for what checks its bytes when the file was written to since; None for a file that is the tier's own.
    """

    file: DirectFile
    offset: int
    nbytes: int
    check: Callable[[], Check | None] | None = None
    again: Callable[[], Check] | None = None
    look: tuple[int, int] = (0, 0)  # of the file, when its bytes were those that `again` wants

    def __post_init__(self) -> None:
        self.look = self.file.look() if self.again is not None else self.look

    @property
    def touched(self) -> bool:
        """Whether the file was written to, or given another time, since."""
        return self.again is not None and self.file.look() != self.look

    def confirm(self) -> None:
        """After a load: a region whose file was touched is read once more. Raises Changed if its bytes are others."""
        look = self.file.look() if self.again is not None else self.look
        if self.again is None or look == self.look:
            return
        check, buffer = self.again(), memoryview(bytearray(min(CHUNK_NBYTES, self.nbytes)))
        try:
            for begin, end in chunks(self.nbytes):
                self.file.read(self.offset + begin, buffer[: end - begin])
                check.update(buffer[: end - begin])
            check.finish()
        except InputError as error:
            raise Changed(str(self.file.path), "model") from error
        self.look = look


@dataclass
class Stretch:
    """A run of bytes in one region: `at` in its file, `place` in the slot, `data` on the device."""

    region: Region
    at: int
    place: int
    data: torch.Tensor

    def within(self, slot: torch.Tensor) -> torch.Tensor:
        """Its bytes in the slot."""
        return slot[self.place : self.place + self.data.numel()]


Chunk: TypeAlias = tuple[DirectFile, int, memoryview, int]  # (file, offset, memory, bytes needed)


class Regions:
    """Regions one after another, as one range of offsets from 0 to `nbytes`."""

    def __init__(self, regions: Sequence[Region]):
        self._regions = list(regions)
        self._starts = list(accumulate((region.nbytes for region in self._regions), initial=0))
        self.nbytes = self._starts[-1]

    def _find(self, offset: int) -> int:
        return bisect_right(self._starts, offset) - 1

    def whole(self, offset: int, nbytes: int) -> Region | None:
        """The region that is exactly these bytes, if one is."""
        index = self._find(offset)
        region = self._regions[index]
        return region if (offset, nbytes) == (self._starts[index], region.nbytes) else None

    def cut(self, pieces: Iterable[tuple[int, torch.Tensor]], slot_nbytes: int) -> Iterator[list[Stretch]]:
        """The pieces cut into what fits a slot. Each stretch lies in its slot as its sectors do on the disk."""
        stretches: list[Stretch] = []
        used = 0
        for offset, data in pieces:
            done = 0
            while done < data.numel():
                index = self._find(offset + done)
                region, start = self._regions[index], self._starts[index]
                at = region.offset + offset + done - start
                place = used + at % ALIGNMENT
                if place >= slot_nbytes:
                    yield stretches
                    stretches, used = [], 0
                    continue
                count = min(data.numel() - done, slot_nbytes - place, region.offset + region.nbytes - at)
                stretches.append(Stretch(region, at, place, data[done : done + count]))
                used, done = round_up(place + count), done + count
        if stretches:
            yield stretches

    def close(self) -> None:
        """Closes the files."""
        for file in {id(region.file): region.file for region in self._regions}.values():
            file.close()


def covers(stretches: list[Stretch], slot: torch.Tensor) -> list[Chunk]:
    """Whole sectors that hold the stretches, in chunks."""
    covers = []
    for stretch in stretches:
        head = stretch.at % ALIGNMENT
        needed = head + stretch.data.numel()
        view = slot[stretch.place - head : stretch.place - head + round_up(needed)].numpy().data
        for begin, end in chunks(len(view)):
            covers.append((stretch.region.file, stretch.at - head + begin, view[begin:end], min(end, needed) - begin))
    return covers


def exact(stretches: list[Stretch], slot: torch.Tensor) -> list[Chunk]:
    """The bytes of the stretches, in chunks."""
    exact = []
    for stretch in stretches:
        view = stretch.within(slot).numpy().data
        for begin, end in chunks(len(view)):
            exact.append((stretch.region.file, stretch.at + begin, view[begin:end], end - begin))
    return exact


def in_tasks(pieces: list[Chunk]) -> list[list[Chunk]]:
    """Small pieces together, so that each task is worth a thread's while."""
    tasks: list[list[Chunk]] = [[]]
    nbytes = 0
    for piece in pieces:
        if tasks[-1] and nbytes + len(piece[2]) > CHUNK_NBYTES:
            tasks.append([])
            nbytes = 0
        tasks[-1].append(piece)
        nbytes += len(piece[2])
    return tasks


def read(task: list[Chunk]) -> None:
    for file, offset, view, needed in task:
        file.read(offset, view, needed)


def write(task: list[Chunk]) -> None:
    for file, offset, view, _ in task:
        file.write(offset, view)
