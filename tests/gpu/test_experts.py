"""Mixtures of experts on a GPU, by tiles and by grouped products, against plain sums in float64, without a wait of the host."""

import pytest
import torch

import expert_checks
import stored_cases
import test_decoding_blocks
from expert_checks import CASES, CLAMPED, IN_GROUPS, LEAST_SHARED, ROUTINGS, Case
from noria import kinds
from noria.engine.decoding import Decoder
from noria.engine.parameters import Undecoded
from noria.kernels.expert_layer import ExpertLayer
from noria.models import _experts, _routing, _tiles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def plain(hidden, chosen, weights, experts):
    hidden, weights, experts = hidden.double(), weights.double(), experts.double()
    mixed = torch.zeros_like(hidden)
    for expert, matrices in enumerate(experts):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        gate, up, down = matrices.chunk(3)
        output = torch.nn.functional.silu(hidden[token] @ gate.T) * (hidden[token] @ up.T) @ down
        mixed.index_add_(0, token, output * weights[token, choice, None])
    return mixed


def mixture(hidden, chosen, weights, experts, transposed=True):
    """_experts.mixture of experts [X, 3 * I, E]; not `transposed`: its down matrices lie [E, I], as decoded ones do."""
    inner = experts.shape[1] // 3
    down = experts[:, 2 * inner :].transpose(1, 2)
    return _experts.mixture(hidden, chosen, weights, experts[:, : 2 * inner], down if transposed else down.contiguous())


def case(num_tokens, count, num_experts, hidden, inner, dtype):
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    draw = lambda *size: torch.randn(*size, generator=generator, device="cuda")  # noqa: E731
    experts = (draw(num_experts, 3 * inner, hidden) * hidden**-0.5).to(dtype)
    chosen, weights = _routing.choose(
        _routing.Routing(count, "softmax", normalized=True), draw(num_tokens, num_experts).to(dtype)
    )
    return draw(num_tokens, hidden).to(dtype), chosen, weights, experts


