"""Says what is there of an output that is not finished: a run at work, or one that was stopped.

Reads its parts, segments and lock; changes nothing, and may be called while the run writes.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from noria.errors import InputError
from noria.output.access import hindrance
from noria.output.outcome import Outcome, outcome_of_parts
from noria.output.sealed import ERROR, Part, Selection, part_files, parts_folder, select, tried_again, unfinished_parts
from noria.output.segments import age, read_segments
from noria.output.summary import Summary, settings, summary_of
from noria.tools.changes import looks_of
from noria.tools.lock import held_by
from noria.tools.text import nbytes_words, plural
from noria.tools.values import WHOLE


def summary_of_unfinished(path: Path, verify: bool = False) -> Summary:
    """What a running or stopped run has so far; with `verify` every part's checksums are compared.

    Of a run that finishes meanwhile, what summary.summary_of says. Raises InputError for damaged parts if `verify`.
    """
    return tried_again(path, lambda: summary_of(path, verify) if path.exists() else _of_parts(path, verify))


def _of_parts(path: Path, verify: bool) -> Summary:
    damaged: list[str] = []
    parts = unfinished_parts(path, damaged.append, verify)
    summary = _summary(path, parts, damaged)
    if verify and damaged:
        raise InputError(f"{path}: {len(damaged)} of {plural(len(damaged) + len(parts), 'part')} damaged: {damaged[0]}")
    if verify:
        summary.verified = f"checksums: all of {plural(len(parts), 'part')} agree"
    return summary


def _summary(path: Path, parts: list[Part], damaged: list[str]) -> Summary:
    folder, selection = parts_folder(path), select(parts)
    segments, looks = read_segments(folder), [*looks_of(part_files(folder)).values()]
    header = parts[-1].header if parts else {}
    of = segments[-1]["of"] if segments else 0
    sealed = age(time.time() - max(at for *_, at in looks) / 1e9) if looks else "never"
    nbytes, shard = sum(size for *_, size, _ in looks), header.get("shard", WHOLE)
    outcome, unreadable = _outcome(parts, selection)
    return Summary(
        path,
        f"not finished, {_state(path, segments)}",
        outcome,
        num_todo=max(of - len(selection.row), 0) if of else None,
        num_half_way=selection.num_todo,
        running=held_by(path) is not None,
        segments=segments,
        run_file=settings(header),
        notes=[
            f"{plural(len(looks), 'part')} in {folder}, {nbytes_words(nbytes)}, last sealed {sealed}",
            *damaged,
            *unreadable,
            *([f"shard: {shard}"] if shard != WHOLE else []),
        ],
    )


def _outcome(parts: list[Part], selection: Selection) -> tuple[Outcome, list[str]]:
    """The outcome, and a line where it cannot be read whole: then it has what the parts' numbers say."""
    try:
        return outcome_of_parts(parts, selection), []
    except InputError as error:
        status = np.array(
            [parts[number].status[place] for number, place in zip(selection.part, selection.position, strict=True)]
        )
        outcome = Outcome(parts[-1].header if parts else {})
        outcome.num_rows, outcome.num_errors = len(status), int((status == ERROR).sum())
        outcome.num_tokens, outcome.num_prompt_tokens = (
            int(selection.num_tokens.sum()),
            int(selection.num_prompt_tokens.sum()),
        )
        return outcome, [f"why rows are in error cannot be read: {error}"]


def _state(path: Path, segments: list[dict[str, Any]]) -> str:
    holder = held_by(path)
    if holder:
        return f"being written by {holder}"
    last = segments[-1] if segments else {}
    found = hindrance(path)
    goes_on = "the same command continues it" + (f" once you may write there ({found})" if found else "")
    if last.get("ended"):
        return f"stopped ({last['ended']}); {goes_on}"
    return f"stopped without notice, last seen {last.get('end') or 'never'}; {goes_on}"
