"""One job owns an output: a lock on `OUTPUT.lock` that the system takes back when its holder dies, however it dies.

A record lock of fcntl, because that is the one that NFS and Lustre hand on between machines. Knows nothing of MPI.
"""

import contextlib
import errno
import fcntl
import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from noria.errors import InputError
from noria.tools.atomic import check_file, real
from noria.tools.writing import write_error

_LONGEST_ENDING = ".old-999.parts"  # of the names beside an output
_PART_NBYTES = 200  # of the names in the folder of its parts, and of the folder's ending
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, process
PATIENCE = 5.0  # seconds: a job that was killed may be given up by mpirun before the system has ended its processes
_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, 524)  # 524: Lustre mounted without flock


def lock_path(output: str | Path) -> Path:
    output = real(output)
    return output.with_name(output.name + ".lock")


def check_names(output: str | Path) -> None:
    """Raises InputError if the names that stand beside an output, or in the folder of its parts, would be too long."""
    output = real(output)
    for path in (output.with_name(output.name + _LONGEST_ENDING), output.with_name("x") / ("x" * _PART_NBYTES)):
        try:
            os.lstat(path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                nbytes = len(os.fsencode(output.name)), len(os.fsencode(output))
                raise InputError(
                    f"output {output}: the name has {nbytes[0]} bytes, the path {nbytes[1]}: too long for those of its"
                    f" parts, whose names end in {_LONGEST_ENDING} and the like: shorten it"
                ) from error


class OutputLock:
    """Held from the making to `close` or the process's death. A context manager.

    `holder` (job id, host, process, start; `what`, if it is not a run) is what a second job is told. Raises InputError,
    with the holder's words, where another process still has it after PATIENCE seconds. A file system that knows no
    locks is reported and used without; one whose locks fail is an InputError too.
    """

    def __init__(self, output: str | Path, holder: Mapping[str, object], report: Callable[[str], None]):
        check_file(Path(output))
        check_names(output)
        self.path = lock_path(output)
        self._handle = _take(self.path, output, report)
        if self._handle is not None:
            _refuse_foreign(self._handle, self.path, output)
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its words
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, json.dumps(dict(holder)).encode(), 0)

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def held(self) -> bool:
        """Nobody else has it; not where the file system knows no locks."""
        return self._handle is not None

    def close(self) -> None:
        """Lets go and takes the file away. May be called twice."""
        handle, self._handle = self._handle, None
        if handle is not None:
            if _still_named(handle, self.path):
                with contextlib.suppress(OSError):  # a folder in which its owner alone deletes: the next job takes it
                    self.path.unlink(missing_ok=True)
            os.close(handle)


def _take(path: Path, output: str | Path, report: Callable[[str], None]) -> int | None:
    """A locked handle of the file that has this name: not of one that its last holder has just taken away."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # the umask and the folder say who may take it
        except OSError as error:
            if (holder := held_by(output)) is not None:
                raise InputError(_being_written(output, holder)) from None
            raise InputError(f"output {output}: {write_error(error, path)}") from error
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = _said(handle)
            os.close(handle)
            if error.errno in _HELD:
                if time.monotonic() < end:
                    time.sleep(0.05)
                    continue
                raise InputError(_being_written(output, _words(said))) from None
            if error.errno not in _NO_LOCKS:
                raise InputError(
                    f"output {output}: {path} cannot be locked ({os.strerror(error.errno or 0).lower()}): ask who runs the"
                    " file system, or name an output on another one"
                ) from error
            report(f"{path.parent} has no file locks: a second job on {output} would not be noticed")
            return None
        if _still_named(handle, path):
            return handle
        os.close(handle)


def _refuse_foreign(handle: int, path: Path, output: str | Path) -> None:
    """Raises InputError for a file that no holder of a lock wrote; one that was killed early wrote nothing."""
    said = _said(handle)
    if said and not said.startswith(b'{"job"'):
        os.close(handle)
        raise InputError(f"output {output}: {path}, where the lock goes, is no lock but another file: move it away")


def _being_written(output: str | Path, holder: str) -> str:
    return f"output {output} is being written by {holder}: wait for it, or name another output"


def _said(handle: int) -> bytes:
    """What the holder wrote of itself, as far as it can be read."""
    try:
        return os.pread(handle, 4096, 0)
    except OSError:
        return b""


def _still_named(handle: int, path: Path) -> bool:
    try:
        named = os.stat(path)
    except OSError:
        return False
    own = os.fstat(handle)
    return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)


def held_by(output: str | Path) -> str | None:
    """The words for the process that holds the lock of this output, or None. Takes no lock itself; not for the holder."""
    try:
        with lock_path(output).open("rb") as file:
            found = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            held = struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK
            return _words(file.read(4096)) if held else None
    except (OSError, struct.error):
        return None


def _words(said: bytes) -> str:
    """`job 17 on node3 (process 4711, since 2026-11-23T03:15:02Z)`."""
    try:
        holder = json.loads(said)
        job = f"job {holder['job']}" if holder["job"] else holder.get("what", "a run")
        return f"{job} on {holder['host']} (process {holder['process']}, since {holder['start']})"
    except (ValueError, KeyError, TypeError):
        return "another job"
