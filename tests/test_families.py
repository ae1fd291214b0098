"""Every family from a directory that transformers saved, through convert and run, on rings of one and three ranks."""

import json

import families_worker
import numpy as np
import pytest
import torch

import families
import world
from families import CONFIGS
from noria.__main__ import main
from noria.output.generations import open_generations

# Six layers: two for each of three ranks, one a lap. Every family, and the settings that change what a layer does.
SETTINGS = [
    "llama 3",
    "llama tied",
    "llama yarn with its own numbers",
    "mistral",
    "qwen2 with windows in its upper layers",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3_moe with dense layers",
    "phi3 partly rotated",
    "gpt2 with settings",
    "opt",
    "opt with the norm after (350m)",
    "galactica",
]
NEW_TOKENS = 12
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


def config_of(name):
    config = CONFIGS[name]
    depth = "n_layer" if "n_layer" in config else "num_hidden_layers"
    return config | {depth: 6, "eos_token_id": 3}


def prompts():
    random = np.random.default_rng(3)
    return [random.integers(4, families.VOCAB, length).tolist() for length in (1, 5, 40, 17, 30, 2, 22)]


def generate(model, prompt):
    """Greedy token ids of transformers' model in float64, without a cache: (ids, the least gap to the second)."""
    ids, gap = list(prompt), np.inf
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            ids, gap = [*ids, int(logits.argmax())], min(gap, best - second)
    return ids[len(prompt) :], gap


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of each setting and the tokens that transformers generates with it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("families")
    rows = [{"token_ids": prompt} for prompt in prompts()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(RUN)
    for name in SETTINGS:
        model = families.save(config_of(name), folder / name / "hf").double()
        assert main(["convert", str(folder / name / "hf"), str(folder / name / "model.h5"), "--dtype", "float64"]) == 0
        wanted = [generate(model, prompt) for prompt in prompts()]
        # transformers' rotary angles are float32 whatever the dtype: tokens may differ only where logits nearly tie
        assert min(gap for _, gap in wanted) > 1e-4, name
        (folder / name / "expected.json").write_text(json.dumps([ids for ids, _ in wanted]))
    return folder


def tokens_of(output):
    with open_generations(output) as file:
        return [row.token_ids.tolist() for row in file.rows()]


def expected(folder, name):
    return json.loads((folder / name / "expected.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_command_generates_transformers_tokens(folder, name):
    output = folder / name / "command.h5"
    files = ["--model", folder / name / "model.h5", "--prompts", folder / "prompts.jsonl", "--output", output]
    assert main(["run", str(folder / "run.toml"), *map(str, files)]) == 0
    assert len({tuple(tokens) for tokens in expected(folder, name)}) > 3
    assert tokens_of(output) == expected(folder, name)


@pytest.mark.slow
@pytest.mark.world
def test_every_ring_generates_transformers_tokens_with_every_family(folder):
    world.call(3, families_worker.work, folder, timeout=300)
    names = [name for name, _, _ in families_worker.cases(3)]
    assert names == ["N1-V1", "N1-V2", "N3-V1", "N3-V2"]
    for name in SETTINGS:
        for case in names:
            assert tokens_of(folder / name / f"{case}.h5") == expected(folder, name), (name, case)
