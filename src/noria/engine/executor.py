"""The loop nest of a rank: rounds, laps, groups; receive, compute, send.

The same on every rank: what differs (who composes a step, who samples) is decided by the rank's place in the ring.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import Protocol, TypeAlias, TypeVar

import torch

from noria.engine.batch import Batch
from noria.engine.stage import Stage
from noria.engine.timing import Meters, Timing, work_of
from noria.masks import Pending
from noria.ring.ring import AnyRing
from noria.step import Result, Step, Word

T = TypeVar("T")


def _is_prefill(steps: Sequence[Step]) -> bool:
    """Whether a round of these steps computes any chunk of a prompt: not one that is a prompt's last token alone."""
    return any((step.num_tokens and step.admitted) or step.num_tokens > step.num_samples for step in steps)


def _phase(steps: Sequence[Step]) -> str:
    return "prefill" if _is_prefill(steps) else "decode"


class Executor:
    """Runs a rank's part of all rounds. `stages` are the layers of its laps; `run` is given its source of steps."""

    def __init__(self, stage: Stage, stages: list[range], ring: AnyRing, meters: Meters):
        self._traffic, self.trace, self._gauge = meters.traffic, meters.trace, meters.gauge
        self._stage, self._stages = stage, stages
        self._ring, self._place = ring, ring.place
        self.timing = Timing()
        self._began = 0.0  # of the first round that is not booked yet
        self._unbooked: list[tuple[int, list[Step]]] = []
        self._at: tuple[int, int, int] | None = None
        self._doing = "computing"

    def doing(self) -> str:
        """What this rank is at, in words; any thread may ask."""
        if self._at is None:
            return "before the first step"
        round, lap, group = self._at
        return f"{self._doing} in round {round}, lap {lap}, group {group}"

    @property
    def may_compose_ahead(self) -> bool:
        """Whether a step may set out before it is known what the one before sampled: where nobody waits for its header, and the
        device, which runs behind the host, has the tokens."""
        alone = self._place.num_ranks == self._place.groups == self._place.laps == 1
        return alone and self._stage.feeds

    @torch.inference_mode()
    def run(self, next_step: "NextStep", take_in: "TakeIn | None" = None) -> Timing:
        """All rounds, until every header of one says STOP. take_in: takes in what the step before gave, where the next one is
        composed before that is known; called before the next one is sampled."""
        started = self._began = time.perf_counter()
        steps: dict[int, Batch] = {}
        for round in count():
            for lap, layers in enumerate(self._stages):
                for group in range(self._place.groups):
                    self._at = round, lap, group
                    if lap == 0:
                        steps[group] = self._prepared(self._next(next_step, round, group))
                    empty = not steps[group].step.num_tokens
                    if lap == group == 0 and (take_in is None or empty):
                        self._book()  # what the round before computed is there, or this step could not be
                    self._stage.begin(round, lap, group, steps[group].step.num_tokens)
                    self.timing.visits += lap == 0 and not empty
                    if not empty:
                        self._visit(steps[group], group, lap, layers, take_in)
            composed = [batch.step for batch in steps.values()]
            self._traffic.end_round(_is_prefill(composed))
            self._gauge.end_round(_phase(composed) if any(step.num_tokens for step in composed) else "")
            self._unbooked.append((round, composed))
            if all(step.word is Word.STOP for step in composed):
                self._book()
                break
        self.timing.seconds = time.perf_counter() - started
        self._stage.close()
        return self.timing

    def _book(self) -> None:
        """Books the rounds that are over now: what they computed is there."""
        for round, steps in self._unbooked:
            ended, tokens = time.perf_counter(), sum(step.num_tokens for step in steps)
            self.timing.end_round(_is_prefill(steps), work_of(steps), ended - self._began)
            self._gauge.lasted(ended - self._began)
            name = _phase(steps) if tokens else "no tokens"
            self.trace.host("steps", name, self._began, ended, round=round, tokens=tokens)
            self._began = ended
        self._unbooked.clear()

    def _visit(self, batch: Batch, group: int, lap: int, layers: range, take_in: "TakeIn | None") -> None:
        """One group's way through one virtual stage."""
        if self._place.embeds(lap):
            begin = self.trace.mark()
            hidden = self._stage.embed(batch)
            self.trace.compute("embed", begin, batch.step.round, lap, group)
        else:
            num_tokens = batch.step.num_tokens
            self._stage.expect(batch, layers)
            hidden = self._wait("waiting for hidden states", lambda: self._ring.receive(group, lap, num_tokens))
        if self._place.answers(lap):
            after = self._stage.forward(batch, layers, hidden)
            if take_in is not None:
                self._take_in(batch, take_in)
            masked = batch.step.masked
            masks = self._wait("waiting for masks", lambda: self._ring.receive_masks(group)) if masked else None
            self._ring.send_result(group, self._stage.sample(batch, after, masks))
            return
        output = self._ring.output(group, lap, batch.step.num_tokens)
        nbytes = self._ring.send(group, lap, self._stage.forward(batch, layers, hidden, output))
        if nbytes:
            self._traffic.add("rank_to_rank", nbytes)

    def _take_in(self, batch: Batch, take_in: "TakeIn") -> None:
        """Takes in what the step before this one gave; what the host waits for that counts for the round before."""
        began, waited = time.perf_counter(), 0.0

        def wait(doing: str, call: Callable[[], T]) -> T:
            nonlocal waited
            before, self._doing = time.perf_counter(), doing
            value = call()
            self._doing, ended = "composing a step, or sealing rows,", time.perf_counter()
            self.trace.host("waits", doing, before, ended)
            waited += ended - before
            return value

        batch.step = take_in(batch.step, wait)
        self._doing = "computing"
        self.timing.waited += waited
        self._gauge.took("waited", waited, before=True)
        self._gauge.took("host", time.perf_counter() - began - waited)
        self._book()

    def _prepared(self, step: Step) -> Batch:
        began = time.perf_counter()
        batch = self._stage.prepare(step)
        self._gauge.took("prepare", time.perf_counter() - began)
        return batch

    def _next(self, next_step: "NextStep", round: int, group: int) -> Step:
        self._doing = "composing a step, or sealing rows,"
        began, waited = time.perf_counter(), self.timing.waited
        step = next_step(round, group, self._wait)
        self._gauge.took("host", time.perf_counter() - began - (self.timing.waited - waited))
        self._doing = "computing"
        return step

    def _wait(self, doing: str, call: Callable[[], T]) -> T:
        """What `call` returns; the time that it takes counts as waiting for the ring."""
        before, self._doing, done_before = time.perf_counter(), doing, self._doing
        begin = self._gauge.mark()
        value = call()
        self._gauge.waited("input", begin)
        self._doing = done_before
        ended = time.perf_counter()
        self.timing.waited += ended - before
        self._gauge.took("waited", ended - before)
        self.trace.host("waits", doing, before, ended)
        return value


