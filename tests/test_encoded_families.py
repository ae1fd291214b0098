"""Every family with a cache in 8 bits: its logits are near those of a plain one, and not the same; graphs change nothing."""

import json

import numpy as np
import pytest

import families
import mixtures
from captured import captured
from counts import some
from noria import config
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.run import run

CONFIGS = families.CONFIGS | mixtures.CONFIGS
WITHIN = {
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "mistral4",
}  # keys and values are one array


def generated(folder, config_json, name, **its):
    """Three rows of a family, generated as said."""
    (folder / "config.json").write_text(json.dumps(config_json))
    prompts = [{"token_ids": [5 + number % 7 for number in range(length)]} for length in (2, 9, 20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    keys = {"random_weights": "config.json", "prompts": "prompts.jsonl", "output": f"{name}.h5"}
    keys = {name: str(folder / file) for name, file in keys.items()} | {"dtype": "float64", "device": "cpu"}
    assert run(config.load(None, keys | {"logprobs": 1} | its), Solo()) == 0
    with open_generations(folder / f"{name}.h5") as output:
        rows = list(output.rows())
    assert {row.status for row in rows} == {"done"}
    return rows


def first_logprobs(folder, config_json, kind):
    """The log-probability of each row's first new token."""
    rows = generated(folder, config_json, kind, kv_cache_dtype=kind, max_new_tokens=2)
    return np.array([row.logprobs[0] for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("name", some(CONFIGS))
def test_a_family_with_a_cache_in_8_bits_is_near_itself(tmp_path, name):
    apart = np.abs(first_logprobs(tmp_path, CONFIGS[name], "int8") - first_logprobs(tmp_path, CONFIGS[name], "auto"))
    assert 0 < apart.max() < 0.01, apart


@pytest.mark.slow
@pytest.mark.parametrize("name", some(CONFIGS))
def test_decode_steps_of_a_family_are_graphs_unless_its_values_lie_within_keys(tmp_path, name, capfd):
    keys = {"kv_cache_dtype": "int8", "max_new_tokens": 6, "ignore_eos": True}
    with captured(coded=True) as graphs:
        found = generated(tmp_path, CONFIGS[name], "graphs", **keys)
        refused = "no graphs: the cache is decoded before attention" in capfd.readouterr().err
        assert (graphs.replays > 2) != refused and refused == (CONFIGS[name]["model_type"] in WITHIN)
        plain = generated(tmp_path, CONFIGS[name], "plain", graphs=False, **keys)
    for one, other in zip(found, plain, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-9)
