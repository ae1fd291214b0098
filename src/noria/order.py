"""The order of the ring's messages as data: what each rank sends and receives, and in which order it does so.

A dry run of these lists shows a deadlock without MPI; the rings follow them. Knows no tensors, no threads and no MPI.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from noria.errors import InputError
from noria.limits import MAX_GROUPS

HEADER, HIDDEN, RESULT, BEAT, MASKS = "header", "hidden", "result", "beat", "masks"
_TAGS = {HEADER: 0, BEAT: 1, RESULT: MAX_GROUPS, HIDDEN: 2 * MAX_GROUPS, MASKS: 3 * MAX_GROUPS}
MASKED = 2  # of a step in a round: it has tokens, and masks follow its header


def tag(kind: str, group: int = 0) -> int:
    """The MPI tag of a message. All headers share one, so that they arrive in the order in which they were sent."""
    return _TAGS[kind] + (0 if kind in (HEADER, BEAT) else group)


def kind_of(tag: int) -> tuple[str, int]:
    """The kind of message that an MPI tag says, and its group (0 where it says none)."""
    kind = max((kind for kind in _TAGS if _TAGS[kind] <= tag), key=_TAGS.__getitem__)
    return kind, tag - _TAGS[kind]


@dataclass(frozen=True)
class Place:
    """A rank's place in the ring. Virtual stage lap * num_ranks + rank lives here for every lap."""

    rank: int
    num_ranks: int
    groups: int
    laps: int

    @property
    def previous(self) -> int:
        return (self.rank - 1) % self.num_ranks

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.num_ranks

    @property
    def last(self) -> int:
        return self.num_ranks - 1

    @property
    def is_last(self) -> bool:
        """Headers end here."""
        return self.rank == self.last

    def embeds(self, lap: int) -> bool:
        """The first virtual stage: its hidden states are embedded, not received."""
        return self.rank == 0 and lap == 0

    def answers(self, lap: int) -> bool:
        """The last virtual stage: it answers with a result, not with hidden states."""
        return self.is_last and lap == self.laps - 1

    def next_visit(self, lap: int, group: int) -> tuple[int, int]:
        """The lap and group that the rank computes after these."""
        if group + 1 < self.groups:
            return lap, group + 1
        return (lap + 1) % self.laps, 0


@dataclass(frozen=True)
class Message:
    """One message; `lap` is the lap of the visit that sends it (0 for a header)."""

    kind: str
    source: int
    dest: int
    round: int
    lap: int
    group: int

    @property
    def tag(self) -> int:
        return tag(self.kind, self.group)


@dataclass(frozen=True)
class Action:
    """`start` posts a send or a receive and goes on, `finish` waits for it, `do` is both at once."""

    verb: str
    message: Message


def ring_order(place: Place, rounds: Sequence[Sequence[int]]) -> tuple[list[Action], list[Action]]:
    """What a rank of the non-blocking ring does: its main thread's list and its header list.

    rounds[round][group] says whether that step has tokens (MASKED: and masks); the STOP round follows by itself. The
    header list runs beside the main one, in the communication thread.
    """
    if place.num_ranks == 1:
        return [], []
    rounds = [*rounds, [0] * place.groups]
    return list(_visits(place, rounds)), list(_headers(place, rounds)) if place.rank else []


def _visits(place: Place, rounds: Sequence[Sequence[int]]) -> Iterator[Action]:
    unfinished: dict[int, Message] = {}  # group -> the send that may still read the group's send buffer
    for round, lap, group in product(range(len(rounds)), range(place.laps), range(place.groups)):
        if lap == 0:
            yield from _open_step(place, rounds, round, group)
        if not rounds[round][group]:
            continue
        if not place.embeds(lap):
            yield Action("finish", _incoming(place, round, lap, group))
        if place.answers(lap) and rounds[round][group] == MASKED:
            yield Action("finish", _masks(place, round, group))
        message = _outgoing(place, round, lap, group)
        if message.kind == HIDDEN:
            if group in unfinished:
                yield Action("finish", unfinished[group])
            unfinished[group] = message
            if lap + 1 < place.laps:
                yield Action("start", _incoming(place, round, lap + 1, group))
        yield Action("start", message)
    for message in unfinished.values():
        yield Action("finish", message)


