"""Which products go by the kernel of fixed order (products.py), and where that serves.

T tokens, I inputs, O outputs. A run chooses at its start; elsewhere nothing is chosen.
"""

import contextlib
from collections.abc import Container, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType
from typing import TypeAlias

import torch

from noria import kinds
from noria.kernels.trying import tried

HALVES = (torch.bfloat16, torch.float16)
ALL = range(1 << 62)  # any number of rows
LARGEST_ERROR = 1e-3  # of sums of about 1 in float32: more is no rounding
# How many rows go by the kernel, by outputs, inputs, and whether there is a bias.
Chosen: TypeAlias = Mapping[tuple[int, int, bool], Container[int]]
_CHOSEN: ContextVar[Chosen] = ContextVar("products in order", default={})  # noqa: B039 -- nobody changes it


@contextlib.contextmanager
def products_by_kernel(chosen: Chosen) -> Iterator[None]:
    """Inside, in this thread, these products of half precisions go by the kernel."""
    token = _CHOSEN.set(chosen)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def serves(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether this product of hidden [T, I] with weight [O, I] was chosen."""
    chosen = _CHOSEN.get()
    if not chosen or hidden.dtype not in HALVES:
        return False
    return len(hidden) in chosen.get((weight.shape[0], weight.shape[1], bias is not None), ())


def product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[T, O] in this dtype (None: hidden's): see products.py."""
    found: torch.Tensor = _kernel().product(hidden, weight, bias, dtype)
    return found


@lru_cache
def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why nothing is multiplied by the kernel here; empty where it can be. It is built then."""
    if device.type != "cuda":
        return f"it needs a CUDA device, this is the {device.type.upper()}"
    if dtype not in HALVES:
        return f"it multiplies float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"

    def trial() -> str:
        wrong = max(error(device, dtype, of_weights) for of_weights in (dtype, torch.float32))
        return "" if wrong < LARGEST_ERROR else "it gives other results than torch"

    return tried(trial)


def build(dtype: torch.dtype, router: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Builds what scores of a router [X, E], with a bias [X] or none, are computed with: for few, some and many tokens."""
    one = torch.zeros(1, router.shape[1], dtype=dtype, device=router.device)
    for tokens in (1, 512, 16_384):
        product(one.expand(tokens, -1), router, bias, torch.float32)


def error(device: torch.device, dtype: torch.dtype, of_weights: torch.dtype, rows: int = 3, inputs: int = 200) -> float:
    """The largest difference of a small product in float32 to float64."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=draw) for size in ((rows, inputs), (40, inputs), (40,)))
    hidden, weight, bias = hidden.to(device, dtype), (weight * inputs**-0.5).to(device, of_weights), bias.to(device)
    found = product(hidden, weight, bias, torch.float32)
    exact = hidden.double() @ weight.double().t() + bias
    return float((found - exact).abs().max())


@lru_cache
def _kernel() -> ModuleType:
    """Imported where there is a GPU: others may lack Triton."""
    return kinds.load("kernels", "products")
