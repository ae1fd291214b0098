"""Looks at HDF5 files in a child process before this one opens them: on a damaged file HDF5 may hang, crash or ask for
all memory, and no signal is heard meanwhile.

Only what HDF5 says of a file is looked at, never its numbers: it takes as long for a large file as for a small one.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

from noria.errors import InputError
from noria.tools.damage import has_signature
from noria.tools.helper import Failed, Helper
from noria.tools.helper_process import Limits

# Seconds of the processor tell a loop from a slow disk, on which the other limit allows minutes.
LIMITS = Limits(memory_nbytes=2**32, cpu_seconds=2, wall_seconds=600, answer_nbytes=2**20, opens_files=True)
LIBRARIES = ("h5py", "numpy")
REMEDY = "copy or make it again"


class Looker:
    """One child for many files, started when the first one is looked at. A context manager; has nothing to close if
    nothing was looked at."""

    def __init__(self) -> None:
        self._helper: Helper | None = None

    def __enter__(self) -> "Looker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def look(self, path: Path) -> None:
        """Raises InputError, naming the file, if HDF5 does not come to an end with it, or cannot read its attributes."""
        if not has_signature(path):
            return
        self._ask(path, {"path": str(path.absolute())})

    def read(self, path: Path, dataset: str, start: int, stop: int) -> None:
        """Raises InputError, naming the file, if HDF5 does not come to an end with these values, or cannot read them."""
        self._ask(path, {"path": str(path.absolute()), "dataset": dataset, "start": start, "stop": stop})

    def close(self) -> None:
        """Ends the child. A later look starts another."""
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    def _ask(self, path: Path, request: dict[str, Any]) -> None:
        self._helper = self._helper or Helper("noria.tools.looking_child", LIMITS, LIBRARIES)
        try:
            self._helper.ask(request)
        except Failed as error:
            if self._helper.pid is None:  # it ended: the next file has a child of its own
                self.close()
            raise InputError(f"{path} is damaged: HDF5 cannot read it ({error}): {REMEDY}") from error
