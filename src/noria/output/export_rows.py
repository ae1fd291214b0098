"""The rows that an export writes, of a finished output or of its parts so far, and what the output tells of its run.

Knows no format of exports.
"""

import contextlib
import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from noria.errors import InputError
from noria.output.generations import Generations
from noria.output.schema import Generation
from noria.output.sealed import gather, parts_folder, select, unfinished_parts
from noria.output.segments import read_segments
from noria.output.wanted import WantedRows
from noria.tools.text import plural


@dataclass(frozen=True)
class Origin:
    """What an output says of how it was made: `checkpoint` is the hash of its model's header, `model` the file that its run
    named (None: not told), `start` when it began (ISO 8601)."""

    path: Path
    checkpoint: str = ""
    model: str | None = None
    start: str = ""


@dataclass(frozen=True)
class ExportedRows:
    """The rows of an output, read anew at each call of `all`."""

    all: Callable[[], Iterator[Generation]]
    origin: Origin
    has_logprobs: bool
    report: Callable[[str], None] | None = None  # of an output that is not whole

    def those(self, wanted: WantedRows) -> Iterator[Generation]:
        """Those that are wanted. Raises InputError where an id is none of a whole output's."""
        yield from filter(wanted.takes, self.all())
        missing = wanted.missing()
        if missing and self.report:
            self.report(f"{self.origin.path}: {missing} among the rows so far")
        elif missing:
            raise InputError(f"{self.origin.path}: {missing}")


def origin_of(file: Generations) -> Origin:
    """What a finished output tells of its run."""
    header, run_file = {}, {}
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        header = json.loads(file.attrs.get("header", "{}"))
        run_file = tomllib.loads(file.attrs.get("run_file", ""))
    model, checkpoint = run_file.get("model"), header.get("checkpoint", "") if isinstance(header, dict) else ""
    return Origin(
        file.path, str(checkpoint), model if isinstance(model, str) else None, str(file.attrs.get("start", ""))
    )


def rows_so_far(source: Path, report: Callable[[str], None]) -> ExportedRows:
    """The rows of an output that is not finished, which is told. Raises sealed.Gone, also while they are read."""
    segments, parts = read_segments(parts_folder(source)), unfinished_parts(source, report)
    selection = select(parts)
    half = f", {plural(selection.num_todo, 'row')} stopped half-way not included" if selection.num_todo else ""
    report(f"{source} is not finished: exporting the {plural(len(selection.row), 'row')} finished so far{half}")
    header, start = parts[-1].header if parts else {}, min((one["start"] for one in segments), default="")
    origin = Origin(source, str(header.get("checkpoint", "")), None, start)
    return ExportedRows(
        lambda: (one for block in gather(parts, selection) for one in block),
        origin,
        any(part.scores.chosen for part in parts),
        report,
    )
