"""Models whose windowed layers keep their windows alone give transformers' tokens, and those of a run that keeps all: whatever the
ring, the tiers and the chunks are, with beginnings that are shared, where rows grow, return to the line, and are captured."""

import json

import h5py
import numpy as np
import pytest
import torch
import windows_worker

import decoders
import families
import mixtures
import wide
import world
from captured import captured
from late_streams import LateStreams
from noria import config, streams
from noria.checkpoint.convert import convert
from noria.engine import assembly
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.plan import windows
from noria.rows.sequence import Sequence
from noria.rows.slots import Slots
from noria.run import run

LONG = {"max_position_embeddings": 700}
CONFIGS = {
    "mistral": families.MISTRAL | LONG,  # a window in each layer
    "gemma3_text": decoders.CONFIGS["gemma3_text"] | LONG,
    "gemma2": decoders.CONFIGS["gemma2"] | LONG,  # soft caps
    "gpt_oss": mixtures.CONFIGS["gpt_oss"] | LONG,  # sinks
    "mimo_v2_flash": mixtures.CONFIGS["mimo_v2_flash"] | LONG,  # heads of two widths, and those of windows others
}
RUN = """
dtype = "float64"
device = "cpu"
[sampling]
max_new_tokens = 6
seed = 5
logprobs = 0
ignore_eos = true
[pipeline]
step_tokens = 500
microbatch_tokens = 300
"""
NEW = [6, 140, 3, 9]


def prompts():
    """Rows of 1 to 420 tokens, some of which begin alike, and one that goes round its ring; sampled ones have several samples."""
    random = np.random.default_rng(3)
    text = lambda length: random.integers(4, 90, length).tolist()  # noqa: E731
    first, more = text(256), text(128)
    own = [
        text(300),
        text(40),
        first + text(1),
        text(420),
        text(1),
        first + more + text(9),
        first + more + text(30),
        first + text(70),
    ]
    for row, ids in enumerate(own):
        sampled = {"temperature": 0.9, "n": 2} if row in (0, 5) else {}
        yield {"id": f"row {row}", "token_ids": ids, "max_new_tokens": NEW[row % 4], **sampled}


def alone(folder, name, model="mistral", **keys):
    files = {"model": f"{model}/model.h5", "prompts": "prompts.jsonl", "output": f"{model}/{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0
    with h5py.File(folder / model / f"{name}.h5") as file:
        plan = json.loads(file.attrs["plan"])
    assert plan["rings"] and sum(pools["states"] for pools in plan["pools"].values())
    return rows_of(folder, f"{model}/{name}")


def rows_of(folder, name):
    with open_generations(folder / f"{name}.h5") as output:
        return [(row.prompt_token_ids.tolist(), row.token_ids.tolist(), row.logprobs) for row in output.rows()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts()))
    (folder / "run.toml").write_text(RUN)
    torch.set_num_threads(1)
    return folder


