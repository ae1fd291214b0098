"""Which sequences are in flight: admits prompts into slots, composes each group's step, takes results in.

Rank 0 alone has one. Knows tokens; nothing of devices, messages or files.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np

from noria.masks import Pending
from noria.rows.beginnings import Lead
from noria.rows.composing import Changes, compose
from noria.rows.flight import Flight
from noria.rows.gathering import Gathering
from noria.rows.guides import Making, MaskMemory
from noria.rows.level import Level
from noria.rows.making import Maker, Source
from noria.rows.results import take_sample, take_scores
from noria.rows.sequence import Sequence, sampler_settings
from noria.rows.slots import Capacity, Slots
from noria.rows.waiting import WaitingQueue
from noria.sampling import RULES, Sampling
from noria.step import Admitted, Grown, Result, Step, Word


@dataclass
class Counted:
    """Tokens since somebody last looked and set them to 0."""

    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of prompts: shared when their rows were first admitted, as in the output


class Admission:
    """The sequences of all groups and those that wait. Groups are kept equally full.

    `rules` are those of output/agreement.py.
    """

    def __init__(
        self,
        source: Source,
        sampling: Sampling,
        end_token_ids: frozenset[int],
        capacity: Capacity,
        rules: int = RULES,
    ):
        self._maker, self._finished = Maker(source, sampling, capacity, rules), source.finished
        self._queue = WaitingQueue(source, self._maker, capacity.sharing)
        self._end_token_ids = frozenset(token_id for token_id in end_token_ids if token_id < capacity.vocab_size)
        self._capacity, self._slots = capacity, Slots(capacity, source.lengths)
        self._level = Level(capacity.groups, capacity.costs)
        self._gathering = Gathering(capacity.groups, capacity.gathers)
        firsts = (group * capacity.step_tokens for group in range(capacity.groups))
        self._flights = [Flight(first, self._end_token_ids, capacity.max_positions) for first in firsts]
        self.step_tokens = capacity.step_tokens  # of the next steps: at most as many, for which there is room
        self.counted = Counted()
        self._stopping = False
        self._over = False
        self._num_admitted = 0
        self._leading: list[Sequence] = []  # those that compute something for others
        self._masks: dict[int, Pending] = {}
        self._mask_memory = [MaskMemory() for _ in range(capacity.groups)]

    @property
    def samples(self) -> "array[int]":
        """Of each prompt read so far, in order, how many rows the output has of it."""
        return self._maker.samples

    @property
    def num_rows(self) -> int:
        """How many rows the output has of the prompts read so far."""
        return self._maker.num_rows

    @property
    def num_active(self) -> int:
        return self._slots.num_active

    @property
    def done(self) -> bool:
        """No sequence is in flight and none waits."""
        return self.num_active == 0 and not self._may_admit

    @property
    def exhausted(self) -> bool:
        """No sequence is in flight, none waits, and no prompt is left that could run."""
        return self.num_active == 0 and self._queue.first() is None

    @property
    def _may_admit(self) -> bool:
        """Whether a sequence waits that is to be admitted: where the run stops, one that was in flight alone."""
        return self._queue.has_returned or (not self._stopping and self._queue.first() is not None)

    def lengths(self) -> Iterator[int]:
        """How many tokens each sequence in flight has generated, as far as they are known."""
        return chain.from_iterable(flight.lengths() for flight in self._flights)

    def admit_no_more(self) -> None:
        """Sequences in flight, and those that returned from there, go on to their ends; others are left for another job."""
        self._stopping = True

    def stop(self) -> list[Sequence]:
        """Admits nothing more and drops what is in flight. Returns the unfinished sequences with their tokens so far."""
        self._stopping = True
        unfinished = self._queue.withdraw()
        unfinished += [sequence for active in self._slots.active for sequence in active.values()]
        for group, active in enumerate(self._slots.active):
            for sequence in list(active.values()):
                self._leave(group, sequence)
        return unfinished

    def compose(self, round: int, group: int) -> Step:
        """The group's next step: a token for each decoding row, then chunks of prompts, then new prompts, in this budget.

        It may be composed before the result of the one before is there: then its masks are made by `mask`, after that.

        The run ends with whole rounds: when group 0 finds nothing left, all steps of that round say STOP.
        """
        if group == 0:
            self._over = self.done
        if self._over:
            return Step(round, group, Word.STOP)
        moved = self._spread(group)
        grown, flight = self._grow(group), self._flights[group]
        chunks, decoding = list[tuple[Sequence, int]](), len(flight.ready())
        budget = self._level.most(group, decoding, self.step_tokens) - decoding
        for sequence in flight.filling.values():
            if budget > 0 and sequence.num_tokens > sequence.cached:
                chunks.append((sequence, self._take_chunk(sequence, budget)))
                budget -= chunks[-1][1]
        admitted = [self._admitted(one) for one in moved]
        opens = self._gathering.opens(group, decoding, bool(chunks), self._queue.num_left)
        while opens and budget > 0 and (new := self._admit(group)):
            admitted.append(self._admitted(new))
            chunks.append((new, self._take_chunk(new, budget)))
            budget -= chunks[-1][1]
        changes = Changes(self._slots.released(group), tuple(admitted), grown)
        step = compose(round, group, changes, flight, chunks, self._slots.active[group], self._capacity)
        self._level.took(group, step.num_tokens, decoding)
        self._led()
        return step if flight.awaits else self.mask(step)

    def _admitted(self, sequence: Sequence) -> Admitted:
        return Admitted(sequence.slot, sequence.runs, sampler_settings(sequence, self._end_token_ids))

    def _spread(self, group: int) -> list[Sequence]:
        """The sequences of the group, if they go to other groups because none follow: they have slots there."""
        if self._capacity.costs is None or self._may_admit or any(flight.filling for flight in self._flights):
            return []
        rows, flights = list(self._slots.active[group].values()), self._flights
        left = iter(rows)
        for other, count in enumerate(self._level.spread(group, [len(active) for active in self._slots.active])):
            for sequence in islice(left, count):
                flights[group].give(sequence)
                self._slots.move(sequence, group, other)
                flights[other].enter(sequence)
        return rows if not self._slots.active[group] else []

    def _grow(self, group: int) -> tuple[Grown, ...]:
        """More pages for sequences that outgrow theirs. Where none are free, the youngest of the group returns to the line."""
        active, flight = self._slots.active[group], self._flights[group]
        outgrown = [active[slot] for slot in flight.outgrown()]
        outgrown += [sequence for sequence in flight.filling.values() if sequence.cached >= sequence.room]
        for sequence in outgrown:
            while sequence.slot in active and not self._slots.grow(group, sequence):
                youngest = self._slots.youngest(group, sequence)
                self._leave(group, youngest)
                youngest.give_back()
                self._queue.give_back(youngest)
            if sequence.slot in active:
                flight.hold(sequence)
        return tuple(Grown(one.slot, one.runs) for one in outgrown if one.slot in active)

    def mask(self, step: Step) -> Step:
        """The step, whose masks are being made from now on where some of its samples are constrained."""
        wants, active = {}, self._slots.active[step.group]
        for place in (
            self._flights[step.group].steered(step) if self._maker.guides.steering and step.num_samples else ()
        ):
            sequence = active[int(step.sample_slots[place])]
            if sequence.guide is not None and (want := sequence.guide.want(len(sequence.token_ids))):
                wants[place] = sequence.guide, want
        if not wants:
            return step
        self._masks[step.group] = Making(
            wants, self._maker.guides.constraints, self._capacity.vocab_size, self._mask_memory[step.group]
        )
        return replace(step, masked=True)

    def masks(self, group: int) -> Pending:
        """What the samples of the group's step, which is `masked`, may be: it is being made."""
        return self._masks.pop(group)

    def apply(self, step: Step, result: Result) -> None:
        """Takes the sampled tokens of a step in; sequences that end leave their slots and pages."""
        active, flight = self._slots.active[step.group], self._flights[step.group]
        rows, samples = flight.arrived(step)
        if len(step.score_rows):
            self._take_scores(step, result, rows)
        self.counted.tokens += int(np.count_nonzero(samples & (result.token_ids >= 0)))
        ends, most, slots = self._end_token_ids, self._capacity.max_positions, step.sample_slots.tolist()
        for place, may_end, lacks in flight.take(step, result.token_ids, samples):
            sequence = active[slots[place]]
            if lacks:
                flight.tell(sequence)
            take_sample(sequence, result, place, (ends, most) if may_end else None)
            if sequence.error or sequence.finish_reason != "none":
                self._end(step.group, sequence)
            elif sequence.guide is not None and sequence.guide.turned:
                sequence.guide.turned = False
                flight.watch(sequence)
        for slot in flight.full(step):
            flight.tell(active[slot])
        if len(step.slots) > step.num_samples:
            self._end_scored(step, rows)

    def _take_scores(self, step: Step, result: Result, rows: np.ndarray) -> None:
        """Log-probabilities of prompts: of each of these rows, those of the tokens after the ones that this step computed."""
        ends = np.searchsorted(step.score_rows, np.cumsum(step.counts))
        starts = np.concatenate([[0], ends[:-1]])
        for row in np.flatnonzero(rows & (ends > starts)).tolist():
            sequence = self._slots.active[step.group][int(step.slots[row])]
            take_scores(sequence, int(step.positions[row]), result.prompt_logprobs[starts[row] : ends[row]])

    def _end_scored(self, step: Step, rows: np.ndarray) -> None:
        """Those of these rows end whose prompts alone were to be computed, and are."""
        ends = (step.positions + step.counts).tolist()
        for row in np.flatnonzero(rows & ~np.isin(step.slots, step.sample_slots)).tolist():
            sequence = self._slots.active[step.group].get(int(step.slots[row]))
            if sequence and sequence.sampling.most_new_tokens == 0 and ends[row] == sequence.num_tokens:
                sequence.finish_reason = "length"
                self._end(step.group, sequence)

    def _leave(self, group: int, sequence: Sequence) -> None:
        """The sequence is out of flight; those that waited for what it computes are in line again."""
        self._flights[group].leave(sequence)
        self._slots.leave(group, sequence)
        self._gathering.left(group)
        if sequence.lead is not None:
            self._leading.remove(sequence)
            self._queue.unpark(sequence.lead)

    def _led(self) -> None:
        """What is computed for others in the step just composed is there for all later ones."""
        for sequence in list(self._leading):
            lead = sequence.lead
            if lead is not None and sequence.cached >= lead.end:
                sequence.lead = None
                self._leading.remove(sequence)
                self._slots.prefixes.done(lead)
                self._queue.unpark(lead)

    def _end(self, group: int, sequence: Sequence) -> None:
        self._leave(group, sequence)
        if not sequence.error:
            self._slots.ended(sequence, self.lengths())
        self._finished(sequence)

    def _take_chunk(self, sequence: Sequence, budget: int) -> int:
        """How many of its tokens a sequence computes in this step; those of its prompt are counted."""
        count = min(sequence.num_tokens - sequence.cached, budget, self._capacity.microbatch_tokens)
        if border := sequence.to_border:
            count = min(count, border)
        self.counted.prompt_tokens += max(0, min(count, len(sequence.prompt_token_ids) - sequence.cached))
        return count

    def _admit(self, group: int) -> Sequence | None:
        """Gives the first waiting sequence a slot and pages of this group, if there is room. Those step aside whose beginning is
        being computed."""
        while self._may_admit and (sequence := self._queue.first()) is not None:
            found = self._slots.take(group, sequence, self._queue.num_left)
            if isinstance(found, Lead):
                self._queue.park(found)
            elif found:
                self._queue.take()
                self._begun(group, sequence)
                return sequence
            else:
                self._gathering.full(group)
                break
        return None

    def _begun(self, group: int, sequence: Sequence) -> None:
        """A sequence is in flight."""
        self._flights[group].enter(sequence)
        if sequence.order < 0:
            sequence.order, sequence.cached_tokens = self._num_admitted, sequence.cached
            self._num_admitted += 1
            self.counted.cached_tokens += sequence.cached
        if sequence.lead is not None:
            self._leading.append(sequence)
