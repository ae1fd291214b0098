"""Noria's own quantization: which parameters of a model are stored in fewer bits, and how, by the word that a user gives.

Matrices of layers are; embedding, head, norms, routers, biases and what has a dtype of its own are left as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from noria import encodings, kinds
from noria.blocks import Block, Parameter, lay_out
from noria.errors import InputError, require
from noria.limits import CODED, CODED_NUMBERS
from noria.pieces import Encoded, Matrix

WORDS = {"fp8": "fp8_block", "fp8_channel": "fp8_channel", "int8": "int8", "int4": "int4"}
SIZES = ("fp8", "int8", "int4")  # those of different bits
GROUPED = ("int8", "int4")  # that have groups of inputs
GROUP_SIZES = (32, 64, 128)
SENSITIVE = ("router", "shared_gate", "correction")  # parameters of layers: a wrong choice costs more than its bytes
LEAST = 8  # outputs and inputs of a matrix that is a product's


@dataclass(frozen=True)
class Quantization:
    """An encoding with settings beside its defaults, for all parameters that take one."""

    encoding: str
    settings: Mapping[str, Any]

    def __call__(self, block: str, parameter: Parameter) -> tuple[str, Mapping[str, Any]] | None:
        """How a parameter is stored; None: as it is."""
        return (self.encoding, self.settings) if takes(block, parameter) else None

    def lay_out(self, block: Block, dtype: str) -> Block:
        """A plain block with its parameters encoded."""
        return laid_out(block, dtype, lambda parameter: self)

    def of(self, parameter: Parameter, dtype: str) -> Encoded:
        """How a parameter is encoded: each piece of it as one matrix or as those that its family names."""
        settings = kinds.load("encodings", self.encoding).DEFAULTS | self.settings
        named = [Matrix(its.name, its.shape) for its in parameter.piece.matrices if its.name]
        piece = encodings.capacity(self.encoding, named or [Matrix("", parameter.shape)], dtype, settings)
        return Encoded(self.encoding, settings, piece)


def laid_out(block: Block, dtype: str, choose: Callable[[Parameter], Quantization | None]) -> Block:
    """A plain block with each parameter that takes an encoding in the one that is chosen for it, if one is."""
    forms = dict[str, Encoded]()
    for parameter in block.parameters:
        chosen = choose(parameter) if takes(block.name, parameter) else None
        if chosen is not None:
            try:
                forms[parameter.name] = chosen.of(parameter, dtype)
            except InputError as error:
                raise InputError(f"{block.name}/{parameter.name}: {error}") from error
    return lay_out(block.name, {one.name: one.wanted for one in block.parameters}, dtype, forms) if forms else block


def quantization(word: str, group_size: int | None = None) -> Quantization:
    """What the user asks for. Raises InputError for a group size where there are no groups."""
    require(
        group_size is None or word in GROUPED,
        f"--group-size {group_size} with --quantization {word}, which has no groups of inputs: leave it out, or take"
        f" {' or '.join(GROUPED)}",
    )
    return Quantization(WORDS[word], {} if group_size is None else {"group_size": group_size})


def compressed(block: str, parameter: Parameter) -> tuple[str, Mapping[str, Any]] | None:
    """How large matrices of bfloat16 are stored in fewer bits without loss, those of the head too; None: as they are."""
    large = len(parameter.shape) > 1 and parameter.numbers >= CODED_NUMBERS * parameter.pieces
    return (CODED, {}) if large and parameter.own_dtype is None else None


def forms_of(blocks: Mapping[str, Block], dtype: str) -> dict[str, dict[str, Block]]:
    """What a model of these blocks could be converted to: its blocks in each form, by the word for it.

    None if some are encoded already: the numbers that they were made of are gone. What takes as many bytes as another form
    is left out (fp8_channel).
    """
    if any(block.fielded for block in blocks.values()):
        return {}
    found = {}
    for word in SIZES:
        form = quantization(word)
        found[word] = {name: form.lay_out(block, dtype) for name, block in blocks.items()}
    return found


def takes(block: str, parameter: Parameter) -> bool:
    """Whether a parameter is stored in fewer bits: matrices of layers are, but for the sensitive ones."""
    # biases of experts are [experts, outputs], norms of heads [heads, numbers]: two axes and no matrix
    left = parameter.own_dtype is not None or parameter.name in SENSITIVE or parameter.name.endswith(("bias", "norm"))
    matrices = (
        parameter.shape
        if not parameter.wanted.named
        else [size for its in parameter.piece.matrices for size in its.shape]
    )
    return block.startswith("layers/") and not left and len(parameter.shape) > 1 and min(matrices) >= LEAST
