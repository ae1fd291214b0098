"""What a run tells its user while it works and at its end: a bar on a terminal, else a plain line now and then.

Knows counts and times, nothing of the rows themselves.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from noria.tools.text import plural, printable
from noria.tools.work_left import DoneSoFar, Expected, WorkLeft

FIRST_LINE = 5.0  # seconds until the first plain line
NEXT_LINES = 30.0  # seconds between plain lines after it


class Progress:
    """Rows and tokens of a run as they come; rank 0's alone. `num_finished` rows were finished by earlier runs.

    Speeds and times are those of this run; what earlier runs generated counts as rows alone. `expected`: what a row is
    likely to take; without it nothing is said of the time left.
    """

    def __init__(
        self,
        num_rows: int,
        num_finished: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        expected: Expected | None = None,
    ):
        self.work_left, self.finished_tokens = WorkLeft(expected) if expected else None, 0
        self.stream, self.clock = stream or _terminal() or sys.stderr, clock
        self.num_rows, self.num_before = num_rows, num_finished
        self.rows = self.errors = self.tokens = self.prompt_tokens = self.cached_tokens = 0
        self.started = clock()
        self.next_line = self.started + FIRST_LINE
        self.bar = None
        if _has_width(self.stream):
            self.bar = tqdm(
                total=num_rows,
                initial=num_finished,
                file=self.stream,
                dynamic_ncols=True,
                unit="row",
                bar_format="{n_fmt}/{total_fmt} rows |{bar}| {elapsed}{postfix}",
            )

    @property
    def seconds(self) -> float:
        return self.clock() - self.started

    def expect(self, num_rows: int) -> None:
        """The run has this many rows: a prompt may have several, which is known when it is read."""
        self.num_rows = num_rows
        if self.bar is not None:
            self.bar.total = num_rows

    def add(
        self,
        rows: int = 0,
        tokens: int = 0,
        prompt_tokens: int = 0,
        errors: int = 0,
        finished_tokens: int = 0,
        cached_tokens: int = 0,
    ) -> None:
        """Counts what came since the last call, once a step and a row, and shows it when it is time to. Cheap.

        `errors` are among `rows`, which have `finished_tokens` new tokens in all; `tokens` are generated, `prompt_tokens`
        computed and `cached_tokens` of prompts shared instead, whether their rows are finished or not.
        """
        self.rows += rows
        self.finished_tokens += finished_tokens
        self.errors += errors
        self.tokens += tokens
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        if self.work_left is not None:
            self.work_left.step(self.clock(), prompt_tokens + cached_tokens, tokens)
        if self.bar is not None:
            counts = f"{_short(self.prompt_tokens)} prompt, {_short(self.tokens)} new"
            speed = f"{self._speed(self.tokens):,.0f} tok/s"
            self.bar.set_postfix_str(", ".join([counts, speed, *self._left()]), refresh=False)
            self.bar.update(rows)
        elif self.clock() >= self.next_line:
            self.next_line = self.clock() + NEXT_LINES
            self.stream.write(self.line() + "\n")
            self.stream.flush()

    def line(self) -> str:
        """`12/64 rows  800 prompt tokens (27 tok/s), 1,234 generated (41 tok/s)  about 2 min left`."""
        finished = self.num_before + self.rows
        return "  ".join([f"{finished:,}/{self.num_rows:,} rows", self._counts(), *self._left()])

    def _counts(self) -> str:
        prompts = f"{plural(self.prompt_tokens, 'prompt token')} ({self._speed(self.prompt_tokens):,.0f} tok/s)"
        return f"{prompts}{self._shared()}, {self.tokens:,} generated ({self._speed(self.tokens):,.0f} tok/s)"

    def _shared(self) -> str:
        """` and 1,984 shared`: tokens of prompts that need not be computed, if there are any."""
        return f" and {self.cached_tokens:,} shared" if self.cached_tokens else ""

    def _left(self) -> list[str]:
        """`about 2 min left`: what the tokens left take, of each kind; nothing before that is known."""
        rows_left = max(0, self.num_rows - self.num_before - self.rows)
        prompts = self.prompt_tokens + self.cached_tokens
        if self.work_left is None:
            return []
        seconds = self.work_left.seconds(DoneSoFar(self.rows, self.finished_tokens, prompts, self.tokens), rows_left)
        return [] if seconds is None else [f"about {duration(seconds)} left"]

    def close(self) -> None:
        """Takes the bar away, leaving its last state. May be called twice."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def summary(self, output: str | Path) -> str:
        """The end of a run in two or three lines: rows, tokens, time, speed, and where the output lies."""
        finished = self.num_before + self.rows
        rows = f"{plural(self.rows - self.errors, 'row')} done, {self.errors:,} with errors"
        if self.num_before:
            rows += f", {self.num_before:,} finished before"
        prompts = f"{plural(self.prompt_tokens, 'prompt token')}{self._shared()}"
        tokens = f"{prompts}, {plural(self.tokens, 'generated token')}"
        lines = [f"{rows}; {tokens} in {self.seconds:,.1f} s: {self._speed(self.tokens):,.0f} tok/s"]
        if finished < self.num_rows:
            left = plural(self.num_rows - finished, "row")
            lines.append(f"stopped with {left} of {self.num_rows:,} left: start the same run again to go on")
            lines.append(f"finished rows so far: {printable(str(output))}.parts")
        else:
            lines.append(f"output: {printable(str(output))}")
        return "\n".join(lines)

    def end(self, output: str | Path, more: Sequence[str] = ()) -> None:
        """Closes and writes the summary, and `more` lines."""
        self.close()
        self.stream.write("".join(f"{line}\n" for line in [self.summary(output), *more]))
        self.stream.flush()

    def _speed(self, tokens: int) -> float:
        return tokens / self.seconds if self.seconds > 0 else 0.0


def _short(count: int) -> str:
    """A count in a few characters, as a bar has room for."""
    return f"{count:,}" if count < 100_000 else str(tqdm.format_sizeof(count))


def _terminal() -> TextIO | None:
    """The stream that a bar can be drawn on. Open MPI gives its ranks a terminal as stdout; it has a width if mpirun's own
    is one, and none in a batch job or a pipe."""
    return next((stream for stream in (sys.stderr, sys.stdout) if stream is not None and _has_width(stream)), None)


def _has_width(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # no file behind the stream, or a closed one
        return False


def duration(seconds: float) -> str:
    """`40 s`, `2 min`, `3.5 h`, `2.1 days`: as exact as a guess deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
