"""A state is advanced once in a step, wherever memory fails: what is done of a layer is not done again."""

# ruff: noqa: F811 -- the fixtures of test_states are fixtures here
import itertools
import json

import numpy as np
import pytest
from states_worker import CACHE, SCHEDULES

import counts
from late_streams import LateStreams
from noria import streams
from noria.engine.stage import Stage
from shortages import Shortage
from test_states import alone, folder, turns  # noqa: F401

NUM_ROWS, NEW = 6, 5


@pytest.fixture(scope="module")
def expected(turns, folder):
    """Six rows of three tokens: the dense model's greedy tokens and their log-probabilities."""
    weights = {name: tensor.numpy() for name, tensor in turns.random_state(turns.CONFIG).items()}
    rows, found = [[5 + row, 6, 7] for row in range(NUM_ROWS)], []
    (folder / "three.jsonl").write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in rows))
    for ids in rows:
        logprobs = []
        for _ in range(NEW):
            logits = turns.dense(turns.CONFIG, weights, np.array(ids))[-1]
            ids = [*ids, int(logits.argmax())]
            logprobs.append(-np.log(np.exp(logits - logits.max()).sum()))
        found.append((ids[3:], logprobs))
    return found


def short(folder, turns, monkeypatch, cell, **keys):
    """The rows of a run in which memory fails in this (layer, microbatch) of every step, which begins uncut; token rows that
    each layer has computed."""
    monkeypatch.setattr(Stage, "_most_tokens", property(lambda _: None, lambda *_: None), raising=False)
    monkeypatch.setattr(streams, "streams_of", LateStreams)
    shortage = Shortage(turns.layer, *cell)
    monkeypatch.setattr(turns, "layer", shortage)
    keys |= {"prompts": str(folder / "three.jsonl"), "groups": 1, "microbatches": 3, "max_new_tokens": NEW}
    rows = alone(folder, "short", ignore_eos=True, overwrite=True, **keys)
    assert shortage.failures >= 4
    return [(tokens, logprobs) for _, tokens, logprobs in rows], shortage.computed


def same(found, expected):
    tokens = [row[0] for row in found] == [row[0] for row in expected]
    return tokens and np.allclose([row[1] for row in found], [row[1] for row in expected], rtol=0, atol=1e-9)


CELLS = itertools.product(range(7), range(3), SCHEDULES, ["gpu", "cpu"], CACHE[:3])


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "microbatch", "schedule", "activations", "cache"), counts.some(CELLS))
def test_memory_may_fail_in_any_layer_and_microbatch_of_every_step(
    folder, turns, expected, monkeypatch, layer, microbatch, schedule, activations, cache
):
    keys = {"schedule": schedule, "activations": activations, "cache": cache}
    found, computed = short(folder, turns, monkeypatch, (layer, microbatch), **keys)
    assert same(found, expected) and computed == dict.fromkeys(range(7), NUM_ROWS * (3 + NEW - 1))


def test_a_layer_that_is_begun_anew_advances_states_twice(folder, turns, expected, monkeypatch):
    go_on = Stage._pass

    def begin_anew(self, *arguments):
        cell = go_on(self, *arguments)
        self._activations._after = []
        return cell and (cell[0], 0)

    monkeypatch.setattr(Stage, "_pass", begin_anew)
    found, computed = short(folder, turns, monkeypatch, (2, 1))
    assert computed[2] > computed[1] and not same(found, expected)
