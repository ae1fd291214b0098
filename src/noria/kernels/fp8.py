"""Products in fp8: weights as they are stored, codes of e4m3 under scales, times activations that are rounded to such codes.

A token's activations have a scale for each block of inputs that has one in the weights: for 128 inputs each, or one for all
where weights have a scale an output. It makes the largest of them the largest code. What a row gets depends on the row alone.
T tokens, I inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F

from noria import kinds
from noria.kernels.trying import tried
from noria.limits import DECODED_NUMBERS

LARGEST = 448.0  # of e4m3
HALVES = (torch.bfloat16, torch.float16)
CAPABILITY = (8, 9)  # Ada and Hopper multiply e4m3
LEAST_COLUMNS = 32  # of a block: inputs that an instruction takes
LARGEST_ERROR = 0.03  # beside sums and 1: bfloat16 beside float32, sums of tensor cores


@dataclass(frozen=True)
class Fp8Matrix:
    """codes: uint8 [O, I], the bits of e4m3. scales: float32, or uint8 of e8m0, a block of outputs and inputs each."""

    codes: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class Fp8Weight:
    """The matrices whose outputs follow one another in a weight; block: outputs and inputs that share a scale."""

    matrices: tuple[Fp8Matrix, ...]
    block: tuple[int, int]

    @property
    def outputs(self) -> int:
        return sum(len(matrix.codes) for matrix in self.matrices)

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory that it lies in."""
        return self.matrices[0].codes.untyped_storage()


def product(hidden: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[T, O] in hidden's dtype = rounded hidden [T, I] times the weight, plus bias [O]."""
    if hidden.is_cuda:
        found: torch.Tensor = _kernel().product(hidden, weight, bias)
        return found
    return reference(hidden, weight, bias)


def reference(hidden: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same by torch on any device, in float32, or float64 for float64; some outputs at a time."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    its, (rows, columns) = rounded(hidden.to(wide), weight.block[1]), weight.block
    found, at = hidden.new_empty(len(hidden), weight.outputs), 0
    some = max(DECODED_NUMBERS // max(rows * hidden.shape[1], 1), 1) * rows
    for matrix in weight.matrices:
        scales = _float32(matrix.scales).to(wide)
        for first in range(0, len(matrix.codes), some):
            numbers = matrix.codes[first : first + some].view(torch.float8_e4m3fn).to(wide)
            its_scales = scales[first // rows : -(-(first + len(numbers)) // rows)]
            numbers *= _spread(its_scales.repeat_interleave(rows, 0)[: len(numbers)], columns, hidden.shape[1])
            end = at + len(numbers)
            part = None if bias is None else bias[at:end].to(wide)
            found[:, at:end] = F.linear(its, numbers, part)
            at = end
    return found


def rounded(hidden: torch.Tensor, columns: int) -> torch.Tensor:
    """[T, I]: the nearest codes of activations times their scales, one for so many inputs of a token.

    A block with a number that is none becomes none.
    """
    inputs = hidden.shape[1]
    largest = F.pad(hidden.abs(), (0, -inputs % columns)).unflatten(1, (-1, columns)).amax(2)
    # torch divides by a number of Python on a GPU by multiplying: another last bit, which decides between two codes as near
    scales = _spread(
        (largest / largest.new_full((), LARGEST)).clamp(min=torch.finfo(torch.float32).tiny), columns, inputs
    )
    codes = (hidden / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.to(hidden.dtype) * scales


def _spread(scales: torch.Tensor, columns: int, inputs: int) -> torch.Tensor:
    """[R, I] of scales [R, blocks]."""
    return scales.expand(-1, inputs) if scales.shape[1] == 1 else scales.repeat_interleave(columns, 1)[:, :inputs]


def _float32(scales: torch.Tensor) -> torch.Tensor:
    """Scales that are stored as uint8 are e8m0: powers of two, the exponent's bits of a float32."""
    if scales.dtype != torch.uint8:
        return scales
    exponents = scales.to(torch.int32)
    return torch.where(exponents > 0, exponents << 23, 1 << 22).to(torch.int32).view(torch.float32)


@lru_cache
def refuses(device: torch.device, dtype: torch.dtype, blocks: Sequence[tuple[int, int]] = ((1, 0),)) -> str:
    """Why products in fp8 are not computed here, with weights of such blocks (0: all inputs); empty where they are.

    On a CUDA device kernels are built and tried, also whether rows have the same bits alone.
    """
    said = str(dtype).removeprefix("torch.")
    if device.type != "cuda":
        return (
            "" if dtype in (torch.float32, torch.float64) else f"a CPU computes them in float32 or float64, not {said}"
        )
    if dtype not in HALVES:
        return f"a GPU computes them in bfloat16 or float16, not {said}"
    has = torch.cuda.get_device_capability(device)
    if has < CAPABILITY:
        return f"they need a GPU of compute capability 8.9, this one has {has[0]}.{has[1]}"
    odd = next((columns for _, columns in blocks if columns % LEAST_COLUMNS), 0)
    if odd:
        return f"a scale for {odd} inputs: a GPU's products need multiples of {LEAST_COLUMNS}"
    return next(filter(None, (tried(partial(wrong, device, dtype, its)) for its in blocks)), "")


def wrong(device: torch.device, dtype: torch.dtype, block: tuple[int, int], inputs: int = 320, rows: int = 300) -> str:
    """What is wrong with the kernel's product of random numbers; empty if nothing is."""
    draw, outputs, (tall, wide) = torch.Generator().manual_seed(0), 200, block
    hidden = torch.randn(rows, inputs, generator=draw).to(device, dtype)
    codes = (torch.randn(outputs, inputs, generator=draw) * inputs**-0.5 * 256).clamp(-LARGEST, LARGEST)
    blocks = -(-outputs // tall), -(-inputs // (wide or inputs))
    scales = (torch.rand(blocks, generator=draw) + 1).to(device) / 256
    matrix = Fp8Matrix(codes.to(torch.float8_e4m3fn).view(torch.uint8).to(device), scales)
    weight, bias = Fp8Weight((matrix,), (tall, wide or inputs)), torch.randn(outputs, generator=draw).to(device, dtype)
    found, exact = _kernel().product(hidden, weight, bias), reference(hidden.float(), weight, bias.float())
    if not float(((found.float() - exact).abs() / (1 + exact.abs())).max()) < LARGEST_ERROR:
        return "they give other results than torch"
    alone = all(torch.equal(_kernel().product(hidden[:few], weight, bias), found[:few]) for few in (1, 70))
    return "" if alone else "what a row gets depends on the number of rows"


@lru_cache
def _kernel() -> ModuleType:
    """Imported where there is a GPU: others may lack Triton."""
    return kinds.load("kernels", "products_fp8")
