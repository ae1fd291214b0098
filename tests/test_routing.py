"""Routing: which experts a token goes to, against one token after another in numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from noria.errors import InputError
from noria.models import _routing, _tiles
from noria.models._routing import Routing

T, X = 40, 12


def scores_of(seed=0, size=(T, X)):
    return np.random.default_rng(seed).normal(size=size) * 3


def found(routing, scores, correction=None):
    correction = None if correction is None else torch.from_numpy(correction)
    chosen, weights = _routing.choose(routing, torch.from_numpy(scores), correction)
    assert weights.dtype == torch.float64
    return [dict(zip(*pair, strict=True)) for pair in zip(chosen.tolist(), weights.tolist(), strict=True)]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose([one[expert] for expert in other], list(other.values()), rtol=1e-13)


def softmax(row):
    return np.exp(row - row.max()) / np.exp(row - row.max()).sum()


def sigmoid(row):
    return 1 / (1 + np.exp(-row))


def best(row, count):
    return sorted(range(len(row)), key=lambda place: -row[place])[:count]


def test_softmax_before_the_choice_weighs_by_the_probabilities_of_all_experts():
    scores = scores_of()
    expected = [{x: softmax(row)[x] for x in best(row, 3)} for row in scores]
    same(found(Routing(3, before="softmax"), scores), expected)
    expected = [{x: weight / sum(row.values()) for x, weight in row.items()} for row in expected]
    same(found(Routing(3, before="softmax", normalized=True), scores), expected)


def test_softmax_after_the_choice_weighs_by_the_probabilities_of_the_chosen():
    scores = scores_of(1)
    expected = [dict(zip(best(row, 4), softmax(np.array(sorted(row)[::-1][:4])), strict=True)) for row in scores]
    same(found(Routing(4, after="softmax"), scores), expected)


def test_a_correction_counts_for_the_choice_and_not_in_the_weight():
    scores, correction = scores_of(2), scores_of(3, X)
    chosen = [best(sigmoid(row) + correction, 3) for row in scores]
    assert chosen != [best(row, 3) for row in scores]
    rows = [{x: sigmoid(row)[x] for x in its} for row, its in zip(scores, chosen, strict=True)]
    expected = [{x: 2.5 * weight / sum(row.values()) for x, weight in row.items()} for row in rows]
    same(found(Routing(3, before="sigmoid", normalized=True, scaling=2.5), scores, correction), expected)


@pytest.mark.parametrize("summed", [1, 2])
def test_a_token_s_experts_are_in_the_groups_whose_best_experts_have_the_largest_sum(summed):
    scores, correction, expected = scores_of(4), scores_of(5, X) - 9, []
    for row in scores:
        ranks = sigmoid(row) + correction
        of_group = [sum(sorted(ranks[first : first + 3])[-summed:]) for first in range(0, X, 3)]
        inside = [group * 3 + place for group in best(of_group, 2) for place in range(3)]
        expected.append({inside[n]: sigmoid(row)[inside[n]] for n in best(ranks[inside], 4)})
    same(found(Routing(4, before="sigmoid", groups=4, kept=2, best=summed), scores, correction), expected)
    assert expected != [{x: sigmoid(row)[x] for x in best(sigmoid(row) + correction, 4)} for row in scores]


def test_weights_whose_sum_is_less_than_the_least_are_divided_by_the_least():
    scores = np.full((1, 4), -50.0) - np.arange(4)
    same(
        found(Routing(2, before="sigmoid", normalized=True, least=1e-9), scores),
        [{0: sigmoid(-50) / 1e-9, 1: sigmoid(-51) / 1e-9}],
    )


def test_the_sparse_mixer_weighs_a_choice_among_those_that_are_nearly_as_good():
    scores, expected = scores_of(6), []
    scores[::2] *= 0.05  # some rows with rivals, and with negative scores alone
    scores[::4] -= 1.0
    for row in scores:
        its, left = {}, set(range(X))
        for _ in range(2):
            top = max(left, key=lambda x: row[x])
            near = [x for x in left if (row[top] - row[x]) / max(abs(row[x]), row[top]) <= 0.4]
            its[top] = np.exp(row[top]) / np.exp(row[near]).sum()
            left.remove(top)
        expected.append(its)
    chosen, weights = _routing.sparse_mixer(torch.from_numpy(scores), 0.2)
    same([dict(zip(*pair, strict=True)) for pair in zip(chosen.tolist(), weights.tolist(), strict=True)], expected)
    assert len({len(row) for row in expected}) == 1 and (weights < 0.9).any() and (weights == 1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precisions_are_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, router = (torch.randn(size, 64, generator=generator).to(dtype) for size in (5, 7))
    bias = torch.randn(7, generator=generator)
    scores = _routing.scores_of(hidden, router, bias)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, hidden.float() @ router.float().T + bias, rtol=1e-6, atol=1e-6)
    assert _routing.choose(Routing(2, "softmax"), scores)[1].dtype == torch.float32
    assert _routing.scores_of(hidden.double(), router.double(), bias).dtype == torch.float64


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"n_group": 5}, "(12) is not a multiple of n_group (5)"),
        ({"n_group": 4, "topk_group": 5}, "topk_group (5) is more than n_group (4)"),
        ({"n_group": 12, "topk_group": 12}, "n_group is 12: a group must have at least 2 experts"),
        ({"n_group": 4, "topk_group": 1}, "num_experts_per_tok (4) is more than topk_group (1) x 3"),
        ({"routed_scaling_factor": -1}, "routed_scaling_factor is -1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1"),
    ],
)
def test_routing_that_cannot_be_is_refused_by_name(config, words):
    with pytest.raises(InputError) as error:
        _routing.corrected_sigmoid(config, 12, 4)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("routing", "experts", "expected"),
    [
        (Routing(2), 60, True),
        (Routing(2, groups=8, kept=4), 256, True),
        (Routing(2, groups=4, kept=2), 60, False),
        (Routing(2, groups=6, kept=2), 96, False),
        (Routing(2, soft_cap=30.0), 64, False),
    ],
)
def test_a_kernel_chooses_on_gpus_where_groups_are_powers_of_two(routing, experts, expected, monkeypatch):
    monkeypatch.setattr(_tiles, "chooses", lambda device: True)
    scores = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(3, experts), device="cuda")
    assert _routing._by_kernel(routing, scores) == expected
    scores.dtype = torch.float64
    assert not _routing._by_kernel(routing, scores)
