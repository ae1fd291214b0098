"""What is said where a file cannot be written: which, how many bytes were wanted and are free, and the remedy; in one line.

Python's own errors of a write name no file, and none names numbers. Knows nothing of what the files hold.
"""

import contextlib
import errno
import io
import os
import pwd
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRITES_ALONE = (*_FULL, errno.EROFS)  # what no reading meets


class WriteError(OSError):
    """A write that failed. `filename`, `strerror` and `str` are words for people; `remedy` is the end of `strerror`."""

    def __init__(self, number: int, what: str, path: str | Path, remedy: str):
        super().__init__(number, f"{what}: {remedy}", str(path))
        self.what, self.remedy = what, remedy

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"

    def about(self, path: str | Path, remedy: str | None = None) -> "WriteError":
        """The same of the file that people know, and with what they can do in this place."""
        return WriteError(self.errno or errno.EIO, self.what, path, remedy or self.remedy)


def write_error(error: OSError, path: str | Path, nbytes: int | None = None, remedy: str | None = None) -> WriteError:
    """The error of a write to `path`, in words: `nbytes` were still to be written. `remedy`: what to do once it can be."""
    if isinstance(error, WriteError):
        return error.about(path, remedy)
    number, path = error.errno or errno.EIO, Path(path)
    what = os.strerror(number).lower() if error.errno else str(error)
    wanted = [f"{nbytes:,} more bytes were to be written"] if nbytes else []
    return WriteError(
        number, ", ".join([what, *wanted, *_numbers(number, path)]), path, remedy or _remedy(number, path)
    )


@contextlib.contextmanager
def writing(path: str | Path, nbytes: int | None = None) -> Iterator[None]:
    """Makes a WriteError of an OSError of the body, which does nothing else than to write to `path`."""
    try:
        yield
    except OSError as error:
        raise write_error(error, path, nbytes) from error


@contextlib.contextmanager
def making(target: str | Path, remedy: str | None = None) -> Iterator[None]:
    """Makes a WriteError of `target` of what the body meets on its way there: it writes under other names first, and reads.

    An OSError that reading could meet as well goes through as it is.
    """
    try:
        yield
    except WriteError as error:
        raise error.about(target, remedy) from error
    except OSError as error:
        if error.errno not in _WRITES_ALONE:
            raise
        raise write_error(error, target, None, remedy) from error


class _New(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            raise write_error(error, os.fsdecode(self.name), memoryview(data).nbytes) from error


def open_new(path: Path) -> io.BufferedWriter:
    """A file to write, empty, for whoever the umask and the folder allow it. Its writes raise WriteError, at `close` too."""
    with writing(path):
        return io.BufferedWriter(_New(path, "w"))


def _numbers(number: int, path: Path) -> list[str]:
    """What of the limit that was met is free."""
    if number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return [f"a file of this process may have {limit:,}"] if limit != resource.RLIM_INFINITY else []
    try:
        space = os.statvfs(path.parent)
    except OSError:
        return []
    if number == errno.ENOSPC and space.f_files and not space.f_favail:
        return [f"{path.parent} takes no more files (0 of {space.f_files:,} inodes are free)"]
    # a quota's rest is not what the file system has
    return [f"{space.f_bavail * space.f_frsize:,} are free in {path.parent}"] if number == errno.ENOSPC else []


def _remedy(number: int, path: Path) -> str:
    if number == errno.EFBIG:
        return "raise that limit (ulimit -f) and try again"
    if number == errno.EDQUOT:
        return "delete files, or ask for more (quota -s, or lfs quota, shows it), and try again"
    if number in (errno.EACCES, errno.EPERM):
        return (os.path.lexists(path) and not_writable(path)) or "name another folder"
    return "make room and try again" if number in _FULL else "name another folder, or ask who runs the file system"


def not_writable(path: Path) -> str | None:
    """Words for a file or folder that is there and that this user may not write: whose it is, and what they can do."""
    if os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
        return None
    return f"{path} is {_owned(path)}: ask for chmod g+w {path}"


def not_readable(path: Path) -> str | None:
    """Words for a file or folder that is there and that this user may not read."""
    if os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        return None
    return f"{path} is {_owned(path)}: ask for chmod g+r{'x' * path.is_dir()} {path}"


def not_removable(path: Path) -> str | None:
    """Words for what is there in a folder with the sticky bit, which lets owners alone rename and delete."""
    folder = path.parent.stat()
    if not folder.st_mode & stat.S_ISVTX or os.geteuid() in (0, folder.st_uid, path.lstat().st_uid):
        return None
    return f"{path} is {_owned(path)}, and {path.parent} lets only owners delete: ask for chmod -t {path.parent}"


def _owned(path: Path) -> str:
    """`alice's (-rw-r--r--)`."""
    found = path.lstat()
    try:
        name = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        name = f"user {found.st_uid}"
    return f"{name}'s ({stat.filemode(found.st_mode)})"
