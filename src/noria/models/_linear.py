"""The product with a weight matrix, in the form that is fast on this device, and activations. Knows no model.

T tokens, I inputs, O outputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from noria.kernels import as_stored, fp8, in_order
from noria.kernels.as_stored import StoredWeight

# By the names that config.json files give them; each may write into its argument.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu_,
    "gelu": F.gelu,
    "gelu_new": lambda inner: F.gelu(inner, approximate="tanh"),
    "gelu_pytorch_tanh": lambda inner: F.gelu(inner, approximate="tanh"),
    "gelu_fast": lambda inner: F.gelu(inner, approximate="tanh"),
    "relu2": lambda inner: torch.relu_(inner).square_(),
    "silu": lambda inner: F.silu(inner, inplace=True),
    "swish": lambda inner: F.silu(inner, inplace=True),
}

TILE_ROWS = 1024  # rows of a weight matrix that one thread takes at a time
FEW, MANY = 2, 256  # tokens between which tiles pay


def linear(
    hidden: torch.Tensor, weight: torch.Tensor | StoredWeight | fp8.Fp8Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, O] = hidden [T, I] times weight [O, I], plus bias [O]: F.linear, for a few rows on the CPU tile by tile, on a
    GPU by a kernel of fixed order where the run has chosen that. Of a weight in fp8 with hidden rounded too. An encoded
    weight is decoded for many rows, and multiplied as it is stored by few where the run has chosen that.

    A tall float32 matrix times a few rows falls out of MKL's caches. Measured with 64 rows on one thread of an EPYC:
    4096 x 768 goes from 54 to 66 GFLOP/s, 32000 x 768 from 54 to 70, 11008 x 4096 from 55 to 80.
    """
    if isinstance(weight, fp8.Fp8Weight):
        return fp8.product(hidden, weight, bias)
    if isinstance(weight, StoredWeight):
        if as_stored.serves(hidden, weight, bias):
            return as_stored.product(hidden, weight.stored, bias)
        weight = weight.decoded()
    if hidden.is_cuda and in_order.serves(hidden, weight, bias):
        return in_order.product(hidden, weight, bias)
    if hidden.is_cuda or hidden.dtype != torch.float32 or not FEW <= len(hidden) <= MANY:
        return F.linear(hidden, weight, bias)
    num_tiles = len(weight) // (TILE_ROWS * torch.get_num_threads())
    if num_tiles < 2:
        return F.linear(hidden, weight, bias)
    product = hidden.new_empty(len(hidden), len(weight))
    for tile, part in zip(weight.chunk(num_tiles), product.chunk(num_tiles, dim=1), strict=True):
        torch.mm(hidden, tile.t(), out=part)
    return product if bias is None else product.add_(bias)
