"""What the experts of a layer compute with: their matrices, and the gate between the two products. Data for every kind.

X experts, E hidden, I intermediate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from noria.kernels.stored import StoredMatrices

Matrices = TypeVar("Matrices")

# What a gate is bent by, by the names that config.json files give them.
SILU, GELU_TANH = "silu", "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Gate:
    """How gates g and ups u become what the down matrix is given: function(g) * (u + shift).

    alpha: silu is g * sigmoid(alpha * g). limit: g is at most, u within plus and minus this. alternating: gates and ups take
    turns among the outputs; else all gates come first. wide: a plain product of both is of float32 for half precisions.
    """

    function: str = SILU
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0
    alternating: bool = False
    wide: bool = False


class Some(Protocol):
    """Matrices [X, outputs, inputs] of which at most `most` are there at a time: those that `of` is asked for, in order, or
    those that a list of the device names, with -1 for none. stored: all, for kernels that decode their own tiles, if any do."""

    def __len__(self) -> int: ...

    @property
    def most(self) -> int: ...

    def of(self, wanted: Sequence[int]) -> torch.Tensor: ...

    def listed(self, named: torch.Tensor) -> torch.Tensor: ...

    @property
    def stored(self) -> StoredMatrices | None: ...


@dataclass(frozen=True)
class Arriving:
    """Stands for matrices of which those that tokens chose come when it is known which.

    After `bring` of the choices [T, C] `there` has these, as a tensor or as what decodes them, and of the others anything.
    """

    there: Any
    bring: Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class ExpertLayer(Generic[Matrices]):
    """gate_up [X, 2 * I, E] and down [X, E, I] in any strides; biases: [X, 2 * I] of gates and ups, [X, E] of downs."""

    gate_up: Matrices
    down: Matrices
    gate: Gate = Gate()
    biases: tuple[torch.Tensor, torch.Tensor] | None = None
