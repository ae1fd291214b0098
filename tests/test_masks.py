"""Masks as data, and what they do to logits, against numpy on the same numbers."""

import warnings

import numpy as np
import pytest
import torch

from noria.engine import sampler as module
from noria.engine.masking import masking
from noria.engine.sampler import Sampler
from noria.masks import ANY, Masks
from noria.step import NO_TOKEN, NONE_LEFT, Admitted, Step

VOCAB = 21


def masks_of(wanted, width=3):
    """Masks by sample: a token id, or the ids that are allowed."""
    samples = sorted(wanted)
    forced = [one if isinstance(one := wanted[sample], int) else ANY for sample in samples]
    rows = []
    for sample in samples:
        if not isinstance(wanted[sample], int):
            allowed = np.zeros(8 * width, np.uint8)
            allowed[list(wanted[sample])] = 1
            rows.append(np.packbits(allowed, bitorder="little"))
    bits = np.array(rows, np.uint8).reshape(-1, width)
    return Masks(np.array(samples, np.int32), np.array(forced, np.int32), bits)


WANTED = {0: [3, 20], 2: 7, 3: [0], 5: 11, 6: [], 7: list(range(VOCAB))}


def test_a_message_decodes_to_the_masks_that_it_encodes():
    for masks in (masks_of(WANTED), masks_of({4: 1}), masks_of({1: [2]}), masks_of({})):
        again = Masks.decode(masks.encode())
        assert all(
            np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(again._arrays(), masks._arrays(), strict=True)
        )


def test_masks_of_a_message_are_put_on_the_device_without_a_warning():
    masks = Masks.decode(masks_of({1: [2], 2: [3, 20]}).encode())
    scores = torch.zeros(3, VOCAB, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for edit in masking(masks, [0, 1, 2], VOCAB):
            edit(scores.view(-1), torch.from_numpy)
    assert [np.flatnonzero(row == 0).tolist() for row in scores.numpy()][1:] == [[2], [3, 20]]


@pytest.mark.parametrize(("first", "last"), [(0, 8), (1, 4), (3, 7), (6, 6), (2, 3)])
def test_masks_of_a_stretch_of_samples_count_from_its_first(first, last):
    part = {sample - first: one for sample, one in WANTED.items() if first <= sample < last}
    found, expected = masks_of(WANTED).within(first, last), masks_of(part)
    assert all(map(np.array_equal, found._arrays(), expected._arrays()))


def sampler_of(count, settings):
    sampler = Sampler(torch.device("cpu"))
    sampler.apply(Step(0, 0, admitted=tuple(Admitted(slot, (), settings | {"masked": True}) for slot in range(count))))
    return sampler


@pytest.mark.parametrize("elements", [2**24, 1, 2 * VOCAB])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_a_mask_allows_is_sampled_and_rows_without_one_as_before(temperature, elements, monkeypatch):
    monkeypatch.setattr(module, "DRAW_ELEMENTS", elements)
    random = np.random.default_rng(0)
    logits, uniforms = random.normal(size=(9, VOCAB)), random.random(9)
    logits[8] = np.nan
    sampler = sampler_of(9, {"temperature": temperature, "top_k": 0, "top_p": 1.0})
    found = sampler.sample(
        torch.from_numpy(logits), np.arange(9), uniforms, np.ones(9, int), -1, masks_of(WANTED | {8: [1]})
    )
    expected = []
    for row in range(8):
        allowed = WANTED.get(row, range(VOCAB))
        allowed = [allowed] if isinstance(allowed, int) else list(allowed)
        weights = np.zeros(VOCAB)
        weights[allowed] = np.exp(logits[row, allowed])
        drawn = (
            weights.argmax()
            if not temperature
            else np.searchsorted(weights.cumsum(), uniforms[row] * weights.sum(), "right")
        )
        expected.append(int(drawn) if allowed else NONE_LEFT)
    assert found.token_ids.tolist() == [*expected, NO_TOKEN]


def test_log_probabilities_are_those_without_the_masks():
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(8, VOCAB)))
    sampler = sampler_of(8, {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "logprobs": 2})
    found = sampler.sample(logits, np.arange(8), np.full(8, 0.5), np.ones(8, int), 2, masks_of({2: 7, 3: [4]}))
    raw = torch.log_softmax(logits, -1)
    assert found.token_ids[2:4].tolist() == [7, 4]
    assert torch.equal(found.logprobs, raw.gather(1, found.token_ids[:, None])[:, 0])
    assert torch.equal(found.top_logprobs, raw.topk(2).values)


def test_a_mask_that_is_wider_or_narrower_than_the_vocabulary_counts_by_ids():
    logits = torch.zeros(2, 30, dtype=torch.float64)
    logits[:, 25:] = 5
    sampler = sampler_of(2, {"temperature": 0.0, "top_k": 0, "top_p": 1.0})
    narrow = sampler.sample(logits, np.arange(2), np.zeros(2), np.ones(2, int), -1, masks_of({0: [4, 23], 1: [9]}))
    wide = sampler.sample(logits, np.arange(2), np.zeros(2), np.ones(2, int), -1, masks_of({0: [26, 39], 1: [39]}, 5))
    assert narrow.token_ids.tolist() == [4, 9]
    assert wide.token_ids.tolist() == [26, NONE_LEFT]
