from dataclasses import replace

import numpy as np
import pytest

import test_admission
from noria.limits import RUN_PAGES
from noria.rows.gathering import Gathering
from noria.rows.slots import Capacity
from noria.step import Word

ROWS = 128  # at once
CAPACITY = Capacity(1, 5 * ROWS * RUN_PAGES, 512, 512, 1, test_admission.LIMIT, gathers=True)


def steps_of(capacity):
    """Steps of rows of 8 tokens that end at 20 to 250: about one of them in each step."""
    limits = np.random.default_rng(1).integers(20, 250, 6 * ROWS).tolist()
    prompts = [test_admission.prompt(row, 8, max_new_tokens=limit, ignore_eos=True) for row, limit in enumerate(limits)]
    finished, steps = test_admission.run(prompts, capacity)
    assert {one.prompt.row: len(one.token_ids) for one in finished} == dict(enumerate(limits))
    return [step for step in steps if step.word is Word.RUN]


def with_prompts(steps):
    return sum(bool((step.counts > 1).any()) for step in steps)


def test_rows_that_wait_for_one_another_take_few_steps_more_and_a_third_of_those_with_prompts():
    one_by_one, together = (steps_of(replace(CAPACITY, gathers=gathers)) for gathers in (False, True))
    assert len(together) < 1.02 * len(one_by_one)
    assert with_prompts(together) < 0.4 * with_prompts(one_by_one)


@pytest.mark.parametrize(
    ("worth", "decoding", "prompts", "waiting", "left", "opens"),
    [
        (True, 64, False, 100, 1, False),
        (True, 64, False, 100, 2, True),
        (True, 31, False, 100, 0, True),  # few rows wait for nobody
        (True, 64, False, 1, 1, True),  # no more rows are to come than have left
        (True, 64, True, 100, 0, True),  # prompts are computed in this step anyway
        (True, 0, False, 100, 0, True),
        (False, 64, False, 100, 0, True),
    ],
)
def test_rows_are_admitted_when_enough_have_left_or_nothing_is_saved(worth, decoding, prompts, waiting, left, opens):
    gathering = Gathering(2, worth)
    assert gathering.opens(1, 1000, False, 1000)  # there was always room
    gathering.full(1)
    for _ in range(left):
        gathering.left(1)
    assert gathering.opens(1, decoding, prompts, waiting) is opens
    assert gathering.opens(0, 1000, False, 1000)