class Composer(Protocol):
    """What rank 0's source of steps asks of the admission."""

    def compose(self, round: int, group: int) -> Step: ...

    def apply(self, step: Step, result: Result) -> None: ...

    def masks(self, group: int) -> Pending: ...

    def mask(self, step: Step) -> Step: ...


class Wait(Protocol):
    """How a source of steps waits for the ring: what `call` returns; `doing` says in words what for."""

    def __call__(self, doing: str, call: Callable[[], T]) -> T: ...


NextStep: TypeAlias = Callable[[int, int, Wait], Step]  # a source of steps: next_step(round, group, wait)
TakeIn: TypeAlias = Callable[[Step, Wait], Step]  # see Executor.run: the step as it is to be sampled


def lead(
    ring: AnyRing,
    admission: Composer,
    groups: int,
    after_step: Callable[[], None],
    lock: AbstractContextManager[object] = contextlib.nullcontext(),
) -> NextStep:
    """Rank 0's source of steps: takes the group's last result in, composes its next step and sends the header ahead.

    `lock` is held while the admission is touched, and never while this rank waits.
    """
    under_way: list[Step | None] = [None] * groups

    def next_step(round: int, group: int, wait: Wait) -> Step:
        before = under_way[group]
        result = None if before is None else wait("waiting for results", lambda: ring.receive_result(group))
        with lock:
            if before is not None and result is not None:
                admission.apply(before, result)
            step = admission.compose(round, group)
        ring.send_header(step)
        if step.masked:
            ring.send_masks(group, admission.masks(group))
        under_way[group] = step if step.num_tokens else None
        after_step()
        return step

    return next_step


def follow(ring: AnyRing) -> NextStep:
    """The other ranks' source of steps: the headers, in the order in which rank 0 sent them."""
    return lambda round, group, wait: wait("waiting for the next step", lambda: ring.receive_header(group))
