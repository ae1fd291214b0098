"""Tokens do not depend on where weights and cache live, on the schedule or on laps; every byte over a link is counted."""

# ruff: noqa: F811 -- the folder of test_same is a fixture here
import json

import h5py
import placement_worker
import pytest
from placement_worker import CACHE, SCHEDULES, SHORT, WEIGHTS, cases, home

import world
from late_streams import LateStreams
from noria import config, streams
from noria.blocks import layer_name
from noria.checkpoint.checkpoint import open_checkpoint
from noria.launch.mpi import Solo
from noria.limits import loaded_once
from noria.run import run
from test_same import CONFIG, compare, fill, folder  # noqa: F401

NUM_ROWS, MOST = 7, 5  # rows, and tokens of a row, for each of 432 cases: more would only take longer


def alone(folder, name, **keys):
    files = {"model": "model.h5", "prompts": "prompts.jsonl", "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0
    return folder / f"{name}.h5"


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(streams, "streams_of", LateStreams)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weights", range(1, len(WEIGHTS)))
def test_one_rank_gives_the_references_tokens_wherever_its_weights_are(folder, late, weights, schedule):
    name = f"weights-{weights}-{schedule}"
    alone(folder, name, weights=WEIGHTS[weights], schedule=schedule, groups=2)
    compare(folder, [name])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cache", range(1, len(CACHE)))
def test_one_rank_gives_the_references_tokens_wherever_its_cache_is(folder, late, cache, schedule):
    name = f"cache-{cache}-{schedule}"
    alone(folder, name, cache=CACHE[cache], weights={"gpu": 40, "cpu": 60}, schedule=schedule, microbatches=3)
    compare(folder, [name])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("laps", [1, 2])
@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_one_rank_gives_the_references_tokens_with_hidden_states_in_cpu_memory(
    folder,
    late,
    microbatches,
    laps,
    schedule,
):
    name = f"activations-{microbatches}-{laps}-{schedule}"
    keys = {"activations": "cpu", "schedule": schedule, "laps": laps, "microbatches": microbatches, "groups": 2}
    alone(folder, name, cache={"gpu": 40, "cpu": 60}, weights={"gpu": 40, "cpu": 60}, **keys)
    compare(folder, [name])


@pytest.mark.slow
@pytest.mark.world
def test_every_placement_schedule_and_lap_gives_the_references_tokens(folder):
    names = [(name, home(num_ranks)) for num_ranks in (1, 2, 3, 4) for name, _ in cases(num_ranks)]
    (folder / SHORT).mkdir()
    fill(folder / SHORT, CONFIG | {"num_hidden_layers": 7})
    for place in (folder, folder / SHORT):
        rows = [json.loads(line) for line in (place / "prompts.jsonl").read_text().splitlines()[:NUM_ROWS]]
        few = [row | {"max_new_tokens": min(row["max_new_tokens"], MOST)} for row in rows]
        (place / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    world.call(4, placement_worker.work, folder, timeout=900)
    for place in (folder, folder / SHORT):
        compare(place, [name for name, home in names if folder / home == place], NUM_ROWS, MOST)


def bytes_of(path):
    """The output's plan, and the sums over the ranks of what its `timing` counts."""
    with h5py.File(path) as file:
        plan = json.loads(file.attrs["plan"])
        return plan, {name: column[:].sum() for name, column in file["timing"].items()}


def test_one_thing_after_the_other_loads_no_weights_in_vain_although_groups_are_passed_over(folder):
    keys = {"weights": {"gpu": 40, "cpu": 60}, "schedule": "sequential", "laps": 2, "groups": 9}
    plan, found = bytes_of(alone(folder, "in-vain", max_new_tokens=3, **keys))
    assert found["visits"] < (found["rounds"] - 1) * plan["groups"] and found["decode_host_to_gpu_nbytes"]
    assert found["weights_unused_nbytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("weights", range(len(WEIGHTS)))
def test_weights_over_the_link_are_what_the_rounds_need(folder, weights, groups):
    path = alone(folder, f"bytes-{weights}-{groups}", weights=WEIGHTS[weights], groups=groups, max_new_tokens=3)
    plan, found = bytes_of(path)
    with open_checkpoint(folder / "model.h5") as checkpoint:
        blocks = checkpoint.blocks
    tiers = {name: tier for name, tier in plan["weight_tiers"][0].items() if tier != "gpu" and name != "embed"}
    each_group = not loaded_once(len(tiers), groups, plan["weight_slots"])
    visits = found["visits"] if each_group else found["rounds"] - 1  # the last round says STOP
    wanted = visits * sum(blocks[name].nbytes for name in tiers)
    assert found["prefill_host_to_gpu_nbytes"] + found["decode_host_to_gpu_nbytes"] == wanted
    assert (wanted > 0) == bool(tiers)
    on_disk = visits * sum(blocks[name].nbytes for name, tier in tiers.items() if tier == "disk")
    assert found["prefill_disk_to_host_nbytes"] + found["decode_disk_to_host_nbytes"] == on_disk
    assert found["weights_unused_nbytes"] <= 2 * plan["weight_slots"] * max(block.nbytes for block in blocks.values())
    assert layer_name(0) in blocks
