"""The jobs that worked on one output, one after another: a segment each, as a small JSON file among the parts.

A segment is rewritten whole at each seal, so a job that was killed has one too. Knows nothing of the rows themselves.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noria.output.course import Course
from noria.tools.atomic import write_whole
from noria.tools.provenance import now
from noria.tools.text import plural

FORMAT = "noria-segment"
SEGMENT_NAME = re.compile(r"segment-(\d{6,})\.json")
_INTERNAL = ("format", "header", "rates", "running")
_COUNTED = ("rows", "errors", "tokens", "prompt_tokens")
_EMPTY = {
    "start": "",
    "end": "",
    "ended": "",
    "of": 0,
    "hosts": [],
    "ranks": 0,
    "job_ids": {},
    "prompts": [],
    **dict.fromkeys(_COUNTED, 0),
}


def read_segments(folder: Path) -> list[dict[str, Any]]:
    """The segments of a folder of parts, in order; files that are no segments are left out.

    Of each: `start`, `end` (when it was last seen alive, UTC), `ended` (why; "" while it runs, and if it was killed),
    `rows` that it finished, `errors` among them, `tokens` that it generated and sealed, whether their rows are finished or
    not, `prompt_tokens` that it computed, `of` (rows of the whole job), `prompts` (the files that these come from), `course`
    (tokens over time: see course.py), and what its job said of itself: see provenance.segment_of.
    """
    return [{name: value for name, value in one.items() if name not in _INTERNAL} for _, one in _found(folder)]


def latest_rates(folder: Path) -> str | None:
    """The rates that the latest job with some planned with, as text (output/stored_rates.py)."""
    texts = [one["rates"] for _, one in _found(folder) if isinstance(one.get("rates"), str)]
    return texts[-1] if texts else None


def change_rates(folder: Path, rates: str) -> None:
    """For a job that has ended its segment, the latest one: other rates than those that it planned with."""
    for path, segment in _found(folder)[-1:]:
        _write(path, segment | {"rates": rates})


def latest_running(folder: Path) -> list[int]:
    """How long the rows in flight were when the latest job was last seen: see Segment.running."""
    found = [one.get("running") for _, one in _found(folder)]
    latest = found[-1] if found and isinstance(found[-1], list) else []
    return latest if all(_fits(one, 0) for one in latest) else []


def segment_lines(segments: list[dict[str, Any]], running: bool = False) -> list[str]:
    """Each segment in a line, for people; the last one may be `running`."""
    lines = []
    for number, one in enumerate(segments, 1):
        ids = "/".join(map(str, one["job_ids"].values()))
        where = f"{'job ' + ids if ids else 'no job id'} on {', '.join(map(str, one['hosts'])) or 'an unknown host'}"
        counts = f"{plural(one['rows'], 'row')}, {plural(one['errors'], 'error')}, {plural(one['tokens'], 'token')}"
        shard = f" of shard {one['shard']}" if "shard" in one else ""
        runs = running and number == len(segments)
        ended = one["ended"] or ("running" if runs else "no end recorded")
        ranks = plural(one["ranks"], "rank")
        lines.append(f"segment {number}{shard}: {one['start']} to {one['end']} ({ended}), {where}, {ranks}: {counts}")
    return lines


def age(seconds: float) -> str:
    """`12 s ago`, `3 h ago`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def history(folder: Path) -> dict[str, object]:
    """Attributes of an output from the segments of its parts: all of them, restarts, every host, the first start."""
    segments = read_segments(folder)
    if not segments:
        return {}
    hosts = dict.fromkeys(host for one in segments for host in map(str, one["hosts"]))
    start, last = min(one["start"] for one in segments), segments[-1]
    return {
        "segments": segments,
        "restarts": len(segments) - 1,
        "hosts": list(hosts),
        "start": start,
        "job_ids": last["job_ids"],
    }


