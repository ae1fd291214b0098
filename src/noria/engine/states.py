"""Which states the rows of a microbatch read and write, as arrays; which of them to move, where they are not on the device."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from noria.engine.kv_cache import Staged, TierPages, Triples
from noria.step import Step


@dataclass(frozen=True)
class States:
    """The states of a microbatch's N rows, on the device: int64, ids there, or places in a staging slot."""

    starts: torch.Tensor  # [N + 1] the first token of each row, and the end
    kept: torch.Tensor  # [N] after how many of its new tokens a row's state is written
    reads: torch.Tensor  # [N] 0 for a row that reads zeros
    fresh: torch.Tensor  # [N] bool: which those are
    writes: torch.Tensor  # [N]


def arrays_of(step: Step, first_row: int, last_row: int, staged: Staged | None) -> list[np.ndarray]:
    """Of the rows of a microbatch: starts, kept, reads (-1: zeros) and writes; nothing where the family has no states."""
    if not len(step.writes):
        return []
    rows = slice(first_row, last_row)
    reads, writes, starts = step.reads[rows], step.writes[rows], np.concatenate([[0], np.cumsum(step.counts[rows])])
    if staged is not None:
        writes = np.arange(len(writes))
        reads = np.where(reads < 0, reads, writes)
    return [starts, step.kept[rows], reads, writes]


def on_device(arrays: list[torch.Tensor]) -> States | None:
    """What `arrays_of` returned, once it is on the device."""
    if not arrays:
        return None
    starts, kept, reads, writes = arrays
    return States(starts, kept, reads.clamp(min=0), reads < 0, writes)


def moved(step: Step, first_row: int, last_row: int, staged: Staged | None) -> Staged | None:
    """What to move, with the states of these rows: each row's has its place among them in the staging slot."""
    if staged is None or not len(step.writes):
        return staged
    reads, writes = step.reads[first_row:last_row].tolist(), step.writes[first_row:last_row].tolist()
    loads = {**staged.loads, "sequence": _triples(staged.held, reads)}
    return replace(staged, loads=loads, stores={**staged.stores, "sequence": _triples(staged.held, writes)})


def _triples(held: TierPages, ids: list[int]) -> Triples:
    """(id in the tier, place in the staging slot, 1) of those that are one."""
    return [(id - held.first_state, place, 1) for place, id in enumerate(ids) if id >= 0]
