"""Results do not depend on ranks, laps, groups, microbatches, transport or blocking: they are the model's alone."""

import json
import math

import numpy as np
import pytest
import same_worker
import torch
import xxhash

import reference
import tiny_models
import world
from noria.checkpoint.convert import convert
from noria.output.generations import open_generations

# 13 layers: neither 2, 3, 4 ranks nor their 1, 2 or 3 laps divide them.
CONFIG = tiny_models.LLAMA | {"num_hidden_layers": 13, "eos_token_id": 3, "max_position_embeddings": 96}
RUN = """
dtype = "float64"
device = "cpu"
[sampling]
max_new_tokens = 12
seed = 11
[pipeline]
step_tokens = 24
microbatch_tokens = 16
"""


def prompts():
    """Rows of 1 to 60 tokens that end at different times; one in two is sampled."""
    random = np.random.default_rng(5)
    for row in range(14):
        sampled = {"temperature": 0.8 + row / 10, "top_k": [0, 7][row % 3 == 0], "top_p": [1.0, 0.9][row % 4 == 1]}
        yield {
            "id": f"row {row}",
            "token_ids": random.integers(4, 101, [1, 3, 60, 9, 17][row % 5]).tolist(),
            "max_new_tokens": [9, 2, 6, 1][row % 4],
            **(sampled if row % 2 else {}),
        }


def uniform(seed, row, position):
    digest = xxhash.xxh3_64_intdigest(np.array([seed, row, 0, position], "<i8").tobytes())
    return (digest >> 11) / 2**53


def sample(logits, row, number):
    """Temperature, top-k, top-p and the inverse of the cumulative distribution, a token at a time in plain numpy."""
    scaled = logits / row["temperature"]
    order = sorted(range(len(scaled)), key=lambda id: -scaled[id])
    kept = order[: row["top_k"] or None]
    weights = {id: math.exp(scaled[id] - scaled[kept[0]]) for id in kept}
    total, before, nucleus = sum(weights.values()), 0.0, []
    for id in kept:
        if before < row["top_p"] * total:
            nucleus.append(id)
        before += weights[id]
    target, reached = number * sum(weights[id] for id in nucleus), 0.0
    for id in sorted(nucleus):
        reached += weights[id]
        if reached > target:
            return id
    return max(nucleus)


def expected(config, state, row, number):
    tokens = []
    while len(tokens) < row["max_new_tokens"] and (not tokens or tokens[-1] != config["eos_token_id"]):
        logits = reference.logits(config, state, row["token_ids"] + tokens)[-1]
        drawn = "temperature" in row
        tokens.append(sample(logits, row, uniform(11, number, len(tokens))) if drawn else int(logits.argmax()))
    return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("same"), CONFIG)


def fill(folder, config):
    """The folder with a model of this config, prompts, a run file and the tokens that a run must give."""
    state = {name: tensor * 0.25 for name, tensor in tiny_models.state(config, torch.float64).items()}
    tiny_models.write_directory(folder / "hf", config, state)
    convert(folder / "hf", folder / "model.h5")
    rows = list(prompts())
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(RUN)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    (folder / "expected.json").write_text(json.dumps([expected(config, arrays, row, i) for i, row in enumerate(rows)]))
    return folder


def compare(folder, names, num_rows=14, most=9):
    """The outputs of these names have the first rows' tokens as expected, up to `most` of a row."""
    wanted = [tokens[:most] for tokens in json.loads((folder / "expected.json").read_text())[:num_rows]]
    assert len({tuple(tokens) for tokens in wanted}) > num_rows / 2
    assert {len(tokens) for tokens in wanted} >= {min(length, most) for length in (1, 2, 6, 9)}
    for name in names:
        with open_generations(folder / f"{name}.h5") as output:
            found = [row.token_ids.tolist() for row in output.rows()]
        assert found == wanted, name


def test_one_rank_without_mpi_gives_the_references_tokens(folder):
    from noria import config
    from noria.launch.mpi import Solo
    from noria.run import run

    files = {"model": "model.h5", "prompts": "prompts.jsonl", "output": "alone.h5"}
    flags = {name: str(folder / file) for name, file in files.items()}
    assert run(config.load(folder / "run.toml", flags), Solo()) == 0
    compare(folder, ["alone"])


@pytest.mark.slow
@pytest.mark.world
def test_every_shape_of_ring_gives_the_references_tokens(folder):
    names = [name for num_ranks in (1, 2, 3, 4) for name, _ in same_worker.cases(num_ranks)]
    assert len(names) == 120
    world.call(4, same_worker.work, folder, timeout=420)
    compare(folder, names)
