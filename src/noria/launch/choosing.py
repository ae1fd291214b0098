"""Which products of a run go by the kernel of fixed order: those that it computes faster to the same bits, and those whose
bits depend on the number of rows otherwise. Tried and measured where a run starts.

O outputs, I inputs of a product.
"""

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
import torch.nn.functional as F

from noria.kernels import in_order

Product: TypeAlias = tuple[int, int, bool, int]  # outputs, inputs, whether it has a bias, the most rows that it gets
Linear: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Given: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
Timed: TypeAlias = Callable[[Linear, Given], float]
FEW, SOME, MANY = 1, 100, 2048  # rows of a product that are compared: they get kernels of their own
NARROW = (16, 64)  # rows up to which the kernel may be faster
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
) -> dict[tuple[int, int, bool], int]:
    """The most rows of each of these products that the kernel computes; products without any are left out."""
    chosen: dict[tuple[int, int, bool], int] = {}
    try:
        for product in its:
            if most := _most_rows(tensors_of(product, device, dtype), linear, kernel, timed):
                chosen[product[:3]] = most
    except torch.OutOfMemoryError:  # the check behind this says so
        return {}
    return chosen


def _most_rows(its: Given, linear: Linear, kernel: Linear, timed: Timed) -> int:
    hidden, weight, bias = its
    whole = linear(*its)
    if differs(linear, its, whole=whole):
        return in_order.ALL
    if differs(kernel, its, (FEW, *NARROW), whole):
        return 0
    most = 0
    for rows in NARROW:
        few = hidden[:rows], weight, bias
        if timed(kernel, few) > GAIN * timed(linear, few):
            break
        most = rows
    return most
