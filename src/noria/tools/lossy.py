"""What is said to people while work goes on: it may be lost, and never ends the work.

Knows streams, nothing of what is said.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TextIO, cast

_STANDARD = range(3)  # the file descriptors that libraries take for standard input, output and error


def lossy(stream: TextIO) -> TextIO:
    """The stream without errors: once it cannot be written to, what is said there is lost.

    Its terminal may be gone, its disk full, its reader dead. From then on the file descriptor leads nowhere, so that
    neither a library nor the interpreter at its end meets with the same error. Everything else is the stream's own.
    """
    return cast(TextIO, _Lossy(stream))


class _Lossy:
    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # somebody made the terminal one that does not wait: it may take the next line
            pass
        except OSError:
            lead_nowhere(self._stream)
        except ValueError:
            if not self._stream.closed:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lead_nowhere(stream: TextIO) -> None:
    """Lets the stream's file descriptor, if it has one, take everything and keep nothing."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


def hold_standard_streams() -> None:
    """Opens those of the standard file descriptors that the caller closed, leading nowhere.

    Else the next file that is opened gets such a number, and what a library has to say is written into that file.
    """
    for number in _STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(number, True)
