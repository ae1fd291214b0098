"""The rounds that a plan counts on, against those that rank 0 composes for the same rows."""

import numpy as np
import pytest

from noria.plan.rounds import Composing, Workload, rounds_of
from noria.plan.walk import Group, walked
from noria.rows.admission import Admission
from noria.rows.making import Source
from noria.rows.prompts import Prompt
from noria.rows.slots import Capacity
from noria.sampling import Sampling
from noria.step import Result, Word


def composed(load, most, step, chunk=None, late=False, gathers=False, groups=1):
    """Rounds with chunks of prompts, rounds without, and tokens of rows that decode in both."""
    keys = {"max_new_tokens": load.new_tokens, "ignore_eos": True}
    prompts = [Prompt(row, str(row), "", [1] * load.prompt_tokens, keys, "", None) for row in range(load.num_rows)]
    pages = most * load.pages
    capacity = Capacity(groups, pages, step, chunk or step, 1, 10**6, sharing=False, gathers=gathers)
    source = Source(prompts, load.num_rows, lambda prompt: prompt.token_ids, lambda sequence: None)
    admission, found = Admission(source, Sampling(), frozenset(), capacity), np.zeros((2, 2))
    under_way = [None] * groups
    for round in range(100_000):
        steps = [next_step(admission, round, group, under_way, late) for group in range(groups)]
        if all(step.word is Word.STOP for step in steps):
            return found
        tokens, rows = sum(step.num_tokens for step in steps), sum(int((step.counts == 1).sum()) for step in steps)
        found[int(tokens == rows)] += (1, rows) if tokens else 0
    raise AssertionError("the run does not end")


def next_step(admission, round, group, under_way, late):
    """late: composed before the result of the one before is there, as one GPU does (engine/ahead.py)."""
    step = admission.compose(round, group) if late else None
    before, under_way[group] = under_way[group], None
    if before is not None:
        result = Result(np.zeros(before.num_samples, np.int64))
        admission.apply(before, result)
        step = admission.mask(step.told(result.token_ids)) if late and step.num_tokens else step
    step = step or admission.compose(round, group)
    under_way[group] = step if step.num_tokens else None
    return step


CASES = {
    "few at once": (Workload(96, 512, 12), 5, 256),
    "long answers, small steps": (Workload(200, 300, 40), 7, 128),
    "two steps a prompt": (Workload(64, 1000, 16), 5, 512),
    "all at once": (Workload(96, 512, 12), 96, 2048),
    "all at once in small steps": (Workload(96, 512, 12), 96, 256),
    "many waves": (Workload(1200, 50, 20), 20, 300),
    "one at a time": (Workload(300, 100, 6), 1, 70),
    "one new token": (Workload(300, 100, 1), 12, 512),
    "many at once, which gather": (Workload(900, 60, 50), 150, 1024),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_as_many_rounds_are_planned_as_composed(case, late):
    load, most, step = CASES[case]
    gathers = "gather" in case
    (prefills, beside), (decodes, alone) = composed(load, most, step, late=late, gathers=gathers)
    found = rounds_of(load, most, step, step, Composing(late=late, gathers=gathers))
    assert found.prefill_rounds == pytest.approx(prefills, rel=0.05)
    assert found.decode_rounds == pytest.approx(decodes, rel=0.05, abs=1)
    assert found.prefill.rows * prefills == pytest.approx(beside, rel=0.05, abs=most)
    assert found.decode.rows * decodes == pytest.approx(alone, rel=0.05, abs=most)


@pytest.mark.parametrize(("groups", "most"), [(2, 6), (3, 30), (4, 4)])
def test_groups_take_equal_parts_of_the_rows(groups, most):
    load = Workload(120, 200, 30)
    (prefills, _), (decodes, alone) = composed(load, most, 150, groups=groups)
    found = rounds_of(load, most, 150, 150, Composing(groups))
    assert found.prefill_rounds == pytest.approx(prefills, rel=0.05)
    assert found.decode_rounds == pytest.approx(decodes, rel=0.05)
    assert found.decode.rows * decodes == pytest.approx(alone, rel=0.05)


@pytest.mark.parametrize("chunk", [64, 100])
def test_rows_in_chunks_smaller_than_steps_compute_side_by_side(chunk):
    load = Workload(150, 250, 30)
    (prefills, _), (decodes, _) = composed(load, 9, 256, chunk)
    found = rounds_of(load, 9, 256, chunk)
    assert (found.prefill_rounds, found.decode_rounds) == pytest.approx((prefills, decodes), rel=0.05)


def test_of_many_waves_a_few_are_walked():
    few, many = (walked(Group(rows, 5, 512, 11, 256, 256, late=True)) for rows in (500, 5_000_000))
    assert many.prefill_rounds == pytest.approx(10_000 * few.prefill_rounds, rel=0.01)
    assert many.beside + many.alone == 11 * 5_000_000


def test_of_a_long_wave_a_part_is_walked():
    """A step has 412 tokens for chunks beside 100 rows that decode."""
    found = walked(Group(10**6, 10**6, 412, 100, 512, 512))
    assert found.prefill_rounds == pytest.approx(10**6, rel=0.01)


def test_a_round_with_a_rest_of_prompts_counts_as_a_part_of_a_full_one():
    """Of 128 prompts 32 fill a step; rows that decode beside them push 32 + 64 + 96 tokens into a fifth one."""
    found = rounds_of(Workload(128, 512, 32), 128, 16384, 16384)
    assert (found.prefill_rounds, found.small) == (5, pytest.approx(1 - 192 / 16384, rel=0.001))
    assert found.full.chunk_tokens == pytest.approx(16384, rel=0.005)
    assert found.prefill.chunk_tokens == pytest.approx(128 * 512 / 5)
    assert found.of_prefill(2.0, 1.0) == pytest.approx((4 * 2 + 1) / 5, rel=0.002)
    # of 7 prompts 6 fill a step, with a seventh of the next one; what is left of that is less than half a step
    found = rounds_of(Workload(7, 256, 6), 7, 1573, 1573)
    assert (found.prefill_rounds, found.small) == (2, pytest.approx(1 - (7 * 256 - 1573) / 1573))
    assert found.full.chunk_tokens == pytest.approx(1573)
