"""Rows that begin alike share the pages of that: computed once while its pages live, and every row ends with its own tokens."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import noria.rows.reservations as reservations
import noria.rows.waiting as waiting
import test_samples
import test_state_ids
from counts import count
from noria.rows.admission import Admission
from noria.rows.beginnings import BLOCK_TOKENS, Beginnings, order_of
from noria.rows.constraints import Constraints
from noria.rows.making import Source
from noria.rows.prompts import Prompt
from noria.rows.slots import Capacity
from noria.sampling import Sampling
from noria.step import Result, Run
from test_samples import END, LIMIT, expected


def prompt(row, ids, **keys):
    return Prompt(row, str(row), "", ids, {"temperature": 1.0, "seed": 3, **keys}, "", None)


def ids(number, length):
    """A text of its own for each number."""
    return [100 + (number * 37 + place * (number + 3)) % 90 for place in range(length)]


def texts(data, num_rows):
    """Prompts that are paths in a small tree of texts, and so begin alike in all ways."""
    sizes = data.draw(st.lists(st.integers(1, 140), min_size=2, max_size=5))
    paths = st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=4)
    for path in data.draw(st.lists(paths, max_size=num_rows)):
        yield [token for part in path for token in ids(part, sizes[part])][: LIMIT - 40] or [100]


@pytest.mark.slow
@settings(max_examples=count(600), deadline=None)
@given(st.data())
def test_whatever_rows_share_each_ends_with_its_own_tokens(data):
    groups, step_tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(20, 300))
    tiers = tuple(data.draw(st.lists(st.integers(20, 60), min_size=1, max_size=3)))
    states = tuple(data.draw(st.integers(2, 9)) for _ in tiers) if data.draw(st.booleans()) else ()
    limits = Capacity(groups, sum(tiers), step_tokens, data.draw(st.integers(1, step_tokens)), 1, LIMIT)
    rows = data.draw(st.integers(1, 4)) if states else 0
    limits = replace(limits, tier_pages=tiers, slot_pages=20, tier_states=states, state_rows=rows)
    prompts = [
        prompt(
            row, tokens, max_new_tokens=data.draw(st.sampled_from([1, 5, 120])), n=data.draw(st.sampled_from([1, 1, 3]))
        )
        for row, tokens in enumerate(texts(data, 14))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reservations, "ENOUGH", data.draw(st.integers(1, 8)))
        patch.setattr(reservations, "GROWTH_TOKENS", BLOCK_TOKENS)
        patch.setattr(waiting, "READ_FIRST", data.draw(st.integers(1, 8)))
        patch.setattr(waiting, "WINDOW", data.draw(st.integers(1, 20)))
        run = test_state_ids.run if states else test_samples.run
        finished, admission, _ = run(prompts, limits)
    assert sorted((one.prompt.row, one.sample) for one in finished) == [
        (one.row, sample) for one in prompts for sample in range(one.sampling["n"])
    ]
    for one in finished:
        assert one.error == "" and one.token_ids == expected(one.prompt, one.sample, LIMIT)
        assert one.cached_tokens % BLOCK_TOKENS == 0 and one.cached_tokens < len(one.prompt_token_ids)
    shared = sum(one.cached_tokens for one in finished)
    assert admission.counted.cached_tokens == shared, "rows that return to the line share a second time, and count once"


def computed(prompts, limits):
    """(tokens of prompts that were computed, cached tokens by row) of a whole run."""
    finished, admission, engine = test_samples.run(prompts, limits)
    assert admission.counted.prompt_tokens == engine.num_prompt_tokens
    assert admission.counted.cached_tokens == sum(one.cached_tokens for one in finished)
    return engine.num_prompt_tokens, {one.prompt.row: one.cached_tokens for one in finished}


ROOMY = Capacity(2, 4000, 3000, 3000, 1, 4096)


def test_a_beginning_is_computed_once_for_all_rows_that_have_it():
    prompts = [prompt(row, ids(50, 200) + ids(row, 30), max_new_tokens=4) for row in range(20)]
    tokens, cached = computed(prompts, ROOMY)
    assert tokens == 20 * 230 - 19 * 192 and sorted(cached.values()) == [0] + [192] * 19


def test_the_last_token_of_a_prompt_is_always_computed():
    for length, shared in [(64, 0), (65, 64), (128, 64), (129, 128)]:
        prompts = [prompt(row, ids(50, length), max_new_tokens=4) for row in range(3)]
        assert computed(prompts, ROOMY)[0] == length + 2 * (length - shared)


def test_beginnings_of_beginnings_are_shared_too():
    """All rows have 128 tokens in common, each third of them 128 more."""
    prompts = [prompt(row, ids(50, 128) + ids(60 + row % 3, 128) + ids(row, 10), max_new_tokens=4) for row in range(12)]
    tokens, cached = computed(prompts, ROOMY)
    assert tokens == 128 + 3 * 128 + 12 * 10
    assert sorted(cached.values()) == [0] + [128] * 2 + [256] * 9


def test_without_sharing_every_row_computes_its_own():
    prompts = [prompt(row, ids(50, 200), max_new_tokens=4, n=2) for row in range(4)]
    tokens, cached = computed(prompts, replace(ROOMY, sharing=False))
    assert tokens == 8 * 200 and set(cached.values()) == {0}


def test_rows_that_score_their_prompt_compute_it_and_others_do_not_wait_for_them():
    prompts = [
        prompt(row, ids(50, 200), max_new_tokens=2, **({"prompt_logprobs": True} if row % 2 else {}))
        for row in range(4)
    ]
    scores = test_samples.Scores(ROOMY)
    finished, *_ = test_samples.run(prompts, ROOMY, answer=scores.answer)
    assert scores.num_prompt_tokens == 200 + 8 + 2 * 200
    assert all(not np.isnan(one.prompt_logprobs[1:]).any() for one in finished if one.prompt.row % 2)


def runs_of(prompts, limits, rounds=30):
    """The runs of pages of each row that was admitted, in order."""
    found, engine = [], test_samples.Engine(limits)

    def answer(step):
        found.extend(one.runs for one in step.admitted)
        return engine.answer(step)

    test_samples.run(prompts, limits, answer=answer)
    return found


def test_rows_that_share_a_beginning_name_the_same_runs_and_so_do_those_of_a_longer_one():
    rows = [ids(50, 128) + ids(60 + row % 3, 64) + ids(row, 10) for row in range(9)]
    runs = runs_of(
        [prompt(row, tokens, max_new_tokens=60) for row, tokens in enumerate(rows)], replace(ROOMY, groups=1)
    )
    assert all(len(one) == 3 and [run.count for run in one] == [8, 4, 8] for one in runs)
    assert (
        len({one[0] for one in runs}) == 1 and len({one[1] for one in runs}) == 3 and len({one[2] for one in runs}) == 9
    )


def test_shuffled_rows_of_eight_beginnings_are_each_computed_once_where_the_cache_holds_two():
    """Rows of a beginning follow one another, and it stays as long as rows wait for it."""
    order = np.random.default_rng(1).permutation(160)
    prompts = [
        prompt(row, ids(50 + which % 8, 256) + ids(int(which), 20), max_new_tokens=20)
        for row, which in enumerate(order)
    ]
    tokens, _ = computed(prompts, Capacity(1, 2 * 16 + 30, 600, 600, 1, 512))
    assert tokens <= 8 * 256 + 160 * 20 + 2 * 256


def test_a_beginning_that_no_row_waits_for_stays_until_its_pages_are_needed():
    first, last = ids(50, 256), ids(51, 64 * 15)
    rows = [*[first + ids(row, 9) for row in range(2)], last, first + ids(9, 9), last, first + ids(8, 9)]
    for pages, again in [(200, 0), (64, 1)]:
        prompts = [prompt(row, tokens, max_new_tokens=4) for row, tokens in enumerate(rows)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(waiting, "READ_FIRST", 2)
            patch.setattr(waiting, "READ_MORE", 0)
            _, cached = computed(prompts, Capacity(1, pages, 2000, 2000, 1, 2000))
        assert cached[3] == (0 if again else 256)


def test_a_row_that_fails_while_others_wait_for_what_it_computes_leaves_it_to_the_next():
    prompts = [prompt(row, ids(50, 300) + ids(row, 9), max_new_tokens=4) for row in range(4)]
    finished = []
    source = Source(iter(prompts), 4, lambda p: p.token_ids, finished.append)
    limits = Capacity(1, 400, 100, 50, 1, 512)
    admission, engine = Admission(source, Sampling(), frozenset({END}), limits), test_samples.Engine(limits)
    engine.answer(admission.compose(0, 0))
    (leader,) = admission._slots.active[0].values()
    assert leader.lead is not None and sum(map(len, admission._queue._parked.values())) == 3
    admission._leave(0, leader)
    step = admission.compose(1, 0)
    assert len(step.admitted) == 1 and step.positions.tolist() == [0] and not engine.answer(step).token_ids.size
    (leader,) = admission._slots.active[0].values()
    assert leader.prompt.row == 1 and sum(map(len, admission._queue._parked.values())) == 2


def test_a_block_is_another_one_behind_another_beginning():
    tree = Beginnings()
    one, same, other = (
        tree.enter(text + ids(3, 70), row) for row, text in enumerate([ids(1, 64), ids(1, 64), ids(2, 64)])
    )
    assert one == same and [block.waiting for block in one] == [2, 2]
    assert one[1].ids == other[1].ids and one[1] is not other[1] and other[1].waiting == 1


def test_few_rows_are_read_ahead_where_each_has_a_constraint_of_its_own(monkeypatch):
    read = []

    def prompts():
        for row in range(500):
            read.append(row)
            yield prompt(row, ids(row % 90, 9), max_new_tokens=1)

    for crowded, most in [(False, 500), (True, waiting.READ_FIRST + 2)]:
        read.clear()
        monkeypatch.setattr(Constraints, "crowded", property(lambda _, crowded=crowded: crowded))
        source = Source(prompts(), 500, lambda p: p.token_ids, lambda row: None)
        admission = Admission(source, Sampling(), frozenset({END}), Capacity(1, 40, 90, 90, 1, 64))
        for round in range(20):
            step = admission.compose(round, 0)
            admission.apply(step, Result(np.full(step.num_samples, 9)))
        assert most - 220 <= len(read) - 200 * crowded <= most


@given(st.data())
def test_rows_of_a_beginning_follow_one_another_and_none_is_overtaken_by_many(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("noria.rows.beginnings.WINDOW", window := data.draw(st.integers(1, 30)))
        tree, orders = Beginnings(), []
        which = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=60))
        for row, number in enumerate(which):
            orders.append(order_of(tree.enter(ids(number, 70), row), row, 0))
    rows = sorted(range(len(which)), key=orders.__getitem__)
    for place, row in enumerate(rows):
        assert max([later - row for later in rows[:place]], default=0) <= 2 * window
    if window == 30 and len(which) < 30:
        changes = sum(which[one] != which[other] for one, other in itertools.pairwise(rows))
        assert changes == len(set(which)) - 1


def test_what_nobody_waits_for_is_forgotten():
    tree = Beginnings()
    entered = [tree.enter(ids(row % 3, 300), row, 2) for row in range(9)]
    assert len(tree._root.children) == 3
    for blocks in entered:
        tree.leave(blocks)
    assert len(tree._root.children) == 3
    for blocks in entered:
        tree.leave(blocks)
    assert not tree._root.children


def test_prompts_are_read_ahead_a_few_with_each_row_and_an_error_is_raised_when_its_turn_comes():
    read = []

    def prompts():
        for row in range(1000):
            read.append(row)
            if row == 300:
                raise ValueError("damaged")
            yield prompt(row, ids(row % 90, 9), max_new_tokens=1)

    finished = []
    source = Source(prompts(), 1000, lambda p: p.token_ids, finished.append)
    admission = Admission(source, Sampling(), frozenset({END}), Capacity(1, 40, 90, 90, 1, 64))
    step = admission.compose(0, 0)
    assert len(step.admitted) == 10 and len(read) <= waiting.READ_FIRST + 10 * waiting.READ_MORE
    with pytest.raises(ValueError, match="damaged"):
        for round in range(1, 100):
            admission.apply(step, Result(np.full(step.num_samples, 9)))
            step = admission.compose(round, 0)
    assert len(finished) == 300


def test_a_prefix_is_staged_once_in_a_microbatch_and_counts_once_in_its_pages():
    from noria.borders import cut
    from noria.engine.batch import to_staging
    from noria.engine.kv_cache import TierPages
    from noria.step import Span

    held = TierPages(100, 200, None, (), ())
    shared, other = Run(100, 8), Run(108, 4)
    spans = [
        Span(0, 1, 140, (shared, Run(200, 4))),
        Span(1, 2, 200, (shared, other, Run(204, 4), Run(220, 4))),
        Span(3, 1, 195, (shared, other, Run(208, 4))),
    ]
    moved, staged = to_staging(spans, [held])
    assert [span.runs for span in moved] == [
        (Run(0, 8), Run(8, 1)),
        (Run(0, 8), Run(9, 4), Run(13, 1)),
        (Run(0, 8), Run(9, 4), Run(14, 1)),
    ]
    assert staged.num_pages == 15
    rows = sum(count for *_, count in staged.loads["token"])
    assert rows == 128 + 64 + (139 - 128) + (198 - 192) + (194 - 192)
    assert sum(count for *_, count in staged.stores["token"]) == 4
    assert cut([1, 1, 1], 9, 1, [9, 13, 13], [0, 8, 12], most_pages=15) == [0, 3]
    assert cut([1, 1, 1], 9, 1, [9, 13, 13], [0, 8, 12], most_pages=14) == [0, 2, 3]
    assert cut([1, 1, 1], 9, 1, [9, 13, 13], [0, 8, 12], most_pages=13) == [0, 1, 2, 3]


def test_a_staged_row_keeps_the_order_of_its_runs_where_only_a_later_one_is_shared():
    """The second row came after others had parted from the beginning: the same pages are two runs to it."""
    from noria.engine.batch import to_staging
    from noria.engine.kv_cache import TierPages
    from noria.step import Span

    own, parted, shared = (Run(100, 8),), (Run(100, 4), Run(104, 4)), Run(108, 4)
    spans = [Span(0, 1, 193, (*own, shared, Run(120, 4))), Span(1, 1, 200, (*parted, shared, Run(124, 4)))]
    moved, staged = to_staging(spans, [TierPages(100, 200, None, (), ())])
    assert [span.runs for span in moved] == [
        (Run(0, 8), Run(8, 4), Run(12, 1)),
        (Run(13, 8), Run(8, 4), Run(21, 1)),
    ]
    assert staged.num_pages == 22
