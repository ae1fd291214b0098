"""One file of generations from rows of many: written in bounded memory and read back before it gets its name.

Knows files and rows; not which files these are, nor what becomes of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from noria.output.generations import Generations, open_generations
from noria.output.schema import FORMAT, VERSION, Generation, RowWriter, checksums, scores_together, write_attrs
from noria.output.sealed import Part, Selection, gather
from noria.tools.atomic import GuardedFile, fsync, replacing
from noria.tools.trailer import append_trailer


@dataclass(frozen=True)
class Chosen:
    """Rows of many files. `opened`: see sealed.gather; `change`: makes of each row, in order, what is written of it."""

    files: Sequence[Part]
    selection: Selection
    opened: Sequence[Generations] | None = None
    change: Callable[[Generation], Generation] | None = None

    def blocks(self) -> Iterator[list[Generation]]:
        """The rows in order, a few at a time."""
        for block in gather(self.files, self.selection, self.opened):
            yield [self.change(one) for one in block] if self.change else block


def assemble(
    target: Path,
    rows: Chosen,
    attrs: Mapping[str, Any],
    timing: Mapping[str, Any] | None,
    remedy: str = "the parts are kept: make room and start the same run again",
    check: Callable[[Generations], list[str]] = lambda file: [],
) -> None:
    """Writes the chosen rows to `target`, in order; what had that name before is replaced.

    `attrs` must hold `header`; `timing` is that of merge.merge (None: the rows are a part of an unfinished output). `check`
    looks at the new file too before it gets its name, and returns the columns that are wrong. Raises WriteError if the disk
    is full, with the remedy, OSError if the file does not read back as it was written; then there is nothing new.
    """
    with replacing(target, remedy) as unchecked:
        sums = _write(unchecked, rows, attrs, timing, remedy)
        if timing is None:
            append_trailer(unchecked)
        fsync(unchecked)
        with open_generations(unchecked) as file:
            found = checksums(file.datasets, file.scores)
            wrong = [name for name in sums if found.get(name) != sums[name]] + _other_rows(file, rows.selection)
            wrong += check(file)
            if wrong or file.complete != (timing is not None):
                kept = remedy.partition(":")[0]
                raise OSError(
                    f"{target} does not read back as it was written ({', '.join(dict.fromkeys(wrong))}): {kept}, try again"
                )


def _other_rows(file: Generations, selection: Selection) -> list[str]:
    keys = zip(("row", "sample"), (selection.row, selection.sample), strict=True)
    return [name for name, wanted in keys if not np.array_equal(file.column(name), wanted)]


def _write(
    path: Path, rows: Chosen, attrs: Mapping[str, Any], timing: Mapping[str, Any] | None, remedy: str
) -> dict[str, str]:
    selection = rows.selection
    scores = scores_together(part.scores for part in rows.files)
    tokens, prompt_tokens = int(selection.num_tokens.sum()), int(selection.num_prompt_tokens.sum())
    with GuardedFile(path) as disk:
        try:
            with h5py.File(path.name, "w", driver="fileobj", fileobj=disk) as file:
                write_attrs(file, {"format": FORMAT, "version": VERSION, "complete": False, **attrs})
                writer = RowWriter(file, len(selection.row), tokens, prompt_tokens, scores)
                for block in rows.blocks():
                    writer.append(block)
                    disk.check(remedy)
                if timing is not None:
                    _write_timing(file.create_group("timing"), timing)
                sums = writer.finish()
                file.flush()
                if timing is not None:
                    file.attrs["complete"] = True
        finally:
            disk.check(remedy)
    return sums


def _write_timing(group: h5py.Group, timing: Mapping[str, Any]) -> None:
    for name, values in timing.items():
        if isinstance(values, Mapping):
            _write_timing(group.create_group(name), values)
        else:
            values = np.asarray(values)
            text = values.dtype.kind in "UO"
            group.create_dataset(
                name, data=values.astype(object) if text else values, dtype=h5py.string_dtype() if text else None
            )
