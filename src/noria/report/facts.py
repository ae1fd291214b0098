"""What a report tells of an output, finished or not, before anybody has decided how it looks."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from noria.output import opened
from noria.output.opened import Output
from noria.output.schema import STATUS, Generation
from noria.output.sealed import is_unfinished
from noria.output.segments import segment_lines
from noria.output.summary import Summary, seconds_of, summary_of
from noria.output.unfinished import summary_of_unfinished
from noria.report.counted import Lengths, Speed, lengths_of, speeds_of
from noria.report.measured import LinkBytes, RankTime, moved, rank_times, terms
from noria.report.spent import Spent, spent
from noria.report.terms import Term, Timings, number
from noria.tools.provenance import now
from noria.tools.text import plural

NUM_GENERATIONS = 10
MAX_GROUPS = 30  # of errors, the most frequent ones
MAX_RANKS = 256
MAX_JOBS = 20


@dataclass(frozen=True)
class Errors:
    """Rows whose errors differ in numbers alone: how many, and (id, error) of the first ones."""

    count: int
    examples: list[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """`ran`: (name, words) of what ran; `terms`, `spent` and `ranks`: of the last job, nothing of a run that is not finished.
    `ended`: rows by finish reason. `num_groups`: of errors, of which `errors` are the most frequent."""

    path: Path
    state: str
    made: str
    notes: list[str]
    ran: list[tuple[str, str]]
    run_file: list[str]
    plan: list[tuple[str, str]]
    terms: list[Term]
    assumed: list[str]
    spent: Spent | None
    ranks: list[RankTime]  # the first ones
    num_ranks: int
    moved: list[LinkBytes]
    speeds: list[Speed]
    lengths: Lengths | None
    prompt_lengths: Lengths | None
    ended: dict[str, int]
    errors: list[Errors]
    num_groups: int
    generations: list[Generation]
    jobs: list[str]


def facts_of(path: Path) -> Facts:
    """Reads an output. Raises InputError where it is none, or damaged."""
    with opened.open(path) as rows:  # looks at the file, for the summary too
        summary = summary_of_unfinished(path) if is_unfinished(path) else summary_of(path)
        plan, timings, segments = _table(rows.attrs.get("plan")), rows.timings(), summary.segments
        last = segments[-1] if segments else {}
        ranks = rank_times(timings, _list(rows.attrs.get("devices")))
        groups = summary.outcome.reasons.groups()
        new, prompts = rows.lengths()
        return Facts(
            path,
            summary.state,
            now(),
            [*summary.notes, *summary.outcome.cut_lines()],
            _ran(summary, rows.attrs),
            summary.run_file,
            _planned(plan),
            # Of shards that were joined the ranks had a plan each.
            []
            if "shards" in rows.attrs
            else terms(plan, timings, int(number(last, "tokens") or 0), len(segments) == 1),
            _assumed(plan),
            _spent(rows, plan, timings),
            ranks[:MAX_RANKS],
            len(ranks),
            moved(timings),
            speeds_of(segments, [seconds_of(one) for one in segments]),
            lengths_of(new),
            lengths_of(prompts),
            {name: count for name, count in summary.outcome.finish_reasons.items() if count},
            [Errors(count, examples) for count, examples in groups[:MAX_GROUPS]],
            len(groups),
            _generations(rows),
            segment_lines(segments, summary.running)[-MAX_JOBS:],
        )


def spent_of(path: Path) -> Spent | None:
    """Where the time of a finished output's last job went. Raises InputError as `facts_of`."""
    with opened.open(path) as rows:
        return _spent(rows, _table(rows.attrs.get("plan")), rows.timings())


def _spent(rows: Output, plan: Mapping[str, Any], timings: Timings) -> Spent | None:
    """Of shards that were joined the ranks had a plan each."""
    return None if "shards" in rows.attrs else spent(plan, timings, str(rows.attrs.get("rates", "")))


def _generations(rows: Output) -> list[Generation]:
    """Some of the rows that are done, from all over the output."""
    done = np.flatnonzero(rows.numbers("status") == STATUS.index("done"))
    places = np.unique(np.linspace(0, len(done) - 1, min(NUM_GENERATIONS, len(done))).astype(int)) if len(done) else ()
    return [rows[int(done[place])] for place in places]


def _ran(summary: Summary, attrs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What worked on it, as far as the output says."""
    last = summary.segments[-1] if summary.segments else {}
    versions = _table(attrs.get("versions"))
    found = [(line[:12].strip(), line[12:].strip()) for line in summary.counted()]
    found.append(("model", _setting(summary.run_file, "model")))
    found.append(("prompts", _setting(summary.run_file, "prompts") if "run_file" in attrs else _prompts(last)))
    keys = {"dtype": "dtype", "cache": "kv_cache_dtype", "products": "products"}
    found += [(name, _setting(summary.run_file, key)) for name, key in keys.items()]
    found.append(("devices", _devices(last.get("devices"))))
    found.append(
        ("time", f"{attrs.get('start') or last.get('start', '')} to {attrs.get('end') or last.get('end', '')}")
    )
    found.append(("job ids", ", ".join(f"{name} {value}" for name, value in _table(last.get("job_ids")).items())))
    known = [f"{name} {version}" for name, version in versions.items() if name in ("noria", "python", "torch", "hdf5")]
    found += [("versions", ", ".join(known)), ("MPI", str(versions.get("mpi", "")).partition("\n")[0])]
    return [(name, words) for name, words in found if words and words != " to "]


def _prompts(segment: Mapping[str, Any]) -> str:
    """The files of prompts of a job: an output that is not finished has no run file, and only the digest of its prompts."""
    return ", ".join(str(path) for path in _list(segment.get("prompts"))[:64])


def _setting(run_file: list[str], name: str) -> str:
    """The value of a key at the top of a run file, as it is written there."""
    lines = (line.partition(" = ") for line in run_file)
    return next((value.strip('"') for key, _, value in lines if key == name and value != '"auto"'), "")


def _devices(devices: object) -> str:
    """`2 ranks: 2 x node3 cuda:0 (NVIDIA H200)`."""
    names = [str(one) for one in devices[:4096]] if isinstance(devices, list) else []
    counts = {name: names.count(name) for name in dict.fromkeys(names[:64])}
    words = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())
    return f"{plural(len(names), 'rank')}: {words}" if names else ""


def _planned(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the plan chose, where it is as plans are."""
    names = ("num_ranks", "laps", "groups", "step_tokens", "microbatch_tokens", "weight_slots", "num_pages")
    found = [(name.removeprefix("num_").replace("_", " "), number(plan, name)) for name in names]
    words = [(name, f"{value:,.0f}") for name, value in found if value is not None]
    return words + [
        (name, plan[name]) for name in ("dtype", "schedule", "activations") if isinstance(plan.get(name), str)
    ]


def _assumed(plan: Mapping[str, Any]) -> list[str]:
    """The rates that the plan took from built-in figures and not from a measurement."""
    predicted = plan.get("predicted")
    return [str(name) for name in _list(predicted.get("assumed"))] if isinstance(predicted, Mapping) else []


def _table(value: object) -> Mapping[str, Any]:
    found = _json(value)
    return found if isinstance(found, Mapping) else {}


def _list(value: object) -> list[Any]:
    found = _json(value)
    return found if isinstance(found, list) else []


def _json(value: object) -> object:
    """What an attribute holds that is stored as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
