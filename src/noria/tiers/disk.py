"""The tier on disk: bytes pass through page-locked slots of host memory, read and written in chunks by several threads.

Knows regions of files, not what lies there. Two transfers of the same bytes are done in the order of their calls.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from noria.blocks import ALIGNMENT, round_up
from noria.errors import Changed, InputError
from noria.limits import DISK_SLOT_NBYTES, DISK_SLOTS, DISK_THREADS
from noria.streams import Event, Streams
from noria.tiers import Events, Pieces, Transfer
from noria.tiers._regions import Check, Chunk, Region, Regions, Stretch, covers, exact, in_tasks, read, write
from noria.tools.busy import Busy
from noria.tools.pinned import HostMemory


@dataclass
class _Filling:
    """What fills one slot; `left` chunks of it are under way."""

    number: int
    stretches: list[Stretch]
    slot: torch.Tensor = field(init=False)
    left: int = 0


@dataclass
class _Passage:
    lane: str
    pieces: list[tuple[int, torch.Tensor]]
    after: list[Event]
    ranges: list[tuple[int, int]]
    earlier: list["_Passage"] = field(default_factory=list)
    transfer: Transfer = field(default_factory=Transfer)
    lock: threading.RLock = field(default_factory=threading.RLock)
    over: threading.Event = field(default_factory=threading.Event)
    ready: dict[int, _Filling] = field(default_factory=dict)
    error: BaseException | None = None
    digest: Check | None = None
    regions: list[Region] = field(default_factory=list)  # that are loaded
    next: int = 0


class Disk:
    """Regions of files. Owns their files, and `num_slots` slots of `slot_nbytes` of host memory.

    A slot need not hold a whole transfer: a large one passes in several. A transfer that fails raises at its wait; what a
    store fails to write, at every later one's.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        streams: Streams,
        slot_nbytes: int = DISK_SLOT_NBYTES,
        num_slots: int = DISK_SLOTS,
        num_threads: int = DISK_THREADS,
    ):
        """Raises OSError if the slots cannot be page-locked."""
        self._regions, self._streams = Regions(regions), streams
        self._busy = Busy(partial(streams.took, "disk"))
        self.nbytes = self._regions.nbytes
        self._slot_nbytes = max(round_up(slot_nbytes), 2 * ALIGNMENT)
        host = HostMemory(self._slot_nbytes * num_slots)
        host.touch()
        host.register(streams.device)
        self._host: HostMemory | None = host  # None: closed
        # (slot, event after which it may be used)
        self._free: queue.Queue[tuple[torch.Tensor, Event | None]] = queue.Queue()
        for slot in host.memory.split(self._slot_nbytes):
            self._free.put((slot, None))
        self._num_slots = num_slots
        self._broken: BaseException | None = None
        self._lock = threading.Lock()
        self._under_way: list[_Passage] = []
        self._pool = ThreadPoolExecutor(num_threads, "disk", initializer=streams.set_device)
        self._passages: dict[str, queue.Queue[_Passage | None]] = {lane: queue.Queue() for lane in ("load", "store")}
        self._threads = [
            threading.Thread(target=self._work, args=(lane, start), name=f"disk {lane}", daemon=True)
            for lane, start in (("load", self._start_load), ("store", self._start_store))
        ]
        for thread in self._threads:
            thread.start()

    def load(self, pieces: Pieces, after: Events = ()) -> Transfer:
        """Reads to the device: (offset here, the device's bytes)."""
        return self._submit("load", pieces, after)

    def store(self, pieces: Pieces, after: Events = ()) -> Transfer:
        """Writes from the device: (offset here, the device's bytes). The event says they were copied from there."""
        return self._submit("store", pieces, after)

    def _submit(self, lane: str, pieces: Pieces, after: Events) -> Transfer:
        pieces = [(offset, data) for offset, data in pieces if data.numel()]
        ranges = sorted((offset, offset + data.numel()) for offset, data in pieces)
        assert not ranges or (ranges[0][0] >= 0 and max(end for _, end in ranges) <= self.nbytes), (ranges, self.nbytes)
        passage = _Passage(lane, pieces, list(after), ranges)
        with self._lock:
            self._under_way = [other for other in self._under_way if not other.over.is_set()]
            passage.earlier = [
                other for other in self._under_way if "store" in (lane, other.lane) and _overlap(ranges, other.ranges)
            ]
            self._under_way.append(passage)
            self._passages[lane].put(passage)
        return passage.transfer

    def _work(self, lane: str, start: Callable[[_Passage, list[_Filling]], None]) -> None:
        self._streams.set_device()
        while (passage := self._passages[lane].get()) is not None:
            try:
                for other in passage.earlier:
                    other.over.wait()
                passage.earlier = []
                if self._broken is not None:
                    raise self._broken
                fillings = [
                    _Filling(number, stretches)
                    for number, stretches in enumerate(self._regions.cut(passage.pieces, self._slot_nbytes))
                ]
                if not fillings:
                    self._end(passage, self._streams.copy(lane, [], passage.after))
                start(passage, fillings)
            except BaseException as error:  # noqa: BLE001 - who waits for the transfer must hear of it
                self._fail(passage, error)
                self._end(passage, None)

    def _start_load(self, passage: _Passage, fillings: list[_Filling]) -> None:
        passage.digest = self._digest(passage)
        touched = {id(one.region): one.region for filling in fillings for one in filling.stretches}
        passage.regions = list(touched.values())
        for filling in fillings:
            with self._slot_for(filling):
                pieces = covers(filling.stretches, filling.slot)
            self._run(passage, filling, len(fillings), read, pieces)

    def _start_store(self, passage: _Passage, fillings: list[_Filling]) -> None:
        for filling in fillings:
            with self._slot_for(filling):
                pairs = [(stretch.within(filling.slot), stretch.data) for stretch in filling.stretches]
                event = self._streams.copy("store", pairs, passage.after)
                if filling.number == len(fillings) - 1:
                    passage.transfer.done(event)
                event.synchronize()
                pieces = exact(filling.stretches, filling.slot)
            self._run(passage, filling, len(fillings), write, pieces)

    @contextlib.contextmanager
    def _slot_for(self, filling: _Filling) -> Iterator[None]:
        """Takes a slot for the filling; after an error inside, it is free again."""
        filling.slot, event = self._free.get()
        try:
            if event is not None:
                event.synchronize()
            yield
        except BaseException:
            self._free.put((filling.slot, None))
            raise

    def _run(
        self,
        passage: _Passage,
        filling: _Filling,
        num_fillings: int,
        work: Callable[[list[Chunk]], None],
        pieces: list[Chunk],
    ) -> None:
        """Gives the filling's chunks to the threads; the last one to end delivers it."""
        tasks = in_tasks(pieces)
        filling.left = len(tasks)

        def run(task: list[Chunk]) -> None:
            try:
                if passage.error is None:
                    with self._busy:
                        work(task)
            except BaseException as error:  # noqa: BLE001 - who waits for the transfer must hear of it
                self._fail(passage, error)
            with passage.lock:
                filling.left -= 1
                if filling.left == 0:
                    passage.ready[filling.number] = filling
                    self._deliver(passage, num_fillings)

        for task in tasks:
            try:
                self._pool.submit(run, task)
            except RuntimeError as error:  # no thread can be started: the task is over, and its slot will be free
                self._fail(passage, error)
                run(task)

    def _deliver(self, passage: _Passage, num_fillings: int) -> None:
        """Hands on what is ready, in order. Called with the passage's lock."""
        while (filling := passage.ready.pop(passage.next, None)) is not None:
            passage.next += 1
            event = None
            try:
                if passage.lane == "load" and passage.error is None:
                    event = self._to_device(passage, filling, last=passage.next == num_fillings)
            except BaseException as error:  # noqa: BLE001 - who waits for the transfer must hear of it
                self._fail(passage, error)
            self._free.put((filling.slot, event))
            if passage.next == num_fillings:
                self._end(passage, event)

    def _to_device(self, passage: _Passage, filling: _Filling, last: bool) -> Event:
        sources = [stretch.within(filling.slot) for stretch in filling.stretches]
        if passage.digest is not None:
            for source in sources:
                passage.digest.update(source.numpy().data)
        if last:
            for region in passage.regions:
                region.confirm()
            if passage.digest is not None:
                passage.digest.finish()
        pairs = [(stretch.data, source) for stretch, source in zip(filling.stretches, sources, strict=True)]
        return self._streams.copy("load", pairs, passage.after)

    def _fail(self, passage: _Passage, error: BaseException) -> None:
        if isinstance(error, InputError) and (changed := next((one for one in passage.regions if one.touched), None)):
            error = Changed(str(changed.file.path), "model")
        with passage.lock:
            passage.error = passage.error or error
            if passage.lane == "store":
                self._broken = self._broken or error

    def _end(self, passage: _Passage, event: Event | None) -> None:
        with passage.lock:
            if passage.over.is_set():
                return
            if not passage.transfer.settled:
                if passage.error is not None:
                    passage.transfer.failed(passage.error)
                else:
                    assert event is not None, "a load is over with its last copy's event"
                    passage.transfer.done(event)
            passage.pieces, passage.after = [], []
            passage.over.set()

    def _digest(self, passage: _Passage) -> Check | None:
        """What checks the one region that the passage loads whole, the first time."""
        if len(passage.pieces) != 1:
            return None
        offset, data = passage.pieces[0]
        region = self._regions.whole(offset, data.numel())
        if region is None or region.check is None:
            return None
        check, region.check = region.check, None
        return check()

    def close(self) -> int:
        """Ends the threads once all transfers are done, closes the files and lets go of the slots: so many locked bytes."""
        if self._host is None:
            return 0
        for lane in self._passages:
            self._passages[lane].put(None)
        for thread in self._threads:
            thread.join()
        self._pool.shutdown()
        for _ in range(self._num_slots):
            _, event = self._free.get()
            if event is not None:
                event.synchronize()
        self._regions.close()
        host, self._host = self._host, None
        return host.close()


def _overlap(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> bool:
    """Whether two sorted lists of (begin, end) have a byte in common."""
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i][1] <= right[j][0]:
            i += 1
        elif right[j][1] <= left[i][0]:
            j += 1
        else:
            return True
    return False
