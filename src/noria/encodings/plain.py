"""Numbers as they are, in the dtype that they have."""

from collections.abc import Mapping
from typing import Any

import torch

VARIABLE: tuple[str, ...] = ()
DEFAULTS: dict[str, Any] = {}


def fields(shape: tuple[int, ...], dtype: str, settings: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """One field, `numbers`."""
    return {"numbers": (shape, dtype)}


def encode(numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The numbers themselves."""
    return {"numbers": numbers}


def decode(fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any], into: torch.Tensor) -> None:
    """The numbers, in the dtype of `into`."""
    into.copy_(fields["numbers"])


def check(fields: Mapping[str, torch.Tensor], shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """Any number may stand in a plain field."""
