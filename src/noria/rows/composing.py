"""A step of a group from the rows that take part in it. Knows neither slots' owners nor pages."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile
from typing import Protocol

import numpy as np

from noria.borders import cut, cut_tokens
from noria.rows.flight import Flight
from noria.rows.sequence import Sequence
from noria.rows.spreading import spread
from noria.step import PAGE_TOKENS, Admitted, Grown, Step, Word


class Cuts(Protocol):
    """How a step is cut into microbatches: rows.slots.Capacity, of which this file knows no more."""

    @property
    def microbatch_tokens(self) -> int: ...

    @property
    def microbatches(self) -> int: ...

    @property
    def tiers(self) -> tuple[int, ...]: ...

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


@dataclass(frozen=True)
class _Rows:
    """R rows of a step with T tokens, as arrays: see Step. samples: [R] whether a token of it is sampled; uniforms: [S]."""

    slots: np.ndarray
    counts: np.ndarray
    positions: np.ndarray
    token_ids: np.ndarray
    samples: np.ndarray
    uniforms: np.ndarray
    reads: np.ndarray
    writes: np.ndarray

    def taken(self, order: np.ndarray) -> "_Rows":
        """The rows in this order [R]."""
        counts = self.counts[order]
        firsts, before = (np.cumsum(self.counts) - self.counts)[order], np.cumsum(counts) - counts
        tokens = np.repeat(firsts - before, counts) + np.arange(counts.sum())
        samples = self.samples[order]
        uniforms = self.uniforms[(np.cumsum(self.samples) - 1)[order][samples]]
        states = (its[order] if len(its) else its for its in (self.reads, self.writes))
        return _Rows(
            self.slots[order], counts, self.positions[order], self.token_ids[tokens], samples, uniforms, *states
        )


def compose(
    round: int,
    group: int,
    changes: Changes,
    flight: Flight,
    chunks: list[tuple[Sequence, int]],
    sequences: Mapping[int, Sequence],
    limits: Cuts,
) -> Step:
    """The step in which each row that is ready takes a token, and each of these chunks is computed; counts all as cached.

    sequences: by slot. limits.microbatch_tokens and limits.microbatches say how it is cut, limits.state_rows whether rows have
    states.
    """
    chunks = sorted(chunks, key=lambda chunk: chunk[0].place)  # rows of one beginning and of one tier side by side
    ready = flight.ready()
    at = flight.where(ready, [sequence for sequence, _ in chunks])
    rows = _ready_rows(flight, ready, limits)
    flight.advance(ready)
    rows = _with_chunks(rows, at, chunks, limits) if chunks else rows
    borders = _borders(rows, sequences, limits)
    order = _order(rows, borders, sequences, limits)
    rows, borders = _in_order(rows, borders, order)
    scores = _scores(chunks, rows)
    step = _step(round, group, changes, rows, scores, borders)
    for sequence, count in chunks:
        sequence.cached += count
        if _is_sampled(sequence):
            flight.decode(sequence)
    if step.num_tokens:
        flight.composed(step)
    return step


def _step(
    round: int, group: int, changes: Changes, rows: _Rows, scores: tuple[np.ndarray, np.ndarray], borders: list[int]
) -> Step:
    ends = np.cumsum(rows.counts)
    return Step(
        round,
        group,
        Word.RUN,
        changes.released,
        changes.admitted,
        rows.slots,
        rows.counts,
        rows.positions,
        rows.token_ids,
        np.array(borders, np.int32),
        (ends[rows.samples] - 1).astype(np.int32),
        rows.slots[rows.samples],
        rows.uniforms,
        *scores,
        reads=rows.reads,
        writes=rows.writes,
        kept=rows.counts[: len(rows.reads)],
        grown=changes.grown,
    )


def _is_sampled(sequence: Sequence) -> bool:
    """Whether its next token is sampled, now that so many of its tokens are in the cache."""
    return sequence.cached == sequence.num_tokens and sequence.sampling.most_new_tokens > 0


def _ready_rows(flight: Flight, ready: np.ndarray, limits: Cuts) -> _Rows:
    ones, none = np.ones(len(ready), np.int32), np.empty(0, np.int32)
    states = flight.states(ready) if limits.state_rows else (none, none)
    ids, numbers = flight.token_ids(ready), flight.uniforms(ready)
    return _Rows(flight.slots(ready), ones, flight.positions(ready), ids, ones.astype(np.bool_), numbers, *states)


def _with_chunks(rows: _Rows, at: list[int], chunks: list[tuple[Sequence, int]], limits: Cuts) -> _Rows:
    """The rows with chunks among them, each before that one of the rows; of one place in the order of the chunks."""
    counts = [count for _, count in chunks]
    states = [sequence.next_states(count) for sequence, count in chunks] if limits.state_rows else []
    sampled = [one.cached + count == one.num_tokens and one.sampling.most_new_tokens > 0 for one, count in chunks]
    numbers = [one.uniform() for (one, _), samples in zip(chunks, sampled, strict=True) if samples]
    where = np.array(at)
    return _Rows(
        np.insert(rows.slots, where, [sequence.slot for sequence, _ in chunks]),
        np.insert(rows.counts, where, counts),
        np.insert(rows.positions, where, [sequence.cached for sequence, _ in chunks]),
        np.insert(rows.token_ids, where.repeat(counts), [id for one, count in chunks for id in one.pending(count)]),
        np.insert(rows.samples, where, sampled),
        np.insert(rows.uniforms, where[sampled], numbers),
        np.insert(rows.reads, where, [reads for reads, _ in states]) if states else rows.reads,
        np.insert(rows.writes, where, [writes for _, writes in states]) if states else rows.writes,
    )


def _scores(chunks: list[tuple[Sequence, int]], rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
    """[P] which of the step's tokens predict a token of a prompt that is scored, in their order, and these tokens."""
    scored = {sequence.slot: (sequence, count) for sequence, count in chunks if sequence.scores}
    score_rows, score_ids = list[int](), list[int]()
    if not scored:
        return np.array(score_rows, np.int32), np.array(score_ids, np.int32)
    starts = np.cumsum(rows.counts) - rows.counts
    for row in np.flatnonzero(np.isin(rows.slots, list(scored))).tolist():
        sequence, count = scored[int(rows.slots[row])]
        following = sequence.prompt_token_ids[sequence.cached + 1 : sequence.cached + count + 1]
        score_rows += range(int(starts[row]), int(starts[row]) + len(following))
        score_ids += following
    return np.array(score_rows, np.int32), np.array(score_ids, np.int32)


