import itertools
import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noria.borders import cut, cut_tokens
from noria.limits import RUN_PAGES
from noria.rows import composing
from noria.rows.admission import Admission
from noria.rows.making import Source
from noria.rows.prompts import Prompt
from noria.rows.sequence import Sequence
from noria.rows.slots import Capacity
from noria.sampling import Sampling
from noria.step import NO_TOKEN, PAGE_TOKENS, Result, Word

END = 7
LIMIT = 300  # tokens of the context


def prompt(row, length, **keys):
    return Prompt(row, str(row), "", list(range(100, 100 + length)), keys, "", None)


def next_token(tokens):
    """A model of two lines: the next token is a function of all tokens before it."""
    return (sum(tokens) * 31 + len(tokens)) % 50


def expected(row, limit):
    tokens, new = list(row.token_ids), []
    while True:
        new.append(next_token(tokens + new))
        if new[-1] == END or len(new) == row.sampling["max_new_tokens"] or len(tokens) + len(new) == limit:
            return new


def pages_of(runs):
    return [page for run in runs for page in range(run.start, run.start + run.count)]


class Engine:
    """Answers steps as ranks would, from the tokens that the steps alone carry, and checks what every step promises."""

    def __init__(self, limits):
        self.limits, self.slots, self.seen = limits, {}, {}

    def answer(self, step):
        left = {self.slots.pop(slot): self.seen.pop(slot) for slot in step.released}
        for admitted in step.admitted:
            assert admitted.slot not in self.slots
            moved = admitted.slot not in step.slots.tolist()  # to another group, with its pages and what lies in them
            self.seen[admitted.slot] = left.pop(admitted.runs) if moved else []
        for one in (*step.admitted, *step.grown):
            before = pages_of(self.slots.pop(one.slot, ()))
            held = {page for runs in self.slots.values() for page in pages_of(runs)}
            mine = pages_of(one.runs)
            assert len(set(mine)) == len(mine) > len(before) and mine[: len(before)] == before
            assert not held & set(mine) and max(mine) < self.limits.num_pages
            assert all(run.count % RUN_PAGES == 0 for run in one.runs)
            self.slots[one.slot] = one.runs
        assert step.num_tokens <= self.limits.step_tokens
        ends = np.concatenate([[0], np.cumsum(step.counts)]).astype(int)
        for first, last in zip(step.borders[:-1], step.borders[1:], strict=True):
            assert 0 < ends[last] - ends[first] <= self.limits.microbatch_tokens
        for row, slot in enumerate(step.slots.tolist()):
            assert step.positions[row] == len(self.seen[slot])
            self.seen[slot] += step.token_ids[ends[row] : ends[row + 1]].tolist()
            assert len(self.seen[slot]) <= sum(run.count for run in self.slots[slot]) * PAGE_TOKENS
        for row, slot in zip(step.sample_rows, step.sample_slots, strict=True):
            assert row + 1 in ends and step.slots[np.flatnonzero(ends == row + 1)[0] - 1] == slot
        return Result(np.array([next_token(self.seen[slot]) for slot in step.sample_slots.tolist()], np.int64))


def run(prompts, limits, answer=None):
    finished = []
    source = Source(prompts, len(prompts), lambda p: p.token_ids, finished.append)
    admission = Admission(source, Sampling(), frozenset({END}), replace(limits, sharing=False))
    engine, under_way, steps = Engine(limits), [None] * limits.groups, []
    for round in range(10_000):
        words = set()
        for group in range(limits.groups):
            if under_way[group] is not None:
                admission.apply(*under_way[group])
            step = admission.compose(round, group)
            words.add(step.word)
            result = (answer or engine.answer)(step)
            under_way[group] = (step, result) if step.num_tokens else None
            steps.append(step)
        assert len(words) == 1
        if words == {Word.STOP}:
            return finished, steps
    raise AssertionError("the run does not end")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_row_ends_once_with_its_own_tokens_whatever_the_groups_and_budgets(data):
    groups, step_tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 160))
    limits = Capacity(
        groups,
        data.draw(st.integers(20, 80)),
        step_tokens,
        data.draw(st.integers(1, step_tokens)),
        data.draw(st.integers(1, 3)),
        LIMIT,
        gathers=data.draw(st.booleans()),
    )
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 90)), max_size=25))
    prompts = [prompt(row, length, max_new_tokens=new) for row, (length, new) in enumerate(shapes)]
    finished, _ = run(prompts, limits)
    assert sorted(sequence.prompt.row for sequence in finished) == list(range(len(prompts)))
    for sequence in finished:
        assert sequence.error == "" and sequence.token_ids == expected(sequence.prompt, LIMIT)


def test_groups_are_kept_equally_full_when_rows_are_few():
    prompts = [prompt(row, 4, max_new_tokens=5) for row in range(8)]
    _, steps = run(prompts, Capacity(4, 100, 64, 64, 1, 64))
    assert [len(step.slots) for step in steps[:4]] == [2, 2, 2, 2]


