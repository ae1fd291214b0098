"""Mixtures by tiles of sorted pairs in Triton's interpreter, which runs the kernels on the CPU, against sums in float64.

Needs triton, which a CPU's torch does not bring, and a numpy that its interpreter knows (below 2.4 for triton 3.6). Where
there is a GPU, gpu/test_experts.py runs the compiled kernels. The interpreter cannot multiply bfloat16.
"""

import importlib.util
import sys

import numpy as np
import pytest
import safetensors
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available() or np.lib.NumpyVersion(np.__version__) >= "2.4.0" or "noria.kernels.mix" in sys.modules:
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

with pytest.MonkeyPatch.context() as patch:  # what is imported now is interpreted
    patch.setenv("TRITON_INTERPRET", "1")
    from noria.kernels import mix, routing

import expert_checks
import families
import mixtures
import stored_cases
from expert_checks import CASES, CLAMPED, LEAST_SHARED, ROUTINGS, Case
from noria.kernels.expert_layer import ExpertLayer
from noria.models import _routing, _tiles
from noria.step import Run
from whole import Whole, tokens_of


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def by(its):
    return lambda _: its


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.tokens} tokens of {case.experts} experts")
def test_a_mixture_is_the_plain_sum_in_tiles_of_any_size(case):
    for dtype, most in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        tensors = expert_checks.made(case, dtype)
        for its in mix.TILINGS:
            assert expert_checks.error(mix.mix(*tensors, tiled=by(its)), *tensors) < most, (dtype, its.tile)


