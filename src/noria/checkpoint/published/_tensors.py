"""The tensors of a directory as formats look them up, and what they make of a matrix.

Every refusal names the file, the tensor, what it is and what it should be.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from noria.checkpoint.tensor_files import Reader, Tensor
from noria.encodings import Fields
from noria.errors import InputError, require

PLAIN = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Published:
    """A matrix as a directory has it: in fields of an encoding.

    shape: [outputs, inputs]. tensors: all that it is made of, its codes first. fields: reads them, whole. turn: makes what
    it is if its tensors lie the other way, where they may.
    """

    module: str
    encoding: str
    settings: Mapping[str, Any]
    shape: tuple[int, int]
    tensors: tuple[Tensor, ...]
    fields: Callable[[Reader], Fields]
    turn: "Callable[[], Published] | None" = None

    @property
    def name(self) -> str:
        return self.module

    @property
    def shard(self) -> Path:
        return self.tensors[0].shard

    @property
    def stored(self) -> tuple[int, int]:
        return self.shape

    def using(self, *others: Tensor) -> "Published":
        """The same, made of these tensors too."""
        return replace(self, tensors=self.tensors + others)

    def turned(self) -> "Published":
        """The transpose, or itself where that cannot be read."""
        return self.turn() if self.turn else self


class Tensors:
    """The tensors of a directory by name."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def named(self, name: str) -> Tensor | None:
        return self._tensors.get(name)

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def need(self, beside: Tensor, *names: str) -> Tensor:
        """The first of these that there is. Raises InputError if there is none; `beside`: the tensor that asks for it."""
        found = [tensor for name in names if (tensor := self.named(name))]
        if not found:
            raise InputError(
                f"{beside.shard}: {beside.name!r} is {beside.dtype} and no file holds {' or '.join(map(repr, names))}: the"
                " directory is not whole, download it again"
            )
        return found[0]


def hold(tensor: Tensor, dtypes: tuple[str, ...], shape: tuple[int, ...], why: str) -> Tensor:
    """The tensor. Raises InputError if it is of another dtype or shape; `why` says what asks for them."""
    require(
        tensor.dtype in dtypes and tensor.shape == shape,
        f"{tensor.shard}: {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, it should be {' or '.join(dtypes)}"
        f" {list(shape)}, {why}",
    )
    return tensor


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """[outputs, inputs] of a tensor. Raises InputError if it has other dimensions, or no numbers."""
    require(
        len(tensor.shape) == 2 and tensor.size > 0,
        f"{tensor.shard}: {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}: quantized weights are matrices",
    )
    return tensor.shape[0], tensor.shape[1]


def activations_of(settings: Mapping[str, Any]) -> str:
    """How activations are rounded: `dynamic`, `static`, or nothing."""
    return str(settings.get("activation_scheme") or "")[:80]


def cache_of(settings: Mapping[str, Any]) -> str:
    """How the cache is rounded, in a word."""
    said = settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo")
    if isinstance(said, Mapping):
        return f"{str(said.get('type', ''))[:20]}{str(said.get('num_bits', ''))[:20]}"
    return str(said or "")[:80]