def test_a_long_prompt_is_prefilled_in_chunks_beside_decoding_rows():
    prompts = [prompt(0, 2, max_new_tokens=20, ignore_eos=True), prompt(1, 30, max_new_tokens=2, ignore_eos=True)]
    _, steps = run(prompts, Capacity(1, 100, 10, 8, 1, 64))
    assert [step.counts.tolist() for step in steps[:5]] == [[2, 8], [1, 8], [1, 8], [1, 6], [1, 1]]


def test_steps_of_rows_on_the_device_are_cut_without_a_look_at_each_row(monkeypatch):
    """As a plan has it that gives the other tiers no pages."""
    monkeypatch.setattr(composing, "cut", None)
    prompts = [prompt(row, 5, max_new_tokens=4) for row in range(30)]
    limits = Capacity(1, 128, 64, 64, 1, 64)
    _, steps = run(prompts, replace(limits, tier_pages=(128, 0, 0)))
    _, expected = run(prompts, limits)
    assert [step.encode() for step in steps] == [step.encode() for step in expected]


def test_a_slot_is_refilled_as_soon_as_its_row_ends():
    prompts = [prompt(row, 3, max_new_tokens=1 + row % 2, ignore_eos=True) for row in range(6)]
    _, steps = run(prompts, Capacity(1, 8, 64, 64, 1, 32))
    busy = [len(step.slots) for step in steps if step.word is Word.RUN]
    assert busy == [2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (prompt(0, 128), "the prompt has 128 tokens, the model's context 128"),
        (prompt(0, 70, max_new_tokens=24), "need 128 tokens of cache, there is room for 64"),
        (prompt(0, 4, max_new_tokens="x"), "max_new_tokens is 'x'"),
        (Prompt(0, "0", "", None, {}, "", "line 1 is not JSON"), "line 1 is not JSON"),
    ],
)
def test_a_row_that_cannot_run_ends_with_its_reason_and_costs_no_other_row(row, said):
    others = [prompt(1, 3, max_new_tokens=2)]
    finished, _ = run([row, *others], Capacity(1, 7, 16, 16, 1, 128))
    assert len(finished) == 2 and said in finished[0].error and finished[1].error == ""


def test_a_row_without_finite_logits_ends_with_an_error():
    finished, _ = run(
        [prompt(0, 3)], Capacity(1, 100, 16, 16, 1, 64), lambda step: Result(np.full(step.num_samples, NO_TOKEN))
    )
    assert "not finite" in finished[0].error


def test_the_most_likely_ids_of_a_row_do_not_keep_the_results_of_whole_steps():
    kept = []

    def answer(step):
        ids = np.arange(step.num_samples * 20).reshape(-1, 20)
        kept.extend((weakref.ref(ids), weakref.ref(logprobs := ids / -8)))
        return Result(np.full(step.num_samples, 3), np.zeros(step.num_samples), ids, logprobs)

    prompts = [prompt(row, 3, max_new_tokens=4, logprobs=row) for row in (2, 20)]
    finished, _ = run(prompts, Capacity(1, 100, 16, 16, 1, 64), answer)
    assert [(ids.tolist(), logprobs.tolist()) for ids, logprobs in finished[0].top] == [([0, 1], [0.0, -0.125])] * 4
    assert len(finished[1].top) == 4 and kept
    assert not any(array() is not None for array in kept), "a row of 300 tokens would hold 300 steps"


def test_no_prompts_at_all_is_one_round_of_stop():
    finished, steps = run([], Capacity(3, 4, 16, 16, 1, 64))
    assert finished == [] and [step.word for step in steps] == [Word.STOP] * 3


@given(st.lists(st.integers(1, 8), max_size=20), st.integers(8, 30), st.integers(1, 5))
def test_a_cut_keeps_rows_whole_within_the_budget_and_makes_enough_microbatches(counts, budget, least):
    borders = cut(counts, budget, least)
    assert borders[0] == 0 and borders[-1] == len(counts) and borders == sorted(set(borders))
    assert all(sum(counts[a:b]) <= budget for a, b in itertools.pairwise(borders))
    assert len(borders) - 1 >= min(least, len(counts))


@given(st.lists(st.integers(1, 8), max_size=40), st.integers(1, 30), st.integers(1, 9), st.integers(0, 6))
def test_a_cut_by_searches_is_the_cut_by_rows(counts, budget, least, most_rows):
    assert cut_tokens(np.array(counts, np.int32), budget, least, most_rows) == cut(
        counts, budget, least, most_rows=most_rows
    )


def test_a_sequence_has_slots_for_its_fields():
    """Without them Python reads the fields of objects that have more than 30 through a dictionary each, and admission takes
    a third longer: it reads a dozen of each row in a step."""
    assert not hasattr(Sequence(prompt(0, 1), Sampling(), [1]), "__dict__")
