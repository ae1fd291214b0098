"""A model whose windowed layers keep their windows alone, in bfloat16: the bits of the run that keeps all, in every tier and chunk;
and how many more rows memory holds."""

import contextlib
import json
from unittest.mock import patch

import numpy as np
import pytest
import torch

from bits import FAMILIES, RUN, hashes
from noria import config
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.plan import windows
from noria.run import run

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
CASES = {
    "rings": {},
    "chunks": {"step_tokens": 700, "microbatch_tokens": 300},
    "plain steps": {"graphs": False, "groups": 2, "microbatches": 2},
    "not shared": {"prefix_sharing": False},
    "cpu": {"cache": {"cpu": 100}},
}


def rows():
    """Prompts of 300 to 2,400 tokens, some behind two beginnings; the first goes round its ring."""
    random = np.random.default_rng(1)
    beginnings = [random.integers(10, 31000, length).tolist() for length in (640, 1100)]
    for row in range(24):
        ids = (
            beginnings[row % 2] * (row % 3 == 0) + random.integers(10, 31000, [1700, 300, 577, 2400][row % 4]).tolist()
        )
        sampled = {"temperature": 1.0, "top_p": 0.95, "seed": row} if row % 2 else {}
        yield {"token_ids": ids, "max_new_tokens": 600 if row == 0 else 40, **sampled}


def keeping_all(shape, *_):
    return shape.without_rings(), ""


def hashes_of(folder, name, keys, kept=contextlib.nullcontext()):
    files = {"prompts": "prompts.jsonl", "output": f"{name}.h5", "random_weights": "config.json", "scratch": "."}
    with kept:
        assert (
            run(
                config.load(folder / "run.toml", {key: str(folder / file) for key, file in files.items()} | keys),
                Solo(),
            )
            == 0
        )
    with open_generations(folder / f"{name}.h5") as file:
        return hashes(folder / f"{name}.h5")[0], json.loads(file.attrs["plan"])


def test_bits_are_those_of_the_run_that_keeps_all(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["gemma2"]))
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    expected, plan = hashes_of(tmp_path, "all", {}, patch.object(windows, "keeping", keeping_all))
    assert not plan["rings"] and len({*expected}) == len(expected)
    torch.cuda.empty_cache()
    differ = {}
    for name, keys in CASES.items():
        found, its_plan = hashes_of(tmp_path, name, keys)
        assert its_plan["rings"], name
        differ[name] = [row for row, pair in enumerate(zip(found, expected, strict=True)) if len({*pair}) > 1]
    print(json.dumps({"bench": "windows", "differ": differ}))
    assert not any(differ.values())
