"""A family with a bundle and tied layers gives the dense model's tokens and log-probabilities; its bytes are counted.

Whatever the ranks, laps, partitions, microbatches and places of hidden states are, and wherever memory fails.
"""

import itertools
import json

import carried_worker
import h5py
import numpy as np
import pytest

import counts
import noria.engine.stage
import tiny_models
import world
from extra_kinds import extra_kinds
from late_streams import LateStreams
from noria import config, streams
from noria.__main__ import main
from noria.bundle import borders_of
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.plan import costs
from noria.plan.plan import Plan
from noria.run import run
from shortages import Shortage

RUN = """
dtype = "float64"
device = "cpu"
[sampling]
max_new_tokens = 7
logprobs = 0
ignore_eos = true
[pipeline]
step_tokens = 24
microbatch_tokens = 16
"""
NUM_ROWS = 7


@pytest.fixture(scope="module")
def carried():
    with extra_kinds():
        from noria.models import carried

        yield carried


@pytest.fixture(scope="module")
def folder(carried, tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("carried"), np.random.default_rng(3)
    tiny_models.write_directory(folder / "hf", carried.CONFIG, carried.random_state(carried.CONFIG))
    convert(folder / "hf", folder / "model.h5")
    rows = [{"token_ids": random.integers(4, 53, length).tolist()} for length in (5, 40, 1, 17, 3, 29, 16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(RUN)
    return folder


def dense(carried, path):
    """(tokens, log-probabilities) of each row, by the dense model."""
    weights = {name: tensor.numpy() for name, tensor in carried.random_state(carried.CONFIG).items()}
    found = []
    for line in path.read_text().splitlines():
        ids, tokens, logprobs = json.loads(line)["token_ids"], [], []
        for _ in range(7):
            logits = carried.dense(carried.CONFIG, weights, np.array(ids + tokens))[-1]
            tokens.append(int(logits.argmax()))
            logprobs.append(-np.log(np.exp(logits - logits.max()).sum()))
        found.append((tokens, logprobs))
    assert len({tuple(tokens) for tokens, _ in found}) == len(found)
    return found


@pytest.fixture(scope="module")
def expected(carried, folder):
    return dense(carried, folder / "prompts.jsonl")


def compare(folder, name, expected):
    with open_generations(folder / f"{name}.h5") as output:
        rows = list(output.rows())
    assert [row.token_ids.tolist() for row in rows] == [tokens for tokens, _ in expected], name
    for row, (_, logprobs) in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row.logprobs, logprobs, rtol=0, atol=1e-9)


def alone(folder, name, prompts="prompts.jsonl", **keys):
    files = {"model": "model.h5", "prompts": prompts, "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config.load(folder / "run.toml", flags | {"overwrite": True} | keys), Solo()) == 0


def test_tokens_and_logprobs_are_the_dense_models(folder, expected):
    alone(folder, "undisturbed")
    compare(folder, "undisturbed", expected)


CACHE = [{"gpu": 100}, {"cpu": 100}, {"gpu": 40, "cpu": 60}]
PLACES = itertools.product(
    ["sequential", "single_batch", "multi_batch"],
    ["gpu", "cpu"],
    (1, 2, 3),
    (1, 3),
    CACHE,
    ({"gpu": 100}, {"cpu": 100}),
)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "activations", "laps", "microbatches", "cache", "weights"), counts.some(PLACES))
def test_one_rank_gives_them_wherever_what_travels_is(
    folder, expected, monkeypatch, schedule, activations, laps, microbatches, cache, weights
):
    monkeypatch.setattr(streams, "streams_of", LateStreams)
    keys = {"schedule": schedule, "activations": activations, "laps": laps, "microbatches": microbatches, "groups": 2}
    alone(folder, "alone", cache=cache, weights=weights, **keys)
    compare(folder, "alone", expected)


@pytest.mark.slow
@pytest.mark.world
def test_every_ring_and_partition_gives_them(folder, expected):
    names = [name for num_ranks in carried_worker.PARTITIONS for name, _ in carried_worker.cases(num_ranks)]
    assert len(names) == 3 + 5 * 11
    names = names if counts.full() else names[::4]
    world.call(4, carried_worker.work, folder, names, timeout=600)
    for name in names:
        compare(folder, name, expected)


@pytest.fixture(scope="module")
def few(carried, folder):
    """Rows of three tokens each."""
    rows = [[5 + row, 6, 7] for row in range(6)]
    (folder / "few.jsonl").write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in rows))
    return dense(carried, folder / "few.jsonl")


