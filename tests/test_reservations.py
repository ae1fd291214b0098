"""Rows reserve what most rows have needed; those that need more grow, or return to the line and lose nothing."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import noria.rows.reservations as reservations
import test_admission
from noria.kernels.work import KEY_BLOCK
from noria.limits import RUN_PAGES
from noria.rows.admission import Admission
from noria.rows.making import Source
from noria.rows.prompts import Prompt
from noria.rows.reservations import EarlierLengths, Reservations, needed
from noria.rows.sequence import Sequence
from noria.rows.slots import Capacity
from noria.sampling import Sampling
from noria.step import PAGE_TOKENS, Result, Run, pages_for
from test_admission import END, expected, prompt

OTHER = 9
ROW = RUN_PAGES * PAGE_TOKENS  # tokens of the least run


def test_a_run_of_pages_holds_whole_key_blocks():
    assert ROW == KEY_BLOCK
    assert [pages_for(tokens) for tokens in (0, 1, ROW, ROW + 1)] == [0, RUN_PAGES, RUN_PAGES, 2 * RUN_PAGES]


@pytest.fixture
def soon(monkeypatch):
    """Rows are judged by the first ones that end."""
    monkeypatch.setattr(reservations, "ENOUGH", 2)
    monkeypatch.setattr(reservations, "GROWTH_TOKENS", ROW)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_rows_that_grow_or_return_to_the_line_end_with_the_same_tokens(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reservations, "ENOUGH", data.draw(st.integers(1, 4)))
        patch.setattr(reservations, "GROWTH_TOKENS", ROW * data.draw(st.integers(1, 2)))
        patch.setattr(reservations, "QUANTILE", data.draw(st.sampled_from([0.1, 0.5, 0.9])))
        groups, step_tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(30, 200))
        limits = Capacity(
            groups, data.draw(st.integers(20, 60)), step_tokens, data.draw(st.integers(1, step_tokens)), 1, 300
        )
        shapes = data.draw(
            st.lists(st.tuples(st.integers(1, 150), st.sampled_from([1, 3, 200])), min_size=4, max_size=16)
        )
        prompts = [
            prompt(row, length, max_new_tokens=new, ignore_eos=row % 3 == 0) for row, (length, new) in enumerate(shapes)
        ]
        finished, _ = test_admission.run(prompts, limits)
    assert sorted(sequence.prompt.row for sequence in finished) == list(range(len(prompts)))
    for sequence in finished:
        assert sequence.error == "" and sequence.token_ids == whole(sequence.prompt)


def whole(row):
    if not row.sampling["ignore_eos"]:
        return expected(row, 300)
    tokens, most = list(row.token_ids), min(row.sampling["max_new_tokens"], 300 - len(row.token_ids))
    while len(tokens) < len(row.token_ids) + most:
        tokens.append(test_admission.next_token(tokens))
    return tokens[len(row.token_ids) :]


def admitted_to(limits, rows, **keys):
    source = Source(iter(rows), len(rows), lambda p: p.token_ids, lambda row: None)
    return Admission(source, Sampling(**keys), frozenset({END}), limits)


def go_on(admission, round, ends=()):
    """The step of a round, answered: rows in slots that are among `ends` end."""
    step = admission.compose(round, 0)
    tokens = [END if slot in ends else OTHER for slot in step.sample_slots.tolist()]
    admission.apply(step, Result(np.array(tokens, np.int64)))
    return step


def rows_of(*lengths, **keys):
    return [prompt(row, length, **keys) for row, length in enumerate(lengths)]


def test_a_row_grows_in_place_where_the_next_pages_are_free_and_else_by_a_second_run(soon):
    """Two short rows end; of the next two, which reserve 64 + 64 tokens each, the last can grow where it lies."""
    limits = Capacity(1, 8 * RUN_PAGES, 1000, 1000, 1, 512)
    admission = admitted_to(limits, rows_of(2, 2, 60, 60), max_new_tokens=300)
    step = go_on(admission, 0)
    assert [len(one.runs) for one in step.admitted] == [1], "all of 302 tokens is 5 of 8 runs"
    go_on(admission, 1, ends=[step.admitted[0].slot])
    step = go_on(admission, 2)
    go_on(admission, 3, ends=[step.admitted[0].slot])
    step = go_on(admission, 4)
    assert [one.runs for one in step.admitted] == [(Run(0, 8),), (Run(8, 8),)]
    grown = {}
    for round in range(5, 200):
        step = go_on(admission, round)
        grown |= {one.slot: one.runs for one in step.grown}
        if len(grown) == 2:
            break
    first, last = grown.values()
    assert first == (Run(0, 8), Run(16, 4)) and last == (Run(8, 8), Run(20, 4))


def test_where_no_page_is_free_the_youngest_row_returns_with_its_tokens_and_then_reserves_all(soon):
    limits, finished = Capacity(1, 6 * RUN_PAGES, 1000, 1000, 1, 512), []
    source = Source(iter(rows_of(2, 2, 60, 60, 60)), 5, lambda p: p.token_ids, finished.append)
    admission = Admission(source, Sampling(max_new_tokens=130), frozenset({END}), limits)
    for round in range(4):
        step = go_on(admission, round, ends=[0, 1] if round == 0 else [])
    assert len(finished) == 2
    round, tokens = 4, {}
    while not step.released or round < 6:
        step, round = go_on(admission, round), round + 1
        tokens |= dict(zip(step.slots.tolist(), (step.positions + step.counts).tolist(), strict=True))
    assert len(step.grown) == 2 and admission.num_active == 2, "three rows of two runs each fill the cache"
    youngest = admission._queue.first()
    assert youngest.prompt.row == 4 and len(youngest.token_ids) == 69 and youngest.returned
    while not step.admitted:
        step, round = go_on(admission, round), round + 1
    assert pages_of(step.admitted[0].runs) == pages_for(60 + 130)
    assert step.counts[step.slots.tolist().index(step.admitted[0].slot)] == 60 + 69


def test_what_a_row_shared_counts_once_though_it_returned_to_the_line(soon):
    """Three rows of one beginning fill seven runs; the youngest returns, and shares the beginning again."""
    finished, round, returned = [], 0, False
    source = Source(iter(rows_of(2, 2, 70, 70, 70)), 5, lambda p: p.token_ids, finished.append)
    limits = Capacity(1, 7 * RUN_PAGES, 1000, 1000, 1, 512)
    admission = Admission(source, Sampling(max_new_tokens=130), frozenset({END}), limits)
    while not admission.done:
        go_on(admission, round, ends=[0, 1] if round == 0 else [])
        round, returned = round + 1, returned or admission._queue.has_returned
    assert returned and sorted(one.cached_tokens for one in finished) == [0, 0, 0, ROW, ROW]
    assert admission.counted.cached_tokens == 2 * ROW


def pages_of(runs):
    return sum(run.count for run in runs)


def test_rows_that_returned_go_on_where_the_run_admits_no_more_and_are_sealed_where_it_stops(soon):
    for stopped in (False, True):
        finished = []
        source = Source(iter(rows_of(2, 2, 60, 60, 60, 60)), 6, lambda p: p.token_ids, finished.append)
        admission = Admission(
            source, Sampling(max_new_tokens=150), frozenset({END}), Capacity(1, 24, 1000, 1000, 1, 512)
        )
        round = 0
        while not admission._queue.has_returned:
            go_on(admission, round, ends=[0, 1] if round == 0 else [])
            round += 1
        if stopped:
            assert sorted(one.prompt.row for one in admission.stop() if one.token_ids) == [2, 3, 4]
            assert admission.done
            continue
        admission.admit_no_more()
        while not admission.done:
            go_on(admission, round)
            round += 1
        assert sorted(one.prompt.row for one in finished) == [0, 1, 2, 3, 4] and not admission.exhausted


def by_hand(ended, running, quantile):
    """Kaplan and Meier's estimate, a length at a time."""
    share = 1.0
    for length in sorted(set(ended)):
        at_risk = sum(one >= length for one in [*ended, *running])
        share *= 1 - ended.count(length) / at_risk
        if share <= 1 - quantile + 1e-12:
            return length
    return math.ceil(max(*ended, *running, 1) * math.log(1 - quantile) / math.log(share))


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=40),
    st.sampled_from([0.5, 0.9, 0.95]),
)
def test_rows_that_still_run_count_as_at_least_their_present_length(ended, running, quantile):
    found = needed(np.array(ended), np.array(running, np.int64), quantile)
    assert found == by_hand(ended, running, quantile)
    if not running:
        assert found == sorted(ended)[int(np.ceil(len(ended) * quantile - 1e-9)) - 1]


