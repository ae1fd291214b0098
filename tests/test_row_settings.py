"""What a row's settings do to its logits, against transformers' logits processors on the same logits."""

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from noria.engine.row_settings import Counts, RowSettings, SlotColumns, edits_of
from noria.engine.sampler import Sampler
from noria.rows.prompts import Prompt
from noria.rows.sequence import Sequence, sampler_settings
from noria.sampling import Sampling
from noria.step import NONE_LEFT, Admitted, Step

VOCAB, END = 60, (2, 7)
CASES = {
    "nothing": {},
    "logit_bias": {"logit_bias": {"5": 8.5, "59": -100, "0": 0.25}},
    "repetition": {"repetition_penalty": 1.7},
    "repetition below 1": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.4},
    "a negative frequency": {"frequency_penalty": -0.9},
    "min_new_tokens": {"min_new_tokens": 7, "stop_token_ids": [11, 12], "logit_bias": {"2": 50, "12": 45}},
    "min_new_tokens reached": {"min_new_tokens": 6, "logit_bias": {"2": 50}},
    "min_new_tokens and ignore_eos": {"min_new_tokens": 9, "ignore_eos": True, "stop_token_ids": [11]},
    "everything": {
        "logit_bias": {"5": 3, "9": -4.5},
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.2,
        "min_new_tokens": 8,
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
    },
}


def sequence(keys, row=0):
    """Nine tokens of prompt and six generated, with repetitions in both."""
    random = np.random.default_rng(row)
    prompt = random.integers(0, 15, 9).tolist()
    new = random.integers(8, 20, 6).tolist()
    return Sequence(Prompt(row, "", "", prompt, {}, "", None), Sampling().override(keys), prompt, token_ids=new)


def header_of(one):
    """What travels at admission: when nothing is cached yet."""
    return sampler_settings(one, END)


def reference(one, scores, vocab_size=VOCAB, end=END):
    """[1, V] scores as transformers, and OpenAI's formula in plain numpy, make them."""
    sampling, ids = one.sampling, torch.tensor([one.prompt_token_ids + one.token_ids])
    if sampling.logit_bias:
        bias = {(int(token_id),): float(value) for token_id, value in sampling.logit_bias.items()}
        scores = SequenceBiasLogitsProcessor(bias)(ids, scores)
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    counts = np.bincount(np.array(one.token_ids, int), minlength=vocab_size)
    taken = counts * sampling.frequency_penalty + (counts > 0) * sampling.presence_penalty
    scores = scores - torch.from_numpy(taken)
    ends = [*([] if sampling.ignore_eos else end), *(sampling.stop_token_ids or [])]
    if sampling.min_new_tokens and ends:
        length = len(one.prompt_token_ids)
        scores = MinNewTokensLengthLogitsProcessor(length, sampling.min_new_tokens, ends)(ids, scores)
    return scores


