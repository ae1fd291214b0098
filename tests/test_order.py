"""The message order, dry-run with rendezvous semantics: a send is over only when its receive has been posted."""

import random
import threading
from collections import defaultdict

import numpy as np
import pytest
import torch

from noria.bundle import of_hidden
from noria.errors import InputError
from noria.limits import MAX_GROUPS
from noria.masks import Masks
from noria.order import MASKED, Action, Place, blocking_order, check_blocking, ring_order, tag
from noria.ring.base import RingShape
from noria.ring.messages import Answer, Hidden
from noria.ring.ring import open_ring
from noria.step import Result, Step, Word
from noria.streams import streams_of


def run_dry(programs: list[list[Action]], ranks: list[int]) -> bool:
    """Whether all programs come to their end; `ranks` says whose they are. Receives meet sends as in MPI: in order, per
    source, destination and tag."""
    sent, received = defaultdict(dict), defaultdict(dict)  # (source, dest, tag) -> message: its place in the order
    at = [0] * len(programs)
    started = [False] * len(programs)  # the `do` at hand has been posted

    def post(rank, message):
        posted = (received if rank == message.dest else sent)[message.source, message.dest, message.tag]
        posted[message] = len(posted)

    def complete(message):
        key = message.source, message.dest, message.tag
        places = sent[key].get(message), received[key].get(message)
        if None in places:
            return False
        assert places[0] == places[1], f"{message} would meet another message"
        return True

    moved = True
    while moved:
        moved = False
        for index, (program, rank) in enumerate(zip(programs, ranks, strict=True)):
            while at[index] < len(program):
                action = program[at[index]]
                if action.verb == "start" or (action.verb == "do" and not started[index]):
                    post(rank, action.message)
                    started[index] = True
                if action.verb != "start" and not complete(action.message):
                    break
                started[index] = False
                at[index] += 1
                moved = True
    return all(at[index] == len(program) for index, program in enumerate(programs))


def finishes(order, num_ranks, groups, laps, rounds) -> bool:
    programs, ranks = [], []
    for rank in range(num_ranks):
        lists = order(Place(rank, num_ranks, groups, laps), rounds)
        for program in lists if isinstance(lists, tuple) else [lists]:
            programs.append(program)
            ranks.append(rank)
    return run_dry(programs, ranks)


def patterns(groups: int, seed: int) -> list[list[list[int]]]:
    """Rounds whose steps have tokens (True), masks too, or are a header alone: all full, some empty, all empty."""
    draw = random.Random(seed)
    some = [[draw.choice([False, True, MASKED]) for _ in range(groups)] for _ in range(4)]
    return [[[True] * groups] * 3, some, [[False] * groups] * 2]


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_the_ring_never_deadlocks(num_ranks):
    for groups in range(1, 17):
        for laps in range(1, 5):
            for rounds in patterns(groups, seed=groups * 10 + laps):
                assert finishes(ring_order, num_ranks, groups, laps, rounds), (groups, laps, rounds)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_the_blocking_ring_finishes_exactly_where_it_is_not_refused(num_ranks):
    for groups in range(1, 17):
        for laps in range(1, 5):
            full, *others = patterns(groups, seed=groups * 10 + laps)
            # One rank has nobody to send to: a synchronous send to itself never returns.
            finished = num_ranks > 1 and finishes(blocking_order, num_ranks, groups, laps, full)
            assert finished == accepted(num_ranks, groups), (groups, laps)
            if finished:
                for rounds in others:
                    assert finishes(blocking_order, num_ranks, groups, laps, rounds), (groups, laps, rounds)


def accepted(num_ranks, groups) -> bool:
    try:
        check_blocking(num_ranks, groups)
    except InputError:
        return False
    return True


def test_the_dry_run_sees_a_deadlock():
    rounds = [[True, True]]
    programs = [blocking_order(Place(rank, 2, 2, 1), rounds) for rank in range(2)]
    assert run_dry(programs, [0, 1])
    last_to_first = programs[0].index(next(action for action in programs[0] if action.message.dest == 0))
    programs[0].insert(0, programs[0].pop(last_to_first))  # rank 0 receives before it has sent anything
    assert not run_dry(programs, [0, 1])


@pytest.mark.parametrize(("num_ranks", "groups", "reason"), [(4, 1, "come back"), (4, 5, "hold"), (1, 2, "hold")])
def test_a_blocking_ring_that_would_deadlock_is_refused_with_the_reason(num_ranks, groups, reason):
    message = f"with {groups} groups? on {num_ranks} rank.*{reason}.*2 <= groups <= ranks"
    with pytest.raises(InputError, match=message):
        check_blocking(num_ranks, groups)


class Wire:
    """A transport inside one process that notes what each rank asks of it. A send ends when it has been received."""

    def __init__(self):
        self.changed = threading.Condition()
        self.letters = defaultdict(list)  # (source, dest, tag) -> [payload, taken]
        self.notes = defaultdict(list)  # rank -> [(what, source, dest, tag)] in order
        self.broken = False

    def end(self, rank: int) -> "WireEnd":
        return WireEnd(self, rank)


class Made:
    """Masks that are there already: of one sample, which must be the token `token_id`."""

    def __init__(self, token_id):
        self._token_id = token_id

    def done(self):
        return True

    def result(self):
        return Masks(np.zeros(1, np.int32), np.array([self._token_id], np.int32), np.empty((0, 0), np.uint8))


