"""From sealed parts to the finished output: rows in order, read back and compared before the file gets its name.

May be killed anywhere and called again. Knows nothing of the run; what it says about it comes as `attrs` and `timing`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from noria.files.atomic import GuardedFile, fsync, publish, temporary
from noria.files.generations import open_generations
from noria.files.parts import Parts, Selection, gather, select
from noria.files.schema import FORMAT, STATUS, VERSION, Writer, checksums, scores_together, write_attrs
from noria.text import plural

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
    parts: Parts, output: str | Path, rows: int | range, attrs: Mapping, timing: Mapping | None = None, samples: int = 1
) -> Merged:
    """Seals what waits in `parts`, merges everything into `output` and deletes the parts.

    The rows must be exactly those of `rows` (a number: from 0 on), each with samples 0 .. samples-1, all done or error.
    `attrs`: provenance, stored as attributes (lists and tables as JSON text). `timing`: name -> array with a value (or
    row) a rank, or a mapping of such names. Memory: a block of rows, and about 100 bytes for each row of the output.
    Raises MissingRows; OSError if the disk is full or does not read back as written. Either way the parts stay.
    """
    output, rows = Path(output), range(rows) if isinstance(rows, int) else rows
    assert not set(_OURS) & set(attrs), f"attributes of the format: {set(_OURS) & set(attrs)}"
    parts.seal()
    selection = select(parts.parts)
    _check_rows(selection, rows, samples)
    unchecked = temporary(output)
    try:
        sums = _write(unchecked, parts, selection, attrs, timing or {})
        fsync(unchecked)
        merged = _read_back(unchecked, sums, rows, samples, selection.num_repeated)
        publish(unchecked, output)
    except BaseException:
        unchecked.unlink(missing_ok=True)
        raise
    parts.remove()
    return merged


def _check_rows(selection: Selection, rows: range, samples: int) -> None:
    place, rest = np.divmod(selection.row - rows.start, rows.step)
    foreign = (rest != 0) | (place < 0) | (place >= len(rows)) | (selection.sample < 0) | (selection.sample >= samples)
    if foreign.any():
        first = _name(selection.row[foreign][:5], selection.sample[foreign][:5], samples)
        raise MissingRows(
            f"{plural(int(foreign.sum()), 'row')} of the parts lie outside the {len(rows):,} of this run: {first}"
        )
    missing = np.setdiff1d(np.arange(len(rows) * samples), place * samples + selection.sample, assume_unique=True)
    if len(missing):
        first = _name(missing[:10] // samples * rows.step + rows.start, missing[:10] % samples, samples)
        more = ", ..." if len(missing) > 10 else ""
        raise MissingRows(
            f"{plural(len(missing), 'row')} of {len(rows) * samples:,} not finished: {first}{more}: "
            "the parts are kept, start the same run again to finish them"
        )


def _name(rows: np.ndarray, numbers: np.ndarray, samples: int) -> str:
    pairs = zip(rows.tolist(), numbers.tolist(), strict=True)
    return ", ".join(f"{row}" if samples == 1 else f"{row} sample {sample}" for row, sample in pairs)


def _write(path: Path, parts: Parts, selection: Selection, attrs: Mapping, timing: Mapping) -> dict[str, str]:
    scores = scores_together(part.scores for part in parts.parts)
    tokens, prompt_tokens = int(selection.num_tokens.sum()), int(selection.num_prompt_tokens.sum())
    remedy = "the parts are kept: make room and start the same run again"
    with GuardedFile(path) as disk:
        try:
            with h5py.File(path.name, "w", driver="fileobj", fileobj=disk) as file:
                header = json.dumps(parts.header)
                write_attrs(file, {"format": FORMAT, "version": VERSION, "complete": False, "header": header})
                write_attrs(file, {"repeated_rows": selection.num_repeated, **attrs})
                writer = Writer(file, len(selection.row), tokens, prompt_tokens, scores)
                for block in gather(parts.parts, selection):
                    writer.append(block)
                    disk.check(remedy)
                _write_timing(file.create_group("timing"), timing)
                sums = writer.finish()
                file.flush()
                file.attrs["complete"] = True
        finally:
            disk.check(remedy)
    return sums


def _write_timing(group: h5py.Group, timing: Mapping) -> None:
    for name, values in timing.items():
        if isinstance(values, Mapping):
            _write_timing(group.create_group(name), values)
        else:
            values = np.asarray(values)
            text = values.dtype.kind in "UO"
            group.create_dataset(
                name, data=values.astype(object) if text else values, dtype=h5py.string_dtype() if text else None
            )


def _read_back(path: Path, sums: dict[str, str], rows: range, samples: int, num_repeated: int) -> Merged:
    with open_generations(path) as file:
        found = checksums(file.datasets, file.scores)
        wrong = [name for name in sums if found.get(name) != sums[name]]
        found_rows, numbers, status = (file.column(name) for name in ("row", "sample", "status"))
        # Exactly the rows asked for, in order, is also none missing and none twice.
        wanted = np.repeat(np.arange(rows.start, rows.stop, rows.step), samples)
        in_order = np.array_equal(found_rows, wanted)
        if not in_order or not np.array_equal(numbers, np.tile(np.arange(samples), len(rows))):
            wrong.append("row")
        if (status == STATUS.index("todo")).any():
            wrong.append("status")
        if wrong or not file.complete:
            raise OSError(
                f"{path} does not read back as it was written ({', '.join(wrong)}): the parts are kept, try again"
            )
        tokens, prompt_tokens = (int(lengths.sum()) for lengths in file.lengths())
    return Merged(len(found_rows), int((status == STATUS.index("error")).sum()), tokens, prompt_tokens, num_repeated)
