"""Models from directories that transformers saved, through convert, rings, laps, tiers, pages and chunks of prompts.

Each token that a run generates is the likeliest one by transformers in float64 (wide.py), of all that is before it.
"""

import json

import mixtures_worker
import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import families
import wide
import world
from beside import CONFIGS
from counts import full
from noria import config as config_file
from noria.__main__ import main
from noria.checkpoint.checkpoint import open_checkpoint
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.run import run

# One of each kind: shared experts behind dense layers; sinks, slices and biases; layers that differ in their caches; latents;
# windows and two ropes; halves in parallel, a fused matrix; soft caps;
# caches of earlier layers, inputs that travel beside hidden states.
KINDS = [
    "glm4_moe",
    "gpt_oss",
    "mimo_v2_flash",
    "deepseek_v3",
    "olmo3",
    "falcon of 40B's shape",
    "gemma2",
    "gemma4_text of E2B's shape",
]
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
    lists |= {key: value for key, value in patterns.items() if isinstance(config.get(key), list)}
    more = {"moe_layers": [0, 1, 2, 3, 5]} if config.get("moe_layers") else {}
    if config.get(
        "num_kv_shared_layers"
    ):  # layers that read one cache are on one rank: the others need as many as there are
        more = {"num_hidden_layers": 12, "layer_types": config["layer_types"] * 2}
    if config.get("per_layer_config"):
        more = {"per_layer_config": dict.fromkeys(("2", "5"), config["per_layer_config"]["2"])}
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
    assert len(generated) > 1


def test_every_token_round_rings_and_tiers_is_the_likeliest_by_transformers(folder, models):
    world.call(3, mixtures_worker.work, folder, timeout=900)
    for name, model in models.items():
        for case in mixtures_worker.cases():
            check(model, folder / name / f"{case}.h5")


def in_mxfp4(source, model):
    """The directory with experts in MXFP4, of random codes and scales, as gpt-oss is published; the model gets the numbers."""
    random, path = np.random.default_rng(1), source / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in [one for one in tensors if one.endswith("_proj") and ".experts." in one]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.from_numpy(random.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8))
        scales = torch.from_numpy(random.integers(122, 125, (experts, outputs, inputs // 32), np.uint8))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        model.get_parameter(name).copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, path)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (source / "config.json").write_text(json.dumps(config))


def test_gpt_oss_in_mxfp4_keeps_its_codes_and_gives_the_numbers_that_transformers_unpacks(folder):
    source, config = folder / "gpt_oss-mxfp4", deep(CONFIGS["gpt_oss"])
    with torch.inference_mode():
        model = families.save(config, source / "hf")
        in_mxfp4(source / "hf", model)
        model = wide.wide_model(config, model)
    assert main(["convert", str(source / "hf"), str(source / "model.h5")]) == 0
    with open_checkpoint(source / "model.h5") as checkpoint:
        experts = next(one for one in checkpoint.blocks["layers/0003"].parameters if one.name == "experts")
    assert experts.encoding == "mxfp4" and experts.piece.nbytes < 3 * 32 * 32 * 0.6
    files = {"model": "gpt_oss-mxfp4/model.h5", "prompts": "prompts.jsonl", "output": "gpt_oss-mxfp4/run.h5"}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config_file.load(folder / "run.toml", flags | mixtures_worker.TIERS | {"laps": 2}), Solo()) == 0
    check(model, folder / "gpt_oss-mxfp4/run.h5")
