"""The loop nest of a rank: rounds, laps, groups; receive, compute, send.

The same on every rank: what differs (who composes a step, who samples) is decided by the rank's place in the ring.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from noria.engine.activations import Embedding
from noria.engine.stage import Prepared, Stage
from noria.engine.trace import OFF, Tracing
from noria.engine.traffic import Traffic
from noria.ring.ring import AnyRing
from noria.step import Result, Step, Word
from noria.streams import Streams

T = TypeVar("T")
MIN_ROUNDS = 3  # of a phase, before its speed is compared with the plan's


@dataclass
class Timing:
    """Seconds of a rank between its first step and its last; `waited` of them for the ring.

    Rounds with any chunk of a prompt are prefill, the others with tokens decode.
    """

    rounds: int = 0
    visits: int = 0  # of each lap, by groups that had something to compute
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    prefill_rounds: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_rounds: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def end_round(self, prefill: bool, tokens: int, seconds: float) -> None:
        """Adds a round to its phase."""
        self.rounds, self.tokens, phase = self.rounds + 1, self.tokens + tokens, "prefill" if prefill else "decode"
        if not tokens:
            return
        for name, value in (("rounds", 1), ("tokens", tokens), ("seconds", seconds)):
            setattr(self, f"{phase}_{name}", getattr(self, f"{phase}_{name}") + value)


def figures(timings: Sequence[Mapping[str, Any]], speeds: bool) -> dict[str, Any]:
    """What the ranks measured, for a comparison with the plan: peaks of memory, one a rank, and tokens per second.

    Of a phase with few rounds nothing is said: its first round waits for what is loaded ahead in the others.
    """
    found: dict[str, Any] = {
        name: [timing[name] for timing in timings] for name in ("peak_device_nbytes", "peak_host_nbytes")
    }
    for phase in ("prefill", "decode") if speeds else ():
        slowest = max(timings, key=lambda timing: timing[f"{phase}_seconds"])
        if slowest[f"{phase}_rounds"] >= MIN_ROUNDS:
            found[f"{phase}_tokens_per_second"] = slowest[f"{phase}_tokens"] / slowest[f"{phase}_seconds"]
    return found


def _is_prefill(steps: Sequence[Step]) -> bool:
    """Whether a round of these steps computes any chunk of a prompt."""
    return any(step.admitted or step.num_tokens > len(step.slots) for step in steps)


class Executor:
    """Runs a rank's part of all rounds. `stages` are the layers of its laps, `next_step(round, group)` its source of steps."""

    def __init__(
        self,
        stage: Stage,
        stages: list[range],
        ring: AnyRing,
        rank: int,
        num_ranks: int,
        groups: int,
        streams: Streams,
        traffic: Traffic,
        trace: Tracing = OFF,
    ):
        self._traffic, self._trace = traffic, trace
        self._stage, self._stages, self._ring = stage, stages, ring
        self._first_rank, self._last_rank = rank == 0, rank == num_ranks - 1
        self._groups, self._streams = groups, streams
        self.timing = Timing()
        self._at: tuple[int, int, int] | None = None
        self._doing = "computing"

    def doing(self) -> str:
        """What this rank is at, in words; any thread may ask."""
        if self._at is None:
            return "before the first step"
        round, lap, group = self._at
        return f"{self._doing} in round {round}, lap {lap}, group {group}"

    @torch.inference_mode()
    def run(self, next_step: "NextStep") -> Timing:
        """All rounds, until every header of one says STOP."""
        started = began = time.perf_counter()
        steps: dict[int, Prepared] = {}
        for round in count():
            before = [prepared.step for prepared in steps.values()]
            for lap, layers in enumerate(self._stages):
                for group in range(self._groups):
                    self._at = round, lap, group
                    if lap == 0:
                        steps[group] = self._stage.prepare(self._next(next_step, round, group))
                        if group == 0 and round:  # what the round before computed is there, or this step could not be
                            began = self._time_round(round - 1, before, began)
                    empty = not steps[group].step.num_tokens
                    self._stage.begin(round, lap, group, empty)
                    self.timing.visits += lap == 0 and not empty
                    if not empty:
                        self._visit(steps[group], group, lap, layers)
            composed = [prepared.step for prepared in steps.values()]
            self._traffic.end_round(_is_prefill(composed))
            if all(step.word is Word.STOP for step in composed):
                self._time_round(round, composed, began)
                break
        self.timing.seconds = time.perf_counter() - started
        self._stage.close()
        return self.timing

    def _time_round(self, round: int, steps: list[Step], began: float) -> float:
        """Books a round that began at `began` and is over now. Returns now."""
        ended, tokens, prefill = time.perf_counter(), sum(step.num_tokens for step in steps), _is_prefill(steps)
        self.timing.end_round(prefill, tokens, ended - began)
        name = ("prefill" if prefill else "decode") if tokens else "no tokens"
        self._trace.host("steps", name, began, ended, round=round, tokens=tokens)
        return ended

    def _visit(self, prepared: Prepared, group: int, lap: int, layers: range) -> None:
        """One group's way through one virtual stage."""
        if self._first_rank and lap == 0:
            begin = self._trace.mark()
            hidden: torch.Tensor | Embedding = self._stage.embed(prepared)
            self._trace.compute("embed", begin, prepared.step.round, lap, group)
        else:
            num_tokens = prepared.step.num_tokens
            hidden = self._wait("waiting for hidden states", lambda: self._ring.receive(group, lap, num_tokens))
        answers = self._last_rank and lap == len(self._stages) - 1
        output = None if answers else self._ring.output(group, lap, prepared.step.num_tokens)
        after = self._stage.forward(prepared, layers, hidden, output)
        if answers:
            answer = {name: self._to_host(values) for name, values in self._stage.sample(prepared, after).items()}
            make = lambda: Result(**{name: values.numpy() for name, values in answer.items()})  # noqa: E731
            self._ring.send_result(group, self._streams.event(), make)
        else:
            self._ring.send(group, lap, after, self._stage.stored)
            if not (self._first_rank and self._last_rank):
                self._traffic.add("rank_to_rank", after.nbytes)

    def _to_host(self, values: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, complete when an event recorded now is."""
        if values.device.type == "cpu":
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    def _next(self, next_step: "NextStep", round: int, group: int) -> Step:
        self._doing = "composing a step, or sealing rows,"
        step = next_step(round, group, self._wait)
        self._doing = "computing"
        return step

    def _wait(self, doing: str, call: Callable[[], T]) -> T:
        """What `call` returns; the time that it takes counts as waiting for the ring."""
        before, self._doing, done_before = time.perf_counter(), doing, self._doing
        value = call()
        self._doing = done_before
        ended = time.perf_counter()
        self.timing.waited += ended - before
        self._trace.host("waits", doing, before, ended)
        return value


class Composer(Protocol):
    """What rank 0's source of steps asks of the admission."""

    def compose(self, round: int, group: int) -> Step: ...

    def apply(self, step: Step, result: Result) -> None: ...


class Wait(Protocol):
    """How a source of steps waits for the ring: what `call` returns; `doing` says in words what for."""

    def __call__(self, doing: str, call: Callable[[], T]) -> T: ...


NextStep: TypeAlias = Callable[[int, int, Wait], Step]  # a source of steps: next_step(round, group, wait)


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
        under_way[group] = step if step.num_tokens else None
        after_step()
        return step

    return next_step


def follow(ring: AnyRing) -> NextStep:
    """The other ranks' source of steps: the headers, in the order in which rank 0 sent them."""
    return lambda round, group, wait: wait("waiting for the next step", lambda: ring.receive_header(group))
