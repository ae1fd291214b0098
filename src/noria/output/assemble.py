"""One file of generations from rows of many: written in bounded memory and read back before it gets its name.

Knows files and rows; not which files these are, nor what becomes of them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from noria.output.generations import Generation, Generations, open_generations
from noria.output.schema import FORMAT, VERSION, RowWriter, checksums, scores_together, write_attrs
from noria.output.sealed import Part, Selection, gather
from noria.tools.atomic import GuardedFile, fsync, replacing
from noria.tools.trailer import append_trailer


def assemble(
    target: Path,
    files: Sequence[Part],
    selection: Selection,
    attrs: Mapping[str, Any],
    check: Callable[[Generations], list[str]],
    timing: Mapping[str, Any] | None = None,
    complete: bool = True,
    remedy: str = "the parts are kept: make room and start the same run again",
    opened: Sequence[Generations] | None = None,
    change: Callable[[Generation], Generation] | None = None,
) -> None:
    """Writes the selected rows of `files` to `target`, in order; what had that name before is replaced.

    `attrs` must hold `header`; `timing` and `change` are those of merge.merge, `opened` that of sealed.gather. `check` looks
    at the new file before it gets its name and returns the columns that are wrong. Raises WriteError if the disk is full,
    with the remedy, OSError if the file does not read back as it was written; then there is nothing new.
    """
    with replacing(target, remedy) as unchecked:
        sums = _write(unchecked, files, selection, attrs, timing or {}, complete, remedy, opened, change)
        if not complete:
            append_trailer(unchecked)
        fsync(unchecked)
        with open_generations(unchecked) as file:
            found = checksums(file.datasets, file.scores)
            wrong = [name for name in sums if found.get(name) != sums[name]] + check(file)
            if wrong or file.complete != complete:
                kept = remedy.partition(":")[0]
                raise OSError(f"{target} does not read back as it was written ({', '.join(wrong)}): {kept}, try again")


def _write(
    path: Path,
    files: Sequence[Part],
    selection: Selection,
    attrs: Mapping[str, Any],
    timing: Mapping[str, Any],
    complete: bool,
    remedy: str,
    opened: Sequence[Generations] | None,
    change: Callable[[Generation], Generation] | None,
) -> dict[str, str]:
    scores = scores_together(part.scores for part in files)
    tokens, prompt_tokens = int(selection.num_tokens.sum()), int(selection.num_prompt_tokens.sum())
    with GuardedFile(path) as disk:
        try:
            with h5py.File(path.name, "w", driver="fileobj", fileobj=disk) as file:
                write_attrs(file, {"format": FORMAT, "version": VERSION, "complete": False, **attrs})
                writer = RowWriter(file, len(selection.row), tokens, prompt_tokens, scores)
                for block in gather(files, selection, opened):
                    writer.append([change(one) for one in block] if change else block)
                    disk.check(remedy)
                if complete:
                    _write_timing(file.create_group("timing"), timing)
                sums = writer.finish()
                file.flush()
                if complete:
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
