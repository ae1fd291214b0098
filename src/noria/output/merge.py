"""From sealed parts to the finished output: rows in order, read back and compared before the file gets its name.

May be killed anywhere and called again. Knows nothing of the run; what it says about it comes as `attrs` and `timing`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from noria.output.assemble import Chosen, assemble
from noria.output.generations import Generations
from noria.output.parts import Parts
from noria.output.schema import STATUS, Generation
from noria.output.sealed import ERROR, Part, Selection, select
from noria.tools.text import plural

_OURS = ("format", "version", "complete", "header", "repeated_rows", "checksums")


class MissingRows(RuntimeError):
    """Rows of the run are in no part, or parts hold rows that are not of this run. The parts are as they were."""


@dataclass(frozen=True)
class Merged:
    """What the finished output holds."""

    num_rows: int
    num_errors: int
    num_tokens: int
    num_prompt_tokens: int
    num_repeated: int  # rows that more than one part had as finished; the first one stands


def merge(
    parts: Parts,
    output: str | Path,
    rows: int | range,
    attrs: Mapping[str, Any],
    timing: Mapping[str, Any] | None = None,
    samples: int | np.ndarray = 1,
    change: Callable[[Generation], Generation] | None = None,
) -> Merged:
    """Seals what waits in `parts`, merges everything into `output` and deletes the parts.

    The rows must be exactly those of `rows` (a number: from 0 on), each with samples 0 .. samples-1 (a number, or
    [rows] its own for each row), all done or error; errors of further samples are left out.
    `attrs`: provenance, stored as attributes (lists and tables as JSON text). `timing`: name -> array with a value (or
    row) a rank, or a mapping of such names. `change` is asked for each row before it is written, in order; its tokens stay
    as many. Memory: a block of rows, and about 100 bytes for each row of the output.
    Raises MissingRows; OSError if the disk is full or does not read back as written. Either way the parts stay.
    """
    output, rows = Path(output), range(rows) if isinstance(rows, int) else rows
    samples = np.broadcast_to(samples, len(rows))
    assert not set(_OURS) & set(attrs), f"attributes of the format: {set(_OURS) & set(attrs)}"
    parts.seal()
    selection = _without_older(parts.parts, select(parts.parts), rows, samples)
    _check_rows(selection, rows, samples)
    merged = Merged(0, 0, 0, 0, selection.num_repeated)

    def check(file: Generations) -> list[str]:
        nonlocal merged
        status = file.column("status")
        tokens, prompt_tokens = (int(lengths.sum()) for lengths in file.lengths())
        errors = int((status == STATUS.index("error")).sum())
        merged = Merged(len(file), errors, tokens, prompt_tokens, selection.num_repeated)
        return _wrong_rows(file, rows, samples)

    attrs = {"header": json.dumps(parts.header), "repeated_rows": selection.num_repeated, **attrs}
    assemble(output, Chosen(parts.parts, selection, change=change), attrs, timing or {}, check=check)
    parts.remove()
    return merged


def _without_older(parts: Sequence[Part], selection: Selection, rows: range, samples: np.ndarray) -> Selection:
    """Without errors of samples that the row's prompt does not have any more: it was mended, and asks for fewer now."""
    if (samples == 1).all() and not selection.sample.any():
        return selection
    place, rest = np.divmod(selection.row - rows.start, rows.step)
    ours = (rest == 0) & (place >= 0) & (place < len(rows))
    older = np.zeros(len(ours), bool)
    older[ours] = selection.sample[ours] >= samples[place[ours]]
    pairs = zip(selection.part[older], selection.position[older], strict=True)
    older[older] = [parts[number].status[position] == ERROR for number, position in pairs]
    names = ("part", "position", "row", "sample", "num_tokens", "num_prompt_tokens")
    return replace(selection, **{name: getattr(selection, name)[~older] for name in names})


def _check_rows(selection: Selection, rows: range, samples: np.ndarray) -> None:
    place, rest = np.divmod(selection.row - rows.start, rows.step)
    ours = (rest == 0) & (place >= 0) & (place < len(rows)) & (selection.sample >= 0)
    ours[ours] = selection.sample[ours] < samples[place[ours]]
    several = bool((samples != 1).any())
    if not ours.all():
        first = _name(selection.row[~ours][:5], selection.sample[~ours][:5], several)
        raise MissingRows(
            f"{plural(int((~ours).sum()), 'row')} of the parts lie outside the {samples.sum():,} of this run: {first}"
        )
    starts = np.cumsum(samples) - samples
    missing = np.setdiff1d(np.arange(samples.sum()), starts[place] + selection.sample, assume_unique=True)
    if len(missing):
        places = np.searchsorted(starts, missing[:10], side="right") - 1
        first = _name(places * rows.step + rows.start, missing[:10] - starts[places], several)
        more = ", ..." if len(missing) > 10 else ""
        raise MissingRows(
            f"{plural(len(missing), 'row')} of {samples.sum():,} not finished: {first}{more}: "
            "the parts are kept, start the same run again to finish them"
        )


def _name(rows: np.ndarray, numbers: np.ndarray, several: bool) -> str:
    pairs = zip(rows.tolist(), numbers.tolist(), strict=True)
    return ", ".join(f"{row} sample {sample}" if several else f"{row}" for row, sample in pairs)


def _wrong_rows(file: Generations, rows: range, samples: np.ndarray) -> list[str]:
    """Exactly the rows asked for, in order, is also none missing and none twice."""
    wanted = np.repeat(np.arange(rows.start, rows.stop, rows.step), samples)
    numbers = np.arange(len(wanted)) - np.repeat(np.cumsum(samples) - samples, samples)
    in_order = np.array_equal(file.column("row"), wanted) and np.array_equal(file.column("sample"), numbers)
    todo = (file.column("status") == STATUS.index("todo")).any()
    return ["row"] * (not in_order) + ["status"] * bool(todo)
