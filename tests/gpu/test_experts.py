"""Mixtures of experts on a GPU: the grouped product against a plain sum in float64, without a wait of the host."""

import pytest
import torch

from noria.models import _experts, _routing

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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_mixture_on_the_gpu_is_the_plain_sum(num_tokens, count, num_experts, dtype, transposed):
    tensors = case(num_tokens, count, num_experts, 256, 96, dtype)
    exact, found = plain(*tensors), mixture(*tensors, transposed).double()
    assert (found - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * exact.abs().max()


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs Hopper")
def test_the_host_does_not_wait_for_a_grouped_mixture():
    tensors = case(300, 8, 128, 256, 96, torch.bfloat16)
    mixture(*tensors)
    assert _experts._groups(tensors[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        _routing.choose(_routing.Routing(8, "softmax", normalized=True), tensors[0][:, :128])
        mixture(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class InRuns:
    """Matrices that come a few at a time."""

    def __init__(self, matrices, most):
        self.matrices, self.most = matrices, most

    def __len__(self):
        return len(self.matrices)

    def of(self, wanted):
        return self.matrices[list(wanted)]


@pytest.mark.parametrize("most", [1, 5, 64])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_experts_that_come_in_runs_give_the_bits_of_all_at_once(num_tokens, most):
    hidden, chosen, weights, experts = case(num_tokens, 8, 64, 512, 256, torch.bfloat16)
    gate_up, down = experts[:, :512], experts[:, 512:].transpose(1, 2).contiguous()
    whole = _experts.mixture(hidden, chosen, weights, gate_up, down)
    parts = _experts.mixture(hidden, chosen, weights, InRuns(gate_up, most), InRuns(down, most))
    assert torch.equal(whole, parts)
