"""Steps of nearly equal time: how long ranks idle with a real admission, old sizes beside new ones, and that rows stay the same."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import small_run
import test_admission
import tiny_models
from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.desk import capacity
from noria.desk.capacity import costs_of
from noria.rows.level import LEAST_TOKENS, Level, StepCosts
from noria.rows.slots import Capacity, Slots
from pipeline import Cost, simulate
from test_states import turns  # noqa: F401

# A Llama-8B shape on two H200s, as measured: 2.5 ms of weights and launches, 35,000 prompt tokens/s on one GPU, 1,024 rows of
# 576 tokens in 25 ms of attention; the last stage has the head and samples.
STAGE, LAST = Cost(2.5e-3, 14.3e-6, 12e-6), Cost(3e-3, 14.3e-6, 18e-6)
COSTS = StepCosts(2, STAGE.step / STAGE.token, 1 + STAGE.row / STAGE.token)
HOP, HOST = 0.2e-3, 0.5e-3
ALIKE = [(512, 128)] * 1024


def mixed(rows=1024, seed=0):
    """Prompts of 32 to 2,048 tokens, log-uniform, outputs of 16 to 512."""
    rng = np.random.default_rng(seed)
    return [(int(np.exp(rng.uniform(*np.log((32, 2048))))), int(rng.integers(16, 513))) for _ in range(rows)]


def courses(lengths, pages, costs, groups=3, step_tokens=2048):
    """The run without and with steps that are level."""
    capacity = Capacity(groups, pages, step_tokens, step_tokens, 1, 8192, sharing=False)
    its = replace(COSTS, ranks=len(costs))
    return [simulate(lengths, replace(capacity, costs=one), costs, HOP, HOST) for one in (None, its)]


@pytest.mark.slow
def test_two_ranks_idle_little_where_rows_come_and_go():
    """Half of the rows in flight, the others follow: the time in which rows end and prompts begin."""
    old, new = courses(mixed(512), 13_280, [STAGE, STAGE])
    assert old.idle(0.1, 0.8) > 0.08 and new.idle(0.1, 0.8) < 0.03
    assert new.seconds < 0.96 * old.seconds
    old, new = courses(mixed(512), 13_280, [STAGE, LAST])
    assert old.idle(0.1, 0.8) > 0.13 and new.idle(0.1, 0.8) < 0.08  # most of it for the head of the last rank


@pytest.mark.slow
def test_two_ranks_idle_little_where_all_rows_are_alike():
    """1,024 x (512 + 128), all at once: groups go the same way, and nothing changes."""
    old, new = courses(ALIKE, 45_000, [STAGE, STAGE])
    assert new.idle(0.05, 0.95) < 0.01 and new.seconds == pytest.approx(old.seconds, rel=0.01)


@pytest.mark.slow
def test_four_ranks_are_level_too():
    old, new = courses(mixed(384), 9_960, [STAGE] * 4, groups=5)
    assert new.idle(0.1, 0.8) < old.idle(0.1, 0.8) - 0.08 and new.seconds < 0.9 * old.seconds


def test_the_simulation_is_that_of_a_pipeline_by_hand():
    """Two stages of 1 s, a step of one token in each round: one group idles a half, two groups idle while it fills and drains."""
    row = [(1, 4)]
    for groups, idle in ((1, 1 / 2), (2, 1 / 9)):
        course = simulate(row * groups, Capacity(groups, 64, 8, 8, 1, 64), [Cost(1.0, 0.0, 0.0)] * 2)
        assert course.idle() == pytest.approx(idle)
    assert [tokens for _, _, tokens, *_ in course.steps] == [1] * 8 and course.seconds == 9


def test_a_step_is_as_long_as_the_others_let_it_be():
    level = Level(3, StepCosts(2, 100, 2.0))
    assert level.most(0, 0, 4096) == 4096  # nobody else has anything to compute
    level.took(0, 4096, 0)
    assert level.most(1, 0, 4096) == 4096
    level.took(1, 300, 300)  # 100 + 2 x 300 = 700
    level.took(2, 300, 300)
    assert level.most(0, 300, 4096) == 300 + int(0.7 * 1400 - 700)
    level.took(2, 0, 0)  # a group without rows
    assert level.most(0, 300, 4096) == 300 + int(1.25 * 700 - 700)
    assert level.most(0, 600, 4096) == 600 + LEAST_TOKENS and level.most(0, 600, 650) == 650


def test_steps_of_all_groups_get_longer_together():
    """Prompts without end after a time of decoding alone: whatever the ranks and groups, steps become full."""
    for ranks, groups in ((2, 2), (2, 3), (4, 4), (4, 5), (8, 9)):
        level = Level(groups, StepCosts(ranks, 100, 1.0))
        for group in range(groups):
            level.took(group, 200, 200)
        for _, group in itertools.product(range(40), range(groups)):
            size = level.most(group, 200, 4096)
            level.took(group, size, 200)
        assert size == 4096


def test_costs_come_from_the_plan_of_resident_ranks():
    terms = {"decode": {"launches": 14e-3, "device memory": 6e-3, "host": 3e-3}}
    predicted = {
        "prefill": {"tokens_per_second": 60_000},
        "decode": {"round_seconds": 30e-3},
        "terms": terms,
        "rows": 800,
    }
    plan = SimpleNamespace(num_ranks=2, groups=3, weight_slots=0, predicted=predicted)
    step, row, turn = (pytest.approx(60_000 * one) for one in (14e-3 / 3, 16e-3 / 800, 1e-3))
    assert costs_of(plan) == StepCosts(2, step, row, turn)
    for change in ({"num_ranks": 1}, {"weight_slots": 3}, {"predicted": {}}):
        assert costs_of(SimpleNamespace(**(vars(plan) | change))) is None


def test_a_group_gives_its_rows_to_the_emptiest_others_where_rounds_get_shorter():
    """Three steps of 100 and a row each become two, which two ranks compute side by side."""
    level = Level(3, StepCosts(2, 100, 1.0))
    level.took(0, 40, 40)
    assert level.spread(2, [10, 14, 8]) == [6, 2, 0]
    assert level.spread(0, [1, 14, 14]) == [0, 1, 0]
    assert level.spread(1, [10, 0, 8]) == level.spread(0, [20, 0, 0]) == [], "nothing to give, or nobody to take"
    assert level.spread(0, [30, 30, 30]) == [], "more rows than a step has had"
    assert level.spread(0, [10, 14, 0]) == [], "one step at a time leaves one of two ranks without work"
    level = Level(3, StepCosts(2, 100, 1.0, turn=200))
    level.took(0, 40, 40)
    assert level.spread(2, [10, 14, 8]) == [], "a turn between steps is hidden behind the third group's"


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "share"), [(3, 0.97), (4, 0.9)])
def test_the_tail_of_a_run_is_shorter_where_groups_give_their_rows_away(groups, share):
    capacity = Capacity(groups, 20_000, 2048, 2048, 1, 8192, sharing=False)
    its_turns = [1e9, (HOST + 2 * HOP) / STAGE.token]
    costs = [replace(COSTS, turn=turn) for turn in its_turns]
    old, new = (simulate(mixed(128), replace(capacity, costs=one), [STAGE, STAGE], HOP, HOST).seconds for one in costs)
    assert new < share * old


@pytest.mark.slow
@pytest.mark.parametrize("states", [False, True])
def test_rows_that_go_to_another_group_keep_all_that_they_have(tmp_path, monkeypatch, turns, states):  # noqa: F811
    """Penalties, which count their tokens, least lengths and random numbers, as in one group."""
    if states:
        tiny_models.write_directory(tmp_path / "hf", turns.CONFIG, turns.random_state(turns.CONFIG))
        convert(tmp_path / "hf", tmp_path / "model.h5")
    else:
        small_run.write_model(tmp_path, "model.h5")
    keys = [
        {"repetition_penalty": 1.4, "presence_penalty": 0.3},
        {"logit_bias": {"9": 1.5}, "temperature": 0.0},
        {"min_new_tokens": 5, "stop_token_ids": [9, 30, 41]},
        {"logprobs": 2, "frequency_penalty": -0.5},
    ]
    rows = [
        {"token_ids": [5 + row, 6, 7] * (1 + row % 3), "max_new_tokens": 6 + 5 * row % 31, **keys[row % 4]}
        for row in range(14)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moves, plain = [], Slots.move
    monkeypatch.setattr(Slots, "move", lambda self, *given: moves.append(given) or plain(self, *given))
    flags = ["--dtype", "float64", "--no-ignore-eos"]
    assert main(small_run.command(tmp_path, "one.h5", *flags, "--groups", "1")) == 0
    assert not moves
    monkeypatch.setattr(capacity, "costs_of", lambda plan: StepCosts(2, 1000.0, 1.0))
    assert main(small_run.command(tmp_path, "moved.h5", *flags, "--groups", "4")) == 0
    assert len(moves) > 2
    assert small_run.rows_of(tmp_path / "moved.h5") == small_run.rows_of(tmp_path / "one.h5")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_row_has_the_same_tokens_whatever_steps_cost(data):
    """As a property of the admission, with an engine that answers from what steps carry."""
    turn = data.draw(st.sampled_from([0.0, 5.0, 1e9]))
    its = StepCosts(data.draw(st.integers(2, 5)), data.draw(st.floats(0, 50)), data.draw(st.floats(1, 9)), turn)
    limits = Capacity(
        data.draw(st.integers(2, 4)), 96, data.draw(st.integers(8, 300)), 64, 1, test_admission.LIMIT, costs=its
    )
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 20)), min_size=1, max_size=12))
    prompts = [test_admission.prompt(row, length, max_new_tokens=new) for row, (length, new) in enumerate(lengths)]
    finished, _ = test_admission.run(prompts, limits)
    assert {one.prompt.row: one.token_ids for one in finished} == {
        one.row: test_admission.expected(one, test_admission.LIMIT) for one in prompts
    }
