"""Runs whose rows begin alike give the tokens and log-probabilities of runs that share nothing: whatever the ring, the tiers and
the chunks are, where the cache is small, memory fails, and where the run is stopped and gone on with."""

import json
import signal

import h5py
import numpy as np
import pytest
import sharing_worker
import torch

import counts
import noria.models.mistral
import reference
import tiny_models
import world
from extra_kinds import extra_kinds
from late_streams import LateStreams
from noria import config, streams
from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.rows.sequence import Sequence
from noria.run import run
from shortages import Shortage
from test_run_stops import act_in_visit, signal_twice

CONFIG = tiny_models.LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_hidden_layers": 6,
    "eos_token_id": 3,
    "max_position_embeddings": 400,
    "sliding_window": 150,
}
RUN = """
dtype = "float64"
device = "cpu"
[sampling]
max_new_tokens = 5
seed = 11
logprobs = 1
[pipeline]
step_tokens = 400
microbatch_tokens = 250
"""


def prompts():
    """Rows of three beginnings, one of which goes on in two ways, shuffled among others; some are sampled, some several times."""
    random = np.random.default_rng(5)
    text = lambda length: random.integers(4, 101, length).tolist()  # noqa: E731
    first, second, third, more = text(140), text(70), text(129), text(64)
    for row in range(24):
        begins = [first, first + more, second, third, [], first + more][row % 6]
        sampled = {"temperature": 0.9, "n": [1, 3][row % 4 == 1]} if row % 2 else {}
        scores = {"prompt_logprobs": True} if row in (6, 7) else {}
        yield {"id": f"row {row}", "token_ids": begins + text(1 + 7 * row % 40), **sampled, **scores}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharing")
    state = {
        name: tensor * 0.25
        for name, tensor in tiny_models.state(CONFIG | {"model_type": "llama"}, torch.float64).items()
    }
    tiny_models.write_directory(folder / "hf", CONFIG, state)
    convert(folder / "hf", folder / "model.h5")
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts()))
    few = list(prompts())[: sharing_worker.NUM_ROWS]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    (folder / "run.toml").write_text(RUN)
    return folder


def alone(folder, name, prompts="many.jsonl", **keys):
    files = {"model": "model.h5", "prompts": prompts, "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0
    return rows_of(folder, name)


def rows_of(folder, name):
    with open_generations(folder / f"{name}.h5") as output:
        return list(output.rows())


@pytest.fixture(scope="module")
def expected(folder):
    """The rows of a run that shares nothing, whose greedy tokens and log-probabilities are the dense model's."""
    rows = alone(folder, "own", prefix_sharing=False)
    assert {row.cached_tokens for row in rows} == {0} and len({row.token_ids.tobytes() for row in rows}) > 20
    state = {
        name: (tensor * 0.25).numpy()
        for name, tensor in tiny_models.state(CONFIG | {"model_type": "llama"}, torch.float64).items()
    }
    for row in rows[::5]:
        ids = [*row.prompt_token_ids.tolist(), *row.token_ids.tolist()]
        logits = reference.logits(CONFIG, state, ids)[len(row.prompt_token_ids) - 1 : -1]
        whole = logits - logits.max(-1, keepdims=True)
        logprobs = whole - np.log(np.exp(whole).sum(-1, keepdims=True))
        np.testing.assert_allclose(row.logprobs, logprobs[range(len(row.token_ids)), row.token_ids], rtol=0, atol=1e-9)
    return rows


def compare(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.row, one.sample, one.token_ids.tolist()) == (other.row, other.sample, other.token_ids.tolist())
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-9)
        assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)
        if one.prompt_logprobs is not None:
            np.testing.assert_allclose(one.prompt_logprobs, other.prompt_logprobs, rtol=0, atol=1e-9)


def test_rows_that_begin_alike_say_how_many_tokens_they_shared(folder, expected, capsys):
    rows = alone(folder, "shared")
    compare(rows, expected)
    shared = [row.cached_tokens for row in rows]
    longest = [[128, 192, 64, 128, 0, 192][row.row % 6] for row in rows]
    assert all(one <= most for one, most in zip(shared, longest, strict=True))
    # once each: 128 + 64 of the first beginning, one of which scores its prompt; 64; 128, and another; rows without any
    assert sum(longest) - sum(shared) == 192 + 64 + 128 + sum(
        longest[at] for at, row in enumerate(rows) if row.row in (6, 7)
    )
    said = capsys.readouterr().err
    assert f"prompt tokens and {sum(shared):,} shared, " in said
    assert main(["inspect", str(folder / "shared.h5")]) == 0
    assert f" of prompts ({sum(shared):,} shared), " in capsys.readouterr().out
    with h5py.File(folder / "shared.h5") as file:
        assert file["cached_tokens"][:].tolist() == shared


