"""Whole runs of the demo model with every key of sampling: tokens, texts and log-probabilities are those of a dense
reference with transformers' processors, whatever the ring."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import sampling_worker
import torch
import xxhash
from safetensors.torch import load_file
from tokenizers import Tokenizer
from worker import generate

import reference
import world
from noria.checkpoint.convert import convert
from noria.engine.stage import Stage
from noria.errors import InputError
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.output.parts import Parts
from noria.rows.prompts import Prompt
from noria.rows.sequence import Sequence
from noria.sampling import Sampling
from noria.step import Step
from test_row_settings import reference as processed
from test_row_settings import warped

DEMO = Path(__file__).parent.parent / "inputs" / "demo" / "model"
CONFIG = json.loads((DEMO / "config.json").read_text())
STATE = {name: tensor.double().numpy() for name, tensor in load_file(DEMO / "model.safetensors").items()}
TEXT = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
END, SEED = 1, 21
RUN = """
dtype = "float64"
device = "cpu"
[sampling]
max_new_tokens = 14
seed = 21
[pipeline]
step_tokens = 48
microbatch_tokens = 32
"""
LONG = "And it came to pass in those days, that there went out a decree from the king, that all the people"
ROWS = [
    {"prompt": "The LORD is my"},
    {"prompt": LONG, "n": 4, "temperature": 0.9, "repetition_penalty": 1.4, "logprobs": 2},
    {"prompt": "And God said", "n": 3, "temperature": 1.2, "top_p": 0.9, "min_p": 0.05, "seed": 5},
    {"prompt": "Praise the LORD", "stop": ["oul: pr", "never"], "repetition_penalty": 1.2},
    {"prompt": "In the beginning", "stop": "and", "temperature": 1.1, "n": 2, "logprobs": 0},
    {"prompt": "Blessed are", "presence_penalty": 2.5, "frequency_penalty": 0.5, "temperature": 0.6, "top_k": 50},
    {"prompt": "O give thanks", "min_new_tokens": 9, "stop": ["e", "a"], "logprobs": 3},
    {"prompt": "Grace be unto you", "logit_bias": {"1": 30}, "min_new_tokens": 5},
    {"prompt": "I am", "stop_token_ids": [14, 396], "logit_bias": {"265": 2.5, "14": 1}, "top_k": 9},
    {"prompt": LONG, "max_new_tokens": 0, "logprobs": 0},
    {"prompt": LONG + " " + LONG, "prompt_logprobs": True, "n": 2, "temperature": 1, "max_new_tokens": 3},
    {"prompt": "Grace be unto you", "stop": ["</s>", "never"], "ignore_eos": True, "logit_bias": {"1": 15.5}},
    {"prompt": LONG, "n": 3, "frequency_penalty": 2.0, "ignore_eos": True},  # followers share the prompt's pages
    {"prompt": "Amen", "n": 0},
    {"prompt": "Amen", "stop_token_ids": [2048]},
]


def uniform(seed, row, sample, position):
    digest = xxhash.xxh3_64_intdigest(np.array([seed, row, sample, position], "<i8").tobytes())
    return (digest >> 11) / 2**53


def choose(one, logits, number):
    scores = processed(one, logits[None].clone(), len(logits), (END,))
    if one.sampling.temperature == 0:
        return int(scores.argmax())
    probabilities = torch.softmax(warped(one, scores), -1)[0].numpy()
    return int((np.cumsum(probabilities) <= number * math.fsum(probabilities)).sum())


def text_of(token_ids):
    return TEXT.decode(token_ids, skip_special_tokens=True)


def expected(row, keys, sample):
    """One row of the output: what it must hold."""
    sampling = Sampling(max_new_tokens=14, seed=SEED).override({k: v for k, v in keys.items() if k != "prompt"})
    one = Sequence(Prompt(row, "", "", None, {}, "", None), sampling, TEXT.encode(keys["prompt"]).ids)
    found = {"tokens": one.token_ids, "logprobs": [], "top": [], "reason": "length"}
    raw = torch.log_softmax(torch.from_numpy(reference.logits(CONFIG, STATE, one.prompt_token_ids)), -1)
    if sampling.scores_prompt:
        found["prompt"] = [raw[place, token].item() for place, token in enumerate(one.prompt_token_ids[1:])]
    ends = [*([] if sampling.ignore_eos else [END]), *(sampling.stop_token_ids or [])]
    ends += [END] if "</s>" in (sampling.stop or []) else []
    stops = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or []
    while len(one.token_ids) < sampling.max_new_tokens:
        logits = torch.from_numpy(reference.logits(CONFIG, STATE, one.prompt_token_ids + one.token_ids)[-1])
        token = choose(one, logits, uniform(sampling.seed, 0 if "seed" in keys else row, sample, len(one.token_ids)))
        raw = torch.log_softmax(logits, -1)
        best = raw.topk(sampling.logprobs or 0)
        one.token_ids.append(token)
        found["logprobs"].append(raw[token].item())
        found["top"].append((best.indices.tolist(), best.values.tolist()))
        found["text"] = text_of(one.token_ids)
        if token in ends:
            return found | {"reason": "stop", "text": text_of(one.token_ids[:-1])}
        least = max(sampling.min_new_tokens, 1)
        begun = len(text_of(one.token_ids[: least - 1]))
        places = [found["text"].find(stop, max(0, begun - len(stop) + 1)) for stop in stops]
        places = [place for place in places if place >= 0]
        if len(one.token_ids) >= least and places:
            return found | {"reason": "stop", "text": found["text"][: min(places)]}
    return found | {"text": text_of(one.token_ids)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    convert(DEMO, folder / "model.h5")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "run.toml").write_text(RUN)
    return folder


@pytest.fixture(scope="module")
def wanted():
    good = [(row, keys, sample) for row, keys in enumerate(ROWS[:-2]) for sample in range(keys.get("n", 1))]
    return [(row, sample, keys, expected(row, keys, sample)) for row, keys, sample in good]


def compare(path, wanted):
    with open_generations(path) as file:
        rows = list(file.rows())
    pairs = [(row, sample) for row, sample, _, _ in wanted]
    assert [(row.row, row.sample) for row in rows] == [*pairs, (len(ROWS) - 2, 0), (len(ROWS) - 1, 0)]
    for found, (row, sample, keys, one) in zip(rows, wanted, strict=False):
        where = f"{path.name} row {row} sample {sample}: {keys}"
        said = (found.token_ids.tolist(), found.finish_reason, found.text)
        assert said == (one["tokens"], one["reason"], one.get("text", "")), where
        asked = keys.get("logprobs") if keys.get("max_new_tokens") != 0 else None
        assert (found.logprobs is not None) == (asked is not None), where
        if asked is not None:
            assert np.abs(found.logprobs - one["logprobs"]).max() < 1e-9, where
        if asked:
            assert found.top_ids.tolist() == [ids for ids, _ in one["top"]], where
            assert np.abs(found.top_logprobs - [values for _, values in one["top"]]).max() < 1e-9, where
        assert (found.prompt_logprobs is not None) == ("prompt" in one), where
        if "prompt" in one:
            assert np.isnan(found.prompt_logprobs[0]) and np.abs(found.prompt_logprobs[1:] - one["prompt"]).max() < 1e-9
    assert "n is 0" in rows[-2].error and "stop_token_ids has 2048" in rows[-1].error


@pytest.mark.slow
def test_the_reference_uses_every_feature(wanted):
    reasons = {row: one["reason"] for row, _, _, one in wanted}
    assert all(reasons[row] == "stop" for row in (1, 3, 6, 7, 8, 11))
    assert wanted[[row for row, *_ in wanted].index(3)][3]["text"] == ", O my s"
    for row in (1, 2, 4, 10):
        assert len({tuple(one["tokens"]) for number, _, _, one in wanted if number == row}) == ROWS[row]["n"]
    plain = {row: expected(row, {"prompt": ROWS[row]["prompt"]}, 0)["tokens"] for row in (3, 5, 6, 7, 8)}
    assert all(one["tokens"] != plain[row] for row, _, _, one in wanted if row in plain)
    assert [len(one["tokens"]) for row, _, _, one in wanted if row in (6, 7, 8)] == [12, 6, 8]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("V1-M1-K1", {"groups": 1}),
        ("V3-M3-K2", {"laps": 3, "groups": 3, "microbatches": 2, "step_tokens": 20, "microbatch_tokens": 12}),
    ],
)
def test_one_rank_gives_the_references_rows(folder, wanted, name, keys):
    assert generate(folder, name, keys, Solo()) == 0
    compare(folder / f"{name}.h5", wanted)


@pytest.mark.slow
def test_steps_composed_ahead_give_the_references_rows(folder, wanted, monkeypatch):
    awaited = []
    told = Step.told
    monkeypatch.setattr(Stage, "feeds", True)  # as where a GPU runs behind the host
    monkeypatch.setattr(Step, "told", lambda step, ids: awaited.append(step.awaits) or told(step, ids))
    assert generate(folder, "ahead", {"groups": 1}, Solo()) == 0
    assert sum(awaited) > 5, "no step was composed before the one before it was sampled"
    compare(folder / "ahead.h5", wanted)


@pytest.mark.slow
@pytest.mark.world
def test_rings_give_the_references_rows(folder, wanted):
    world.call(3, sampling_worker.work, folder, timeout=240)
    for name in sampling_worker.CASES:
        compare(folder / f"{name}.h5", wanted)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_samples_and_the_log_probabilities_that_it_had(folder, wanted):
    assert generate(folder, "whole", {"groups": 1}, Solo()) == 0
    with open_generations(folder / "whole.h5") as file:
        rows, header = list(file.rows()), json.loads(file.attrs["header"])
    parts = Parts(folder / "resumed.h5", header)
    for place, row in enumerate(rows):
        if place % 3 == 1 and len(row.token_ids) > 3:
            row.status, row.finish_reason, row.text, row.token_ids = "todo", "none", "", row.token_ids[:3]
            for name in ("logprobs", "top_ids", "top_logprobs"):
                setattr(row, name, getattr(row, name)[:3] if getattr(row, name) is not None else None)
        if place % 3 < 2:
            parts.add(row)
    parts.seal()
    assert generate(folder, "resumed", {"groups": 2}, Solo()) == 0
    compare(folder / "resumed.h5", wanted)


def test_a_finished_run_of_lists_and_tables_is_known_again(folder):
    keys = {"stop": ["never"], "logit_bias": {"5": 1.0}, "stop_token_ids": [4], "max_new_tokens": 1}
    assert generate(folder, "again", keys, Solo()) == 0
    before = (folder / "again.h5").stat()
    assert generate(folder, "again", keys, Solo()) == 0
    assert (folder / "again.h5").stat().st_mtime == before.st_mtime
    with pytest.raises(InputError, match="sampling.stop"):
        generate(folder, "again", keys | {"stop": ["ever"]}, Solo())
