"""Weights that few rows are multiplied with as they are stored (products_stored.py); which ones of a run.

For many rows a weight's numbers are decoded before, and for everything but `linear`. A run tries the kernel at its start, and
elsewhere nothing goes by it. T tokens, I inputs, O outputs.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch

from noria import kinds
from noria.kernels.stored import StoredMatrices, TileForm
from noria.limits import STORED_ROWS

# What the kernel is built and tried for: form, dtype of scales, outputs of each part, inputs; and whether there is a bias.
Kind: TypeAlias = tuple[TileForm, torch.dtype, tuple[int, ...], int]
Chosen: TypeAlias = Collection[tuple[Kind, bool]]
_CHOSEN: ContextVar[Chosen] = ContextVar("products as stored", default=frozenset())
LARGEST = 1 << 31  # numbers of a weight: places in it are of 32 bits


class StoredWeight:
    """A weight [O, I]: the only matrix of `stored`, whose numbers `decoded` gives. To torch's functions it is its numbers."""

    def __init__(self, stored: StoredMatrices, decoded: Callable[[], torch.Tensor]):
        self.stored, self.decoded, self.kind = stored, decoded, kind_of(stored)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        _: Sequence[type],
        given: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        by_name = {name: _numbers(value) for name, value in (named or {}).items()}
        return function(*map(_numbers, given), **by_name)


def _numbers(value: Any) -> Any:
    return value.decoded() if isinstance(value, StoredWeight) else value


def kind_of(stored: StoredMatrices) -> Kind:
    """What the kernel is built for to multiply it."""
    outputs = tuple(part.codes.shape[1] for part in stored.parts)
    return stored.form, stored.parts[0].scales.dtype, outputs, stored.shape[2]


@contextlib.contextmanager
def multiplied_so(chosen: Chosen) -> Iterator[None]:
    """Inside, in this thread, weights of these kinds are multiplied as they are stored where rows are few."""
    token = _CHOSEN.set(chosen)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def serves(hidden: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None) -> bool:
    """Whether the kernel multiplies hidden [T, I] and a weight: shapes alone say it."""
    chosen = _CHOSEN.get()
    return bool(chosen) and len(hidden) <= STORED_ROWS and (weight.kind, bias is not None) in chosen


def product(hidden: torch.Tensor, stored: StoredMatrices, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[T, O] in hidden's dtype."""
    found: torch.Tensor = kinds.load("kernels", "products_stored").product(hidden, stored, bias)
    return found
