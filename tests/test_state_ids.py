"""Which state each row of a step reads and writes: what it reads is what its own tokens so far left, whoever wrote it."""

import itertools
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test_samples
from noria.borders import cut
from noria.limits import RUN_PAGES
from noria.rows.slots import Capacity
from noria.step import NO_STATE, PAGE_TOKENS
from test_samples import LIMIT, expected, prompt


class Engine(test_samples.Engine):
    """Answers steps, with states that hold the tokens that they have counted: microbatch after microbatch, like a layer."""

    def __init__(self, limits):
        super().__init__(limits)
        self.states, self.reads = {}, []  # reads: (position, id) of every row

    def answer(self, step):
        result = super().answer(step)
        assert len(step.reads) == len(step.writes) == len(step.kept) == len(step.slots)
        assert step.kept.tolist() == step.counts.tolist()
        for first, last in itertools.pairwise(step.borders.tolist()):
            assert 0 < last - first <= self.limits.state_rows
            read = [self.read(step, row) for row in range(first, last)]
            writes = step.writes[first:last].tolist()
            assert len(set(writes)) == len(writes)
            self.states |= dict(zip(writes, read, strict=True))
        return result

    def read(self, step, row):
        """The state after the row, once it is sure that it read the right one, of its own tier."""
        slot, count, position = step.slots[row], step.counts[row], step.positions[row]
        tokens, id = self.cache[self.places[slot][: position + count]].tolist(), int(step.reads[row])
        before = [] if id == NO_STATE else self.states[id]
        assert before == tokens[:position], (step.round, row, id)
        self.reads.append((int(position), id))
        page, firsts = self.places[slot][0] // PAGE_TOKENS, list(accumulate(self.limits.tiers))
        states = list(accumulate(self.limits.tier_states, initial=0))
        tier = next(tier for tier, end in enumerate(firsts) if page < end)
        assert states[tier] <= step.writes[row] < states[tier + 1]
        return tokens


def run(prompts, limits):
    engine = Engine(limits)
    finished, admission, _ = test_samples.run(prompts, limits, answer=engine.answer)
    for pool in admission._slots.states:
        assert pool.num_free == pool.num_pages, "a state that nobody gave back"
    return finished, admission, engine


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_row_reads_what_its_own_tokens_left_whatever_is_short(data):
    groups, step_tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 160))
    tiers = tuple(data.draw(st.lists(st.integers(20, 80), min_size=1, max_size=3)))
    limits = Capacity(groups, sum(tiers), step_tokens, data.draw(st.integers(1, step_tokens)), 1, LIMIT)
    states = tuple(data.draw(st.integers(2, 6)) for _ in tiers)
    limits = replace(
        limits, tier_pages=tiers, slot_pages=20, tier_states=states, state_rows=data.draw(st.integers(1, 4))
    )
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40), st.integers(1, 5)), max_size=10))
    prompts = [prompt(row, length, max_new_tokens=new, n=n) for row, (length, new, n) in enumerate(shapes)]
    finished, _, _ = run(prompts, limits)
    assert len(finished) == sum(n for *_, n in shapes)
    for sequence in finished:
        assert sequence.error == "" and sequence.token_ids == expected(sequence.prompt, sequence.sample, LIMIT)


@pytest.mark.parametrize(("length", "reads"), [(160, 3), (129, 3), (65, 3), (64, 0), (20, 0)])
@pytest.mark.parametrize("step_tokens", [200, 17])
def test_a_shared_beginning_is_one_state_that_its_leader_leaves_and_all_samples_begin_from(length, reads, step_tokens):
    limits = Capacity(1, 100, step_tokens, step_tokens, 1, LIMIT, tier_states=(9,), state_rows=9)
    finished, _, engine = run([prompt(0, length, max_new_tokens=6, n=3, ignore_eos=True)], limits)
    border = (length - 1) // (RUN_PAGES * PAGE_TOKENS) * RUN_PAGES * PAGE_TOKENS
    shared = [id for position, id in engine.reads if position == border and id != NO_STATE]
    assert len(shared) == reads and len(set(shared)) <= 1
    again = length - border
    assert engine.num_prompt_tokens == length + 2 * again and len(finished) == 3


def test_rows_beyond_the_states_wait_and_two_states_suffice_for_all():
    limits = Capacity(2, 100, 64, 64, 1, LIMIT, tier_states=(2,), state_rows=2)
    finished, _, engine = run([prompt(row, 80, max_new_tokens=4, n=3) for row in range(4)], limits)
    assert len(finished) == 12 and set(engine.states) == {0, 1}


def test_a_family_without_states_is_told_of_none():
    steps = []
    limits = Capacity(1, 20, 64, 64, 1, LIMIT)
    engine = test_samples.Engine(limits)
    test_samples.run(
        [prompt(0, 160, max_new_tokens=4, n=2)], limits, answer=lambda s: steps.append(s) or engine.answer(s)
    )
    assert all(not len(step.reads) and not len(step.writes) and not len(step.kept) for step in steps)


def test_a_microbatch_has_at_most_so_many_rows():
    assert cut([1] * 7, 100, 1, most_rows=3) == [0, 3, 6, 7]
    assert cut([1] * 7, 2, 1, most_rows=3) == [0, 2, 4, 6, 7]
    assert cut([1] * 7, 100, 1) == [0, 7]
