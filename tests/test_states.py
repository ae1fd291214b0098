"""A family whose layers leave different arrays, states among them, gives the dense model's tokens and log-probabilities.

Whatever the ranks, laps, tiers, chunks and microbatches are, for several samples of a prompt, and stopped and gone on with.
"""

import json

import numpy as np
import pytest
import states_worker

import counts
import more
import tiny_models
import world
from late_streams import LateStreams
from noria import config, streams
from noria.checkpoint.convert import convert
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.run import run

RUN = """
dtype = "float64"
device = "cpu"
[sampling]
max_new_tokens = 9
seed = 5
logprobs = 0
[pipeline]
step_tokens = 24
microbatch_tokens = 16
"""


MOST = 5  # tokens of a row in each of many runs


def prompts():
    """Rows of 1 to 50 tokens; some have several samples, of which some share pages."""
    random = np.random.default_rng(2)
    lengths = [40, 35, 17, 48, 1, 3, 33, 16, 9, 50]
    for row, length in enumerate(lengths):
        more_samples = {"n": [3, 2][row % 4 // 2], "temperature": 0.9} if row % 2 else {}
        ids = random.integers(4, 61, length).tolist()
        yield {"id": f"row {row}", "token_ids": ids, "max_new_tokens": [9, 5, 7][row % 3], **more_samples}


@pytest.fixture(scope="module")
def turns():
    with more.families():
        from noria.models import turns

        yield turns


@pytest.fixture(scope="module")
def folder(turns, tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    tiny_models.write_directory(folder / "hf", turns.CONFIG, turns.random_state(turns.CONFIG))
    convert(folder / "hf", folder / "model.h5")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts()))
    (folder / "run.toml").write_text(RUN)
    return folder


def alone(folder, name, **keys):
    files = {"model": "model.h5", "prompts": "prompts.jsonl", "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0
    return rows_of(folder, name)


def rows_of(folder, name):
    with open_generations(folder / f"{name}.h5") as output:
        return [(row.prompt_token_ids.tolist(), row.token_ids.tolist(), row.logprobs) for row in output.rows()]


@pytest.fixture(scope="module")
def expected(turns, folder):
    """The rows of one undisturbed run, whose log-probabilities and greedy tokens are the dense model's."""
    weights = {name: tensor.numpy() for name, tensor in turns.random_state(turns.CONFIG).items()}
    rows = alone(folder, "undisturbed")
    given = [row for row in prompts() for _ in range(row.get("n", 1))]
    assert len(rows) == len(given) == 5 + 2 * 3 + 3 * 2 + 1
    assert len({tuple(tokens) for _, tokens, _ in rows}) == len(rows), "every sample is another"
    for row, (ids, tokens, logprobs) in zip(given, rows, strict=True):
        logits = turns.dense(turns.CONFIG, weights, ids + tokens[:-1])[len(ids) - 1 :]
        whole = logits - logits.max(-1, keepdims=True)
        wanted = (whole - np.log(np.exp(whole).sum(-1, keepdims=True)))[range(len(tokens)), tokens]
        np.testing.assert_allclose(logprobs, wanted, rtol=0, atol=1e-9)
        assert "temperature" in row or tokens == logits.argmax(-1).tolist()
    return rows


def compare(found, expected):
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for (*_, logprobs), (*_, wanted) in zip(found, expected, strict=True):
        np.testing.assert_allclose(logprobs, wanted, rtol=0, atol=1e-9)


def test_tokens_and_logprobs_are_the_dense_models(expected):
    assert {len(tokens) for _, tokens, _ in expected} >= {5, 7, 9}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", states_worker.SCHEDULES)
@pytest.mark.parametrize("cache", range(1, len(states_worker.CACHE)))
def test_states_and_pages_may_be_in_any_tier(folder, expected, monkeypatch, cache, schedule):
    monkeypatch.setattr(streams, "streams_of", LateStreams)
    keys = {"cache": states_worker.CACHE[cache], "schedule": schedule, "microbatches": 3, "groups": 2}
    compare(alone(folder, f"cache-{cache}-{schedule}", **keys), expected)


@pytest.mark.parametrize(("step", "microbatch"), [(3, 2), (100, 7), (17, 16)])
def test_a_prompt_may_be_cut_anywhere(folder, expected, step, microbatch):
    compare(alone(folder, f"chunks-{step}", step_tokens=step, microbatch_tokens=microbatch), expected)


@pytest.mark.slow
@pytest.mark.world
def test_every_ring_tier_and_chunk_gives_the_same(folder, expected):
    names = [name for num_ranks in range(1, 4) for name, _ in states_worker.cases(num_ranks)]
    assert len(names) == 120
    few = [row | {"max_new_tokens": MOST} for row in list(prompts())[:4]]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    names = names if counts.full() else names[::10]
    world.call(3, states_worker.work, folder, names, timeout=600)
    for name in names:
        compare(rows_of(folder, name), [(ids, tokens[:MOST], found[:MOST]) for ids, tokens, found in expected[:7]])