def test_a_row_reserves_all_until_enough_rows_have_ended_and_never_more_than_it_may_generate():
    one = Reservations(4096)
    row = Sequence(Prompt(0, "", "", [5] * 100, {}, "", None), Sampling(max_new_tokens=1000), [5] * 100)
    for _ in range(reservations.ENOUGH - 1):
        one.ended(50, [])
    assert one.first(row) == 1100
    one.ended(50, [])
    assert one.usual == 50 and one.first(row) == 100 + reservations.GROWTH_TOKENS
    for _ in range(reservations.ENOUGH):
        one.ended(500, [])
    assert one.first(row) == 600
    row.returned = True
    assert one.first(row) == 1100


def job(rounds, lengths, earlier=None, begun=None):
    """A job of this many rounds over prompts of 128 tokens, whose row r ends at lengths[r]: its admission, the lengths of rows
    that have ended by row, and how many are in flight in the rounds. `earlier`: what it is told of; `begun`: rows that go on."""
    finished, counts, step, begun = {}, [], None, begun or {}
    prompts = (Prompt(row, str(row), "", [5] * 128, {}, "", None) for row in range(len(lengths)))
    done = {(row, 0) for row in earlier[0]} if earlier else set()

    def take_up(sequence):
        sequence.token_ids = begun.get(sequence.prompt.row, 0) * [OTHER]

    def end(sequence):
        finished[sequence.prompt.row] = len(sequence.token_ids)

    told = earlier[1] if earlier else EarlierLengths()
    source = Source(prompts, len(lengths), lambda p: p.token_ids, end, begun=take_up, done=done, lengths=told)
    limits = Capacity(1, 12_000, 8192, 8192, 1, 8192, 128_000, sharing=False)
    admission = Admission(source, Sampling(max_new_tokens=4096), frozenset({END}), limits)
    for round in range(rounds):
        step = admission.compose(round, 0)
        rows = [admission._slots.active[0][slot] for slot in step.sample_slots.tolist()]
        known = admission._flights[0]._rows["known"][step.sample_slots]
        ends = known + 1 >= lengths[[row.prompt.row for row in rows]] if rows else np.empty(0, bool)
        admission.apply(step, Result(np.where(ends, END, OTHER)))
        counts.append(admission.num_active)
    return admission, finished, np.array(counts)


