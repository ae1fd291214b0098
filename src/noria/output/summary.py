"""What an output holds, finished or not, and how its runs went: as lines for people, as JSON for scripts.

The keys of the JSON are only ever added to. Knows nothing of how rows are made.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from noria.output.generations import Generations, open_generations, verify_checksums
from noria.output.outcome import Outcome, how_to_read
from noria.output.schema import FORMAT, Generation
from noria.output.segments import segment_lines, segments_of
from noria.tools.damage import damaged_is_input_error
from noria.tools.text import cut, nbytes_words, plural, seconds_words

_TOLD = ("format", "version", "complete", "checksums", "segments", "shards", "run_file", "header")  # in their own words
_SEGMENTS = 3  # the last ones, unless all are asked for
_WIDTH = 60  # characters of a prompt, of a text
_LONG = 2000  # characters of what the file says of itself
_MARGIN = 12  # columns of a name


@dataclass
class Summary:
    """`num_todo`: rows that are left, None where nobody knows yet how many there are. `state`: how far it is, in words.
    `notes` are lines that everybody should see; `details`, those that are shown when all is asked for."""

    path: Path
    state: str
    outcome: Outcome
    num_todo: int | None = 0
    num_half_way: int = 0
    finished: bool = False
    running: bool = False
    segments: list[dict[str, Any]] = field(default_factory=list)
    run_file: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    verified: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For scripts; keys are only ever added."""
        outcome = self.outcome
        reasons = {name: count for name, count in outcome.finish_reasons.items() if name != "none"}
        return {
            "format": FORMAT,
            "finished": self.finished,
            "running": self.running,
            "rows": {"todo": self.num_todo, "done": self.num_done, "error": outcome.num_errors},
            "errors": outcome.reasons.as_list(),
            "tokens": {
                "prompt": outcome.num_prompt_tokens,
                "generated": outcome.num_tokens,
                "cached": outcome.num_cached,
            },
            "finish_reasons": reasons,
            "segments": self.segments,
        }

    def lines(self, everything: bool = False) -> list[str]:
        """Five lines first, then what should be known, three generations, the run and its jobs."""
        lines = [f"{self.path}: {self.state}", *self.counted(), *self.notes, *self.outcome.lines()]
        lines += [line for one in self.outcome.examples for line in _example(one)]
        lines += _table("run file", self.run_file)
        jobs = segment_lines(self.segments, self.running)
        left_out = 0 if everything else max(len(jobs) - _SEGMENTS, 0)
        lines += [f"{plural(left_out, 'earlier segment')} (--all lists them)"] * (left_out > 0) + jobs[left_out:]
        lines += self.details if everything else []
        return lines + [self.verified] * bool(self.verified) + [how_to_read(self.path)] * (self.num_done > 0)

    @property
    def num_done(self) -> int:
        return self.outcome.num_rows - self.outcome.num_errors - self.outcome.finish_reasons["none"]

    def counted(self) -> list[str]:
        outcome, ended = self.outcome, self.outcome.finish_reasons
        rows = f"{self.num_done:,} done, {plural(outcome.num_errors, 'error')}"
        if self.num_todo is None or self.num_todo:
            rows += f", {'others' if self.num_todo is None else f'{self.num_todo:,}'} left"
            rows += f" ({plural(self.num_half_way, 'row')} half-way)" if self.num_half_way else ""
        shared = f" ({outcome.num_cached:,} shared)" if outcome.num_cached else ""
        return [
            _named("rows", rows),
            _named("tokens", f"{outcome.num_prompt_tokens:,} of prompts{shared}, {outcome.num_tokens:,} generated"),
            _named("ended", f"{ended['stop']:,} at a stop, {ended['length']:,} at their limit of tokens"),
            _named("work", _work(self.segments)),
        ]


