"""The lists of attention's work as tensors of a device: one run of int32, of which each list is a view.

Knows what lies where, nothing of kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from noria.kernels.work import PIECE_COLUMNS, Item, Launch, Merge, Work


@dataclass(frozen=True)
class DeviceWork:
    """Lists on the device, int32; of each wave its launches with their items [I, columns], and its merges [M, columns].

    work: what they were made from, which says how many there are and how launches are compiled.
    """

    work: Work
    packed: torch.Tensor  # all of them
    order: torch.Tensor
    positions: torch.Tensor
    pieces: torch.Tensor
    waves: tuple[tuple[tuple[tuple[Launch, torch.Tensor], ...], torch.Tensor], ...]


def packed(work: Work) -> torch.Tensor:
    """The lists one after another, in host memory."""
    return torch.from_numpy(np.concatenate([array.ravel() for array in _arrays(work)]))


def in_place(work: Work, memory: torch.Tensor) -> DeviceWork:
    """The lists in memory that holds, or is to hold, what `packed` gives of them."""
    flat = iter(memory.split([array.size for array in _arrays(work)]))
    order, positions, pieces = next(flat), next(flat), next(flat).view(-1, PIECE_COLUMNS)
    waves = tuple(
        (
            tuple((launch, next(flat).view(-1, len(Item))) for launch in wave.launches),
            next(flat).view(-1, len(Merge)),
        )
        for wave in work.waves
    )
    return DeviceWork(work, memory, order, positions, pieces, waves)


def to_device(work: Work, device: torch.device) -> DeviceWork:
    """The lists in one copy that the host does not wait for."""
    memory = packed(work)
    return in_place(work, memory.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else memory)


def _arrays(work: Work) -> Iterator[np.ndarray]:
    yield from (work.order, work.positions, work.pieces)
    for wave in work.waves:
        yield from (launch.items for launch in wave.launches)
        yield wave.merges
