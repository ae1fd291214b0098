"""Whole runs whose attention goes through the lists of work items: in float64 the tokens are those of the dense model."""

# ruff: noqa: F811 -- the folder of test_same is a fixture here
import json

import listed_worker
import pytest

import world
from late_streams import LateStreams
from listed_kind import listed_kind
from noria import config, streams
from noria.launch.mpi import Solo
from noria.run import run
from small_run import rows_of
from test_same import compare, folder  # noqa: F401

CASES = {
    "whole": {"step_tokens": 400, "microbatch_tokens": 400},
    "chunks": {"step_tokens": 11, "microbatch_tokens": 7},
    "laps": {"laps": 3, "groups": 2, "microbatches": 2},
    "cpu": {"cache": {"gpu": 40, "cpu": 60}, "weights": {"gpu": 40, "cpu": 60}, "microbatches": 3},
    "disk": {"cache": {"gpu": 30, "cpu": 30, "disk": 40}, "activations": "cpu"},
}


def alone(folder, name, prompts="prompts.jsonl", **keys):
    files = {"model": "model.h5", "prompts": prompts, "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_rank_gives_the_references_tokens(folder, monkeypatch, case):
    monkeypatch.setattr(streams, "streams_of", LateStreams)
    for programs in (1, 30):
        with listed_kind(programs) as executed:
            alone(folder, f"listed-{case}-{programs}", **CASES[case])
        waves = [wave for work in executed for wave in work.waves]
        assert any(launch.many for wave in waves for launch in wave.launches) or programs > 1
        assert any(len(wave.merges) for wave in waves) or programs == 1
    compare(folder, [f"listed-{case}-{programs}" for programs in (1, 30)])


@pytest.mark.slow
@pytest.mark.world
def test_rings_give_the_references_tokens(folder):
    world.call(4, listed_worker.work, folder, timeout=200)
    compare(folder, map(listed_worker.name, listed_worker.CASES))


SAMPLED = {"temperature": 0.9, "seed": 5, "max_new_tokens": 7}
BEGINNING = [7, *range(20, 93)]
SHARING = {
    "samples": [{"token_ids": BEGINNING, "n": 4, **SAMPLED}] * 3,
    "prompts": [{"token_ids": [*BEGINNING, *range(row % 5)], **SAMPLED, "seed": row} for row in range(8)],
}


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["gpu", "cpu"])
@pytest.mark.parametrize("case", SHARING)
def test_rows_that_begin_alike_read_that_once_and_get_the_tokens_that_sdpa_gives(folder, case, cache):
    prompts = f"{case}.jsonl"
    (folder / prompts).write_text("".join(json.dumps(row) + "\n" for row in SHARING[case]))
    if not (folder / f"{case}.h5").exists():
        alone(folder, case, prompts)
    with listed_kind() as executed:
        alone(folder, f"listed-{case}-{cache}", prompts, cache={cache: 100})
    found, expected = (rows_of(folder / f"{name}.h5") for name in (f"listed-{case}-{cache}", case))
    assert found == expected and len({tuple(tokens) for _, _, tokens in found}) > 1
    assert any(len(work.waves) > 1 for work in executed), "a beginning is computed before the rows that share it"
