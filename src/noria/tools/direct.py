"""Files read and written beside the page cache (O_DIRECT) where the file system and the alignment allow, else through it.

Owns file descriptors and scratch files. Knows bytes at offsets; nothing of tensors, blocks or threads (any may call).
"""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from noria.blocks import ALIGNMENT
from noria.errors import InputError
from noria.tools.writing import write_error

CHUNK_NBYTES = 8 << 20  # of one read or write: larger ones gain nothing, smaller ones leave a disk idle
_MAX_NBYTES = 1 << 30  # of one system call


class DirectFile:
    """An open file. direct: whether O_DIRECT is (still) used; the first read or write that is refused ends it.

    What is not aligned to 4096 bytes in memory, offset and length goes through the page cache; after such a write all
    does, since a file should not be written both ways at once.
    """

    def __init__(self, descriptor: int, path: Path, writable: bool = False, direct: bool = True):
        """Another view on the file of an open descriptor, which stays the caller's. `path` is for messages."""
        self.path = Path(path)
        self._keeps_cache = writable  # what was written here is read again, what is read only is not
        self._buffered: int | None = os.dup(descriptor)  # None: closed
        self._direct = _open_direct(descriptor, writable) if direct else None
        self.direct = self._direct is not None

    def read(self, offset: int, into: memoryview, needed: int | None = None) -> None:
        """Fills `into` from byte `offset` on. Of a file that ends early the first `needed` bytes are enough.

        Raises OSError or, if the file ends before, InputError: both name the file, the place and the numbers.
        """
        needed = len(into) if needed is None else needed
        done = self._transfer(os.preadv, "reading", offset, into, needed)
        if done < needed:
            raise InputError(
                f"{self.path} is truncated: {needed} bytes were to be read at byte {offset}, the file has"
                f" {self._size()}; copy or make it again"
            )
        if not self.direct and not self._keeps_cache and self._buffered is not None:
            os.posix_fadvise(self._buffered, offset, len(into), os.POSIX_FADV_DONTNEED)

    def look(self) -> tuple[int, int]:
        """What every write to the file changes: its size and the time of its last change (ns)."""
        assert self._buffered is not None, f"{self.path} is closed"
        status = os.fstat(self._buffered)
        return status.st_size, status.st_mtime_ns

    def _size(self) -> int:
        assert self._buffered is not None, f"{self.path} is closed"
        return os.fstat(self._buffered).st_size

    def write(self, offset: int, data: memoryview) -> None:
        """Writes `data` at byte `offset`. Raises WriteError with the file and the numbers."""
        if not _aligned(offset, data):
            self.direct = False
        done = self._transfer(os.pwritev, "writing", offset, data, len(data))
        if done < len(data):
            raise OSError(errno.EIO, f"{self.path}: only {done} of {len(data)} bytes were written at byte {offset}")

    def end(self, nbytes: int) -> None:
        """The file ends after so many bytes: what was reserved behind them is free again."""
        assert self._buffered is not None, f"{self.path} is closed"
        os.ftruncate(self._buffered, nbytes)

    def _transfer(self, call: Callable[..., int], doing: str, offset: int, data: memoryview, needed: int) -> int:
        done = 0
        while done < needed:
            at, part = offset + done, data[done : done + _MAX_NBYTES]
            direct = self.direct and _aligned(at, part)
            try:
                count = call(self._direct if direct else self._buffered, [part], at)
            except OSError as error:
                if direct and error.errno == errno.EINVAL:  # opened, but not done that way
                    self.direct = False
                    continue
                if doing == "writing":
                    raise write_error(error, self.path, len(part)) from error
                raise OSError(
                    error.errno, f"{self.path}: {doing} {len(part)} bytes at byte {at}: {error.strerror}"
                ) from error
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        """No read or write may be under way. May be called twice."""
        for descriptor in (self._buffered, self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._buffered = self._direct = None
        self.direct = False


def _open_direct(descriptor: int, writable: bool) -> int | None:
    flags = (os.O_RDWR if writable else os.O_RDONLY) | getattr(os, "O_DIRECT", 0) | os.O_CLOEXEC
    try:  # by the descriptor: the name may be gone, or another file's by now
        return os.open(f"/proc/self/fd/{descriptor}", flags) if hasattr(os, "O_DIRECT") else None
    except OSError:
        return None


def _aligned(offset: int, data: memoryview) -> bool:
    address = np.frombuffer(data, np.uint8).__array_interface__["data"][0] if len(data) else 0
    return not (offset % ALIGNMENT or len(data) % ALIGNMENT or address % ALIGNMENT)


def scratch_file(folder: str | Path, nbytes: int, key: str = "", direct: bool = True) -> DirectFile:
    """A file of `nbytes` in `folder` that has no name: it is gone when it is closed, or the process ends in any way.

    Its space is reserved. `key`: the setting of the disk tier that takes it. Raises InputError, with this key and the numbers,
    where there is not enough.
    """
    folder = Path(folder)
    try:
        descriptor, name = tempfile.mkstemp(prefix=".noria-scratch-", dir=folder)
    except OSError as error:
        reason = write_error(error, folder / "scratch file", nbytes).what
        raise InputError(f"scratch folder {folder}: {reason}: set placement.scratch to another") from error
    try:
        os.unlink(name)
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        if free < nbytes:
            raise InputError(_no_space(folder, nbytes, free, key))
        if nbytes:
            try:
                os.posix_fallocate(descriptor, 0, nbytes)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise write_error(error, folder / "scratch file", nbytes) from error
                raise InputError(f"{_no_space(folder, nbytes, free, key)} ({error.strerror})") from error
        return DirectFile(descriptor, folder / "scratch file", writable=True, direct=direct)
    finally:
        os.close(descriptor)


def _no_space(folder: Path, nbytes: int, free: int, key: str) -> str:
    what, remedy = (" for the disk tier", f"lower {key} or ") if key else ("", "")
    return (
        f"scratch folder {folder} needs {nbytes / 2**30:.2f} GiB{what}, {free / 2**30:.2f} GiB are free,"
        f" {max(nbytes - free, 0)} bytes too few: {remedy}set placement.scratch to a larger disk"
    )


def chunks(nbytes: int, chunk_nbytes: int = CHUNK_NBYTES) -> list[tuple[int, int]]:
    """(begin, end) of the pieces in which `nbytes` are read or written in parallel."""
    return [(begin, min(begin + chunk_nbytes, nbytes)) for begin in range(0, nbytes, chunk_nbytes)]
