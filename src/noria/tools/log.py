"""What ranks say while a job runs: lines of Python's own logging, to stderr unless somebody who runs Noria says otherwise.

The logger is `noria`; a handler or a level that it has already is left alone. Commands write their own words elsewhere.
"""

import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from tqdm import tqdm

from noria.tools.text import printable


def log(rank: int, num_ranks: int, message: str, stream: TextIO | None = None, bare: bool = False) -> None:
    """Logs `2026-11-23T03:15:02Z rank=1/4 message`, a line for each of the message's.

    `stream`: where Noria's own handler writes it, instead of stderr. bare: it writes the message alone, as wide as it is.
    """
    _logger().info(message, extra={"rank": f"{rank}/{num_ranks}", "stream": stream, "bare": bare})


def _logger() -> logging.Logger:
    logger = logging.getLogger("noria")
    if not logger.handlers:
        logger.addHandler(_BesideTheBar())
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return logger


class _Stamped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        lines = record.getMessage().splitlines() or [""]
        if record.__dict__["bare"]:
            return "\n".join(map(printable, lines))
        return "\n".join(f"{stamp} rank={record.__dict__['rank']} {printable(line)}" for line in lines)


class _BesideTheBar(logging.Handler):
    """Writes to the stderr of the moment, one write a line, so that ranks' lines do not mix."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Stamped())

    def emit(self, record: logging.LogRecord) -> None:
        stream = record.__dict__["stream"] or sys.stderr
        # A bar that stands on the terminal steps aside for the line.
        with tqdm.external_write_mode(file=sys.stderr):
            for line in self.format(record).splitlines():
                stream.write(f"{line}\n")
        stream.flush()
