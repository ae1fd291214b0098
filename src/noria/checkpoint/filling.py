"""Fills extents of a file: what comes chunk by chunk is gathered to large pieces, which threads write past the page cache.

Through the page cache a processor copies each byte, and frees its page again; and whoever writes waits for the disk. Pieces lie
in huge pages: a write from small ones is cut at every few hundred.
"""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from noria.tools.direct import DirectFile
from noria.tools.pinned import HostMemory

THREADS = 2  # that write; one piece more than they write waits for them, and one is filled
PIECE_NBYTES = 4 << 20
BEHIND_NBYTES = 32 << 20  # written through the page cache, after which the system is asked to bring it to the disk


class ExtentWriter:
    """Writes to an open file, which stays the caller's, what one thread gives it. A context: all is written at its end, though
    not synced, unless an error ended it."""

    def __init__(self, path: Path, descriptor: int):
        self._descriptor, self._file = descriptor, DirectFile(descriptor, path, writable=True)
        self._pool = ThreadPoolExecutor(THREADS, "fill")
        pieces = HostMemory((THREADS + 2) * PIECE_NBYTES).memory.split(PIECE_NBYTES)
        self._free = deque(piece.numpy().data for piece in pieces)
        self._coming: deque[tuple[Future[None], memoryview]] = deque()
        self._piece, self._filled, self._offset, self._cached = self._free.popleft(), 0, 0, 0

    def put(self, offset: int, chunk: memoryview) -> None:
        """Takes the bytes of a chunk, which come to `offset` of the file. Raises WriteError where the disk did not take some,
        these or earlier ones."""
        if offset != self._offset + self._filled:
            self._leave()
            self._offset = offset
        while len(chunk):
            some = chunk[: PIECE_NBYTES - self._filled]
            self._piece[self._filled : self._filled + len(some)] = some
            self._filled, chunk = self._filled + len(some), chunk[len(some) :]
            if self._filled == PIECE_NBYTES:
                self._leave()

    def __enter__(self) -> "ExtentWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raises WriteError."""
        try:
            if error is None:
                self._leave()
                for written, _ in self._coming:
                    written.result()
        finally:
            self._pool.shutdown()
            self._file.close()

    def _leave(self) -> None:
        """The piece is on its way; another takes its place."""
        if not self._filled:
            return
        written = self._pool.submit(self._file.write, self._offset, self._piece[: self._filled])
        self._coming.append((written, self._piece))
        if not self._free:
            earlier, piece = self._coming.popleft()
            earlier.result()
            self._free.append(piece)
        self._begin_writing(self._filled)
        self._piece, self._offset, self._filled = self._free.popleft(), self._offset + self._filled, 0

    def _begin_writing(self, nbytes: int) -> None:
        """What is in the page cache goes to the disk, which is not waited for; the cache lets go of what is there already."""
        self._cached += 0 if self._file.direct else nbytes
        if self._cached >= BEHIND_NBYTES:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._cached = 0