@pytest.mark.parametrize(("num_tokens", "count", "num_experts"), [(1, 2, 8), (7, 8, 128), (300, 8, 128), (1000, 2, 8)])
@pytest.mark.parametrize(
    ("dtype", "transposed"), [(torch.bfloat16, True), (torch.float16, False), (torch.float32, True)]
)
def test_a_mixture_on_the_gpu_is_the_plain_sum(num_tokens, count, num_experts, dtype, transposed):
    tensors = case(num_tokens, count, num_experts, 256, 96, dtype)
    exact, found = plain(*tensors), mixture(*tensors, transposed).double()
    assert (found - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * exact.abs().max()


@pytest.fixture(params=["tiles", "grouped"])
def way(request, monkeypatch):
    """Mixtures in bfloat16 are computed this way."""
    if request.param == "grouped":
        if torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs Hopper")
        monkeypatch.setattr(_tiles, "refuses", lambda device, dtype: "not asked for")
    return request.param


def test_the_host_does_not_wait_for_a_mixture(way):
    tensors = case(300, 8, 128, 256, 96, torch.bfloat16)
    mixture(*tensors)
    assert _experts._groups(tensors[0]) and _tiles.fits(tensors[0], ExpertLayer(*tensors[3:] * 2)) == (way == "tiles")
    torch.cuda.set_sync_debug_mode("error")
    try:
        _routing.choose(_routing.Routing(8, "softmax", normalized=True), tensors[0][:, :128])
        mixture(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_grouped_products_give_the_plain_sum_where_tiles_cannot_be_built(monkeypatch):
    tensors = case(300, 8, 128, 256, 96, torch.bfloat16)
    exact, tiles = plain(*tensors), mixture(*tensors)
    monkeypatch.setattr(_tiles, "refuses", lambda device, dtype: "not asked for")
    grouped = mixture(*tensors)
    assert not torch.equal(grouped, tiles)
    assert (grouped.double() - exact).abs().max() <= 0.03 * exact.abs().max()


def kernels():
    return kinds.load("kernels", "mix")


@pytest.mark.parametrize("number", range(len(CASES)))
def test_tiles_of_any_size_give_the_plain_sum(number):
    """Each size and dtype in some of the cases: kernels are built for each."""
    dtype, its = (torch.bfloat16, torch.float16)[number % 2], kernels().TILINGS[number % 3]
    tensors = expert_checks.made(CASES[number], dtype, "cuda")
    found = kernels().mix(*tensors, tiled=lambda _: its)
    assert expert_checks.error(found, *tensors) < (0.02 if dtype == torch.bfloat16 else 0.003), its.tile


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("its", [*ROUTINGS, *IN_GROUPS], ids=str)
def test_a_kernel_chooses_as_torch_does(its, corrected):
    for experts in (13, 128) if its.groups == 1 else (16, 256):
        choose = kinds.load("kernels", "routing").choose
        (chosen, weights), expected = expert_checks.routed(its, 300, experts, corrected, "cuda", choose)
        assert (chosen == expected[0]).all(dim=1).float().mean() > 0.99  # probabilities may be equal in float32
        alike = (chosen == expected[0]).all(dim=1)
        torch.testing.assert_close(weights[alike].double(), expected[1][alike], rtol=1e-4, atol=1e-6)


COMPANIES = [
    (Case(24, 2048, 768, 8, 2048), torch.bfloat16),
    (Case(8, 2880, 1440, 4, 1500, CLAMPED, biased=True), torch.bfloat16),
    (Case(60, 1000, 520, 6, 3000, lies="decoded"), torch.float16),
]


@pytest.mark.parametrize(("case", "dtype"), COMPANIES, ids=str)
def test_a_row_has_the_same_bits_in_any_company_tile_and_card(case, dtype):
    rows, chosen, weights, layer = expert_checks.made(case, dtype, "cuda")
    whole = kernels().mix(rows, chosen, weights, layer)
    for count in (1, 5, 16, 64, 300, 1024, case.tokens):
        some = torch.randperm(case.tokens, device="cuda")[:count]
        for its in kernels().TILINGS:
            for shared in (None, LEAST_SHARED):
                found = kernels().mix(rows[some], chosen[some], weights[some], layer, lambda _, its=its: its, shared)
                assert torch.equal(found, whole[some]), (count, its.tile, shared)


class Recorded:
    """A kernel, and the shared memory of all that was compiled of it."""

    def __init__(self, kernel):
        self.kernel, self.shared = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.shared.append(self.kernel[grid](*arguments, **options).metadata.shared)

        return launch


def test_cards_with_99_kib_of_shared_memory_are_served(monkeypatch):
    rows, chosen, weights, layer = expert_checks.made(Case(16, 2048, 768, 8, 64), torch.float16, "cuda")
    recorded = [Recorded(getattr(kernels().experts, name)) for name in ("first_product", "second_product")]
    for name, one in zip(("first_product", "second_product"), recorded, strict=True):
        monkeypatch.setattr(kernels().experts, name, one)
    for its in kernels().TILINGS:
        kernels().mix(rows, chosen, weights, layer, lambda _, its=its: its, LEAST_SHARED)
    assert all(len(one.shared) == 3 and max(one.shared) <= 99 << 10 for one in recorded), [r.shared for r in recorded]


def test_a_captured_mixture_computes_what_its_rows_choose_when_it_is_replayed():
    case = Case(64, 512, 256, 4, 100)
    (rows, chosen, weights, layer), (others, other_chosen, *_) = (
        expert_checks.made(case, torch.bfloat16, "cuda", seed) for seed in (0, 1)
    )
    mix = lambda: _tiles.mix(rows, chosen, weights, layer)  # noqa: E731
    mix()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = mix()
    rows.copy_(others)
    chosen.copy_(other_chosen)
    graph.replay()
    assert torch.equal(found, _tiles.mix(others, other_chosen, weights, layer))
    gone = ExpertLayer(layer.gate_up.clone(), layer.down.clone())
    gone.gate_up[~torch.isin(torch.arange(64, device="cuda"), other_chosen)] = torch.nan
    assert torch.equal(found, _tiles.mix(others, other_chosen, weights, gone))  # only chosen experts are read


class InRuns:
    """Matrices that come a few at a time."""

    stored = None

    def __init__(self, matrices, most):
        self.matrices, self.most = matrices, most

    def __len__(self):
        return len(self.matrices)

    def of(self, wanted):
        if isinstance(wanted, range):  # a list of numbers would be sent to the device, and waited for
            return self.matrices[wanted.start : wanted.stop]
        return self.matrices[wanted]

    def listed(self, named):
        return self.matrices[named.clamp(min=0)]


@pytest.mark.parametrize("most", [1, 5, 64])
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_experts_that_come_in_runs_give_the_bits_of_all_at_once(num_tokens, most):
    hidden, chosen, weights, experts = case(num_tokens, 8, 64, 512, 256, torch.bfloat16)
    gate_up, down = experts[:, :512], experts[:, 512:].transpose(1, 2).contiguous()
    whole = _experts.mixture(hidden, chosen, weights, gate_up, down)
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = _experts.mixture(hidden, chosen, weights, InRuns(gate_up, most), InRuns(down, most))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("routing", ["random", "few", "one"])
def test_encoded_experts_are_decoded_by_lists_to_the_bits_of_all_at_once_without_a_wait(routing):
    held = test_decoding_blocks.mixture(pieces=12, inner=48, hidden=64, dtype="bfloat16")
    held = Undecoded(held.block, held.buffer.cuda())
    rows, chosen, weights, _ = expert_checks.made(Case(12, 64, 48, 3, 40, routing=routing), torch.bfloat16, "cuda")
    found = []
    for room in (0, 3 * 4096 * 8, 1 << 30):
        decoder = Decoder(held.block.decoding_room(room), torch.device("cuda"))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if found else "default")  # kernels are built the first time
        try:
            parameters = decoder.parameters("layers/0000", held)
            matrices = parameters["experts.gate_up"], parameters["experts.down"]
            whole = _experts.mixture(rows, chosen, weights, *matrices)
            few = _experts.mixture(rows[:2], chosen[:2], weights[:2], *matrices)
            found.append(torch.cat([few, whole]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert matrices[0].most == 12 and torch.equal(found[2][:2], found[2][2:4])
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


AS_STORED = [Case(24, 2048, 768, 8, 100), Case(8, 2880, 1440, 4, 60, CLAMPED, biased=True), Case(12, 1000, 520, 6, 90)]


@pytest.mark.parametrize("form", stored_cases.FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_as_they_are_stored_give_the_bits_of_those_decoded_before(form, dtype):
    case = AS_STORED[list(stored_cases.FORMS).index(form) % len(AS_STORED)]
    rows, chosen, weights, decoded, stored = stored_cases.made(form, case, dtype, "cuda")
    for its in (stored.gate_up, stored.down):
        assert not _tiles.refuses_stored(rows.device, dtype, *its.kind)
    for its, expected in ((stored.gate_up, decoded.gate_up), (stored.down, decoded.down)):
        assert torch.equal(its.plain(dtype), expected)
    whole = kernels().mix(rows, chosen, weights, decoded)
    assert torch.equal(kernels().mix(rows, chosen, weights, stored), whole)
    for count in (1, 5, 33):
        some = torch.randperm(case.tokens, device="cuda")[:count]
        for shared in (None, LEAST_SHARED):
            found = kernels().mix(rows[some], chosen[some], weights[some], stored, shared=shared)
            assert torch.equal(found, whole[some]), (count, shared)


def test_few_rows_take_encoded_experts_as_they_are_stored(monkeypatch):
    """Nothing is decoded for them, in a graph neither; for many rows all that have rows are."""
    held = test_decoding_blocks.mixture(pieces=12, inner=48, hidden=64, dtype="bfloat16")
    held = Undecoded(held.block, held.buffer.cuda())
    decoder = Decoder(held.block.decoding_room(1 << 30), torch.device("cuda"))
    parameters = decoder.parameters("layers/0000", held)
    matrices = parameters["experts.gate_up"], parameters["experts.down"]
    rows, chosen, weights, _ = expert_checks.made(Case(12, 64, 48, 3, 600), torch.bfloat16, "cuda")
    whole = _experts.mixture(rows, chosen, weights, *matrices)
    few = lambda: _experts.mixture(rows[:40], chosen[:40], weights[:40], *matrices)  # noqa: E731
    few()
    decoder.buffer.fill_(255)  # what was decoded is lost
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = few()
    graph.replay()
    assert torch.equal(found, whole[:40]) and torch.equal(few(), whole[:40])
    assert _tiles.STORED_PAIRS * 12 < 600 * 3
