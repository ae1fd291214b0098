"""Outputs of `--shard i/n` into one: the rows that the run without shards would have written, in its order.

Knows finished outputs; nothing of how their rows came about. The shards stay as they are.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from noria.errors import InputError
from noria.output.agreement import differing
from noria.output.assemble import Chosen, assemble
from noria.output.generations import Generations, open_generations
from noria.output.schema import STATUS
from noria.output.sealed import Part, part_files, parts_folder, scan, scan_one, select, to_stderr
from noria.output.segments import read_segments, segments_of
from noria.tools.atomic import check_folder
from noria.tools.changes import looks_of, refuse_changed
from noria.tools.damage import damaged_is_input_error
from noria.tools.looking import Looker
from noria.tools.text import plural
from noria.tools.values import WHOLE, parse_shard, shard_rows

_MAY_DIFFER = ("shard", "chat.date")
_MAX_OPEN = 256  # files at a time
_SHOWN = 5  # problems in one line
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Shard:
    """A finished shard: number i of n, its rows, what its file says of itself, and what its ranks measured."""

    part: Part
    i: int
    n: int
    attrs: dict[str, Any]
    timing: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return f"{self.i}/{self.n}"

    def told(self, name: str, default: T) -> T:
        """An attribute that is stored as JSON text."""
        try:
            value = json.loads(self.attrs.get(name, ""))
        except (TypeError, ValueError, RecursionError):
            return default
        return value if isinstance(value, type(default)) else default


def merge_shards(
    paths: Sequence[Path], output: Path, argv: Sequence[str], report: Callable[[str], None] = to_stderr
) -> int | None:
    """Writes the rows of all shards to `output` and returns their number; None if that was done before.

    Every checksum of the shards is compared first, and the output's before it gets its name; a kill leaves the output
    whole or not there. Raises InputError for shards that do not belong together, are not all there, or are not
    finished, naming each; WriteError if the disk is full, OSError if it does not read back as written.
    """
    check_folder(output)
    if any(path.exists() and output.exists() and path.samefile(output) for path in paths):
        raise InputError(f"{output} is the output of this merge and one of its shards: the output's name comes first")
    before = looks_of(paths)
    shards = sorted(_opened(paths), key=lambda shard: shard.i)
    _check_together(shards)
    total = _check_rows(shards)
    attrs = _attrs(shards, total, argv)
    if _merged_before(output, attrs):
        return None
    dates = {str(shard.part.header.get("chat.date"))[:10]: shard.name for shard in reversed(shards)}
    if len(dates) > 1:
        told = ", ".join(f"{date} in {name}" for date, name in sorted(dates.items(), key=lambda one: one[1])[:_SHOWN])
        report(f"the chat template uses the date, and the shards began on different days: {told}")
    old = [shard.name for shard in shards if "texts" not in shard.attrs]
    if 0 < len(old) < len(shards):
        report(f"texts of shard {old[0]} were decoded by an earlier version, which left out their first space")
    parts = [shard.part for shard in shards]
    selection = select(parts)

    def check(file: Generations) -> list[str]:
        refuse_changed(before, "merged")
        return []

    with contextlib.ExitStack() as files:
        few = len(parts) <= _MAX_OPEN
        opened = [files.enter_context(open_generations(part.path)) for part in parts] if few else None
        remedy = "the shards are unchanged: make room and merge again"
        try:
            assemble(output, Chosen(parts, selection, opened), attrs, _timing(shards), remedy, check)
        except Exception:  # whatever a library made of bytes that changed under it
            refuse_changed(before, "merged")
            raise
    return len(selection.row)


def _opened(paths: Sequence[Path]) -> list[Shard]:
    shards, problems = [], []
    with Looker() as looker:
        for path in paths:
            try:
                shards.append(_open(path, looker, alone=len(paths) == 1))
            except InputError as error:
                problems.append(str(error))
    _refuse(problems)
    return shards


def _open(path: Path, looker: Looker, alone: bool) -> Shard:
    """A shard; one of 1/1 is a whole run, and taken where it is all that an array had."""
    if not path.exists() and parts_folder(path).is_dir():
        raise InputError(f"shard {path} is not finished ({_so_far(path)}): start its job again")
    with damaged_is_input_error(path), open_generations(path, looker) as file:
        if not file.complete:
            raise InputError(f"{path} is a part of an unfinished output: give the output itself")
        header = json.loads(file.attrs.get("header", "{}"))
        if header.get("shard", WHOLE) == WHOLE and not alone:
            raise InputError(f"{path} holds a whole run, not a shard of one")
        timing = file.file.get("timing", {})
        timing = {name: item[...] for name, item in timing.items() if _is_column(item)}
        return Shard(scan_one(path), *parse_shard(header.get("shard", WHOLE)), dict(file.attrs), timing)


def _so_far(path: Path) -> str:
    done = len(select(scan(parts_folder(path), verify=False)).row)
    of = max((segment["of"] for segment in read_segments(parts_folder(path))), default=0)
    return f"{done:,} of {plural(of, 'row')}" if of else plural(done, "row")


def _check_together(shards: list[Shard]) -> None:
    first, problems = shards[0], []
    by_number: dict[int, list[Shard]] = {}
    for shard in shards:
        place, file = shard.part.path, first.part.path
        if shard.n != first.n:
            problems.append(f"{file} is shard {first.name} and {place} shard {shard.name}: all must have one n")
            continue
        by_number.setdefault(shard.i, []).append(shard)
        ours, theirs = first.part.header, shard.part.header
        for name in differing(theirs, ours, but=_MAY_DIFFER):
            values = f"{json.dumps(ours.get(name))} in {file}, {json.dumps(theirs.get(name))} in {place}"
            problems.append(f"the shards are of different runs: {name} is {values}")
    for same in by_number.values():
        if len(same) > 1:
            files = ", ".join(str(shard.part.path) for shard in same)
            problems.append(f"shard {same[0].name} is given {_times(len(same))}: {files}")
    missing = [f"{i}/{first.n}" for i in range(1, first.n + 1) if i not in by_number]
    if missing and all(shard.n == first.n for shard in shards):
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        word = "shard" if len(missing) == 1 else "shards"
        problems.append(
            f"{word} missing: {', '.join(missing[:_SHOWN])}{more}: give every shard, finished, of {first.n}"
        )
    _refuse(problems)


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f"; and {plural(len(problems) - _SHOWN, 'problem')} more" if len(problems) > _SHOWN else ""
        raise InputError("; ".join(problems[:_SHOWN]) + more)


def _check_rows(shards: list[Shard]) -> int:
    """The number of prompts of the whole run. Raises InputError for a shard with other rows than its own."""
    totals = {shard.attrs.get("prompt_rows") for shard in shards}
    total = totals.pop()
    if totals or not isinstance(total, int):
        told = ", ".join(f"{shard.part.path} {shard.attrs.get('prompt_rows')}" for shard in shards[:_SHOWN])
        raise InputError(
            f"the shards are of different numbers of prompts ({told}): run all of them with the same limit and prompts"
        )
    for shard in shards:
        part, wanted = shard.part, shard_rows(shard.name, total)
        begins = np.flatnonzero(part.sample == 0)
        counted: np.ndarray | list[int]
        counted = np.arange(len(part.row)) - np.repeat(begins, np.diff([*begins, len(part.row)])) if len(begins) else []
        right = np.array_equal(part.row[begins], np.arange(wanted.start, wanted.stop, wanted.step))
        right = right and len(counted) == len(part.row) and np.array_equal(part.sample, counted)
        right = right and np.array_equal(part.row, np.repeat(part.row[begins], np.diff([*begins, len(part.row)])))
        if not right or (part.status == STATUS.index("todo")).any():
            raise InputError(f"{part.path} does not hold the rows of shard {shard.name} of {plural(total, 'prompt')}")
    return total


def _attrs(shards: list[Shard], total: int, argv: Sequence[str]) -> dict[str, object]:
    """What the output says of itself: the first shard's words on what all share, and every shard's on its own."""
    first = shards[0].attrs
    shared = (
        "run_file",
        "versions",
        "checkpoint_hash",
        "prompts_hash",
        "prompt_files",
        "launcher",
        "plan",
        "seed",
        "model_sampling",
    )
    none: list[Any] = []
    told = [
        {
            "shard": shard.name,
            "file": shard.part.path.name,
            "rows": len(shard.part.row),
            "checksums": shard.told("checksums", {}),
            **{name: shard.attrs.get(name, "") for name in ("start", "end", "restarts", "ranks")},
        }
        for shard in shards
    ]
    return {
        "header": json.dumps({**shards[0].part.header, "shard": WHOLE}),
        "repeated_rows": 0,
        **{name: first[name] for name in shared if name in first},
        "argv": list(argv),
        "prompt_rows": total,
        "ranks": sum(int(shard.attrs.get("ranks", 0)) for shard in shards),
        "devices": [device for shard in shards for device in shard.told("devices", none)],
        "hosts": list(dict.fromkeys(str(host) for shard in shards for host in shard.told("hosts", none))),
        "start": min(str(shard.attrs.get("start", "")) for shard in shards),
        "end": max(str(shard.attrs.get("end", "")) for shard in shards),
        "restarts": sum(int(shard.attrs.get("restarts", 0)) for shard in shards),
        "segments": [{"shard": shard.name, **one} for shard in shards for one in segments_of(shard.attrs)],
        "shards": told,
    }


def _timing(shards: list[Shard]) -> dict[str, np.ndarray]:
    """What each rank of each shard measured, and `shard`, the shard that it worked on."""
    names = [name for name in shards[0].timing if all(_is_column(shard.timing.get(name)) for shard in shards)]
    if not names:
        return {}
    numbers = [np.full(len(shard.timing[names[0]]), shard.i) for shard in shards]
    columns = {name: np.concatenate([shard.timing[name] for shard in shards]) for name in names}
    return {"shard": np.concatenate(numbers), **columns}


def _is_column(values: object) -> bool:
    return isinstance(values, np.ndarray | h5py.Dataset) and values.ndim == 1 and values.dtype.kind in "iuf"


def _merged_before(output: Path, attrs: Mapping[str, Any]) -> bool:
    """Whether `output` is the merge of these shards. Raises InputError if something else is there."""
    if part_files(parts_folder(output)):
        raise InputError(f"{output} is the output of a run that is not finished: name another file")
    if not output.exists():
        return False
    with Looker() as looker, open_generations(output, looker) as file, damaged_is_input_error(output):
        there = json.loads(file.attrs.get("shards", "[]"))
        same = [(one["shard"], one["checksums"]) for one in there] == [
            (one["shard"], one["checksums"]) for one in attrs["shards"]
        ]
        if file.complete and same:
            return True
    raise InputError(f"{output} exists and is not the merge of these shards: name another file, or move it away")
