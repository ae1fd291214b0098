"""Mixtures with biases, another gate, weighted inputs, on a GPU: grouped products against plain sums in float64."""

import pytest
import torch

from noria.kernels.expert_layer import Gate
from noria.models import _experts, _gates, _routing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EXPERTS, HIDDEN, INNER, CHOSEN = 32, 320, 96, 4
GATE = Gate(alpha=1.702, limit=7.0, shift=1.0, alternating=True)


def case(num_tokens, dtype):
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    draw = lambda *size: torch.randn(*size, generator=generator, device="cuda").to(dtype)  # noqa: E731
    gate_up, down = draw(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5, draw(EXPERTS, HIDDEN, INNER) * INNER**-0.5
    biases = draw(EXPERTS, 2 * INNER), draw(EXPERTS, HIDDEN)
    routing = _routing.Routing(CHOSEN, after="softmax")
    chosen, weights = _routing.choose(routing, draw(num_tokens, EXPERTS))
    return draw(num_tokens, HIDDEN), chosen, weights, gate_up, down, biases


def plain(hidden, chosen, weights, gate_up, down, biases, on_inputs):
    """One token and one choice after another."""
    mixed = torch.zeros_like(hidden, dtype=torch.float64)
    for token, (experts, its) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
        for expert, weight in zip(experts, its, strict=True):
            row = hidden[token].double() * (weight if on_inputs else 1)
            inner = gate_up[expert].double() @ row
            if on_inputs:
                gate, up = inner.chunk(2)
                mixed[token] += down[expert].double() @ (torch.nn.functional.silu(gate) * up)
            else:
                output = (
                    down[expert].double() @ _gates.inner(GATE, inner + biases[0][expert].double())
                    + biases[1][expert].double()
                )
                mixed[token] += weight * output
    return mixed


@pytest.mark.parametrize("on_inputs", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_biases_gates_and_weighted_inputs_are_those_of_the_plain_sum(num_tokens, dtype, on_inputs):
    hidden, chosen, weights, gate_up, down, biases = case(num_tokens, dtype)
    exact = plain(hidden, chosen, weights, gate_up, down, biases, on_inputs)
    if on_inputs:
        found = _experts.mixture_of_weighted(hidden, chosen, weights, gate_up, down)
    else:
        found = _experts.mixture(hidden, chosen, weights, gate_up, down, GATE, biases)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_token_s_mixture_has_the_same_bits_in_any_company(dtype):
    hidden, chosen, weights, gate_up, down, biases = case(70, dtype)
    whole = _experts.mixture(hidden, chosen, weights, gate_up, down, GATE, biases)
    for token in (0, 33, 69):
        own = slice(token, token + 1)
        alone = _experts.mixture(hidden[own], chosen[own], weights[own], gate_up, down, GATE, biases)
        assert torch.equal(alone[0], whole[token])
