"""A dry run of a ring's messages with the seconds that visits and messages take: how long a round is, rank by rank.

The order of messages is that which the rings follow (order.py). For a number of ranks that nobody measured. Pure arithmetic.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from noria.order import HEADER, HIDDEN, RESULT, Action, Message, Place, blocking_order, ring_order
from noria.plan import costs, terms
from noria.plan.loads import load_of
from noria.plan.plan import Plan
from noria.plan.problem import Problem
from noria.plan.rates import Rates
from noria.plan.rounds import Round

WARM, ROUNDS = 3, 4  # rounds before those that are measured, in which the ring fills; those
MOST_VISITS = 60_000  # of a dry run: with more of them a round, fewer rounds are run


@dataclass
class Doing:
    """Where a thread of a rank is in its list of actions, and at what time."""

    rank: int
    actions: list[Action]
    place: int = 0
    now: float = 0.0


class Rehearsal:
    """Seconds of rounds in which each rank computes `visits[rank]` seconds a visit, and a message takes `hop` seconds.

    Headers take `latency`. Messages over one hop follow each other.
    """

    def __init__(self, plan: Plan, visits: Sequence[float], hop: float, latency: float):
        self._plan, self._visits, self._hop, self._latency = plan, visits, hop, latency
        self._arrivals: dict[Message, float] = {}
        self._free: dict[int, float] = {}  # rank -> when its hop is free again
        self._begun: dict[int, float] = {}  # round -> when rank 0 begins it

    def round_seconds(self) -> float:
        """The time between two rounds, once the ring is full."""
        plan = self._plan
        a_round = plan.num_ranks * plan.laps * plan.groups
        count = max(min(ROUNDS, MOST_VISITS // a_round - WARM), 1)
        self._run([[1] * plan.groups for _ in range(WARM + count + 1)])
        return (self._begun[WARM + count] - self._begun[WARM]) / count

    def _run(self, rounds: list[list[int]]) -> None:
        """Goes through the lists of all ranks, each as far as its messages have come."""
        doing = [one for rank in range(self._plan.num_ranks) for one in self._threads(rank, rounds)]
        moved = True
        while moved:
            moved = False
            for one in doing:
                while one.place < len(one.actions) and self._does(one, one.actions[one.place]):
                    one.place, moved = one.place + 1, True
        assert all(one.place == len(one.actions) for one in doing), "the messages of a plan deadlock"

    def _threads(self, rank: int, rounds: list[list[int]]) -> Iterator[Doing]:
        plan = self._plan
        place = Place(rank, plan.num_ranks, plan.groups, plan.laps)
        if plan.blocking:
            yield Doing(rank, blocking_order(place, rounds))
            return
        yield from (Doing(rank, actions) for actions in ring_order(place, rounds))

    def _does(self, one: Doing, action: Action) -> bool:
        """Does an action if what it waits for has been sent; False if it has not."""
        message = action.message
        if message.source == one.rank and action.verb != "finish":
            self._send(one, message)
            if action.verb == "do":  # of the blocking ring: it goes on when all is there
                one.now = self._arrivals[message]
            return True
        if action.verb == "start":
            return True  # a receive, posted
        if message not in self._arrivals:
            return False
        one.now = max(one.now, self._arrivals[message])
        return True

    def _send(self, one: Doing, message: Message) -> None:
        if message.kind == HEADER:
            if message.source == 0 and message.group == 0:
                self._begun.setdefault(message.round, one.now)
            self._arrivals[message] = one.now + self._latency
            return
        one.now += self._visits[one.rank]  # what is sent is computed first
        if message.kind == RESULT:
            self._arrivals[message] = one.now + self._latency
            return
        assert message.kind == HIDDEN, message
        begin = max(one.now, self._free.get(one.rank, 0.0))
        self._arrivals[message] = self._free[one.rank] = begin + self._hop


def rehearsed(problem: Problem, plan: Plan, known: Rates) -> Plan:
    """The plan, with rounds as long as the dry run says; `predicted` has `rehearsed`: seconds of a round by the terms alone."""
    planned = costs.planned_rounds(plan, problem.workload, known.device)
    rounds = {"prefill": planned.full, "decode": planned.decode}
    before = {phase: plan.predicted[phase]["round_seconds"] for phase in rounds}
    after = {phase: _round_seconds(problem, plan, known, round) for phase, round in rounds.items()}
    after["prefill"] = planned.of_prefill(after["prefill"], after["decode"])
    return replace(plan, predicted=_predicted(plan.predicted, after) | {"rehearsed": before})


def _round_seconds(problem: Problem, plan: Plan, known: Rates, round: Round) -> float:
    visits, cut = [], problem.cut_into(tuple(plan.ranges()))
    for rank in range(plan.num_ranks):
        way = costs.of_rank(plan, problem.shape, load_of(plan, cut, rank), known, round)
        visits.append(way.seconds / (plan.groups * plan.laps))
    hop = terms.hop(round.tokens / plan.groups * max(cut.sent), known)
    return Rehearsal(plan, visits, hop, known.hop_seconds).round_seconds()


def _predicted(predicted: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """A prediction with rounds of so many seconds."""
    phases = {phase: _longer(predicted[phase], round_seconds) for phase, round_seconds in seconds.items()}
    whole = sum(predicted["rounds"][phase] * round_seconds for phase, round_seconds in seconds.items())
    speed = predicted["tokens_per_second"] * predicted["seconds"] / whole
    return {**predicted, **phases, "seconds": whole, "tokens_per_second": speed}


def _longer(phase: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    speed = phase["tokens_per_second"] * phase["round_seconds"] / seconds
    return {**phase, "round_seconds": seconds, "tokens_per_second": speed}