def summary_of(path: Path, verify: bool = False) -> Summary:
    """That of a finished output or of one sealed part, looked at before; with `verify` every checksum is computed again.

    Raises InputError as `open_generations`, and for damaged columns.
    """
    with open_generations(path) as file, damaged_is_input_error(path):
        header = json.loads(file.attrs.get("header", "{}"))
        outcome = Outcome(header)
        outcome.add(file)
        half_way = outcome.finish_reasons["none"]
        return Summary(
            path,
            "finished" if file.complete else "part of an output that is not finished",
            outcome,
            num_todo=half_way,
            num_half_way=half_way,
            finished=file.complete,
            segments=segments_of(file.attrs),
            run_file=_run_file(file.attrs) or settings(header),
            details=_details(file, header),
            verified=verify_checksums(file) if verify else "",
        )


def _run_file(attrs: Mapping[str, Any]) -> list[str]:
    return [line for line in str(attrs.get("run_file", "")).split("\n") if line.strip()]


def settings(header: dict[str, Any]) -> list[str]:
    """`sampling.top_k = 5`: what the rows were made with, a line each; what was not set is left out."""
    return [f"{name} = {json.dumps(value)}" for name, value in header.items() if value is not None]


def _details(file: Generations, header: dict[str, Any]) -> list[str]:
    lines = [_named("version", f"{file.attrs.get('version')} of {FORMAT}"), _named("logprobs", str(file.scores))]
    lines += [f"{name}: {cut(str(value), _LONG)}" for name, value in file.attrs.items() if name not in _TOLD]
    lines += _table("header", settings(header))
    timing = file.file.get("timing")
    if isinstance(timing, h5py.Group):
        timing.visititems(
            lambda name, item: lines.append(_measured(name, item)) if isinstance(item, h5py.Dataset) else None
        )
    return lines


def _measured(name: str, dataset: h5py.Dataset) -> str:
    if dataset.dtype.kind not in "iuf" or dataset.ndim > 1 or dataset.size > 8:
        return f"timing {name}: {dataset.dtype} {list(dataset.shape)}"
    values = dataset[...]
    return f"timing {name}: " + " ".join(_in_units(name, value) for value in np.atleast_1d(values))


def _in_units(name: str, value: float) -> str:
    if name.endswith("nbytes") and np.isfinite(value):
        return nbytes_words(int(value))
    return f"{value:,.6g} s" if "seconds" in name or name == "waited" else f"{value:,.6g}"


def _example(one: Generation) -> list[str]:
    name = f"row {one.row}" + f" sample {one.sample}" * (one.sample > 0) + f" ({one.id})" * (one.id != str(one.row))
    return [f"{name}: {cut(one.prompt, _WIDTH)!r}", f"{'':<{_MARGIN}}-> {cut(one.text, _WIDTH)!r}"]


def _work(segments: list[dict[str, Any]]) -> str:
    """How many jobs worked how long on it, and what they made."""
    if not segments:
        return "not recorded"
    seconds = sum(seconds_of(one) for one in segments)
    tokens = sum(one["tokens"] for one in segments)
    rate = f", {tokens / seconds:,.0f} tok/s" if seconds and tokens else ""
    last = segments[-1]
    hosts = ", ".join(map(str, last["hosts"])) or "an unknown host"
    where = f"the last with {plural(last['ranks'], 'rank')} on {hosts}"
    return f"{plural(len(segments), 'job')}, {seconds_words(seconds)} together{rate}; {where}"


def seconds_of(segment: Mapping[str, Any]) -> float:
    """How long a job worked on an output, as far as it said."""
    try:
        said = segment["start"], segment["end"]
        times = [datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC) for text in said]
    except ValueError:  # a segment may say anything
        return 0
    return max((times[1] - times[0]).total_seconds(), 0)


def _table(name: str, values: list[str]) -> list[str]:
    return [_named("" if number else name, cut(line, _LONG)) for number, line in enumerate(values)]


def _named(name: str, words: str) -> str:
    return f"{name:<{_MARGIN}}{words}"
