"""A step of a group from the sequences that take part in it. Knows neither slots' owners nor pages."""

from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile
from typing import Protocol

import numpy as np

from noria.borders import cut
from noria.rows.sequence import Sequence
from noria.step import PAGE_TOKENS, Admitted, Grown, Step, Word


class Cuts(Protocol):
    """How a step is cut into microbatches: rows.slots.Capacity, of which this file knows no more."""

    @property
    def microbatch_tokens(self) -> int: ...

    @property
    def microbatches(self) -> int: ...

    @property
    def slot_pages(self) -> int: ...

    @property
    def state_rows(self) -> int: ...


@dataclass(frozen=True)
class Changes:
    """Of slots, before a step."""

    released: tuple[int, ...] = ()
    admitted: tuple[Admitted, ...] = ()
    grown: tuple[Grown, ...] = ()


def compose(
    round: int,
    group: int,
    changes: Changes,
    rows: list[tuple[Sequence, int]],
    limits: Cuts,
) -> Step:
    """The step in which each of these sequences advances by so many tokens; counts them as cached.

    limits.microbatch_tokens and limits.microbatches say how it is cut, limits.state_rows whether rows have states.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    sampled: list[tuple[int, Sequence]] = []
    score_rows: list[int] = []
    score_ids: list[int] = []
    counts = [count for _, count in rows]
    states = [sequence.next_states(count) for sequence, count in rows] if limits.state_rows else []
    for sequence, count in rows:
        positions.append(sequence.cached)
        if sequence.scores:
            following = sequence.prompt_token_ids[sequence.cached + 1 : sequence.cached + count + 1]
            score_rows += range(len(token_ids), len(token_ids) + len(following))
            score_ids += following
        token_ids += sequence.pending(count)
        sequence.cached += count
        if sequence.cached == sequence.num_tokens and sequence.sampling.max_new_tokens:
            sampled.append((len(token_ids) - 1, sequence))
    return Step(
        round,
        group,
        Word.RUN,
        changes.released,
        changes.admitted,
        np.array([sequence.slot for sequence, _ in rows], np.int32),
        np.array(counts, np.int32),
        np.array(positions, np.int32),
        np.array(token_ids, np.int32),
        np.array(_borders(rows, positions, limits), np.int32),
        np.array([row for row, _ in sampled], np.int32),
        np.array([sequence.slot for _, sequence in sampled], np.int32),
        np.array([sequence.uniform() for _, sequence in sampled], np.float64),
        np.array(score_rows, np.int32),
        np.array(score_ids, np.int32),
        reads=np.array([reads for reads, _ in states], np.int32),
        writes=np.array([writes for _, writes in states], np.int32),
        kept=np.array(counts if states else [], np.int32),
        grown=changes.grown,
    )


def _borders(rows: list[tuple[Sequence, int]], positions: list[int], limits: Cuts) -> list[int]:
    """Borders [K+1] of the step's microbatches: each in one tier, and beyond the device within a staging buffer's pages."""
    counts = [count for _, count in rows]
    borders = [0]
    for tier, group in groupby(range(len(rows)), key=lambda row: rows[row][0].tier):
        first, *_ = members = list(group)
        its, pages, shared = [counts[row] for row in members], None, list[int]()
        if tier:
            pages = [-(-(positions[row] + counts[row]) // PAGE_TOKENS) for row in members]
            pairs = pairwise(rows[row][0] for row in members)
            shared = [0, *(_in_common(*pair) for pair in pairs)]
        most = limits.slot_pages, limits.state_rows
        found = cut(its, limits.microbatch_tokens, limits.microbatches, pages, shared, *most)
        borders += [first + border for border in found[1:]]
    return borders


def _in_common(one: Sequence, other: Sequence) -> int:
    """Pages of the runs that two rows share: both begin with them."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one.runs, other.runs, strict=False))
    return sum(run.count for run, _ in pairs)
