"""A family whose layers leave different arrays, states among them, gives the dense model's tokens and log-probabilities.

Whatever the ranks, laps, tiers, chunks and microbatches are, for several samples of a prompt, and stopped and gone on with.
"""

import json
import signal

import h5py
import numpy as np
import pytest
import states_worker

import counts
import tiny_models
import world
from extra_kinds import extra_kinds
from late_streams import LateStreams
from noria import config, streams
from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.engine import assembly
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.run import run
from test_run_stops import act_in_visit, signal_twice

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
    with extra_kinds():
        from noria.models import turns

        yield turns


@pytest.fixture(scope="module")
def folder(turns, tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    tiny_models.write_directory(folder / "hf", turns.CONFIG, turns.random_state(turns.CONFIG))
    convert(folder / "hf", folder / "model.h5")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts()))
    rows = [row | {"max_new_tokens": MOST} for row in list(prompts())[:4]]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(RUN)
    return folder


def alone(folder, name, prompts="prompts.jsonl", **keys):
    files = {"model": "model.h5", "prompts": prompts, "output": f"{name}.h5", "scratch": "."}
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


def few(rows):
    """The rows of few.jsonl."""
    return [(ids, tokens[:MOST], logprobs[:MOST]) for ids, tokens, logprobs in rows[:7]]


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
    names = names if counts.full() else names[::10]
    world.call(3, states_worker.work, folder, names, timeout=600)
    for name in names:
        compare(rows_of(folder, name), few(expected))


def run_out(turns, monkeypatch, at):
    """Memory fails in the call of this number of those with several rows, when all is computed; returns who counts them."""
    layer, calls = turns.layer, []

    def limited(*arguments):
        after = layer(*arguments)
        if len(arguments[-1].starts) > 2:
            calls.append(arguments[1])
            if len(calls) == at:
                raise MemoryError("no room")
        return after

    monkeypatch.setattr(turns, "layer", limited)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["gpu", "cpu"])
def test_memory_may_fail_in_any_microbatch_of_any_layer_of_any_step(turns, folder, expected, monkeypatch, capsys, tier):
    keys = {
        "prompts": "few.jsonl",
        "microbatches": 2,
        "cache": {tier: 100},
        "activations": tier,
        "laps": 1 + (tier == "cpu"),
    }
    with monkeypatch.context() as patched:
        calls = run_out(turns, patched, 0)
        compare(alone(folder, f"all-{tier}", **keys), few(expected))
    assert len(calls) > 60 and set(calls) == set(range(7))
    # a layer begun anew fails first where an earlier microbatch has left states: in most of these
    of_states = [at for at, layer in enumerate(calls, 1) if layer % 3 == 2]
    for at in range(1, len(calls) + 1) if counts.full() else of_states[3::5]:
        capsys.readouterr()
        with monkeypatch.context() as patched:
            run_out(turns, patched, at)
            compare(alone(folder, f"short-{tier}-{at}", **keys), few(expected))
        assert capsys.readouterr().err.count("out of memory") == 1


@pytest.mark.slow
@pytest.mark.parametrize("visit", [4, 9])
def test_rows_that_are_stopped_begin_from_their_tokens_and_end_with_the_same(folder, expected, monkeypatch, visit):
    """Once while prompts are computed, of which others share the beginning, and once later."""
    files = {"model": "model.h5", "prompts": "prompts.jsonl", "output": f"stopped-{visit}.h5"}
    command = ["run", str(folder / "run.toml"), "--cache", "gpu=50,cpu=50"]
    command += [word for key, file in files.items() for word in (f"--{key}", str(folder / file))]
    with monkeypatch.context() as patched:
        act_in_visit(patched, visit, signal_twice(signal.SIGUSR1))
        assert main(command) == 75
    assert main(command) == 0
    compare(rows_of(folder, f"stopped-{visit}"), expected)


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_bytes_of_the_cache_are_those_that_were_planned(folder, expected, monkeypatch, tier):
    caches, build = [], assembly.KvCache

    def keep(*arguments):
        caches.append((build(*arguments), arguments[5]))
        return caches[-1][0]

    monkeypatch.setattr(assembly, "KvCache", keep)
    compare(alone(folder, f"bytes-{tier}", cache={"gpu": 40, tier: 60} if tier != "gpu" else {"gpu": 100}), expected)
    with h5py.File(folder / f"bytes-{tier}.h5") as file:
        plan = json.loads(file.attrs["plan"])
    (memory,), ((cache, staging),) = plan["memory"], caches
    assert cache.nbytes == memory["gpu"]["cache"] + memory["gpu"].get("cache slots", 0)
    assert [held.tier.nbytes for held in staging.tiers] == [memory[tier]["cache"] for _ in range(tier != "gpu")]
    assert plan["pools"]["gpu"]["states"] > 1 and (tier == "gpu" or plan["pools"][tier]["states"] > 1)
    assert plan["state_rows"] > 0
