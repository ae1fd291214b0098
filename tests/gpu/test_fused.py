"""The kernels of a layer on a CUDA device: their formulas rounded, the same bits for a row alone, and a copy's rate."""

import functools
import json

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import fused_checks
from noria.models import _fused
from noria.models._fused import Norming

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HALVES = [torch.float16, torch.bfloat16]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}
LAYERS = {
    "llama": LLAMA,
    "qwen3": LLAMA
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 2560, "head_dim": 128},
    "phi3": LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75},
}
HEADS = fused_checks.Case(32, 8, 128, 128, 128)
LEAST_SHARE = 0.8


def device():
    return torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_are_built_and_found_right(dtype):
    assert _fused.refuses(device(), dtype) == ""
    assert "float16 and bfloat16" in _fused.refuses(device(), torch.float32)


# Few of each, since each is built: every width, every kind, both dtypes.
@pytest.mark.parametrize(
    ("width", "kind", "dtype"),
    [(width, fused_checks.NORMS[0], torch.bfloat16) for width in (1, 44, 4096, 5120, 16384)]
    + [(1000, kind, HALVES[number % 2]) for number, kind in enumerate(fused_checks.NORMS)],
)
def test_a_row_is_summed_and_normed(width, kind, dtype):
    fused_checks.sum_and_norm(3, width, dtype, device(), kind)


@pytest.mark.parametrize(
    ("width", "activation", "dtype"),
    [(width, "silu", torch.bfloat16) for width in (1, 44, 14336)]
    + [(2100, activation, torch.float16) for activation in fused_checks.ACTIVATIONS],
)
def test_gates_multiply_ups(width, activation, dtype):
    fused_checks.gates(3, width, dtype, device(), activation)


@pytest.mark.parametrize("number", range(len(fused_checks.CASES)))
def test_heads_are_normed_turned_and_written(number):
    case, dtype = fused_checks.CASES[number], HALVES[number % 2]
    fused_checks.heads_written(case, dtype, device(), table=torch.float32 if case.pairs else None)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_has_the_same_bits_alone(dtype):
    hidden = fused_checks.draw(300, 4096, dtype=dtype, device=device())
    how = Norming(torch.ones(4096, dtype=dtype, device=device()), 1e-6)
    assert fused_checks.rows_alone(lambda rows: _fused.norm(rows, how), hidden)
    assert fused_checks.rows_alone(lambda rows, branch: _fused.add_norm(branch.clone(), rows, how)[1], hidden, hidden)
    assert fused_checks.rows_alone(_fused.gated, hidden)
    case = fused_checks.Case(32, 8, 128, 128, 128, normed=True)
    whole, alone = (fused_checks.made(case, dtype, device(), 300, only) for only in (None, 17))
    assert all(torch.equal(one[17:18], other) for one, other in zip(whole, alone, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_by_kernels_is_as_right_as_by_torch(name, dtype, monkeypatch):
    found, plain = fused_checks.errors(LAYERS[name], dtype, device(), monkeypatch)
    assert all(ours < 1.2 * theirs for ours, theirs in zip(found, plain, strict=True)), (found, plain)


def test_a_graph_of_kernels_gives_what_they_give():
    hidden, weight = (fused_checks.draw(*size, dtype=torch.bfloat16, device=device()) for size in ((5, 512), (512,)))
    (queries, keys, values), rotary = fused_checks.drawn(HEADS, 5, torch.bfloat16, device())
    arrays = [torch.zeros(64, 8, 128, dtype=torch.bfloat16, device=device()) for _ in range(2)]
    rows = torch.arange(5, device=device()) + 3

    def step():
        total, normed = _fused.add_norm(hidden.clone(), hidden, Norming(weight, 1e-6))
        made = _fused.rotate_and_write(queries, rotary, (keys, values), arrays, rows)
        return total, normed, _fused.gated(normed), made

    expected, written = [one.clone() for one in step()], [one.clone() for one in arrays]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for array in arrays:
        array.zero_()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip([*found, *arrays], [*expected, *written], strict=True))


def seconds(calls):
    """Of a call of these, which take turns so that the cache of the device holds nothing of the next one's."""
    for call in calls[:2]:
        call()
    found = []
    for _ in range(5):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(20_000_000)  # while the host launches what is timed
        before.record()
        for call in calls:
            call()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after) / 1e3 / len(calls))
    return min(found)


def sums(tokens):
    given = (fused_checks.draw(tokens, 4096, dtype=torch.bfloat16, device=device()) for _ in range(2))
    return functools.partial(
        _fused.add_norm, *given, Norming(torch.ones(4096, dtype=torch.bfloat16, device=device()), 1e-5)
    )


def products(tokens):
    return functools.partial(_fused.gated, torch.zeros(tokens, 2 * 14336, dtype=torch.bfloat16, device=device()))


def heads(tokens, case=HEADS):
    (queries, keys, values), rotary = fused_checks.drawn(case, tokens, torch.bfloat16, device())
    arrays = [torch.zeros(2 * tokens, 8, 128, dtype=torch.bfloat16, device=device()) for _ in range(2)]
    rows = torch.arange(tokens, device=device()) * 2
    return functools.partial(_fused.rotate_and_write, queries, rotary, (keys, values), arrays, rows)


def normed_heads(tokens):
    return heads(tokens, fused_checks.Case(32, 8, 128, 128, 128, normed=True))


NUMBERS = {
    sums: 4 * 4096,
    products: 3 * 14336,
    heads: 2 * 48 * 128,
    normed_heads: 2 * 48 * 128,
}  # of a token, read or written


@pytest.mark.parametrize("tokens", [16, 256, 1024, 16384])
@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.__name__)
def test_kernels_move_their_bytes_at_the_rate_of_a_copy(kind, tokens):
    nbytes = NUMBERS[kind] * tokens * 2
    turns = max(2, min(16, (1 << 30) // nbytes))
    took = seconds([kind(tokens) for _ in range(turns)])
    pairs = [[torch.zeros(nbytes // 2, dtype=torch.uint8, device=device()) for _ in range(2)] for _ in range(turns)]
    copied = seconds([functools.partial(into.copy_, source) for into, source in pairs])
    print(
        json.dumps(
            {"kernel": kind.__name__, "tokens": tokens, "us": round(took * 1e6, 1), "share": round(copied / took, 3)}
        )
    )
    assert copied / took >= LEAST_SHARE or tokens < 1024