def _order(rows: _Rows, borders: list[int], sequences: Mapping[int, Sequence], limits: Cuts) -> list[int]:
    """The numbers of the microbatches in the order in which they are computed: by what each loads of its rows' caches."""
    numbers = [*range(len(borders) - 1)]
    if not any(limits.tiers[1:]) or len(numbers) < 3:
        return numbers
    firsts = np.array(borders[:-1])
    held = zip(rows.slots[firsts].tolist(), np.add.reduceat(rows.positions, firsts).tolist(), strict=True)
    return spread([tokens if sequences[slot].tier else 0 for slot, tokens in held])


def _in_order(rows: _Rows, borders: list[int], order: list[int]) -> tuple[_Rows, list[int]]:
    """Rows and borders of the microbatches in this order."""
    if order == sorted(order):
        return rows, borders
    parts = [np.arange(borders[number], borders[number + 1]) for number in order]
    return rows.taken(np.concatenate(parts)), [0, *np.cumsum([len(part) for part in parts]).tolist()]


def _borders(rows: _Rows, sequences: Mapping[int, Sequence], limits: Cuts) -> list[int]:
    """Borders [K+1] of the step's microbatches: each in one tier, and beyond the device within a staging buffer's pages."""
    if not any(limits.tiers[1:]):
        return cut_tokens(rows.counts, limits.microbatch_tokens, limits.microbatches, limits.state_rows)
    counts, positions, borders = rows.counts.tolist(), rows.positions.tolist(), [0]
    members = [sequences[slot] for slot in rows.slots.tolist()]
    for tier, group in groupby(range(len(members)), key=lambda row: members[row].tier):
        first, *_ = its_rows = list(group)
        its, pages, shared = [counts[row] for row in its_rows], None, list[int]()
        if tier:
            pages = [-(-(positions[row] + counts[row]) // PAGE_TOKENS) for row in its_rows]
            pairs = pairwise(members[row] for row in its_rows)
            shared = [0, *(_in_common(*pair) for pair in pairs)]
        most = limits.slot_pages, limits.state_rows
        found = cut(its, limits.microbatch_tokens, limits.microbatches, pages, shared, *most)
        borders += [first + border for border in found[1:]]
    return borders


def _in_common(one: Sequence, other: Sequence) -> int:
    """Pages of the runs that two rows share: both begin with them."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one.runs, other.runs, strict=False))
    return sum(run.count for run, _ in pairs)
