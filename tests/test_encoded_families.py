"""Every family with a cache in 8 bits: its logits are near those of a plain one, and not the same."""

import json

import numpy as np
import pytest

import families
import mixtures
from counts import some
from noria import config
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.run import run

CONFIGS = families.CONFIGS | mixtures.CONFIGS


def first_logprobs(folder, kind):
    """The log-probability of each row's first new token."""
    keys = {"random_weights": "config.json", "prompts": "prompts.jsonl", "output": f"{kind}.h5"}
    keys = {name: str(folder / file) for name, file in keys.items()} | {"dtype": "float64", "device": "cpu"}
    assert run(config.load(None, keys | {"kv_cache_dtype": kind, "max_new_tokens": 2, "logprobs": 1}), Solo()) == 0
    with open_generations(folder / f"{kind}.h5") as output:
        rows = list(output.rows())
    assert {row.status for row in rows} == {"done"}
    return np.array([row.logprobs[0] for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("name", some(CONFIGS))
def test_a_family_with_a_cache_in_8_bits_is_near_itself(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    prompts = [{"token_ids": [5 + number % 7 for number in range(length)]} for length in (2, 9, 20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    apart = np.abs(first_logprobs(tmp_path, "int8") - first_logprobs(tmp_path, "auto"))
    assert 0 < apart.max() < 0.01, apart
