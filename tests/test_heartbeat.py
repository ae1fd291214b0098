"""Heartbeats between ranks, with a clock of the test's own."""

import itertools
import time

import pytest

from noria.order import Place
from noria.ring import heartbeat

PLACE = Place(1, 3, 1, 1)


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Wire:
    """What arrives from rank 0, and what rank 1 sends to rank 2: (time, message)."""

    def __init__(self, clock):
        self.clock, self.arriving, self.sent = clock, [], []

    def send_bytes(self, data, dest, tag):
        assert (dest, tag) == (2, 1)
        self.sent.append((self.clock.now, data))
        yield

    def receive_bytes(self, source, tag):
        assert (source, tag) == (0, 1)
        while not self.arriving or self.arriving[0][0] > self.clock.now:
            yield
        return self.arriving.pop(0)[1]


@pytest.fixture
def wire(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return Wire(clock)


def turn(wire, work, seconds, step=0.05):
    """Resumes the work for so long; returns whether it is still there."""
    until = wire.clock.now + seconds
    while wire.clock.now < until:
        try:
            next(work)
        except StopIteration:
            return False
        wire.clock.now += step
    return True


def test_a_rank_beats_several_times_in_the_silence_that_counts_and_says_when_it_is_the_last(wire):
    ending = [False]
    work = heartbeat.beat(wire, PLACE, 30.0, lambda: ending[0])
    assert turn(wire, work, 60)
    times = [moment for moment, _ in wire.sent]
    assert 14 <= len(times) <= 17 and max(b - a for a, b in itertools.pairwise(times)) < 5
    ending[0] = True
    assert not turn(wire, work, 1) and wire.sent[-1][1] != wire.sent[0][1]


def test_a_rank_that_beats_is_never_missed_and_its_last_beat_ends_the_listening(wire):
    wire.arriving = [(moment, b"a") for moment in range(0, 300, 20)] + [(300, b"z")]
    lost = []
    work = heartbeat.listen(wire, PLACE, 30.0, lambda *who: lost.append(who))
    assert turn(wire, work, 299)
    assert not turn(wire, work, 10) and lost == []


def test_a_silent_rank_is_missed_once_by_name_after_the_silence(wire):
    wire.arriving = [(0, b"a"), (10, b"a")]
    lost = []
    work = heartbeat.listen(wire, PLACE, 30.0, lambda *who: lost.append((wire.clock.now, *who)))
    assert not turn(wire, work, 100)
    [(moment, rank, seconds)] = lost
    assert rank == 0 and 40 <= moment < 42 and 30 < seconds < 32


def test_a_job_that_was_put_to_sleep_as_a_whole_misses_nobody(wire):
    wire.arriving = [(0, b"a"), (1008, b"a"), (1012, b"z")]
    lost = []
    work = heartbeat.listen(wire, PLACE, 30.0, lambda *who: lost.append(who))
    assert turn(wire, work, 3)
    wire.clock.now += 1000
    assert not turn(wire, work, 20) and lost == []


class Pipe:
    """What one rank says to the next, as it is sent."""

    def __init__(self):
        self.messages = {}

    def of(self, rank):
        return Side(self.messages, rank)


class Side:
    def __init__(self, messages, rank):
        self.messages, self.rank = messages, rank

    def send_bytes(self, data, dest, tag):
        self.messages.setdefault((self.rank, dest), []).append(data)
        yield

    def receive_bytes(self, source, tag):
        while not self.messages.get((source, self.rank)):
            yield
        return self.messages[source, self.rank].pop(0)


@pytest.mark.slow
def test_hearts_of_their_own_hear_each_other_until_they_are_closed_and_miss_one_that_stops():
    pipe, lost = Pipe(), []
    places = [Place(rank, 2, 2, 1) for rank in (0, 1)]
    hearts = [
        heartbeat.Heart(pipe.of(place.rank), place, 0.5, lambda rank, seconds: lost.append(rank)) for place in places
    ]
    time.sleep(1.2)
    assert lost == []
    hearts[1].abandon()
    time.sleep(1.2)
    assert lost == [1], "rank 0 misses rank 1"
    hearts[0].abandon()
    both = [heartbeat.Heart(Pipe().of(0), Place(0, 1, 1, 1), 30, lambda *who: lost.append(who)) for _ in range(2)]
    for heart in both:
        heart.close()
    assert lost == [1]


def test_a_rank_that_is_through_hears_at_once_what_is_there_already(wire):
    """Beats that lie there, then the last one: without looking at every turn each would take a second."""
    wire.arriving = [(0.0, b"a"), (0.0, b"a"), (0.0, b"z")]
    lost = []
    work = heartbeat.listen(wire, PLACE, 30.0, lambda *who: lost.append(who), lambda: True)
    assert not turn(wire, work, 0.5) and not lost
    wire.arriving = [(wire.clock.now, b"a"), (wire.clock.now, b"a"), (wire.clock.now, b"z")]
    assert turn(wire, heartbeat.listen(wire, PLACE, 30.0, lambda *who: lost.append(who)), 0.5)