STORED = [Case(3, 96, 80, 2, 5), Case(4, 200, 72, 2, 70, CLAMPED, biased=True), Case(2, 33, 17, 1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("form", stored_cases.FORMS)
@pytest.mark.parametrize("case", STORED, ids=lambda case: f"{case.tokens} tokens of {case.hidden} numbers")
def test_experts_as_they_are_stored_give_the_bits_of_those_decoded_before(form, case):
    rows, chosen, weights, decoded, stored = stored_cases.made(form, case, torch.float16)
    for its, expected in ((stored.gate_up, decoded.gate_up), (stored.down, decoded.down)):
        assert torch.equal(its.plain(torch.float16), expected)
    expected = mix.mix(rows, chosen, weights, decoded, by(mix.STORED))
    assert torch.equal(mix.mix(rows, chosen, weights, stored), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [Case(8, 96, 40, 3, 40), Case(6, 33, 20, 2, 50, CLAMPED, biased=True)], ids=["plain", "clamped"]
)
@pytest.mark.parametrize("its", mix.TILINGS, ids=lambda its: f"tile {its.tile}")
def test_a_row_has_the_same_bits_in_any_company(case, its):
    rows, chosen, weights, layer = expert_checks.made(case, torch.float16)
    whole = mix.mix(rows, chosen, weights, layer, by(its))
    draw = torch.Generator().manual_seed(1)
    for count in (1, 2, 17, case.tokens):
        some = torch.randperm(case.tokens, generator=draw)[:count]
        assert torch.equal(mix.mix(rows[some], chosen[some], weights[some], layer, by(its)), whole[some]), count


def test_weights_may_stand_in_the_rows_of_the_pairs():
    rows, chosen, weights, layer = expert_checks.made(Case(8, 64, 32, 2, 20), torch.float32)
    given = (rows[:, None] * weights[:, :, None]).flatten(0, 1)
    found = mix.mix(given, chosen, None, layer)
    each = [expert_checks.exact(given[c::2], chosen[:, c : c + 1], torch.ones(20, 1), layer) for c in (0, 1)]
    assert (found - (each[0] + each[1])).abs().max() < 1e-5


def test_numbers_that_are_none_stay_none_and_touch_no_other_row():
    rows, chosen, weights, layer = expert_checks.made(Case(4, 40, 24, 2, 9, CLAMPED), torch.float32)
    whole = mix.mix(rows, chosen, weights, layer)
    rows[3] = torch.nan
    spoilt = mix.mix(rows, chosen, weights, layer)
    assert spoilt[3].isnan().all() and torch.equal(spoilt[[0, 8]], whole[[0, 8]])


@pytest.mark.parametrize(
    ("tokens", "count", "experts", "tile"), [(1, 1, 1, 16), (3, 8, 40, 16), (700, 6, 9, 64), (40, 2, 70, 16)]
)
@pytest.mark.parametrize("sections", [1, 4])
def test_pairs_are_sorted_and_cut_as_a_stable_sort_says(tokens, count, experts, tile, sections, monkeypatch):
    if sections > 1:
        for name, value in (("SECTIONS", sections), ("FEW_PAIRS", 0), ("PAIRS_AT_ONCE", 256)):
            monkeypatch.setattr(mix, name, value)
    draw = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, experts, generator=draw).topk(count).indices
    found = mix.sort(chosen, experts, tile)
    ids, order = chosen.flatten().sort(stable=True)
    assert torch.equal(found.order.long(), order)
    number = int(found.tiles[0])
    assert number <= found.most
    tiles, expected, starts = found.tiles[4 : 4 + 4 * number].view(-1, 4).tolist(), [], []
    named, counts = ids.unique_consecutive(return_counts=True)
    for place, (expert, length) in enumerate(zip(named.tolist(), counts.tolist(), strict=True)):
        first = int((ids < expert).sum())
        starts.append(len(expected))
        expected += [[expert, first + at, min(tile, length - at), place] for at in range(0, length, tile)]
    assert tiles == expected
    none = experts - len(named)
    assert found.named.tolist() == named.tolist() + [-1] * none
    assert found.starts.tolist() == starts + [number] * none


def test_only_experts_that_rows_chose_are_read():
    rows, chosen, weights, layer = expert_checks.made(Case(8, 48, 24, 2, 4, routing="few"), torch.float32)
    gate_up, down = layer.gate_up.clone(), layer.down.clone()
    gate_up[3:], down[3:] = torch.nan, torch.nan
    spoilt = mix.mix(rows, chosen, weights, ExpertLayer(gate_up, down, layer.gate))
    assert torch.equal(spoilt, mix.mix(rows, chosen, weights, layer))


class Listed:
    """Matrices of which those that a list names are there at a time, and nothing where it names none."""

    def __init__(self, matrices, most):
        self.matrices, self.most, self.named = matrices, most, []

    def __len__(self):
        return len(self.matrices)

    def listed(self, named):
        assert len(named) <= self.most
        self.named += named.tolist()
        found = self.matrices[named.clamp(min=0)]
        found[named < 0] = torch.nan
        return found


@pytest.mark.parametrize("most", [1, 3, 5, 99])
@pytest.mark.parametrize("routing", ["random", "few", "one"])
def test_experts_that_come_a_few_at_a_time_give_the_bits_of_all_at_once(most, routing):
    rows, chosen, weights, layer = expert_checks.made(
        Case(7, 40, 24, 2, 30, CLAMPED, biased=True, routing=routing), torch.float16
    )
    some = [Listed(matrices, most) for matrices in (layer.gate_up, layer.down)]
    found = mix.mix(rows, chosen, weights, ExpertLayer(*some, layer.gate, layer.biases), by(mix.FEW))
    assert torch.equal(found, mix.mix(rows, chosen, weights, layer, by(mix.FEW)))
    assert [one for one in some[0].named if one >= 0] == chosen.unique().tolist()


@pytest.mark.parametrize("its", mix.TILINGS, ids=lambda its: f"tile {its.tile}")
def test_blocks_fit_the_shared_memory_of_any_card(its):
    for blocks, matrices in ((its.first, 2), (its.second, 1)):
        fitting = blocks.fitting(its.tile, matrices, 2, LEAST_SHARED)
        held = fitting.stages * (its.tile + matrices * blocks.columns) * blocks.depth * 2
        assert 2 <= fitting.stages <= blocks.stages and held <= 99 * 1024


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("its", ROUTINGS, ids=lambda its: f"{its.chosen} {its.before}{its.after}")
def test_a_kernel_chooses_as_torch_does(its, corrected):
    for experts in (8, 13, 60):
        (chosen, weights), expected = expert_checks.routed(its, 5, experts, corrected, "cpu", routing.choose)
        assert torch.equal(chosen, expected[0])
        torch.testing.assert_close(weights.double(), expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("its", expert_checks.IN_GROUPS, ids=lambda its: f"{its.kept} of {its.groups}")
def test_a_kernel_chooses_within_groups_as_torch_does(its, corrected):
    for experts in (16, 32):
        (chosen, weights), expected = expert_checks.routed(its, 9, experts, corrected, "cpu", routing.choose)
        assert torch.equal(chosen, expected[0])
        torch.testing.assert_close(weights.double(), expected[1], rtol=1e-5, atol=1e-7)


def test_of_equal_scores_the_first_is_chosen_and_what_is_no_number_last():
    scores = torch.tensor([[1.0, 3.0, 3.0, torch.nan, 0.0], [torch.nan] * 5, [-torch.inf, 2.0, -torch.inf, 1.0, 3.0]])
    chosen, weights = routing.choose(scores, None, 3, ("", "softmax"), None, 1.0)
    assert chosen.tolist()[0] == [1, 2, 0] and chosen.tolist()[2] == [4, 1, 3]
    assert weights[1].isnan().all() and not weights[[0, 2]].isnan().any()
    assert 0 <= int(chosen[1].min()) and int(chosen[1].max()) < 5  # within the experts, whatever the scores


def state_of(config, folder):
    families.save(config, folder)
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4_moe", "qwen2_moe", "gpt_oss", "phimoe", "llama4_text", "beam"])
def test_families_compute_by_tiles_what_they_compute_plainly(name, monkeypatch, tmp_path):
    config = mixtures.CONFIGS[name]
    whole, called = Whole(config, state_of(config, tmp_path), torch.float32), []
    tokens = [(tokens_of(1, 9), 0, (Run(3, 4),))]
    plain = whole.logits(tokens)[0]
    mixed = mix.mix
    monkeypatch.setattr(mix, "mix", lambda *given: (called.append(len(given[0])), mixed(*given))[1])
    monkeypatch.setattr(_tiles, "fits", lambda rows, layer: True)
    monkeypatch.setattr(_routing, "_by_kernel", lambda routing, scores: routing.groups == 1 and not routing.soft_cap)
    found = whole.logits(tokens)[0]
    assert called and plain.std() > 0.3
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
