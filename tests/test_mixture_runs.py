"""Mixtures from directories that transformers saved, through convert, rings, laps, tiers, pages and chunks of prompts.

Each token that a run generates is the likeliest one by transformers in float64 (wide.py), of all that is before it.
"""

import json

import mixtures_worker
import numpy as np
import pytest
import torch

import families
import wide
import world
from counts import full
from mixtures import CONFIGS
from noria.__main__ import main
from noria.output.generations import open_generations

# One of each kind: shared experts behind dense layers; sinks, slices and biases; layers that differ in their caches.
KINDS = ["glm4_moe", "gpt_oss", "mimo_v2_flash"]
NAMES = list(CONFIGS) if full() else KINDS
NEW_TOKENS = 8
RUN = f"""
dtype = "float64"
device = "cpu"
[sampling]
max_new_tokens = {NEW_TOKENS}
ignore_eos = true
[pipeline]
step_tokens = 24
microbatch_tokens = 16
"""
pytestmark = [pytest.mark.slow, pytest.mark.world]


def deep(config):
    """The model with twice as many layers, the second three like the first."""
    lists = {key: value * 2 for key, value in config.items() if isinstance(value, list) and len(value) == 3}
    # patterns that transformers does not read: those of the published model, which are its defaults
    patterns = {"hybrid_layer_pattern": [0, 1, 1, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1, 1, 1]}
    lists |= {key: value for key, value in patterns.items() if config.get(key)}
    more = {"moe_layers": [0, 1, 2, 3, 5]} if config.get("moe_layers") else {}
    return (
        config | {"num_hidden_layers": 6, "eos_token_id": 3} | lists | more | {"architectures": config["architectures"]}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of each name, and what transformers makes of it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mixtures")
    random = np.random.default_rng(3)
    prompts = [random.integers(4, families.VOCAB, length).tolist() for length in (1, 40, 17, 30, 5)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"token_ids": prompt}) + "\n" for prompt in prompts))
    (folder / "run.toml").write_text(RUN)
    return folder


@pytest.fixture(scope="module")
def models(folder):
    made = {}
    for name in NAMES:
        source = folder / name.replace(" ", "-").replace("'", "")
        config = deep(CONFIGS[name])
        made[source.name] = wide.wide_model(config, families.save(config, source / "hf"))
        assert main(["convert", str(source / "hf"), str(source / "model.h5"), "--dtype", "float64"]) == 0
    return made


def check(model, output):
    """Asserts that each generated token is the likeliest by transformers."""
    generated = set()
    with open_generations(output) as file, torch.inference_mode():
        for row in file.rows():
            prompt, tokens = row.prompt_token_ids.tolist(), row.token_ids.tolist()
            assert len(tokens) == NEW_TOKENS
            logits = wide.logits(model, prompt + tokens)[len(prompt) - 1 : -1]
            best, second = logits.topk(2, dim=-1).values.T
            assert (best - second).min() > 1e-6, "a tie: take another seed"
            assert logits.argmax(dim=-1).tolist() == tokens
            generated.add(tuple(tokens))
    assert len(generated) > 2


def test_every_token_round_rings_and_tiers_is_the_likeliest_by_transformers(folder, models):
    world.call(3, mixtures_worker.work, folder, timeout=900)
    for name, model in models.items():
        for case in mixtures_worker.cases():
            check(model, folder / name / f"{case}.h5")
