"""What a visit is given and what it leaves: hidden states on their way, and the answer of the last virtual stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from noria.bundle import Bundle
from noria.step import Result
from noria.streams import Event

Arrays: TypeAlias = tuple[torch.Tensor, ...]  # [T, *row] each, in the order of a border's bundle: hidden states first


@dataclass(frozen=True)
class Hidden:
    """Hidden states [T, E] of a step, and the arrays that travel beside them.

    ready: the event after which they may be read; None: they are in the order of the compute stream. `gather(first, last)`,
    in place of the arrays, makes those of these tokens when they are needed: on the device, or (`in_host`) in page-locked
    host memory.
    """

    arrays: Arrays = ()
    ready: Event | None = None
    gather: Callable[[int, int], Arrays] | None = None
    in_host: bool = False


@dataclass(frozen=True)
class Answer:
    """The last virtual stage's result of a step, in host memory that may be read after the event `ready`."""

    result: Result
    ready: Event


def arrays_in(buffer: torch.Tensor, bundle: Bundle, num_tokens: int) -> Arrays:
    """The arrays of so many tokens as views into `buffer` (uint8), where a message has them."""
    found = []
    for array, start, nbytes in zip(bundle.arrays, bundle.starts(num_tokens), bundle.row_nbytes, strict=False):
        run = buffer[start : start + num_tokens * nbytes].view(getattr(torch, array.dtype or ""))
        found.append(run.view(num_tokens, *array.row))
    return tuple(found)


def part_of(arrays: Arrays, first: int, last: int) -> Arrays:
    """The arrays of these tokens."""
    return tuple(array[first:last] for array in arrays)


def joined(parts: Sequence[Arrays]) -> Arrays:
    """The arrays of all tokens, from those of one microbatch after another."""
    return parts[0] if len(parts) == 1 else tuple(torch.cat(arrays) for arrays in zip(*parts, strict=True))