class Expected(dict):
    """Of each family that is asked for the rows of one undisturbed run, which are transformers'."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, name):
        its = self.folder / name
        its.mkdir()
        families.save(CONFIGS[name], its / "hf")
        convert(its / "hf", its / "model.h5", "float64")
        self[name] = _checked(self.folder, name)
        return self[name]


@pytest.fixture(scope="module")
def expected(folder):
    return Expected(folder)


def _checked(folder, name):
    found = alone(folder, "undisturbed", name)
    model = wide.wide_model(CONFIGS[name], families.random_model(CONFIGS[name]))
    greedy = ["temperature" not in row for row in prompts() for _ in range(row.get("n", 1))]
    with torch.inference_mode():
        for of_greedy, (ids, tokens, logprobs) in zip(greedy, found, strict=True):
            logits = wide.logits(model, ids + tokens[:-1])[len(ids) - 1 :]
            wanted = torch.log_softmax(logits, -1)[range(len(tokens)), tokens]
            np.testing.assert_allclose(logprobs, wanted, rtol=0, atol=1e-8)
            assert not of_greedy or tokens == logits.argmax(-1).tolist()
    return found


def compare(found, expected):
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for (*_, logprobs), (*_, wanted) in zip(found, expected, strict=True):
        np.testing.assert_allclose(logprobs, wanted, rtol=0, atol=1e-8)


TIERS = {
    "cpu": {"cache": {"cpu": 100}},
    "disk, in small chunks": {"cache": {"disk": 100}, "step_tokens": 200, "microbatch_tokens": 90},
    "three, one after another": {
        "cache": {"gpu": 30, "cpu": 30, "disk": 40},
        "schedule": "sequential",
        "microbatches": 3,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_gives_the_tokens_of_transformers_in_small_chunks_too(folder, expected, name):
    wanted = expected[name]
    compare(alone(folder, "chunks", name, step_tokens=170, microbatch_tokens=110, groups=2), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("case", TIERS)
def test_rings_may_be_in_any_tier(folder, expected, monkeypatch, case):
    monkeypatch.setattr(streams, "streams_of", LateStreams)  # every copy as late as its events allow
    for name in ("gemma3_text", "mimo_v2_flash"):
        wanted = expected[name]
        compare(alone(folder, "tier", name, **TIERS[case], overwrite=True), wanted)


@pytest.mark.slow
@pytest.mark.world
def test_ranks_and_laps_give_the_same(folder, expected):
    models = ["gemma3_text", "gpt_oss"]
    assert all(expected[model] for model in models)
    world.call(3, windows_worker.work, folder, models, timeout=300)
    for model in models:
        for case in windows_worker.NAMES:
            compare(rows_of(folder, f"{model}/{case}"), expected[model])


@pytest.mark.slow
def test_decode_steps_that_are_captured_give_the_same(folder, expected):
    wanted = expected["gemma3_text"]
    with captured() as graphs:
        compare(alone(folder, "captured", "gemma3_text"), wanted)
    assert graphs.replays > 100


@pytest.mark.slow
def test_rows_that_return_to_the_line_begin_with_rings_of_their_own(folder, expected, monkeypatch):
    wanted = expected["gemma3_text"]
    returned, give_back = [], Sequence.give_back
    monkeypatch.setattr(Sequence, "give_back", lambda one: (returned.append(one), give_back(one)))
    monkeypatch.setattr("noria.rows.reservations.Reservations.first", lambda self, one: one.num_tokens + 1)
    compare(alone(folder, "returned", "gemma3_text", cache={"gpu": "50 pages"}), wanted)
    assert returned


@pytest.mark.slow
def test_more_rows_are_in_flight_in_the_same_memory(folder, expected, monkeypatch):
    """Of 24 rows of 310 tokens, in room for 2,000 tokens in all layers: 6 that keep all; with windows 128 of theirs in two of three."""
    assert expected["gemma3_text"]
    random, in_flight, take = np.random.default_rng(4), [], Slots.take
    rows = [{"token_ids": random.integers(4, 90, 300).tolist(), "max_new_tokens": 10} for _ in range(24)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        Slots, "take", lambda slots, *given: (take(slots, *given), in_flight.append(slots.num_active))[0]
    )
    room = {"cache": {"gpu": "2250KiB"}, "prompts": str(folder / "long.jsonl")}
    alone(folder, "many", "gemma3_text", **room)
    with_windows = max(in_flight)
    in_flight.clear()
    monkeypatch.setattr(windows, "keeping", lambda shape, *_: (shape.without_rings(), ""))
    flags = {"model": folder / "gemma3_text" / "model.h5", "output": folder / "few.h5", "scratch": folder}
    assert run(config.load(folder / "run.toml", {key: str(file) for key, file in flags.items()} | room), Solo()) == 0
    assert max(in_flight) == 2000 // 320 == 6 and with_windows == 9


@pytest.mark.slow
def test_what_the_plan_counts_is_allocated(folder, expected, monkeypatch):
    """The cache's bytes, and no layer with a window has pages."""
    assert expected["gemma3_text"]
    caches, opened = [], assembly.KvCache
    monkeypatch.setattr(assembly, "KvCache", lambda *given: caches.append(opened(*given)) or caches[-1])
    alone(folder, "counted", "gemma3_text")
    with h5py.File(folder / "gemma3_text" / "counted.h5") as file:
        plan = json.loads(file.attrs["plan"])
    assert caches[0].nbytes == plan["memory"][0]["gpu"]["cache"]
    pools = plan["pools"]["gpu"]
    rows = [caches[0].layer(layer)["key"].shape[0] for layer in range(3)]
    assert rows == [128 * pools["states"], 16 * pools["pages"], 128 * pools["states"]]
