"""Files that are there whole or not at all: written under a temporary name, brought to the disk, then renamed.

Knows nothing of what the files hold.
"""

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

from noria.errors import InputError
from noria.tools.keys import check_path


def temporary(target: Path) -> Path:
    """The name under which `target` is written: beside it, so that the rename stays in one file system."""
    return target.with_name(target.name + ".tmp")


def fsync(path: Path) -> None:
    """Brings a closed file, or the names in a folder (where the file system can), to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def publish(path: Path, target: Path) -> None:
    """Gives a finished temporary file its name; what had that name before is replaced."""
    os.replace(path, target)
    fsync(target.parent)


def check_folder(path: Path) -> None:
    """Raises InputError unless a file at `path` could be written: its folder is there and takes a file."""
    check_path(str(path), "the file to write")
    if path.name in ("", ".."):
        raise InputError(f"{path} is a folder: name a file, such as {path / 'run.h5'}")
    folder = path.parent
    if not folder.exists():
        raise InputError(f"{path}: there is no folder {folder}: make it (mkdir -p {folder}) or name another")
    if not folder.is_dir():
        raise InputError(f"{path}: {folder} is a file, not a folder: name another folder")
    trial = folder / f".{path.name[:200]}.{os.getpid()}.trial"
    try:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "permission denied")
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        os.unlink(trial)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{path}: folder {folder} cannot be written ({reason}): name another folder") from error


def check_file(path: Path) -> None:
    """Raises InputError unless a file of Noria's could be written at `path`, or put in the place of one that is there."""
    check_folder(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a device or a pipe, which cannot be replaced by a file: name a file")


class GuardedFile:
    """A new file for HDF5 to write to (a file object of h5py): a failed write is kept, and HDF5 is told all is well.

    HDF5 does not survive a full disk: it goes on with a file that it cannot flush, and ends in a segmentation fault. What
    the disk did not take stays in memory until the end, so that HDF5 reads back what it wrote: call `check` after each
    block of writes, which bounds it, and when HDF5 has closed the file. A context manager.
    """

    def __init__(self, path: Path):
        self.path, self.place, self.end = path, 0, 0
        self.error: OSError | None = None
        self.not_taken: list[tuple[int, bytes]] = []  # (offset, bytes), in the order of the writes
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def __enter__(self) -> "GuardedFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def check(self, remedy: str) -> None:
        """Raises the OSError of the first write that failed, with the name of the file and the remedy."""
        if self.error is not None:
            raise OSError(self.error.errno, f"{self.error.strerror} ({remedy})", str(self.path)) from self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.end}[whence]
        self.place = start + offset
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: bytearray | memoryview) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.end - self.place))
        found = os.preadv(self.handle, [view[:count]], self.place)
        view[found:count] = bytes(count - found)
        for offset, data in self.not_taken:
            start, stop = max(offset, self.place), min(offset + len(data), self.place + count)
            if start < stop:
                view[start - self.place : stop - self.place] = data[start - offset : stop - offset]
        self.place += count
        return count

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while self.error is None and done < len(view):
            done += self._try(functools.partial(os.pwrite, self.handle, view[done:], self.place + done)) or 0
        if done < len(view):
            self.not_taken.append((self.place + done, bytes(view[done:])))
        self.place += len(view)
        self.end = max(self.end, self.place)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        self.end = self.place if size is None else size
        self._try(lambda: os.ftruncate(self.handle, self.end))
        return self.end

    def flush(self) -> None:
        pass

    def _try(self, call: Callable[[], int | None]) -> int | None:
        try:
            return call()
        except OSError as error:
            self.error = self.error or error
            return None