@pytest.mark.slow
@pytest.mark.parametrize("before", [300, 900], ids=["early", "late"])
def test_a_job_that_goes_on_has_as_many_rows_in_flight_as_if_it_had_never_stopped(before):
    """Early, only rows of up to 300 tokens have ended, which is their mean."""
    lengths = np.random.default_rng(3).geometric(1 / 300, 1 << 14)
    steady = 12_000 * PAGE_TOKENS / (128 + np.quantile(lengths, 0.9))
    first, finished, _ = job(before, lengths)
    running = np.array(list(first.lengths()))
    half_way = {one.prompt.row: len(one.token_ids) for one in first.stop()}
    ended = np.array(list(finished.values()))
    told = {
        "stopped": (EarlierLengths(ended, half_way=np.array(list(half_way.values()))), half_way),
        "killed": (EarlierLengths(ended, lost=running), {}),
        "from the beginning": (EarlierLengths(), {}),
    }
    in_flight = {}
    for kind, (its, begun) in told.items():
        _, _, counts = job(150, lengths, (finished, its), begun)
        in_flight[kind] = counts[50:].mean() / steady
    print({kind: round(share, 2) for kind, share in in_flight.items()})
    assert 0.8 < in_flight["stopped"] < 1.1 and 0.8 < in_flight["killed"] < 1.1
    assert in_flight["from the beginning"] < 0.3


def test_rows_that_a_kill_lost_count_as_long_as_those_that_ended_in_that_job(monkeypatch):
    monkeypatch.setattr(reservations, "REMEMBERED", 40)
    monkeypatch.setattr(reservations, "ENOUGH", 10)
    ended, lost = np.arange(1, 21), np.full(30, 50)
    one = Reservations(4096, EarlierLengths(ended, lost=lost))
    assert one.usual == by_hand(ended.tolist(), lost.tolist(), 0.9) > 90
    for _ in range(20):
        one.ended(10, [])
    assert one.usual == by_hand([*ended.tolist(), *[10] * 20], lost.tolist(), 0.9), "all 40 are remembered"
    for _ in range(10):
        one.ended(10, [])
    assert one.usual == by_hand([*ended[10:].tolist(), *[10] * 30], lost[:15].tolist(), 0.9)
    for _ in range(10):
        one.ended(10, [])
    assert one.usual == 10


def simulated(limit, rounds, follows):
    """Mean rows in flight in the second half of the rounds: prompts of 128, ends at random at 300 on average."""
    draw = np.random.default_rng(3)
    prompts = (Prompt(row, str(row), "", [5] * 128, {}, "", None) for row in range(1 << 20))
    limits = Capacity(2, 24_000, 8192, 8192, 1, 8192, 128_000)
    source = Source(prompts, 1 << 20, lambda p: p.token_ids, lambda row: None)
    admission = Admission(source, Sampling(max_new_tokens=limit), frozenset({END}), limits)
    steps, counted, returned = [None] * 2, [], 0
    with pytest.MonkeyPatch.context() as patch:
        if not follows:
            patch.setattr(reservations, "ENOUGH", 1 << 30)
        for round in range(rounds):
            for group in range(2):
                if steps[group] is not None:
                    ends = draw.random(len(steps[group].sample_slots)) < 1 / 300
                    admission.apply(steps[group], Result(np.where(ends, END, OTHER)))
                steps[group] = admission.compose(round, group)
                returned += len(admission._queue._returned)
            counted.append(admission.num_active)
    return np.mean(counted[rounds // 2 :]), returned


@pytest.mark.slow
def test_three_times_as_many_rows_are_in_flight_where_rows_end_long_before_their_limit():
    rows, returned = simulated(4096, 900, True)
    at_limit, _ = simulated(4096, 60, False)
    print(f"{rows:.0f} rows in flight instead of {at_limit:.0f}, {returned} returned to the line")
    assert rows >= 3 * at_limit