def warped(one, scores):
    sampling, warpers = one.sampling, LogitsProcessorList([TemperatureLogitsWarper(one.sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(None, scores)


def feed(sampler, sequences):
    """The steps that carry these sequences: prompts in two chunks, then a token a step."""
    admitted = tuple(Admitted(slot, (), header_of(one)) for slot, one in enumerate(sequences))
    sampler.apply(Step(0, 0, admitted=admitted))
    tokens = [one.prompt_token_ids + one.token_ids for one in sequences]
    borders = [0, 4, *range(len(sequences[0].prompt_token_ids), len(tokens[0]) + 1)]
    slots = np.arange(len(sequences))
    for start, stop in itertools.pairwise(borders):
        ids = np.concatenate([row[start:stop] for row in tokens])
        sampler.count(
            Step(0, 0, slots=slots, counts=slots * 0 + stop - start, positions=slots * 0 + start, token_ids=ids)
        )
    return slots * 0 + len(tokens[0])


def logits_of(rows, seed=3):
    return torch.randn(rows, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("name", CASES)
def test_logits_are_changed_as_transformers_changes_them(name):
    one = sequence(CASES[name])
    settings = RowSettings.from_header(header_of(one))
    if settings.counts:
        settings.counts.add(one.prompt_token_ids + one.token_ids, 0)
    scores = logits_of(1)
    expected = reference(one, scores.clone())
    for edit in edits_of([settings], np.array([15]), VOCAB):
        edit(scores.view(-1), torch.from_numpy)
    assert torch.allclose(scores, expected, rtol=1e-15, atol=1e-14)
    assert torch.equal(torch.isinf(scores), torch.isinf(expected))


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_a_mixed_batch_takes_the_token_that_its_own_processors_give(name):
    names = list(CASES)
    for temperature in (0.0, 0.8):
        sequences = [sequence(CASES[one] | {"temperature": temperature}, row) for row, one in enumerate(names)]
        sampler = Sampler(torch.device("cpu"))
        positions = feed(sampler, sequences)
        logits, uniforms = logits_of(len(names)), np.random.default_rng(1).random(len(names))
        found = sampler.sample(logits, np.arange(len(names)), uniforms, positions).token_ids
        row = names.index(name)
        scores = reference(sequences[row], logits[row : row + 1].clone())
        if temperature == 0:
            assert found[row] == scores.argmax()
        else:
            probabilities = torch.softmax(warped(sequences[row], scores), -1)[0].numpy()
            target = uniforms[row] * probabilities.sum()
            assert found[row] == int((np.cumsum(probabilities) <= target).sum())


def test_logits_that_nothing_changes_are_searched_once_and_are_left_alone():
    sampler = Sampler(torch.device("cpu"))
    positions = feed(sampler, [sequence({}), sequence({"top_k": 3, "min_p": 0.5, "stop_token_ids": [4]})])
    sampler._choose = None
    logits = logits_of(2)
    before = logits.clone()
    assert torch.equal(sampler.sample(logits, np.arange(2), np.zeros(2), positions).token_ids, logits.argmax(-1))
    assert torch.equal(before, logits)


def test_log_probabilities_are_those_of_the_raw_distribution_for_the_rows_that_ask():
    keys = [{}, {"logprobs": 0, "temperature": 0.5}, {"logprobs": 3, **CASES["everything"]}, {"logprobs": 5}]
    sequences = [sequence(one, row) for row, one in enumerate(keys)]
    sampler = Sampler(torch.device("cpu"))
    positions = feed(sampler, sequences)
    logits, slots = logits_of(4), np.arange(4)
    top = sampler.top(slots)
    found = sampler.sample(logits, slots, np.full(4, 0.7), positions, top)
    raw = torch.log_softmax(logits, -1).numpy()
    assert top == 5 and np.isnan(found.logprobs[0].item()) and (found.top_ids[:1] == -1).all()
    for row in (1, 2, 3):
        assert abs(found.logprobs[row].item() - raw[row, found.token_ids[row]]) < 1e-12
    for row in (2, 3):
        best = np.argsort(-raw[row])[:5]
        assert found.top_ids[row].tolist() == best.tolist()
        assert np.allclose(found.top_logprobs[row], raw[row, best], atol=1e-12, rtol=0)
    assert sampler.top(slots[:1]) == -1 and sampler.top(slots[:2]) == 0
    wide = sampler.sample(logits, slots, np.zeros(4), positions, 100)
    assert wide.top_ids.shape == (4, VOCAB)


def test_prompts_are_scored_by_the_raw_distribution_in_chunks(monkeypatch):
    monkeypatch.setattr("noria.engine.sampler.DRAW_ELEMENTS", VOCAB * 3)
    logits, ids = logits_of(8), torch.arange(8) * 7
    expected = torch.log_softmax(logits, -1)[torch.arange(8), ids]
    assert torch.allclose(Sampler(torch.device("cpu")).score(logits, ids), expected, atol=1e-14)


def test_a_row_in_which_everything_is_banned_gets_no_token():
    one = sequence({"min_new_tokens": 9, "stop_token_ids": list(range(VOCAB)), "temperature": 1.0})
    sampler = Sampler(torch.device("cpu"))
    positions = feed(sampler, [one])
    assert sampler.sample(logits_of(1), np.array([0]), np.array([0.5]), positions).token_ids.tolist() == [NONE_LEFT]


def test_tokens_that_are_given_again_are_counted_once():
    counts = Counts(prompt_length=3)
    counts.add([5, 6, 5], 0)
    counts.add([5, 9], 3)
    counts.add([5, 9], 3)
    counts.add([9, 9], 4)
    assert dict(zip(counts.ids.tolist(), counts.generated.tolist(), strict=True)) == {5: 1, 6: 0, 9: 2}
    many = Counts(0)
    many.add(list(range(500)) * 2, 0)
    assert many.ids.tolist() == list(range(500)) and (many.generated == 2).all()


def test_columns_of_slots_are_those_of_their_last_rows():
    random, columns, rows = np.random.default_rng(0), SlotColumns(), {}
    for _ in range(500):
        slot = int(random.integers(0, 200)) * 10**6
        if random.random() < 0.3:
            columns.drop(slot)
            rows.pop(slot, None)
        else:
            rows[slot] = [float(number) for number in random.random(4)]
            names = ("temperature", "top_k", "top_p", "min_p")
            columns.put(slot, RowSettings.from_header(dict(zip(names, rows[slot], strict=True))))
    slots = np.array([*rows, 7])
    assert columns.of(slots).tolist() == [*rows.values(), [0.0] * 4] and len(rows) > 64


def test_a_row_that_goes_on_elsewhere_knows_what_it_has_generated():
    """`shared`: tokens of its prompt and its own, that no step will carry."""
    words = {"temperature": 0.0, "prompt_length": 2, "bad_words": [[7, 8, 9]], "presence_penalty": 0.5}
    before, after = RowSettings.from_header(words), RowSettings.from_header(words | {"shared": [1, 2, 7, 8]})
    before.add([1, 2, 7, 8], 0)
    for row in (before, after):
        assert row.bad_words.banned().tolist() == [9]
        assert dict(zip(row.counts.ids.tolist(), row.counts.generated.tolist(), strict=True)) == {
            1: 0,
            2: 0,
            7: 1,
            8: 1,
        }