def restore(folder: Path, attrs: Mapping[str, Any]) -> None:
    """Puts the segments that a finished output tells of back among the parts, where its next jobs add theirs."""
    for number, segment in enumerate(segments_of(attrs)):
        _write(folder / f"segment-{number:06}.json", {"format": FORMAT, **segment})


def _found(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    numbered = sorted((int(match[1]), path) for path in paths if (match := SEGMENT_NAME.fullmatch(path.name)))
    found = []
    for _, path in numbered:
        if not path.is_file():  # to read a pipe would wait for its writer
            continue
        try:
            segment = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        found += [(path, one) for one in _whole([segment]) if one.get("format") == FORMAT]
    return found


def _whole(segments: object) -> list[dict[str, Any]]:
    """Those that are segments indeed, with every field that all have: a file may hold anything."""
    tables = [{**_EMPTY, **one} for one in segments if isinstance(one, dict)] if isinstance(segments, list) else []
    return [one for one in tables if all(_fits(one[name], empty) for name, empty in _EMPTY.items())]


def _fits(value: object, empty: object) -> bool:
    """Whether a field holds what it should: of this type, and no number that nobody can have counted."""
    return type(value) is type(empty) and (not isinstance(value, int) or 0 <= value < 2**63)


def segments_of(attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The segments that the attributes of a finished output tell of."""
    try:
        return _whole(json.loads(attrs.get("segments", "[]")))
    except (TypeError, ValueError, RecursionError):
        return []


def _write(path: Path, segment: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(segment, indent=1).encode())


_DRAWN = ("sampling.seed", "chat.date")  # may be others in a job that begins anew


class Segment:
    """The segment of this job: begun when the run knows what it will do, seen at each seal, ended in order if it can.

    `header`: what rows of the run have in common. Where no part is, segments of another run that finished no row are
    deleted; beside parts, which are of this run, all stay. Raises WriteError if the disk takes not even this record; one that
    cannot be written later is reported once: it does not end the run, which ends soon enough if its rows cannot be either.
    `running`: of rows that are in flight and nowhere sealed, how many there are, and some of their lengths; as long as this job
    has not said so, those of the job before.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], facts: Mapping[str, Any]):
        self.folder = folder
        own = {name: value for name, value in header.items() if name not in _DRAWN}
        self._header = json.loads(json.dumps(own))
        for path, other in [] if any(folder.glob("part-*.h5")) else _found(folder):
            if not other["rows"] and other.get("header") != self._header:
                path.unlink(missing_ok=True)
        taken = [int(match[1]) for path in folder.iterdir() if (match := SEGMENT_NAME.fullmatch(path.name))]
        self.path = folder / f"segment-{max(taken, default=-1) + 1:06}.json"
        self.facts = {"start": now(), **facts, "ended": "", **dict.fromkeys(_COUNTED, 0)}
        self.course, self.running = Course(), latest_running(folder)
        self.told = False  # the user knows that the disk takes nothing
        self._write()

    def sealed(self, rows: int, errors: int, tokens: int) -> None:
        """So many rows more, the errors among them, are on the disk."""
        for name, count in (("rows", rows), ("errors", errors), ("tokens", tokens)):
            self.facts[name] += count
        self.seen()

    def computed(self, prompt_tokens: int, tokens: int) -> None:
        """So many tokens of prompts more are computed, so many generated: with the next write `inspect` knows."""
        self.facts["prompt_tokens"] += prompt_tokens
        self.course.add(prompt_tokens, tokens)

    def seen(self) -> None:
        """The job is alive at this moment."""
        try:
            self._write()
        except OSError as error:
            if not self.told:
                print(f"the record of this job cannot be written: {error}", file=sys.stderr)
            self.told = True

    def _write(self) -> None:
        self.facts |= {"end": now(), "course": self.course.points(), "running": self.running}
        _write(self.path, {"format": FORMAT, **self.facts, "header": self._header})

    def end(self, reason: str) -> None:
        """The job stops in order, for this reason (one word or two)."""
        self.facts["ended"] = reason
        self.seen()
