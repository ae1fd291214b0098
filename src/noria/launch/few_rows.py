"""Which encoded weights of a run few rows are multiplied with as they are stored: each kind is tried where the run starts.

On random numbers in the weight's own shape: the kernel must give the bits that products of its decoded numbers have.
"""

from collections.abc import Iterable
from functools import partial

import torch

from noria import encodings, kinds
from noria.blocks import Block, Parameter
from noria.kernels import as_stored
from noria.kernels.as_stored import Kind
from noria.kernels.stored import StoredMatrices
from noria.kernels.trying import tried
from noria.launch.choosing import FEW, MANY, Linear
from noria.limits import IN_TILES, STORED_ROWS
from noria.model import in_products

SOME = 16  # rows that are compared too
ENCODED = 128  # outputs that are encoded, and repeated


def weights_of(blocks: Iterable[Block]) -> list[tuple[Parameter, bool]]:
    """The different encoded weights of layers, but for encodings without tiles; and whether products with them have a bias."""
    found: dict[object, tuple[Parameter, bool]] = {}
    for block in blocks:
        names = {one.name for one in block.parameters}
        for one in in_products(block):
            if one.encoding in IN_TILES and not one.multiplied:
                has_bias = f"{one.name}_bias" in names
                found[one.encoding, str(one.settings), one.piece, has_bias] = one, has_bias
    return list(found.values())


def chosen(
    blocks: Iterable[Block], device: torch.device, dtype: torch.dtype, linear: Linear, rows: int = MANY
) -> tuple[frozenset[tuple[Kind, bool]], list[str]]:
    """The kinds of weights that the kernel serves, and a line for those that it does not.

    linear: the product whose bits of so many rows it must have.
    """
    found, lines = set[tuple[Kind, bool]](), list[str]()
    for weight, has_bias in weights_of(blocks):
        stored, why = None, "no kernel takes such groups of inputs, or so many numbers"
        try:
            stored, numbers = sample(weight, device, dtype)
            if stored is not None:
                why = tried(partial(wrong, stored, numbers, has_bias, linear, rows))
        except torch.OutOfMemoryError:
            why = f"no memory to try it with {weight.shape[0]:,} x {weight.shape[1]:,}"
        if why:
            lines.append(
                f"{weight.encoding} is decoded for products of few rows too, slower than as it is stored: {why}"
            )
        elif stored is not None:
            found.add((as_stored.kind_of(stored), has_bias))
    return frozenset(found), [*dict.fromkeys(lines)]


def wrong(stored: StoredMatrices, numbers: torch.Tensor, has_bias: bool, linear: Linear, rows: int) -> str:
    """What is wrong with the kernel's products of a weight that is decoded to these numbers; empty if nothing is."""
    draw, (outputs, inputs) = torch.Generator(numbers.device).manual_seed(0), numbers.shape
    bias = numbers.new_empty(outputs).normal_(generator=draw) if has_bias else None
    hidden = numbers.new_empty(rows, inputs).normal_(generator=draw)
    whole = linear(hidden, numbers, bias)
    few = (FEW, SOME, STORED_ROWS)
    if all(torch.equal(as_stored.product(hidden[:some], stored, bias), whole[:some]) for some in few):
        return ""
    return f"it gives other bits with {outputs:,} x {inputs:,}"


def sample(weight: Parameter, device: torch.device, dtype: torch.dtype) -> tuple[StoredMatrices | None, torch.Tensor]:
    """Random numbers as this weight stores them, for kernels (None: those cannot), and decoded [O, I]."""
    if not weight.in_tiles or weight.numbers >= as_stored.LARGEST:
        return None, torch.empty(0)
    numbers, pieces = torch.empty(weight.shape, dtype=dtype, device=device), random_pieces(weight, device)
    encodings.decode(weight, pieces, {weight.name: numbers})
    return encodings.in_tiles(weight, pieces, weight.name), numbers


def random_pieces(weight: Parameter, device: torch.device) -> torch.Tensor:
    """[1, bytes]: normal numbers in the weight's encoding, those of some outputs again and again."""
    kind, draw, fields = kinds.load("encodings", weight.encoding), torch.Generator(device).manual_seed(0), {}
    for number, matrix in enumerate(weight.piece.matrices):
        outputs, inputs = matrix.stored
        some = torch.empty(min(outputs, ENCODED), inputs, device=device)
        made = kind.encode(some.normal_(std=inputs**-0.5, generator=draw), weight.settings)
        for name, field in weight.piece.fields_of(number).items():
            again = -(-field.shape[0] // len(made[name]))
            whole = made[name].repeat(again, *[1] * (made[name].dim() - 1))[: field.shape[0]]
            fields[weight.piece.prefix(number) + name] = whole
    return encodings.packed(weight.piece, fields)[None]
