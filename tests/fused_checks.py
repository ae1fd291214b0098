"""What the kernels of a layer must give on any device, in Triton's interpreter too: the formulas in float64, rounded."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from noria import models
from noria.attention import sdpa
from noria.engine.layer_cache import LayerCache
from noria.models import _fused, _rotary
from noria.models._fused import Norming
from noria.models._rotary import Rotary
from noria.step import PAGE_TOKENS, Run, Span

STEP = {torch.float32: 2**-21, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # some units in the last place


def draw(*size, dtype, device, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(found, expected, steps=2):
    step = steps * STEP[found.dtype]
    torch.testing.assert_close(found.double().cpu(), expected.double().cpu(), rtol=step, atol=step)


def normed(rows, how):
    """In float64."""
    weight, eps, bias, centered, shift = how
    rows = rows.double() - (rows.double().mean(-1, keepdim=True) if centered else 0)
    found = rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + shift)
    return found if bias is None else found + bias.double()


# Whether rows are centered, whether there is a bias, what weights are stored without.
NORMS = [(False, False, 0.0), (False, False, 1.0), (True, False, 0.0), (True, True, 0.0), (True, True, 1.0)]


def sum_and_norm(rows, width, dtype, device, kind):
    """Of rows whose branch is a part of wider rows."""
    hidden, weight, bias = (draw(*size, dtype=dtype, device=device) for size in ((rows, width), (width,), (width,)))
    centered, biased, shift = kind
    how = Norming(weight, 1e-3, bias if biased else None, centered, shift)
    branch = draw(rows, width + 8, dtype=dtype, device=device, seed=1)[:, :width]
    before, expected = hidden.clone(), (branch.double() + hidden.double()).to(dtype)
    alone = _fused.norm(hidden, how)
    total, found = _fused.add_norm(branch, hidden, how)
    assert torch.equal(hidden, before), "a layer never writes its input"
    assert total.data_ptr() == branch.data_ptr()
    torch.testing.assert_close(total, expected, rtol=STEP[dtype], atol=0)
    close(found, normed(total, how))
    close(alone, normed(hidden, how))


ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh"]


def gates(rows, width, dtype, device, activation):
    gate_up = (3 * draw(rows, 2 * width + 8, dtype=dtype, device=device))[:, : 2 * width]
    gate, up = gate_up.double().chunk(2, dim=-1)
    part = {
        "silu": lambda x: torch.sigmoid(x),
        "gelu": lambda x: torch.distributions.Normal(0.0, 1.0).cdf(x.cpu()).to(x.device),
        "gelu_pytorch_tanh": lambda x: 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    }[activation](gate)
    close(_fused.gated(gate_up, activation), gate * part * up)


def rows_alone(function, *given):
    """Whether a function of rows gives each row the same bits alone as beside the others."""
    whole = function(*given)
    return all(
        torch.equal(function(*(one[row : row + 1].clone() for one in given)), whole[row : row + 1])
        for row in range(len(whole))
    )


@dataclass(frozen=True)
class Case:
    """Heads of a layer: H, Hkv, D, Dv, R (0: not turned), whether pairs are turned, whether heads are normed."""

    heads: int
    key_heads: int
    dim: int
    width: int
    rotated: int
    pairs: bool = False
    normed: bool = False


CASES = [
    Case(4, 2, 16, 16, 16),
    Case(3, 1, 24, 40, 8),
    Case(32, 8, 128, 128, 128),
    Case(7, 7, 6, 6, 6, pairs=True),
    Case(5, 5, 12, 10, 12, normed=True),
    Case(6, 2, 48, 32, 16, normed=True),
    Case(8, 4, 8, 8, 0, normed=True),
    Case(8, 4, 8, 16, 0),
    Case(33, 3, 80, 64, 80, pairs=True, normed=True),
    Case(4, 2, 16, 16, 8, pairs=True),
]


def turned(heads, angles, pairs):
    """In float64: the first R numbers of each head turned by angles [T, R / 2]."""
    size = 2 * angles.shape[1]
    heads, first = heads.double().clone(), slice(0, size, 2) if pairs else slice(0, size // 2)
    second = slice(1, size, 2) if pairs else slice(size // 2, size)
    numbers = torch.complex(heads[..., first], heads[..., second])
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)[:, None]
    heads[..., first], heads[..., second] = numbers.real, numbers.imag
    return heads


def drawn(case, tokens, dtype, device, table=None):
    """Queries, keys and values as views of one product, and how they are made (in Rotary's order)."""
    sizes = case.heads * case.dim, case.key_heads * case.dim, case.key_heads * case.width
    parts = draw(tokens, sum(sizes), dtype=dtype, device=device).split(sizes, dim=-1)
    heads = [part.unflatten(-1, (n, -1)) for part, n in zip(parts, (case.heads, *[case.key_heads] * 2), strict=True)]
    positions = torch.arange(tokens, device=device) * 7
    tables = _rotary.tables(1e4, (), case.rotated, positions, table or dtype) if case.rotated else (None, None)
    norms = tuple(draw(case.dim, dtype=dtype, device=device, seed=seed) for seed in (1, 2)) if case.normed else None
    return heads, Rotary(*tables, case.pairs, norms, 1e-3)


def heads_written(case, dtype, device, tokens=3, table=None):
    """Into arrays whose rows are wider than their numbers, at rows in any order."""
    (queries, keys, values), rotary = drawn(case, tokens, dtype, device, table)
    arrays = [
        torch.full((40, n + 5), 7.0, dtype=dtype, device=device)[:, :n].view(40, case.key_heads, -1)
        for n in (case.key_heads * case.dim, case.key_heads * case.width)
    ]
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:tokens].to(device)
    made = _fused.rotate_and_write(queries, rotary, (keys, values), arrays, rows)
    for found, heads, place in ((made, queries, 0), (arrays[0][rows], keys, 1)):
        expected = heads
        if case.normed:
            expected = normed(heads, Norming(rotary.norms[place], rotary.eps)).to(dtype)
        if case.rotated:
            cosines, sines = rotary.cosines[:, 0, : case.rotated // 2], rotary.sines[:, 0]
            expected = turned(expected, torch.atan2(sines.double(), cosines.double()), case.pairs)
        close(found, expected, steps=4)
    assert torch.equal(arrays[1][rows], values)
    untouched = torch.ones(40, dtype=torch.bool, device=device)
    untouched[rows] = False
    assert all((array[untouched] == 7).all() and (array._base[:, -5:] == 7).all() for array in arrays)


def layer_after(config, dtype, device, tokens):
    """Hidden states after the first layer of a random model, and what its cache has then; the weights are those of bfloat16."""
    family = models.for_config(config)
    shape, parameters = family.shape(config), {}
    for name, sizes in family.layer_parameters(shape, 0).items():
        weight = draw(*sizes, dtype=torch.float32, device=device, seed=len(parameters)) * sizes[-1] ** -0.5
        parameters[name] = (weight + ("norm" in name)).bfloat16().to(dtype)
    hidden = draw(tokens, shape.hidden_size, dtype=torch.bfloat16, device=device).to(dtype)
    runs = (Run(3, -(-tokens // PAGE_TOKENS)),)
    arrays = {
        one.name: torch.zeros(16 * (tokens + 64), *one.row, dtype=dtype, device=device) for one in shape.arrays(0)
    }
    rows = torch.arange(tokens, device=device) + 3 * PAGE_TOKENS
    plan = sdpa.prepare([Span(0, tokens, tokens, runs)], torch.device(device))
    positional = family.positional(shape, torch.arange(tokens, device=device), dtype)
    cache = LayerCache(sdpa, SimpleNamespace(rows=rows, attention_plan=plan, states=None), arrays, shape.arrays(0))
    return [family.layer(shape, 0, parameters, hidden, positional, cache), *arrays.values()]


def errors(config, dtype, device, patch, tokens=37):
    """The errors of a layer by kernels and by torch alone, beside float64 on the CPU: root mean squares."""
    by_kernels = layer_after(config, dtype, device, tokens)
    patch.setattr(_fused, "refuses", lambda *given: "not now")
    plain, exact = layer_after(config, dtype, device, tokens), layer_after(config, torch.float64, "cpu", tokens)
    return [
        [float((one.double().cpu() - right).square().mean().sqrt()) for one, right in zip(found, exact, strict=True)]
        for found in (by_kernels, plain)
    ]


def made(case, dtype, device, tokens, only=None):
    """Queries made of random ones, and the keys and values that are written; of the token `only` alone if it is given."""
    heads, rotary = drawn(case, tokens, dtype, device)
    if only is not None:
        heads = [one[only : only + 1] for one in heads]
        rotary = rotary._replace(cosines=rotary.cosines[only : only + 1], sines=rotary.sines[only : only + 1])
    arrays = [torch.zeros_like(one, memory_format=torch.contiguous_format) for one in heads[1:]]
    rows = torch.arange(len(heads[0]), device=device)
    return [_fused.rotate_and_write(heads[0], rotary, heads[1:], arrays, rows), *arrays]
