"""How many tokens a model has room for: what its config.json makes of it, and `max_context`."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file

import families
import small_run
import tiny_models
from families import LLAMA, LLAMA3, LONG_PHI3, LONGROPE, PHI3, YARN
from noria import models
from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.errors import InputError
from noria.output.generations import open_generations
from noria.step import Run
from test_models import Whole, tokens_of


def shape(config):
    return models.for_config(config).shape(config)


def rope(kind, **keys):
    return {"rope_scaling": {"type": kind, **keys}}


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (LLAMA, 128),
        (LLAMA | rope("linear", factor=4.0), 512),
        (LLAMA | rope("linear", factor=2.5), 320),
        (LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4}}, 512),
        (LLAMA | rope("dynamic", factor=4.0), 128),
        (LLAMA | {"rope_scaling": LLAMA3}, 128),
        (LLAMA | {"rope_scaling": YARN | {"original_max_position_embeddings": 100.0}}, 400),
        (PHI3 | LONG_PHI3 | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 100.0}, 100),
    ],
)
def test_the_context_is_what_the_config_makes_of_it(config, most):
    assert shape(config).max_positions == most


def test_a_first_context_of_a_whole_float_is_that_number_and_another_is_refused():
    for config in (LLAMA | {"rope_scaling": LLAMA3}, LLAMA | {"rope_scaling": YARN}):
        scaling = config["rope_scaling"]
        whole, as_float = (
            config | {"rope_scaling": scaling | {"original_max_position_embeddings": n}} for n in (16, 16.0)
        )
        assert shape(whole) == shape(as_float)
        assert shape(config | {"original_max_position_embeddings": 16.0}).details["rope_scaling"]
        for wrong in (16.5, float("inf"), float("nan"), 0.0, -16.0, "16"):
            with pytest.raises(InputError, match="original_max_position_embeddings is .*: it must be a whole number"):
                shape(config | {"rope_scaling": scaling | {"original_max_position_embeddings": wrong}})


def test_a_factor_that_is_missing_or_makes_a_context_without_end_is_refused():
    for kind in ("linear", "dynamic"):
        with pytest.raises(InputError, match="factor is missing"):
            shape(LLAMA | rope(kind))
    with pytest.raises(InputError, match=r"factor is 1e\+09: the context would be too long"):
        shape(LLAMA | rope("linear", factor=1e9))


FLOAT = {"original_max_position_embeddings": 16.0}
BEYOND = {
    "linear": LLAMA | {"max_position_embeddings": 30} | rope("linear", factor=4.0),
    "yarn from a float": LLAMA | {"max_position_embeddings": 30, "rope_scaling": YARN | FLOAT | {"factor": 8.0}},
    "llama3 from a float": LLAMA | {"rope_scaling": LLAMA3 | FLOAT},
    "dynamic at its end": LLAMA | {"max_position_embeddings": 100} | rope("dynamic", factor=4.0),
}


@pytest.mark.parametrize("name", BEYOND)
@torch.inference_mode()
def test_logits_in_the_whole_context_are_those_of_transformers(name):
    config, token_ids = BEYOND[name], tokens_of(1, 100)
    with TemporaryDirectory() as folder:
        model = families.save(config, Path(folder))
        state = load_file(f"{folder}/model.safetensors")
    assert shape(config).max_positions >= len(token_ids)
    expected = model(torch.tensor([token_ids])).logits[0]
    found = Whole(config, state, torch.float32).logits([(token_ids, 0, (Run(0, 7),))])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_transformers_turns_positions_otherwise_beyond_the_context_of_dynamic():
    """Why Noria ends there: the same beginning has other numbers once more follows it."""
    config, token_ids = BEYOND["dynamic at its end"], torch.tensor([tokens_of(1, 130)])
    model = families.random_model(config)
    with torch.inference_mode():
        short, long = (model(token_ids[:, :length]).logits[0, :90] for length in (100, 130))
    assert (short - long).abs().max() > 1e-2


# ---- max_context

CONFIGS = {
    "plain": tiny_models.LLAMA,
    "linear": tiny_models.LLAMA | rope("linear", factor=2.0),
    "dynamic": tiny_models.LLAMA | rope("dynamic", factor=2.0),
    "learned": tiny_models.OPT,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contexts")
    for name, config in CONFIGS.items():
        source = tiny_models.write_directory(folder / name, config, tiny_models.state(config))
        convert(source, folder / f"{name}.h5")
    return folder


def said(folder, capsys, name, length, *flags, what="validate"):
    """The exit code of `noria validate` for one prompt of so many tokens, and all that it says."""
    (folder / "prompts.jsonl").write_text(json.dumps({"token_ids": [5] * length, "max_new_tokens": 1}) + "\n")
    files = ["--model", folder / f"{name}.h5", "--prompts", folder / "prompts.jsonl", "--output", folder / "out.h5"]
    code = main([what, *map(str, files), *flags])
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("name", "length", "flags", "code", "words"),
    [
        ("plain", 64, [], 2, "64 tokens, the model's context 64: shorten it"),
        ("plain", 64, ["--max-context", "65"], 0, "context 65"),
        ("plain", 40, ["--max-context", "40"], 2, "40 tokens, the model's context 40: shorten it"),
        ("plain", 39, ["--max-context", "40"], 0, "context 40"),
        ("linear", 127, [], 0, "context 128"),
        ("linear", 127, ["--max-context", "64"], 2, "127 tokens, the model's context 64: shorten it"),
        ("dynamic", 63, [], 0, "context 64"),
        ("dynamic", 64, [], 2, "the model's context 64 (rope type dynamic rotates all positions differently beyond it"),
        ("dynamic", 9, ["--max-context", "65"], 2, "max_context is 65, the model's context 64 (rope type dynamic"),
        ("learned", 9, ["--max-context", "31"], 2, "context 30 (its positions are a table of that length): give at"),
        ("learned", 9, ["--max-context", "20"], 0, "context 20"),
        ("plain", 9, ["--max-context", "0"], 2, "max_context is 0: it must be 1 to"),
    ],
)
def test_max_context_is_the_model_s_own_less_or_more_where_the_model_can(
    folder, capsys, name, length, flags, code, words
):
    found, text = said(folder, capsys, name, length, *flags)
    assert found == code and words in text, text


def test_a_run_ends_at_max_context_and_goes_on_with_the_same_alone(tmp_path, capsys):
    small_run.write_files(tmp_path)
    keys = ["--max-new-tokens", "24", "--temperature", "0"]
    assert main(small_run.command(tmp_path, "run.h5", *keys, "--max-context", "10")) == 0
    with open_generations(tmp_path / "run.h5") as output:
        assert {len(row.token_ids) for row in output.rows()} == {7}
    assert main(small_run.command(tmp_path, "run.h5", *keys)) == 2
    assert "max_context: 10 there, null now" in capsys.readouterr().err
