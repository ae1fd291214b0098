"""Says what is there of an output that is not finished: a run at work, or one that was stopped.

Reads its parts, segments and lock; changes nothing, and may be called while the run writes.
"""

import json
import time
from pathlib import Path
from typing import Any

from noria.config import WHOLE, InputError
from noria.files.generations import describe
from noria.files.lock import held_by
from noria.files.outcome import outcome_of_parts
from noria.files.schema import FORMAT, STATUS
from noria.files.sealed import Part, Selection, part_files, parts_folder, scan, select
from noria.files.segments import age, read_segments, segment_lines
from noria.text import plural

_TRIES = 5  # a run that works may put parts together, or finish, while they are read


def is_unfinished(path: Path) -> bool:
    """Whether a run left parts at this place, and no output yet."""
    return not path.exists() and parts_folder(path).is_dir()


def describe_unfinished(path: Path, verify: bool = False) -> list[str]:
    """What a running or stopped run has so far, a line each; with `verify` every part's checksums are compared.

    Of a run that finishes meanwhile, what generations.describe says. Raises InputError for damaged parts if `verify`.
    """
    damaged: list[str] = []
    parts: list[Part] = []
    lines: list[str] = []
    for attempt in range(_TRIES):
        try:
            damaged.clear()
            parts = scan(parts_folder(path), damaged.append, verify)
            lines = _lines(path, parts, damaged)
            break
        except FileNotFoundError as error:
            if path.exists():
                return describe(path, verify)
            if attempt == _TRIES - 1:
                raise InputError(f"{path}: its parts change too fast to be read ({error}): try again") from error
    if damaged and verify:
        raise InputError(f"{path}: {len(damaged)} of {plural(len(damaged) + len(parts), 'part')} damaged: {damaged[0]}")
    return lines + [f"checksums: all of {plural(len(parts), 'part')} agree"] * verify


def _lines(path: Path, parts: list[Part], damaged: list[str]) -> list[str]:
    folder, selection = parts_folder(path), select(parts)
    segments, files = read_segments(folder), [file.stat() for file in part_files(folder)]
    statuses = [parts[number].status[place] for number, place in zip(selection.part, selection.position, strict=True)]
    error, finished = sum(status == STATUS.index("error") for status in statuses), len(statuses)
    rows = f"{finished - error:,} done, {error:,} error"
    of = segments[-1]["of"] if segments else 0
    rows += f", {max(of - finished, 0):,} left of {of:,}" if of else ""
    rows += f" ({plural(selection.num_todo, 'row')} half-way)" if selection.num_todo else ""
    sealed = age(time.time() - max(file.st_mtime for file in files)) if files else "never"
    nbytes = sum(file.st_size for file in files)
    header = {name: value for name, value in parts[-1].header.items() if value is not None} if parts else {}
    shard = header.get("shard", WHOLE)
    return [
        f"{FORMAT}: output that is not finished, {_state(path, segments)}",
        f"rows: {rows}",
        f"{plural(int(selection.num_prompt_tokens.sum()), 'prompt token')},"
        f" {plural(int(selection.num_tokens.sum()), 'generated token')} of finished rows",
        f"{plural(len(files), 'part')} in {folder}, {nbytes / 2**20:.1f} MiB, last sealed {sealed}",
        *damaged,
        *_outcome(parts, selection),
        *([f"shard: {shard}"] if shard != WHOLE else []),
        *([f"header: {json.dumps(header)}"] if header else []),
        *segment_lines(segments, held_by(path) is not None),
    ]


def _outcome(parts: list[Part], selection: Selection) -> list[str]:
    try:
        return outcome_of_parts(parts, selection).lines()
    except InputError as error:
        return [f"why rows are in error cannot be read: {error}"]


def _state(path: Path, segments: list[dict[str, Any]]) -> str:
    holder = held_by(path)
    if holder:
        return f"being written by {holder}"
    last = segments[-1] if segments else {}
    if last.get("ended"):
        return f"stopped ({last['ended']}); the same run again goes on"
    return f"stopped without a word, last seen {last.get('end') or 'never'}; the same run again goes on"
