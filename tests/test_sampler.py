import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from noria.engine import sampler as module
from noria.engine.sampler import Sampler, draw, greedy, truncate
from noria.step import NO_TOKEN, Admitted, Step

LIMITS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}


def columns(rows, temperature, top_k, top_p, min_p=0.0):
    ones = torch.ones(rows, dtype=torch.float64)
    return ones * temperature, torch.full((rows,), top_k), ones * top_p, ones * min_p


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.4, 1.0])
def test_truncation_keeps_what_transformers_keeps(temperature, top_k, top_p, min_p):
    logits = torch.randn(20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    _, *limits = columns(20, temperature, top_k, top_p, min_p)
    assert torch.equal(truncate(logits / temperature, *limits), expected)


def test_a_draw_is_the_first_id_whose_cumulative_probability_exceeds_the_number():
    probabilities = np.array([0.2, 0.0, 0.5, 0.3])
    logits = torch.from_numpy(np.log(np.maximum(probabilities, 1e-300))).repeat(5, 1)
    logits[:, 1] = -torch.inf
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, *columns(5, 1.0, 0, 1.0), uniforms).tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize("temperature", [1e-310, 1e-300, 1e-9])
def test_a_temperature_near_zero_takes_the_most_likely_token(temperature):
    logits = torch.tensor([[5.0, 90.0, 89.0, -3.0]], dtype=torch.float64)
    ids = draw(logits, *columns(1, temperature, 0, 1.0), torch.tensor([0.999], dtype=torch.float64))
    assert ids.item() == 1


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]], dtype=torch.float64).repeat(20_000, 1)
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000))
    ids = draw(logits, *columns(20_000, 0.7, 3, 1.0), uniforms)
    expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0, -torch.inf]).double() / 0.7, 0)
    found = torch.bincount(ids, minlength=4).double() / 20_000
    assert torch.allclose(found, expected, atol=0.015) and found[3] == 0


def test_the_largest_number_never_draws_an_excluded_id():
    logits = torch.zeros(1, 8, dtype=torch.float64)
    logits[0, 6:] = -torch.inf
    ids = draw(logits, *columns(1, 1.0, 0, 1.0), torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert ids.item() == 5


def test_a_row_without_finite_logits_gets_no_token():
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [-torch.inf, -torch.inf]])
    assert greedy(logits).tolist() == [1, NO_TOKEN, NO_TOKEN]


def test_a_row_samples_the_same_whatever_rides_beside_it():
    torch.manual_seed(0)
    logits = torch.randn(6, 40, dtype=torch.float64)
    settings = [
        {"temperature": t, "top_k": k, "top_p": p}
        for t, k, p in [(0, 0, 1), (1, 0, 1), (1, 5, 1), (2, 0, 0.5), (0, 3, 1), (1, 4, 0.7)]
    ]
    uniforms = np.random.default_rng(1).random(6)
    sampler = Sampler(torch.device("cpu"))
    sampler.apply(Step(0, 0, admitted=tuple(Admitted(slot, (), row) for slot, row in enumerate(settings))))
    together = sampler.sample(logits, np.arange(6), uniforms, np.ones(6)).token_ids
    alone = [
        sampler.sample(logits[[row]], np.array([row]), uniforms[[row]], np.ones(1)).token_ids.item() for row in range(6)
    ]
    assert together.tolist() == alone
    assert together[0] == logits[0].argmax() and together[4] == logits[4].argmax()


def test_rows_that_exclude_no_token_are_not_sorted_and_draw_what_they_would_draw_sorted(monkeypatch):
    random = np.random.default_rng(2)
    logits = torch.from_numpy(random.normal(0, 3, (60, 500)))
    choices = [{}, {"top_k": 7}, {}, {"top_p": 0.8}, {"min_p": 0.1}, {}]
    rows = [{"temperature": 0.5 + row / 60} | choices[row % 6] for row in range(60)]
    limits = [torch.tensor([row.get(key, least) for row in rows]) for key, least in LIMITS.items()]
    uniforms, sizes = random.random(60), []
    expected = draw(logits, *limits, torch.from_numpy(uniforms)).tolist()

    def counting(scaled, *limits):
        sizes.append(len(scaled))
        return truncate(scaled, *limits)

    monkeypatch.setattr(module, "truncate", counting)
    sampler = Sampler(torch.device("cpu"))
    sampler.apply(Step(0, 0, admitted=tuple(Admitted(slot, (), row) for slot, row in enumerate(rows))))
    assert sampler.sample(logits, np.arange(60), uniforms, np.ones(60)).token_ids.tolist() == expected
    assert sizes == [30]
    plain = np.array([row for row in range(60) if row % 6 == 0])
    found = sampler.sample(logits[plain], plain, uniforms[plain], np.ones(10)).token_ids.tolist()
    assert found == [expected[row] for row in plain] and sizes == [30]
