"""Many small parts into one, so that a resume or a merge after a long job opens hundreds of files and not thousands.

The new part is on the disk and read back before the old ones go. It names them: after a kill in between readers leave
them out, and the next run deletes them. Each row is written again once in FAN_IN parts, and once more in FAN_IN**2.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noria.errors import InputError
from noria.output.assemble import Chosen, assemble
from noria.output.generations import open_generations, verify_checksums
from noria.output.parts import Parts
from noria.output.sealed import FINISHED_LEVEL, Part, scan_one, select, to_stderr

FAN_IN = 64
LARGE = 4096  # rows: a part that has as many is not small, and putting such together would hold the run up for long
_MAX_OPEN = 256  # files at a time


class Compactor:
    """Puts the latest parts of an output together whenever there are enough of them."""

    def __init__(self, parts: Parts, fan_in: int = FAN_IN, report: Callable[[str], None] = to_stderr):
        self._parts, self._fan_in, self._report = parts, fan_in, report

    def compact_if_due(self) -> Path | None:
        """Makes one part of the latest ones if there are enough. They stay as they are if that fails: it is reported.

        Takes about 10 ms a part. Another thread may seal meanwhile.
        """
        path: Path | None = None
        run: list[Part] = []
        try:
            # What was put together may be one of enough parts of its own level.
            while len(run := latest(self._parts.parts, self._parts.header)) >= self._fan_in:
                path = _compact(self._parts, run)
            return path
        except (OSError, InputError, KeyError, RuntimeError, ValueError) as error:
            self._fan_in *= 2  # a later try, when there may be room again
            self._report(f"{len(run)} parts stay as they are, they could not be put together: {error}")
            return path


def latest(parts: list[Part], header: dict[str, Any]) -> list[Part]:
    """The last parts, in order, that are small, were put together equally often and belong to the same run."""
    run: list[Part] = []
    for part in reversed(list(parts)):
        small = part.level != FINISHED_LEVEL and len(part.row) < LARGE
        if part.header != header or not small or (run and part.level != run[0].level):
            break
        run.append(part)
    return run[::-1]


def _compact(parts: Parts, run: list[Part]) -> Path:
    # The number is taken first: a part that is sealed meanwhile comes after this one, as it comes after those replaced.
    path = parts.reserve()
    selection = select(run, half_way=True)
    attrs = {
        "header": json.dumps(parts.header),
        "level": run[0].level + 1,
        "replaces": [part.path.name for part in run],
    }
    with contextlib.ExitStack() as files:
        opened = []
        for part in run:
            with contextlib.ExitStack() as one:
                opened.append(one.enter_context(open_generations(part.path)))
                verify_checksums(opened[-1])  # what is damaged is not copied as if it were right
                if len(run) <= _MAX_OPEN:
                    files.push(one.pop_all())
        chosen = Chosen(run, selection, opened if len(run) <= _MAX_OPEN else None)
        assemble(path, chosen, attrs, timing=None)
    parts.replace(run, scan_one(path, verify=False))
    return path
