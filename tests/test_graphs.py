"""Decode steps as graphs on the CPU: a capturer that reruns the function that it recorded, over the same memory."""

# ruff: noqa: F811 -- the folder of test_same is a fixture here

import pytest

from captured import captured
from noria import config
from noria.launch.mpi import Solo
from noria.run import run
from test_same import compare, folder  # noqa: F401

CASES = {
    "whole": {"step_tokens": 400, "microbatch_tokens": 400},
    "chunks": {"step_tokens": 11, "microbatch_tokens": 7},
    "laps and groups": {"laps": 3, "groups": 2},
}


def alone(folder, name, prompts="prompts.jsonl", **keys):
    files = {"model": "model.h5", "prompts": prompts, "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_rank_gives_the_references_tokens(folder, case):
    with captured() as graphs:
        alone(folder, f"graphs-{case}", **CASES[case])
    assert graphs.replays > 7 and graphs.captures < graphs.replays
    compare(folder, [f"graphs-{case}"])
