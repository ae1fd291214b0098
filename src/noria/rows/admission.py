"""Which sequences are in flight: admits prompts into slots, composes each group's step, takes results in.

Rank 0 alone has one. Knows tokens; nothing of devices, messages or files.
"""

from array import array
from dataclasses import dataclass, replace

import numpy as np

from noria.errors import InputError
from noria.masks import Pending
from noria.rows.beginnings import Lead
from noria.rows.composing import Changes, compose
from noria.rows.ends import finish_reason
from noria.rows.guides import Making
from noria.rows.making import Maker, Source
from noria.rows.sequence import Sequence, sampler_settings
from noria.rows.slots import Capacity, Slots
from noria.rows.waiting import WaitingQueue
from noria.sampling import RULES, Sampling
from noria.step import NO_TOKEN, NONE_LEFT, Admitted, Grown, Result, Step, Word

# Keys that may leave a row no token.
EXCLUDING = (
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
    "min_new_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@dataclass
class Counted:
    """Tokens since somebody last looked and set them to 0."""

    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of prompts: shared, and so not computed


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
        self._capacity, self._slots = capacity, Slots(capacity)
        self.step_tokens = capacity.step_tokens  # of the next steps: at most as many, for which there is room
        self.counted = Counted()
        self._stopping = False
        self._over = False
        self._num_admitted = 0
        self._leading: list[Sequence] = []  # those that compute something for others
        self._masks: dict[int, Pending] = {}

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

        The run ends with whole rounds: when group 0 finds nothing left, all steps of that round say STOP.
        """
        if group == 0:
            self._over = self.done
        if self._over:
            return Step(round, group, Word.STOP)
        grown, budget = self._grow(group), self.step_tokens
        active = self._slots.active[group].values()
        rows = [(sequence, 1) for sequence in active if sequence.num_tokens - sequence.cached == 1]
        budget -= len(rows)
        for sequence in active:
            if budget > 0 and sequence.num_tokens - sequence.cached > 1:
                rows.append((sequence, self._take_chunk(sequence, budget)))
                budget -= rows[-1][1]
        admitted = []
        while budget > 0 and (new := self._admit(group)):
            admitted.append(Admitted(new.slot, new.runs, sampler_settings(new, self._end_token_ids)))
            rows.append((new, self._take_chunk(new, budget)))
            budget -= rows[-1][1]
        rows.sort(
            key=lambda row: row[0].place
        )  # a microbatch's pages are in one tier, and rows of one beginning in one microbatch
        released = self._slots.released(group)
        changes = Changes(released, tuple(admitted), grown)
        step = compose(round, group, changes, rows, self._capacity)
        self._led()
        return self._with_masks(step)

    def _grow(self, group: int) -> tuple[Grown, ...]:
        """More pages for sequences that outgrow theirs. Where none are free, the youngest of the group returns to the line."""
        active = self._slots.active[group]
        outgrown = [sequence for sequence in active.values() if sequence.cached >= sequence.room]
        for sequence in outgrown:
            while sequence.slot in active and not self._slots.grow(group, sequence):
                youngest = self._slots.youngest(group, sequence)
                self._leave(group, youngest)
                youngest.give_back()
                self._queue.give_back(youngest)
        return tuple(Grown(one.slot, one.runs) for one in outgrown if one.slot in active)

    def _with_masks(self, step: Step) -> Step:
        """The step, whose masks are being made from now on where some of its samples are constrained."""
        wants, active = {}, self._slots.active[step.group]
        for place, slot in enumerate(step.sample_slots.tolist() if self._maker.guides.steering else ()):
            guide = active[slot].guide
            if guide is not None and (want := guide.want(len(active[slot].token_ids))):
                wants[place] = guide, want
        if not wants:
            return step
        self._masks[step.group] = Making(wants, self._maker.guides.constraints, self._capacity.vocab_size)
        return replace(step, masked=True)

    def masks(self, group: int) -> Pending:
        """What the samples of the group's step, which is `masked`, may be: it is being made."""
        return self._masks.pop(group)

    def apply(self, step: Step, result: Result) -> None:
        """Takes the sampled tokens of a step in; sequences that end leave their slots and pages."""
        active = self._slots.active[step.group]
        if len(step.score_rows):
            self._take_scores(step, result)
        sampled = zip(step.sample_slots.tolist(), result.token_ids.tolist(), strict=True)
        for place, (slot, token_id) in enumerate(sampled):
            sequence = active.get(slot)
            if sequence is None:
                continue  # dropped by stop() while its step was under way
            if token_id == NO_TOKEN:
                sequence.error = f"logits are not finite after {len(sequence.token_ids)} tokens"
            elif token_id == NONE_LEFT:
                sequence.error = (sequence.guide and sequence.guide.error) or _none_left(sequence)
            else:
                self._take_token(sequence, token_id, result, place)
            if sequence.error or sequence.finish_reason != "none":
                self._end(step.group, sequence)
        if len(step.slots) > step.num_samples:
            for slot in step.slots.tolist():
                sequence = active.get(slot)
                if sequence and sequence.sampling.max_new_tokens == 0 and sequence.cached == sequence.num_tokens:
                    sequence.finish_reason = "length"
                    self._end(step.group, sequence)

    def _take_token(self, sequence: Sequence, token_id: int, result: Result, place: int) -> None:
        """A new token of a sequence, with its log-probabilities, and whether it ends the sequence."""
        sampling = sequence.sampling
        sequence.token_ids.append(token_id)
        self.counted.tokens += 1
        if sampling.logprobs is not None:
            sequence.logprobs.append(float(result.logprobs[place]))
            if sampling.logprobs:
                top = slice(0, sampling.logprobs)
                # copies: a view would keep the whole step's result, which is often page-locked
                sequence.top.append((result.top_ids[place, top].copy(), result.top_logprobs[place, top].copy()))
        limit = self._capacity.max_positions
        prompt_length = len(sequence.prompt_token_ids)
        reason = finish_reason(sequence.token_ids, sampling, self._end_token_ids, prompt_length, limit)
        try:
            if sequence.guide is not None:
                sequence.guide.add(sequence.token_ids)
                sequence.error = sequence.guide.error
            if sequence.stop_texts and reason != "stop":
                sequence.text_end = sequence.stop_texts.find(sequence.token_ids)
        except InputError as error:
            sequence.error = str(error)
        sequence.finish_reason = reason if sequence.text_end is None else "stop"

    def _take_scores(self, step: Step, result: Result) -> None:
        """Log-probabilities of prompts: of each row, those of the tokens after the ones that this step computed."""
        ends = np.searchsorted(step.score_rows, np.cumsum(step.counts)).tolist()
        rows = zip(step.slots.tolist(), step.positions.tolist(), [0, *ends], ends, strict=False)
        for slot, position, start, end in rows:
            sequence = self._slots.active[step.group].get(slot)
            if sequence is not None and sequence.prompt_logprobs is not None and end > start:
                values = result.prompt_logprobs[start:end]
                sequence.prompt_logprobs[position + 1 : position + 1 + end - start] = values
                if np.isnan(values).any():
                    sequence.error = f"logits are not finite in the prompt, before token {position + end - start}"

    def _leave(self, group: int, sequence: Sequence) -> None:
        """The sequence is out of flight; those that waited for what it computes are in line again."""
        self._slots.leave(group, sequence)
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
            self._slots.ended(sequence)
        self._finished(sequence)

    def _take_chunk(self, sequence: Sequence, budget: int) -> int:
        """How many of its tokens a sequence computes in this step; those of its prompt are counted."""
        count = min(sequence.num_tokens - sequence.cached, budget, self._capacity.microbatch_tokens)
        if border := sequence.to_border:
            count = min(count, border)
        left = len(sequence.prompt_token_ids) - sequence.cached
        alone = left - count == 1 and not sequence.token_ids  # the last one, which the next step takes as a decoded row
        self.counted.prompt_tokens += max(0, min(count, left)) + alone
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
                self._begun(sequence)
                return sequence
            else:
                break
        return None

    def _begun(self, sequence: Sequence) -> None:
        """A sequence is in flight."""
        if sequence.order < 0:
            sequence.order, sequence.cached_tokens = self._num_admitted, sequence.cached
            self._num_admitted += 1
        self.counted.cached_tokens += sequence.cached
        if sequence.lead is not None:
            self._leading.append(sequence)


def _none_left(sequence: Sequence) -> str:
    """What is said of a row whose own settings leave no token: those that can, by name."""
    default, sampling = Sampling(), sequence.sampling
    named = [name for name in EXCLUDING if getattr(sampling, name, None) != getattr(default, name, None)]
    given = ", ".join(f"{name} {str(getattr(sampling, name))[:40]}" for name in named) or "the settings of the row"
    return (
        f"no token is left after {len(sequence.token_ids)} tokens: {given}: they exclude all, or make logits infinite"
    )
