"""Files that are there whole or not at all: written under a temporary name, brought to the disk, then renamed.

A temporary name is of one process alone (`.NAME.noria.HOST.PROCESS.RANDOM.tmp`), so that several may write one name, and
what a process that is dead left behind is known. Knows nothing of what the files hold.
"""

import contextlib
import errno
import functools
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from noria.errors import InputError
from noria.tools.keys import check_path
from noria.tools.writing import making, write_error, writing

_TEMPORARY = re.compile(r"\..*\.noria\.([\w-]+)\.(\d+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_KEPT_NBYTES = 100  # of the target's name: with the rest no file system finds the temporary one too long


def real(path: str | Path) -> Path:
    """The path of the file that is written where this one is: the end of its links, which need not be there yet.

    A link stays, and its file is replaced. Raises InputError for links that lead in a circle.
    """
    path = Path(path)
    if not path.is_symlink():
        return path
    found = Path(os.path.realpath(path))
    if found.is_symlink():
        raise InputError(f"{path} is a link that leads back to itself: remove it, or name another file")
    return found


def new_file(target: Path) -> Path:
    """An empty file of a name of its own beside `target`, so that the rename stays in one file system.

    What processes of this host that are dead left there is removed. Raises WriteError if the folder takes no file.
    """
    target = real(target)
    remove_leftovers(target.parent)
    name = os.fsencode(target.name)[:_KEPT_NBYTES].decode(errors="ignore")
    while True:
        path = target.with_name(f".{name}.noria.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise write_error(error, target) from error


@contextlib.contextmanager
def replacing(target: Path, remedy: str | None = None) -> Iterator[Path]:
    """An empty file for the body to fill, which then has its bytes on the disk and the name `target`; after an error it
    is gone, and `target` is as it was. What the disk does not take is a WriteError of `target`, with the remedy."""
    with making(target, remedy):
        path = new_file(target)
        try:
            yield path
            fsync(path)
            publish(path, target)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise


def remove_leftovers(folder: Path, of_all: bool = False) -> list[Path]:
    """Takes away the temporary files of processes that are dead, or with `of_all` of every process. Returns those."""
    removed: list[Path] = []
    try:
        names = os.listdir(folder)
    except OSError:  # a folder may be written and not read
        return removed
    for path in map(folder.joinpath, names):
        found = _TEMPORARY.fullmatch(path.name)
        if found and (of_all or (found[1] == _host() and _is_dead(int(found[2])))):
            with contextlib.suppress(OSError):  # another process was faster, or it is another user's
                path.unlink()
                removed.append(path)
    return removed


@functools.cache
def _host() -> str:
    """This host and, since containers number processes anew, what numbers them: a word of letters, digits and dashes."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{re.sub('[^A-Za-z0-9]', '-', socket.gethostname())[:64]}-{space:x}"


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def fsync(path: Path) -> None:
    """Brings a closed file, or the names in a folder (where the file system can, and this user reads it), to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # which may be written and not read
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise write_error(error, path) from error
    finally:
        os.close(handle)


def publish(path: Path, target: Path) -> None:
    """Gives a finished temporary file its name; what had that name before is replaced, a link's file in its place.

    Raises InputError for a device or a pipe, which is never replaced: root could put a file in the place of /dev/null.
    """
    target = real(target)
    _refuse_device(target)
    with writing(target):
        os.replace(path, target)
    fsync(target.parent)


def write_whole(target: Path, data: bytes) -> None:
    """A file of these bytes, on the disk and under its name. Raises WriteError, with their number; then nothing is new."""
    with replacing(target) as path, writing(path, len(data)):
        path.write_bytes(data)


def check_folder(path: Path) -> None:
    """Raises InputError unless a file at `path` could be written: its folder is there and takes a file."""
    check_path(str(path), "the file to write")
    if path.name in ("", ".."):
        raise InputError(f"{path} is a folder: name a file, such as {path / 'run.h5'}")
    folder = real(path).parent
    if not folder.exists():
        raise InputError(f"{path}: there is no folder {folder}: make it (mkdir -p {folder}) or name another")
    if not folder.is_dir():
        raise InputError(f"{path}: {folder} is a file, not a folder: name another folder")
    try:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "permission denied")
        os.unlink(new_file(path))
    except OSError as error:
        reason = write_error(error, path).what
        raise InputError(f"{path}: folder {folder} cannot be written ({reason}): name another folder") from error


def check_file(path: Path) -> None:
    """Raises InputError unless a file of Noria's could be written at `path`, or put in the place of one that is there."""
    check_folder(path)
    _refuse_device(path)


def _refuse_device(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a device or a pipe, which cannot be replaced by a file: name a file")


class GuardedFile:
    """A file for HDF5 to write to (a file object of h5py): a failed write is kept, and HDF5 is told all is well.

    HDF5 does not survive a full disk: it goes on with a file that it cannot flush, and ends in a segmentation fault. What
    the disk did not take stays in memory until the end, so that HDF5 reads back what it wrote: call `check` after each
    block of writes, which bounds it, and when HDF5 has closed the file. A context manager.
    """

    def __init__(self, path: Path, new: bool = True):
        """`new`: the file is empty at first, else as it is. Raises WriteError if it cannot be opened."""
        self.path, self.place = path, 0
        self.error: OSError | None = None
        self.not_taken: list[tuple[int, bytes]] = []  # (offset, bytes), in the order of the writes
        with writing(path):
            self.handle = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if new else 0), 0o666)
        self.end = os.fstat(self.handle).st_size

    def __enter__(self) -> "GuardedFile":
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self.path):  # some file systems tell of a quota here
            os.close(self.handle)

    def check(self, remedy: str) -> None:
        """Raises a WriteError with the remedy if a write failed: that of the first."""
        if self.error is not None:
            nbytes = sum(len(data) for _, data in self.not_taken)
            raise write_error(self.error, self.path, nbytes, remedy) from self.error

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