CELLS = itertools.product(range(7), range(3), ["sequential", "single_batch", "multi_batch"], ["gpu", "cpu"], CACHE[:2])


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "microbatch", "schedule", "activations", "cache"), counts.some(CELLS))
def test_memory_may_fail_in_any_layer_and_microbatch_of_every_step(
    carried, folder, few, monkeypatch, layer, microbatch, schedule, activations, cache
):
    # Every step begins with whole microbatches again, so that each of them is cut.
    monkeypatch.setattr(
        noria.engine.stage.Stage, "_most_tokens", property(lambda _: None, lambda *_: None), raising=False
    )
    monkeypatch.setattr(streams, "streams_of", LateStreams)
    shortage = Shortage(carried.layer, layer, microbatch)
    monkeypatch.setattr(carried, "layer", shortage)
    keys = {"schedule": schedule, "activations": activations, "cache": cache, "groups": 1, "microbatches": 3}
    alone(folder, "short", prompts="few.jsonl", **keys)
    compare(folder, "short", few)
    assert shortage.computed == dict.fromkeys(range(7), 6 * (3 + 7 - 1)) and shortage.failures >= 6


def bytes_of(path):
    """The output's plan, and the sums over the ranks of what its `timing` counts."""
    with h5py.File(path) as file:
        plan = json.loads(file.attrs["plan"])
        return plan, {name: column[:].sum() for name, column in file["timing"].items()}


# The border between layers 4 and 5 carries hidden states and a choice, 20 x 8 + 3 x 4 bytes a token; that between 5 and 6
# hidden states alone; that before layer 1 a weight too, aligned: 20 x 8 + 8 + 12, and up to 8 bytes a message.
@pytest.mark.slow
@pytest.mark.world
@pytest.mark.parametrize(
    ("keys", "token_nbytes"),
    [
        ({"partition": [5, 2]}, 172),
        ({"partition": [6, 1], "activations": "cpu"}, 160),
        ({"laps": 2, "partition": [1, 1, 2, 3], "blocking": True, "groups": 2}, 180 + 172 + 180),
    ],
)
def test_bytes_counted_are_bytes_sent_and_messages_are_planned(carried, folder, expected, keys, token_nbytes):
    found = world.call(2, carried_worker.sent, folder, "bytes", keys | {"overwrite": True})
    compare(folder, "bytes", expected)
    plan, timing = bytes_of(folder / "bytes.h5")
    sent, tokens = sum(rank[0] for rank in found), int(timing["tokens"] / 2)
    counted = sum(int(timing[f"{phase}_rank_to_rank_nbytes"]) for phase in ("prefill", "decode"))
    assert counted == sent
    aligned = 2 * 8 * int(timing["visits"]) * (token_nbytes > 180)  # of both hops with a weight, at most
    assert 0 <= sent - tokens * token_nbytes <= aligned
    with open_checkpoint(folder / "model.h5") as checkpoint:
        assert costs.ring_nbytes(Plan(**plan), checkpoint.shape, tokens) == tokens * token_nbytes
        assert len(borders_of(checkpoint.shape, "float64")) == 8
    for (_, buffers, in_host, slots), memory in zip(found, plan["memory"], strict=True):
        assert 0 < buffers <= memory["cpu" if "activations" in keys else "gpu"]["messages"]
        assert in_host == memory["cpu"].get("activations", 0) and slots == memory["gpu"].get("activation slots", 0)
        assert bool(in_host) == bool(slots) == ("activations" in keys)


def test_a_partition_that_parts_tied_layers_is_refused_with_its_numbers(folder, capsys):
    files = ["--model", folder / "model.h5", "--prompts", folder / "prompts.jsonl", "--output", folder / "refused.h5"]
    argv = ["plan", *files, "--ranks", "2", "--device", "cpu", "--partition", "4,3"]
    assert main(list(map(str, argv))) == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "pipeline.partition 4,3 puts layer 1 on rank 0 and layer 4, which reads its" in said
    )
    assert "cache, on rank 1: they must be on one rank, as in 5,2; or leave pipeline.partition out" in said