class WireEnd:
    def __init__(self, wire: Wire, rank: int):
        self.wire, self.rank = wire, rank

    def send(self, tensor, dest, tag, ready):
        while not ready.query():
            yield
        yield from self._send(tensor.clone, dest, tag)

    def send_bytes(self, data, dest, tag):
        yield from self._send(lambda: data, dest, tag)

    def receive(self, tensor, source, tag):
        tensor.copy_((yield from self.receive_bytes(source, tag)))

    def receive_bytes(self, source, tag):
        self._note("receive", source, self.rank, tag)
        letters = self.wire.letters[source, self.rank, tag]
        while not any(not letter[1] for letter in letters):
            yield
        letter = next(letter for letter in letters if not letter[1])
        letter[1] = True
        return letter[0]

    def _send(self, payload, dest, tag):
        self._note("send", self.rank, dest, tag)
        letter = [payload(), False]
        self.wire.letters[self.rank, dest, tag].append(letter)
        while not letter[1]:
            yield

    def _note(self, what, source, dest, tag):
        self.wire.notes[self.rank].append((what, source, dest, tag))


@torch.inference_mode()
def run_steps(ring, rounds):
    """The executor's loop; every stage adds 1 to the hidden states, whose sum is the result. A size of 10 more: with masks."""
    place = ring.place
    everything = [*rounds, [0] * place.groups]
    steps, waiting, results = {}, set(), []
    for round, sizes in enumerate(everything):
        word = Word.STOP if round == len(rounds) else Word.RUN
        for lap in range(place.laps):
            for group in range(place.groups):
                if lap == 0 and place.rank == 0:
                    if group in waiting:
                        results.append(ring.receive_result(group).token_ids.tolist())
                        waiting.discard(group)
                    size, masked = sizes[group] % 10, sizes[group] >= 10
                    steps[group] = Step(round, group, word, token_ids=np.arange(size, dtype=np.int32), masked=masked)
                    ring.send_header(steps[group])
                    if masked:
                        ring.send_masks(group, Made(100 * round + group))
                    if sizes[group]:
                        waiting.add(group)
                elif lap == 0:
                    steps[group] = ring.receive_header(group)
                if count := steps[group].num_tokens:
                    first = place.embeds(lap)
                    hidden = (
                        torch.full((count, 2), float(group)) if first else ring.receive(group, lap, count).arrays[0]
                    )
                    hidden = hidden + 1
                    if place.answers(lap) and steps[group].masked:
                        assert ring.receive_masks(group).forced.tolist() == [100 * round + group]
                    if place.answers(lap):
                        values = hidden[:, 0].numpy().astype(np.int64)
                        ring.send_result(group, Answer(Result(values), streams_of(ring_device).event()))
                    else:
                        ring.send(group, lap, Hidden((hidden,)))
    ring.close()
    return results


ring_device = torch.device("cpu")


@pytest.mark.parametrize(
    ("num_ranks", "groups", "laps", "blocking"),
    [(2, 1, 1, False), (3, 5, 1, False), (3, 4, 3, False), (2, 2, 1, True), (3, 3, 2, True), (4, 2, 3, True)],
)
def test_the_rings_send_and_receive_in_the_order_of_the_dry_run(num_ranks, groups, laps, blocking):
    draw = random.Random(groups)
    rounds = [[draw.choice([0, 1, 3, 11, 13]) for _ in range(groups)] for _ in range(5)]
    wire, results = Wire(), {}

    def run_rank(rank):
        place = Place(rank, num_ranks, groups, laps)
        shape = RingShape(place, (of_hidden(2, "float32"),) * (num_ranks * laps), 3)
        ring = open_ring(wire.end(rank), shape, streams_of(ring_device), blocking)
        results[rank] = run_steps(ring, rounds)

    threads = [threading.Thread(target=run_rank, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results) == list(range(num_ranks)), "not every rank finished"
    assert results[0] == [
        [g + num_ranks * laps] * (sizes[g] % 10) for sizes in rounds for g in range(groups) if sizes[g]
    ]

    has_tokens = [[MASKED if size >= 10 else size > 0 for size in sizes] for sizes in rounds]
    for rank in range(num_ranks):
        place = Place(rank, num_ranks, groups, laps)
        if blocking:
            assert wire.notes[rank] == notes(rank, blocking_order(place, has_tokens))
            continue
        main, headers = ring_order(place, has_tokens)
        main, headers = notes(rank, main), notes(rank, headers)
        # The two lists of a rank run side by side: what it did is the two interleaved, each in its own order.
        assert sorted(wire.notes[rank]) == sorted(main + headers)
        assert is_merge(wire.notes[rank], main, headers)


def notes(rank, actions):
    kinds = {True: "send", False: "receive"}
    messages = [action.message for action in actions if action.verb != "finish"]
    return [(kinds[message.source == rank], message.source, message.dest, message.tag) for message in messages]


def is_merge(merged, one, other) -> bool:
    """Whether `merged` is the two lists interleaved, each in its own order."""
    positions = {(0, 0)}
    for note in merged:
        ahead = {(i + 1, j) for i, j in positions if one[i : i + 1] == [note]}
        positions = ahead | {(i, j + 1) for i, j in positions if other[j : j + 1] == [note]}
    return (len(one), len(other)) in positions


def test_tags_of_different_kinds_and_groups_differ_and_fit_every_mpi():
    tags = [tag("header")] + [
        tag(kind, group) for kind in ("hidden", "result", "masks") for group in (0, 1, MAX_GROUPS - 1)
    ]
    assert len(set(tags)) == len(tags)
    assert max(tags) <= 32767
