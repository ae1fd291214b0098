"""The file of a trace, in the format that Perfetto and chrome://tracing open. Knows no event."""

import contextlib
import io
from pathlib import Path
from typing import TextIO

from noria.tools import atomic
from noria.tools.writing import making, open_new


class TraceFile:
    """The file of all ranks' events, there whole or not at all. An error is kept until `close`: every rank is heard."""

    def __init__(self, path: Path):
        self._path, self._begun = path, False
        self._temporary: Path | None = None
        self._error: OSError | None = None
        self._file: TextIO | None = None

    def add(self, events: list[str]) -> None:
        """A rank's events."""
        try:
            if self._file is None:
                self._temporary = atomic.new_file(self._path)
                self._file = io.TextIOWrapper(open_new(self._temporary), encoding="utf-8")
                self._file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            self._file.write((",\n" if self._begun else "") + ",\n".join(events))
            self._begun = True
        except OSError as error:
            self._error = self._error or error

    def close(self) -> None:
        """Gives the file its name. Raises the first OSError, with nothing left behind."""
        try:
            with making(self._path):
                if self._error is not None:
                    raise self._error
                assert self._file and self._temporary, "a trace without the events of any rank"
                self._file.write("\n]}\n")
                self._file.close()
                atomic.fsync(self._temporary)
                atomic.publish(self._temporary, self._path)
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
            if self._temporary is not None:
                self._temporary.unlink(missing_ok=True)
