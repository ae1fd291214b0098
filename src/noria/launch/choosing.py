"""Which products of a run go by the kernel of fixed order: those that it computes faster to the same bits, and those whose
bits depend on the number of rows otherwise. Tried and measured where a run starts.

O outputs, I inputs of a product.
"""

import itertools
from collections.abc import Callable, Collection, Container, Iterable
from typing import TypeAlias

import torch
import torch.nn.functional as F

from noria.kernels import in_order

Product: TypeAlias = tuple[int, int, bool, int]  # outputs, inputs, whether it has a bias, the most rows that it gets
Linear: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Given: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
Timed: TypeAlias = Callable[[Linear, Given], float]
FEW, SOME, MANY = 1, 100, 2048  # rows of a product that are compared: they get kernels of their own
BOUNDS = (1, 8, 16, 32, 48, 64)  # rows at which times are measured, each for those above the one before
GAIN = 0.85  # of torch's time, so that what is measured is no chance


def multiply(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product as models compute it."""
    by_kernel = in_order.serves(hidden, weight, bias)
    return in_order.product(hidden, weight, bias) if by_kernel else F.linear(hidden, weight, bias)


def tensors_of(product: Product, device: torch.device, dtype: torch.dtype) -> Given:
    """Random numbers for a product: hidden states of all its rows, weights, and a bias if it has one."""
    draw, (outputs, inputs, has_bias, most) = torch.Generator(device).manual_seed(0), product
    weight, hidden = (torch.empty(size, inputs, dtype=dtype, device=device) for size in (outputs, most))
    bias = torch.empty(outputs, dtype=dtype, device=device).normal_(generator=draw) if has_bias else None
    weight.normal_(std=inputs**-0.5, generator=draw)
    return hidden.normal_(generator=draw), weight, bias


def differs(linear: Linear, its: Given, others: Iterable[int] = (FEW, SOME), whole: torch.Tensor | None = None) -> bool:
    """Whether rows have other bits when they are so few; `whole`: what they should be (None: those among all rows)."""
    hidden, weight, bias = its
    whole = linear(*its) if whole is None else whole
    return not all(torch.equal(linear(hidden[:rows], weight, bias), whole[:rows]) for rows in others)


def milliseconds(linear: Linear, its: Given) -> float:
    """Of the device, the least of five."""
    found = []
    for _ in range(6):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        linear(*its)
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after))
    return min(found[1:])


def chosen_products(
    its: Iterable[Product],
    device: torch.device,
    dtype: torch.dtype,
    linear: Linear = F.linear,
    kernel: Linear = in_order.product,
    timed: Timed = milliseconds,
) -> dict[tuple[int, int, bool], Container[int]]:
    """How many rows of each of these products the kernel computes; products without any are left out."""
    chosen: dict[tuple[int, int, bool], Container[int]] = {}
    try:
        for product in its:
            if rows := _rows_of(tensors_of(product, device, dtype), linear, kernel, timed):
                chosen[product[:3]] = rows
    except torch.OutOfMemoryError:  # the check behind this says so
        return {}
    return chosen


def _rows_of(its: Given, linear: Linear, kernel: Linear, timed: Timed) -> Collection[int]:
    hidden, weight, bias = its
    whole = linear(*its)
    if differs(linear, its, whole=whole):
        return in_order.ALL
    if differs(kernel, its, BOUNDS, whole):
        return frozenset()
    found: set[int] = set()
    for before, rows in itertools.pairwise((0, *BOUNDS)):
        few = hidden[:rows], weight, bias
        if timed(kernel, few) <= GAIN * timed(linear, few):
            found |= {*range(before + 1, rows + 1)}
    return frozenset(found)
