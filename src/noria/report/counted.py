"""Numbers of rows as pictures show them: how many have which length, and how fast tokens came over the time of the jobs."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from noria.report.terms import number

BINS = 24  # at most
MAX_POINTS = 480  # of the jobs together


@dataclass(frozen=True)
class Lengths:
    """[B] rows with a length of starts[b] to starts[b] + width - 1, and some of all lengths in order."""

    starts: list[int]
    width: int
    counts: list[int]
    smallest: int
    median: int
    most: int  # 95 % of the rows are no longer
    largest: int
    mean: float

    @property
    def words(self) -> str:
        """All but the counts, in a line."""
        return f"{self.smallest:,} to {self.largest:,}, mean {self.mean:,.1f}, median {self.median:,}, 95 % up to {self.most:,}"


@dataclass(frozen=True)
class Speed:
    """Tokens/s between two moments, in seconds of work of all jobs one after another."""

    start: float
    stop: float
    prompt: float
    new: float
    job: int  # from 0


def lengths_of(lengths: np.ndarray) -> Lengths | None:
    """Of [R] tokens; None of no rows."""
    if not len(lengths):
        return None
    ordered = np.sort(lengths)
    low, high = int(ordered[0]), int(ordered[-1])
    width = next(width for width in _widths() if high // width - low // width < BINS)
    first = low // width
    counts = np.bincount(ordered // width - first)
    median, most = (int(ordered[int(share * (len(ordered) - 1))]) for share in (0.5, 0.95))
    starts = [(first + place) * width for place in range(len(counts))]
    return Lengths(starts, width, counts.tolist(), low, median, most, high, float(ordered.mean()))


def _widths() -> Any:
    """1, 2, 5, 10, 20, 50, ..."""
    return (step * 10**power for power in itertools.count() for step in (1, 2, 5))


def speeds_of(segments: Sequence[Mapping[str, Any]], seconds: Sequence[float]) -> list[Speed]:
    """By the courses of the jobs (output/course.py); one speed of a job that has none. `seconds`: of each job."""
    found: list[Speed] = []
    begun = 0.0
    for job, (segment, length) in enumerate(zip(segments, seconds, strict=True)):
        points = _course(segment.get("course"))
        if len(points) < 2 and length > 0:
            tokens = [max(number(segment, name) or 0.0, 0.0) for name in ("prompt_tokens", "tokens")]
            points = [(0.0, 0.0, 0.0), (length, tokens[0], tokens[1])]
        for (start, prompt, new), (stop, more_prompt, more_new) in itertools.pairwise(points):
            span = stop - start
            speed = Speed(begun + start, begun + stop, (more_prompt - prompt) / span, (more_new - new) / span, job)
            found.append(speed)
        begun += points[-1][0] if points else 0.0
    return _fewer(found)


def _course(course: object) -> list[tuple[float, float, float]]:
    """The points of a course whose time and sums grow, as they should: a file may hold anything."""
    found: list[tuple[float, float, float]] = []
    for point in course[:1000] if isinstance(course, list) else []:
        values = [number({"": one}, "") for one in point] if isinstance(point, list) and len(point) == 3 else [None]
        if None in values:
            continue
        at, prompt, new = (max(value or 0.0, 0.0) for value in values)
        if not found or (at > found[-1][0] + 1e-3 and prompt >= found[-1][1] and new >= found[-1][2]):
            found.append((at, prompt, new))
    return found


def _fewer(speeds: list[Speed]) -> list[Speed]:
    """Neighbours of one job joined until there are no more than a picture shows; of too many jobs the last ones."""
    while len(speeds) > MAX_POINTS:
        jobs = [list(of_job) for _, of_job in itertools.groupby(speeds, lambda speed: speed.job)]
        joined = [_joined(of_job[place : place + 2]) for of_job in jobs for place in range(0, len(of_job), 2)]
        if len(joined) == len(speeds):
            return speeds[-MAX_POINTS:]
        speeds = joined
    return speeds


def _joined(speeds: Sequence[Speed]) -> Speed:
    """The mean speed of one stretch and, if there is another, of the next."""
    first, last = speeds[0], speeds[-1]
    spans = [one.stop - one.start for one in speeds]
    prompt, new = (
        sum(getattr(one, name) * span for one, span in zip(speeds, spans, strict=True)) / sum(spans)
        for name in ("prompt", "new")
    )
    return Speed(first.start, last.stop, prompt, new, first.job)