@pytest.mark.slow
@pytest.mark.world
def test_every_ring_tier_and_chunk_gives_the_same(folder, expected):
    names = [name for num_ranks in range(1, 4) for name, _ in sharing_worker.cases(num_ranks)]
    assert len(names) == 108
    names = names if counts.full() else names[::17]
    world.call(3, sharing_worker.work, folder, names, timeout=600)
    cached = []
    for name in names:
        compare(rows := rows_of(folder, name), [row for row in expected if row.row < sharing_worker.NUM_ROWS])
        cached.append(sum(row.cached_tokens for row in rows))
    assert sum(count > 0 for count in cached) > len(names) / 2


@pytest.mark.slow
def test_rows_that_grow_and_return_to_the_line_in_a_small_cache_give_the_same(folder):
    """Four rows generate 100 tokens, for which there is no room at once."""
    rows = [row | {"max_new_tokens": 1, "n": 1} for row in list(prompts())[:12]]
    rows[8:] = [row | {"max_new_tokens": 100, "ignore_eos": True} for row in rows[8:]]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"prompts": "long.jsonl", "groups": 1}
    own = alone(folder, "own-long", prefix_sharing=False, **keys)
    returned = []
    with sharing_worker.soon(), pytest.MonkeyPatch.context() as patch:
        give_back = Sequence.give_back
        patch.setattr(Sequence, "give_back", lambda self: returned.append(self) or give_back(self))
        compare(alone(folder, "shared-long", cache={"gpu": "1200KiB"}, **keys), own)
    assert returned


@pytest.mark.slow
@pytest.mark.parametrize("visit", [2, 5])
def test_a_run_that_is_stopped_finds_its_beginnings_again(folder, expected, monkeypatch, visit):
    files = {"model": "model.h5", "prompts": "many.jsonl", "output": f"stopped-{visit}.h5"}
    command = ["run", str(folder / "run.toml"), "--cache", "gpu=50,cpu=50"]
    command += [word for key, file in files.items() for word in (f"--{key}", str(folder / file))]
    with monkeypatch.context() as patched:
        act_in_visit(patched, visit, signal_twice(signal.SIGUSR1))
        assert main(command) == 75
    assert main(command) == 0
    rows = rows_of(folder, f"stopped-{visit}")
    compare(rows, expected)
    assert sum(row.cached_tokens for row in rows) > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "microbatch", "tier"), counts.some((a, b, c) for a in range(6) for b in range(2) for c in ("gpu", "cpu"))
)
def test_memory_may_fail_while_beginnings_are_shared(folder, expected, monkeypatch, layer, microbatch, tier):
    monkeypatch.setattr(streams, "streams_of", LateStreams)
    shortage = Shortage(noria.models.mistral.layer, layer, microbatch)
    monkeypatch.setattr(noria.models.mistral, "layer", shortage)
    keys = {"microbatches": 2, "cache": {tier: 100}, "overwrite": True}
    compare(alone(folder, "short", **keys), expected)
    assert shortage.failures


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["gpu", "cpu"])
def test_states_at_the_end_of_a_beginning_are_shared(tmp_path, tier):
    random = np.random.default_rng(4)
    text = lambda length: random.integers(4, 61, length).tolist()  # noqa: E731
    first, second = text(66), text(70)
    rows = [
        {"token_ids": [first, second][row % 2] + text(row), "max_new_tokens": 4, "n": 1 + row % 3 // 2}
        for row in range(8)
    ]
    with extra_kinds():
        from noria.models import turns

        tiny_models.write_directory(tmp_path / "hf", turns.CONFIG, turns.random_state(turns.CONFIG))
        convert(tmp_path / "hf", tmp_path / "model.h5")
        (tmp_path / "many.jsonl").write_text("".join(json.dumps(row | {"temperature": 0.9}) + "\n" for row in rows))
        (tmp_path / "run.toml").write_text(RUN.replace("400", "100").replace("250", "50"))
        own = alone(tmp_path, "own", prefix_sharing=False)
        shared = alone(tmp_path, "shared", cache={tier: 100})
    compare(shared, own)
    assert sum(row.cached_tokens for row in shared) == 64 * (len(shared) - 2)
