"""Whole runs of constrained rows: tokens, texts and log-probabilities are those of a dense reference whose constraint is a
list of the texts that there are, whatever the ring."""

import itertools
import json
import math

import numpy as np
import pytest
import sampling_worker
import torch
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
from test_sampling_runs import CONFIG, DEMO, END, RUN, SEED, STATE, TEXT, text_of, uniform
from test_stop_texts import LETTERS

OBJECT = {
    "type": "object",
    "properties": {"a": {"enum": [1, 22]}, "b": {"enum": [3, 45]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
OBJECTS = [json.dumps({"a": a, "b": b}, separators=(",", ":")) for a in (1, 22) for b in (3, 45)]
WORDS = ["is my rock", "is my", 'said, "Behold"', "Größe ☃"]
REGEX = ["".join(parts) + "!" for parts in itertools.product(["ab", "cd"], repeat=3)]
# Where a constraint leaves one continuation alone, llguidance allows the tokenizer's own tokens of it and no others; these
# texts have no such places with other tokens.
# structured_outputs, all texts that it allows, other keys of the row
CASES = [
    ({"choice": WORDS}, WORDS, {}),
    ({"choice": WORDS}, WORDS, {"temperature": 1.3, "n": 4, "logprobs": 2}),
    ({"regex": "(ab|cd){3}!"}, REGEX, {"temperature": 9.0, "n": 3, "top_k": 5, "repetition_penalty": 1.4}),
    ({"json": OBJECT, "disable_any_whitespace": True}, OBJECTS, {"temperature": 1.0, "n": 2, "logprobs": 0}),
    ({"json": json.dumps({"enum": [7, 23, 45.5]})}, ["7", "23", "45.5"], {"logit_bias": {"77": 3.5}, "n": 1}),
    ({"grammar": 'root ::= "yes" | "no" " " "never"'}, ["yes", "no never"], {"temperature": 1.1, "top_p": 0.8}),
    (None, None, {"temperature": 0.7, "n": 2}),
    (None, None, {}),
    ({"choice": ["a" * 40]}, ["a" * 40], {"max_new_tokens": 3}),
    ({"choice": ["yes", "no"]}, ["yes", "no"], {"stop": "e", "seed": 4, "temperature": 1}),
]
PROMPT = "And the LORD"
BYTES = {letter: byte for byte, letter in LETTERS.items()}
PIECES = {id: bytes(BYTES[letter] for letter in piece) for piece, id in TEXT.get_vocab().items() if id > END}


def allowed(texts, token_ids):
    """The ids that may follow: those with which the bytes so far begin one of the texts, and the end where they are one."""
    said, texts = b"".join(PIECES[id] for id in token_ids), [text.encode() for text in texts]
    found = [id for id, piece in PIECES.items() if any(text.startswith(said + piece) for text in texts)]
    return found + [END] * (said in texts)


def expected(row, constraint, texts, keys, sample):
    sampling = Sampling(max_new_tokens=14, seed=SEED).override(keys)
    one = Sequence(Prompt(row, "", "", None, {}, "", None), sampling, TEXT.encode(PROMPT).ids)
    logprobs = []
    while len(one.token_ids) < sampling.max_new_tokens:
        logits = torch.from_numpy(reference.logits(CONFIG, STATE, one.prompt_token_ids + one.token_ids)[-1])
        scores = processed(one, logits[None].clone(), len(logits), (END,))
        if texts is not None:
            kept = allowed(texts, one.token_ids)
            scores = torch.full_like(scores, -torch.inf).index_copy_(1, torch.tensor(kept), scores[:, kept])
        if sampling.temperature:
            number = uniform(sampling.seed, 0 if "seed" in keys else row, sample, len(one.token_ids))
            probabilities = torch.softmax(warped(one, scores), -1)[0].numpy()
            token = int((np.cumsum(probabilities) <= number * math.fsum(probabilities)).sum())
        else:
            token = int(scores.argmax())
        logprobs.append(torch.log_softmax(logits, -1)[token].item())
        one.token_ids.append(token)
        text = text_of(one.token_ids)
        if token == END:
            return one.token_ids, "stop", text_of(one.token_ids[:-1]), logprobs
        if "stop" in keys and keys["stop"] in text:
            return one.token_ids, "stop", text[: text.find(keys["stop"])], logprobs
    return one.token_ids, "length", text_of(one.token_ids), logprobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structured")
    convert(DEMO, folder / "model.h5")
    rows = [{"prompt": PROMPT} | ({"structured_outputs": one} if one else {}) | keys for one, _, keys in CASES]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(RUN)
    return folder


@pytest.fixture(scope="module")
def wanted():
    return [
        (row, sample, expected(row, *case, sample))
        for row, case in enumerate(CASES)
        for sample in range(case[2].get("n", 1))
    ]


def compare(path, wanted):
    with open_generations(path) as file:
        rows = list(file.rows())
    assert [(row.row, row.sample) for row in rows] == [(row, sample) for row, sample, _ in wanted]
    for found, (row, _, (tokens, reason, text, logprobs)) in zip(rows, wanted, strict=True):
        assert (found.token_ids.tolist(), found.finish_reason, found.text) == (tokens, reason, text), (
            CASES[row],
            found.error,
        )
        if "logprobs" in CASES[row][2]:
            assert np.abs(found.logprobs - logprobs).max() < 1e-9, CASES[row]


@pytest.mark.slow
def test_the_reference_meets_every_kind_and_every_end(wanted):
    assert {reason for _, _, (_, reason, *_) in wanted} == {"stop", "length"}
    assert len({text for row, _, (_, _, text, _) in wanted if row == 2}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("one", {"groups": 1}),
        ("laps", {"laps": 3, "groups": 3, "microbatches": 2, "step_tokens": 20, "microbatch_tokens": 12}),
    ],
)
def test_constrained_rows_of_one_rank_are_the_references(folder, wanted, name, keys):
    assert generate(folder, name, keys, Solo()) == 0
    compare(folder / f"{name}.h5", wanted)


@pytest.mark.slow
def test_constrained_rows_of_steps_composed_ahead_are_the_references(folder, wanted, monkeypatch):
    awaited = []
    told = Step.told
    monkeypatch.setattr(Stage, "feeds", True)  # as where a GPU runs behind the host
    monkeypatch.setattr(Step, "told", lambda step, ids: awaited.append(step.awaits) or told(step, ids))
    assert generate(folder, "ahead", {"groups": 1}, Solo()) == 0
    assert sum(awaited) > 5, "no step was composed before the one before it was sampled"
    compare(folder / "ahead.h5", wanted)


@pytest.mark.slow
@pytest.mark.world
def test_constrained_rows_of_rings_are_the_references(folder, wanted):
    world.call(3, sampling_worker.work, folder, timeout=240)
    for name in sampling_worker.CASES:
        compare(folder / f"{name}.h5", wanted)


@pytest.mark.slow
def test_rows_that_were_stopped_inside_their_constraint_go_on_in_it(folder, wanted):
    assert generate(folder, "whole", {"groups": 1}, Solo()) == 0
    with open_generations(folder / "whole.h5") as file:
        rows, header = list(file.rows()), json.loads(file.attrs["header"])
    parts = Parts(folder / "resumed.h5", header)
    for place, row in enumerate(rows):
        kept = place % 3 + 1
        if kept < len(row.token_ids):
            row.status, row.finish_reason, row.text, row.token_ids = "todo", "none", "", row.token_ids[:kept]
            for name in ("logprobs", "top_ids", "top_logprobs"):
                setattr(row, name, getattr(row, name)[:kept] if getattr(row, name) is not None else None)
        if place % 4:
            parts.add(row)
    parts.seal()
    assert generate(folder, "resumed", {"groups": 2}, Solo()) == 0
    compare(folder / "resumed.h5", wanted)


@pytest.mark.slow
def test_tokens_of_an_earlier_job_that_the_constraint_does_not_take_are_generated_anew(folder, wanted):
    with open_generations(folder / "whole.h5") as file:
        rows, header = list(file.rows()), json.loads(file.attrs["header"])
    parts = Parts(folder / "anew.h5", header)
    for row in rows[:3]:
        row.status, row.finish_reason, row.text, row.token_ids = "todo", "none", "", np.array([300, 301], np.int32)
        for name in ("logprobs", "top_ids", "top_logprobs"):
            setattr(row, name, getattr(row, name)[:2] if getattr(row, name) is not None else None)
        parts.add(row)
    parts.seal()
    assert generate(folder, "anew", {"groups": 2}, Solo()) == 0
    compare(folder / "anew.h5", wanted)


@pytest.mark.slow
def test_the_keys_of_a_run_constrain_every_row_that_has_none_of_its_own(folder):
    (folder / "plain.jsonl").write_text(
        '{"prompt": "The LORD"}\n{"prompt": "The LORD", "structured_outputs": {"choice": ["maybe"]}}\n'
        '{"prompt": "The LORD", "response_format": {"type": "text"}, "max_new_tokens": 2}\n'
    )
    (folder / "schema.json").write_text(json.dumps({"enum": ["yes", None]}))
    ways = {"choice": "yes,null", "regex": "yes|null", "json_schema": str(folder / "schema.json")}
    for name, value in ways.items():
        files = {"prompts": "plain.jsonl"}
        assert generate(folder, f"run_{name}", {name: value, "groups": 1}, Solo(), **files) == 0
        with open_generations(folder / f"run_{name}.h5") as file:
            texts = [row.text for row in file.rows()]
        assert texts[0] in ('"yes"', "null") if name == "json_schema" else texts[0] in ("yes", "null")
        assert texts[1] == "maybe" and texts[2] not in ("yes", "null", '"yes"')
    (folder / "schema.json").write_text(json.dumps({"enum": ["no"]}))
    with pytest.raises(InputError, match="another run: sampling.structured_outputs"):
        generate(folder, "run_json_schema", {"json_schema": str(folder / "schema.json")}, Solo(), prompts="plain.jsonl")
