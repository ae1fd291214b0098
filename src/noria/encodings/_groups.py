"""What encodings by groups share: groups along the inputs of a matrix, codes of 4 bits, matrices taken a part at a time.

P pieces, R rows (outputs), I inputs, G groups of a row, of which the last one may be smaller.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from noria.errors import InputError, require

CHUNK = 1 << 18  # numbers that are encoded or decoded at once: what they leave for a moment fits in a core's cache


def check_settings(encoding: str, settings: Mapping[str, Any], choices: Mapping[str, Sequence[Any] | None]) -> None:
    """Raises InputError for a setting that is none, or is not one of its choices (None: the encoding asks itself)."""
    unknown, missing = sorted(settings.keys() - choices.keys()), sorted(choices.keys() - settings.keys())
    require(
        not unknown,
        f"{encoding} has no setting {', '.join(unknown)[:80]!r}; its settings are {', '.join(choices) or 'none'}",
    )
    require(not missing, f"{encoding} needs the setting {', '.join(missing)!r}")
    for name, allowed in choices.items():
        value = settings[name]
        right = allowed is None or any(type(value) is type(one) and value == one for one in allowed)
        require(right, f"{encoding}: {name} is {str(value)[:80]!r}, it must be one of {list(allowed or ())}")


def matrix(encoding: str, shape: Sequence[int]) -> tuple[int, int]:
    """[outputs, inputs] of what is encoded. Raises InputError for a vector."""
    require(len(shape) == 2, f"{encoding} encodes matrices, not what has the shape {list(shape)}")
    return shape[0], shape[1]


def count(inputs: int, group: int) -> int:
    """How many groups a row has."""
    return -(-inputs // group)


def finite(encoding: str, numbers: torch.Tensor) -> torch.Tensor:
    """The numbers in float32. Raises InputError where one is inf or nan, or becomes so."""
    found = numbers.float()
    if not bool(torch.isfinite(found).all()):
        row = int((~torch.isfinite(found)).flatten(1).any(1).nonzero()[0, 0])
        raise InputError(
            f"{encoding} holds finite numbers of float32, and row {row} has one that is none: leave it plain"
        )
    return found


def grouped(numbers: torch.Tensor, group: int) -> torch.Tensor:
    """Numbers [R, I] as [R, G, group], with zeros behind those of the last group."""
    return torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % group)).unflatten(1, (-1, group))


def scale(values: torch.Tensor, group: int, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """Values [R, I], less the zeros and times the scales [R, G] of their groups, in place."""
    whole = values.shape[1] // group
    parts = [(values[:, : whole * group].unflatten(1, (whole, group)), slice(whole))] if whole else []
    if values.shape[1] > whole * group:
        parts.append((values[:, None, whole * group :], slice(-1, None)))
    for part, groups in parts:
        if zeros is not None:
            part.sub_(zeros[:, groups, None])
        part.mul_(scales[:, groups, None])
    return values


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, uint8 [R, I], two a byte: the first in its low half. An odd row ends with a high half of 0."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] | even[:, 1::2] << 4


def unpacked(content: torch.Tensor, inputs: int) -> torch.Tensor:
    """The codes uint8 [R, I] in bytes [R, half of I]."""
    return torch.stack((content & 15, content >> 4), -1).flatten(-2)[:, :inputs]


def check_halves(codes: torch.Tensor, inputs: int) -> None:
    """Raises InputError where odd rows end with something in the high half of their last byte."""
    if inputs % 2:
        require(not bool((codes[..., -1] >> 4).any()), f"a code stands behind the last of {inputs} of its row")