def _open_step(place: Place, rounds: Sequence[Sequence[int]], round: int, group: int) -> Iterator[Action]:
    if place.rank:
        yield Action("finish", _header(place.previous, round, group))
        return
    if round and rounds[round - 1][group]:
        yield Action("finish", _result(place, round - 1, group))
    yield Action("start", _header(0, round, group))
    if rounds[round][group]:
        yield Action("start", _result(place, round, group))
    if rounds[round][group] == MASKED:
        yield Action("start", _masks(place, round, group))


def _headers(place: Place, rounds: Sequence[Sequence[int]]) -> Iterator[Action]:
    for round, group in product(range(len(rounds)), range(place.groups)):
        yield Action("do", _header(place.previous, round, group))
        if not place.is_last:
            yield Action("start", _header(place.rank, round, group))
        if rounds[round][group]:
            yield Action("start", _incoming(place, round, 0, group))
        if place.is_last and rounds[round][group] == MASKED:
            yield Action("start", _masks(place, round, group))


def blocking_order(place: Place, rounds: Sequence[Sequence[int]]) -> list[Action]:
    """What a rank of the blocking ring does; `rounds` as in `ring_order`. Every action is a `do`; masks are in headers."""
    rounds = [*rounds, [0] * place.groups]
    return [Action("do", message) for message in (_relay if place.rank else _lead)(place, rounds)]


def _lead(place: Place, rounds: Sequence[Sequence[int]]) -> Iterator[Message]:
    """Rank 0: what the next visit needs is received before this visit's messages are sent."""
    visits = list(product(range(len(rounds)), range(place.laps), range(place.groups)))
    for (round, lap, group), following in zip(visits, [*visits[1:], None], strict=True):
        wanted = following and _wanted(place, rounds, *following)
        if wanted:
            yield wanted
        if lap == 0:
            yield _header(0, round, group)
        if rounds[round][group]:
            yield _outgoing(place, round, lap, group)


def _wanted(place: Place, rounds: Sequence[Sequence[int]], round: int, lap: int, group: int) -> Message | None:
    """What rank 0 must have received before this visit."""
    if lap:
        return _incoming(place, round, lap, group) if rounds[round][group] else None
    return _result(place, round - 1, group) if round and rounds[round - 1][group] else None


def _relay(place: Place, rounds: Sequence[Sequence[int]]) -> Iterator[Message]:
    """Every other rank: receive, compute, send; the header travels just ahead of its hidden states."""
    for round, lap, group in product(range(len(rounds)), range(place.laps), range(place.groups)):
        if lap == 0:
            yield _header(place.previous, round, group)
        if rounds[round][group]:
            yield _incoming(place, round, lap, group)
        if lap == 0 and not place.is_last:
            yield _header(place.rank, round, group)
        if rounds[round][group]:
            yield _outgoing(place, round, lap, group)


def _header(source: int, round: int, group: int) -> Message:
    return Message(HEADER, source, source + 1, round, 0, group)


def _result(place: Place, round: int, group: int) -> Message:
    return Message(RESULT, place.last, 0, round, place.laps - 1, group)


def _masks(place: Place, round: int, group: int) -> Message:
    return Message(MASKS, 0, place.last, round, 0, group)


def _incoming(place: Place, round: int, lap: int, group: int) -> Message:
    sent_on_lap = lap if place.rank else lap - 1
    return Message(HIDDEN, place.previous, place.rank, round, sent_on_lap, group)


def _outgoing(place: Place, round: int, lap: int, group: int) -> Message:
    if place.answers(lap):
        return _result(place, round, group)
    return Message(HIDDEN, place.rank, place.next, round, lap, group)


def check_blocking(num_ranks: int, groups: int) -> None:
    """Raises InputError unless the ring of blocking sends and receives can finish with these numbers.

    Rank 0 sends groups - 1 messages before it receives the first one, and the other ranks hold one message each.
    """
    if 2 <= groups <= num_ranks:
        return
    why = (
        "one group would have to come back before it is sent"
        if groups < 2
        else "rank 0 would send more messages than the other ranks can hold before it receives one"
    )
    remedy = f"set pipeline.groups to 2 .. {num_ranks}, or " if num_ranks >= 2 else ""
    raise InputError(
        f"pipeline.blocking with {groups} group{'s' * (groups != 1)} on {num_ranks} rank{'s' * (num_ranks != 1)} deadlocks"
        f" ({why}): it needs 2 <= groups <= ranks; {remedy}leave pipeline.blocking out"
    )
