"""The tier on disk: bytes pass through page-locked slots of host memory, read and written in chunks by several threads.

Knows regions of files, not what lies there. Two transfers of the same bytes are done in the order of their calls.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from noria.blocks import ALIGNMENT, round_up
from noria.limits import DISK_SLOT_NBYTES, DISK_SLOTS, DISK_THREADS
from noria.streams import Event, Streams
from noria.tiers import Events, Pieces, Transfer, total_nbytes
from noria.tiers._regions import Check, Chunk, Part, Region, Regions, covers, exact, in_tasks, read, write
from noria.tools.pinned import HostMemory


@dataclass
class _Batch:
    """What fills one slot; `left` chunks of it are under way."""

    number: int
    parts: list[Part]
    slot: torch.Tensor = field(init=False)
    left: int = 0


@dataclass
class _Job:
    lane: str
    pieces: list[tuple[int, torch.Tensor]]
    after: list[Event]
    ranges: list[tuple[int, int]]
    earlier: list["_Job"] = field(default_factory=list)
    transfer: Transfer = field(default_factory=Transfer)
    lock: threading.RLock = field(default_factory=threading.RLock)
    over: threading.Event = field(default_factory=threading.Event)
    ready: dict[int, _Batch] = field(default_factory=dict)
    error: BaseException | None = None
    digest: Check | None = None
    next: int = 0


class Disk:
    """Regions of files. Owns their files, and `num_slots` slots of `slot_nbytes` of host memory.

    nbytes_read, nbytes_written: bytes asked for (loads, stores). A slot need not hold a whole transfer: a large one
    passes in several. A transfer that fails raises at its wait; what a store fails to write, at every later one's.
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
        self.nbytes = self._regions.nbytes
        self.nbytes_read = self.nbytes_written = 0
        self._slot_nbytes = max(round_up(slot_nbytes), 2 * ALIGNMENT)
        host = HostMemory(self._slot_nbytes * num_slots)
        host.touch()
        host.register(streams.device)
        self._host: HostMemory | None = host  # None: closed
        self._free: queue.Queue[tuple[torch.Tensor, Event | None]] = (
            queue.Queue()
        )  # (slot, event after which it may be used)
        for slot in host.memory.split(self._slot_nbytes):
            self._free.put((slot, None))
        self._num_slots = num_slots
        self._broken: BaseException | None = None
        self._lock = threading.Lock()
        self._under_way: list[_Job] = []
        self._pool = ThreadPoolExecutor(num_threads, "disk", initializer=streams.set_device)
        self._jobs: dict[str, queue.Queue[_Job | None]] = {lane: queue.Queue() for lane in ("load", "store")}
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
        job = _Job(lane, pieces, list(after), ranges)
        with self._lock:
            if lane == "load":
                self.nbytes_read += total_nbytes(pieces)
            else:
                self.nbytes_written += total_nbytes(pieces)
            self._under_way = [other for other in self._under_way if not other.over.is_set()]
            job.earlier = [
                other for other in self._under_way if "store" in (lane, other.lane) and _overlap(ranges, other.ranges)
            ]
            self._under_way.append(job)
            self._jobs[lane].put(job)
        return job.transfer

    def _work(self, lane: str, start: Callable[[_Job, list[_Batch]], None]) -> None:
        self._streams.set_device()
        while (job := self._jobs[lane].get()) is not None:
            try:
                for other in job.earlier:
                    other.over.wait()
                job.earlier = []
                if self._broken is not None:
                    raise self._broken
                batches = [
                    _Batch(number, parts)
                    for number, parts in enumerate(self._regions.cut(job.pieces, self._slot_nbytes))
                ]
                if not batches:
                    self._end(job, self._streams.copy(lane, [], job.after))
                start(job, batches)
            except BaseException as error:  # noqa: BLE001 - who waits for the transfer must hear of it
                self._fail(job, error)
                self._end(job, None)

    def _start_load(self, job: _Job, batches: list[_Batch]) -> None:
        job.digest = self._digest(job)
        for batch in batches:
            with self._slot_for(batch):
                pieces = covers(batch.parts, batch.slot)
            self._run(job, batch, len(batches), read, pieces)

    def _start_store(self, job: _Job, batches: list[_Batch]) -> None:
        for batch in batches:
            with self._slot_for(batch):
                pairs = [(batch.slot[part.place : part.place + part.data.numel()], part.data) for part in batch.parts]
                event = self._streams.copy("store", pairs, job.after)
                if batch.number == len(batches) - 1:
                    job.transfer.done(event)
                event.synchronize()
                pieces = exact(batch.parts, batch.slot)
            self._run(job, batch, len(batches), write, pieces)

    @contextlib.contextmanager
    def _slot_for(self, batch: _Batch) -> Iterator[None]:
        """Takes a slot for the batch; after an error inside, it is free again."""
        batch.slot, event = self._free.get()
        try:
            if event is not None:
                event.synchronize()
            yield
        except BaseException:
            self._free.put((batch.slot, None))
            raise

    def _run(
        self, job: _Job, batch: _Batch, num_batches: int, work: Callable[[list[Chunk]], None], pieces: list[Chunk]
    ) -> None:
        """Gives the batch's chunks to the threads; the last one to end delivers it."""
        shares = in_tasks(pieces)
        batch.left = len(shares)

        def run(task: list[Chunk]) -> None:
            try:
                if job.error is None:
                    work(task)
            except BaseException as error:  # noqa: BLE001 - who waits for the transfer must hear of it
                self._fail(job, error)
            with job.lock:
                batch.left -= 1
                if batch.left == 0:
                    job.ready[batch.number] = batch
                    self._deliver(job, num_batches)

        for task in shares:
            try:
                self._pool.submit(run, task)
            except RuntimeError as error:  # no thread can be started: the task is over, and its slot will be free
                self._fail(job, error)
                run(task)

    def _deliver(self, job: _Job, num_batches: int) -> None:
        """Hands on what is ready, in order. Called with the job's lock."""
        while (batch := job.ready.pop(job.next, None)) is not None:
            job.next += 1
            event = None
            try:
                if job.lane == "load" and job.error is None:
                    event = self._to_device(job, batch, last=job.next == num_batches)
            except BaseException as error:  # noqa: BLE001 - who waits for the transfer must hear of it
                self._fail(job, error)
            self._free.put((batch.slot, event))
            if job.next == num_batches:
                self._end(job, event)

    def _to_device(self, job: _Job, batch: _Batch, last: bool) -> Event:
        sources = [batch.slot[part.place : part.place + part.data.numel()] for part in batch.parts]
        if job.digest is not None:
            for source in sources:
                job.digest.update(source.numpy().data)
            if last:
                job.digest.finish()
        pairs = [(part.data, source) for part, source in zip(batch.parts, sources, strict=True)]
        return self._streams.copy("load", pairs, job.after)

    def _fail(self, job: _Job, error: BaseException) -> None:
        with job.lock:
            job.error = job.error or error
            if job.lane == "store":
                self._broken = self._broken or error

    def _end(self, job: _Job, event: Event | None) -> None:
        with job.lock:
            if job.over.is_set():
                return
            if not job.transfer.settled:
                if job.error is not None:
                    job.transfer.failed(job.error)
                else:
                    assert event is not None, "a load is over with its last copy's event"
                    job.transfer.done(event)
            job.pieces, job.after = [], []
            job.over.set()

    def _digest(self, job: _Job) -> Check | None:
        """What checks the one region that the job loads whole, the first time."""
        if len(job.pieces) != 1:
            return None
        offset, data = job.pieces[0]
        region = self._regions.whole(offset, data.numel())
        if region is None or region.check is None:
            return None
        check, region.check = region.check, None
        return check()

    def close(self) -> int:
        """Ends the threads once all transfers are done, closes the files and lets go of the slots: so many locked bytes."""
        if self._host is None:
            return 0
        for lane in self._jobs:
            self._jobs[lane].put(None)
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
