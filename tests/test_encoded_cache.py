"""Runs whose cache is kept in fewer bits: tokens of the dense model that rounds alike, wherever the cache is and however rows are
cut; bytes of the plan; what a run says and refuses."""

import json
import re
from unittest.mock import patch

import encoded_cache_worker
import h5py
import numpy as np
import pytest
import torch

import counts
import reference
import rounded
import tiny_models
import world
from captured import captured
from listed_kind import listed_kind
from noria import config
from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.engine.rounding import RoundedArray
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.plan import building
from noria.run import run

# Heads of 80 numbers: a group of 64 and one of 16.
CONFIG = tiny_models.LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 160,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "eos_token_id": 3,
    "max_position_embeddings": 200,
    "sliding_window": 70,
}
RUN = """
dtype = "float64"
device = "cpu"
[sampling]
max_new_tokens = 6
seed = 11
logprobs = 1
"""
KINDS = encoded_cache_worker.KINDS


def prompts():
    """Rows of 1 to 130 tokens, some of which begin alike; one in two is sampled."""
    random = np.random.default_rng(5)
    begins = [random.integers(4, 101, 64).tolist(), [], random.integers(4, 101, 128).tolist()]
    for row in range(9):
        sampled = {"temperature": 0.9, "top_k": 0, "top_p": 1.0} if row % 2 else {}
        tokens = begins[row % 3] + random.integers(4, 101, [1, 30, 2, 17][row % 4]).tolist()
        yield {"id": f"row {row}", "token_ids": tokens, "max_new_tokens": [6, 2, 5][row % 3], **sampled}


def weights():
    state = tiny_models.state(CONFIG | {"model_type": "llama"}, torch.float64)
    return {name: tensor * (0.3 if "self_attn" in name else 0.12) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded-cache")
    tiny_models.write_directory(folder / "hf", CONFIG, weights())
    convert(folder / "hf", folder / "model.h5")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts()))
    (folder / "run.toml").write_text(RUN)
    return folder


def alone(folder, name, **keys):
    files = {"model": "model.h5", "prompts": "prompts.jsonl", "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0
    return folder / f"{name}.h5"


def rows_of(folder, name):
    with open_generations(folder / f"{name}.h5") as output:
        return list(output.rows())


@pytest.fixture(scope="module")
def expected(folder):
    """The rows of a plain run with each kind, whose greedy tokens and log-probabilities are the dense model's that rounds alike."""
    found, arrays = {}, {name: tensor.numpy() for name, tensor in weights().items()}
    for kind in KINDS:
        alone(folder, kind, kv_cache_dtype=kind, prefix_sharing=False)
        found[kind] = rows_of(folder, kind)
        over = rounded.attention(kind, reference._attention)
        with patch.object(reference, "_attention", over):
            for row, asked in zip(found[kind], prompts(), strict=True):
                ids = [*row.prompt_token_ids.tolist(), *row.token_ids.tolist()]
                logits = reference.logits(CONFIG, arrays, ids)[len(row.prompt_token_ids) - 1 : -1]
                if "temperature" not in asked:
                    assert row.token_ids.tolist() == logits.argmax(-1).tolist()
                whole = logits - logits.max(-1, keepdims=True)
                logprobs = whole - np.log(np.exp(whole).sum(-1, keepdims=True))
                its = logprobs[range(len(row.token_ids)), row.token_ids]
                np.testing.assert_allclose(row.logprobs, its, rtol=0, atol=1e-9)
    return found


def compare(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-9)


def test_each_kind_rounds_in_its_own_way(folder, expected):
    alone(folder, "auto")
    first = [rows[0].logprobs[0] for rows in (*expected.values(), rows_of(folder, "auto"))]
    assert min(abs(one - other) for place, one in enumerate(first) for other in first[:place]) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_says_which_cache_it_was_made_with(folder, expected, kind, capsys):
    with h5py.File(folder / f"{kind}.h5") as file:
        assert file.attrs["kv_cache_dtype"] == kind
    assert main(["report", str(folder / f"{kind}.h5")]) == 0
    assert re.search(rf"^ +cache +{kind}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.world
def test_rows_do_not_depend_on_ranks_laps_groups_chunks_tiers_or_sharing(folder, expected):
    names = [(name, keys) for ranks in (1, 2, 3, 4) for name, keys in encoded_cache_worker.cases(ranks)]
    if not counts.full():
        names = names[::29]
    world.call(4, encoded_cache_worker.work, folder, [name for name, _ in names], timeout=500)
    for name, keys in names:
        compare(rows_of(folder, name), expected[keys["kv_cache_dtype"]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_attention_by_lists_of_work_reads_what_is_decoded(folder, expected, monkeypatch, kind):
    monkeypatch.setattr(building, "DECODED_CACHE_NBYTES", 0)
    with listed_kind() as executed:
        alone(folder, f"listed-{kind}", kv_cache_dtype=kind, cache={"gpu": 60, "cpu": 40}, groups=2)
    compare(rows_of(folder, f"listed-{kind}"), expected[kind])
    with h5py.File(folder / f"listed-{kind}.h5") as file:
        plan = json.loads(file.attrs["plan"])
    assert plan["decoded_pages"] == 12 and len(executed) > 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_decode_steps_are_graphs_where_attention_decodes_what_it_reads(folder, expected, kind, capfd):
    keys = {"kv_cache_dtype": kind, "step_tokens": 400, "microbatch_tokens": 400}
    for coded, name in ((True, f"graphs-{kind}"), (False, f"decoded-before-{kind}")):
        with captured(coded=coded) as graphs:
            alone(folder, name, **keys)
        compare(rows_of(folder, name), expected[kind])
        said = capfd.readouterr().err
        assert ("graphs: the cache is decoded before attention" in said) != coded
        assert graphs.replays > 3 if coded else not graphs.captures


def test_a_run_goes_on_with_the_same_cache_alone_and_refuses_another_by_name(folder, expected, capsys):
    keys = ["--model", str(folder / "model.h5"), "--prompts", str(folder / "prompts.jsonl"), "--device", "cpu"]
    for flags, said in (([], '"int8" there, "auto" now'), (["--kv-cache-dtype", "fp8"], '"int8" there, "fp8" now')):
        more = [
            *flags,
            "--output",
            str(folder / "int8.h5"),
            "--dtype",
            "float64",
            "--max-new-tokens",
            "6",
            "--seed",
            "11",
        ]
        assert main(["run", *keys, *more, "--logprobs", "1"]) == 2
        error = capsys.readouterr().err
        assert f"kv_cache_dtype: {said}" in error and "holds rows of another run" in error


def test_a_word_that_is_no_cache_is_refused_with_those_that_are(folder, capsys):
    assert main(["run", str(folder / "run.toml"), "--kv-cache-dtype", "int5"]) == 2
    assert "int5" in (said := capsys.readouterr().err) and "auto, fp8, int8, int4" in said


def test_memory_that_fails_while_a_cache_is_decoded_changes_no_row(folder, expected, monkeypatch):
    """Two decodings fail: what was rounded before is rounded again, and the microbatch is cut finer."""
    decode, calls = RoundedArray.decode, []

    def failing(self, pages, into):
        calls.append(len(pages))
        if len(calls) in (3, 30):
            raise torch.OutOfMemoryError
        decode(self, pages, into)

    monkeypatch.setattr(RoundedArray, "decode", failing)
    alone(folder, "short", kv_cache_dtype="int4", step_tokens=160, microbatch_tokens=160)
    assert len(calls) > 30
    compare(rows_of(folder, "short"), expected["int4"])
