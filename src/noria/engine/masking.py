"""What masks do to the scores of samples: ids that may not be sampled become impossible, whatever stands before.

Legend: C rows, V vocab. Knows nothing of grammars, slots or steps.
"""

from collections.abc import Iterator

import numpy as np
import torch

from noria.engine.row_settings import Edit, Put, allow
from noria.kernels import drawing
from noria.masks import ANY, Masks


def masking(masks: Masks, rows: list[int], vocab_size: int) -> Iterator[Edit]:
    """What the masks of a step's samples do to scores [C * V] of these of them, in this order."""
    place = {sample: at for at, sample in enumerate(masks.samples.tolist())}
    concerned = [(row, place[sample]) for row, sample in enumerate(rows) if sample in place]
    forced = [(row, int(masks.forced[at])) for row, at in concerned if masks.forced[at] != ANY]
    free = [(row, at) for row, at in concerned if masks.forced[at] == ANY]
    if forced:
        places = [np.array([row * vocab_size + token_id for row, token_id in forced], np.int64)]
        yield allow(np.array([row for row, _ in forced]), places, vocab_size)
    if free:
        which = np.cumsum(masks.forced == ANY) - 1  # of the samples, the row of their bits
        yield _mask(np.array([row for row, _ in free]), _rows(masks.bits, which[[at for _, at in free]]), vocab_size)


def _rows(bits: np.ndarray, which: np.ndarray) -> np.ndarray:
    """These rows of bits; no copy of those that follow one another: they are megabytes."""
    if len(which) and np.array_equal(which, np.arange(which[0], which[0] + len(which))):
        return bits[which[0] : which[0] + len(which)]
    return bits[which]


def _put(bits: np.ndarray, device: torch.device) -> torch.Tensor:
    """Bits on the device, in a copy that the host does not wait for. They are copied to page-locked memory by numpy: torch would
    do it by all its threads, which wait for one another while others make masks."""
    if device.type != "cuda":
        return torch.from_numpy(np.require(bits, requirements="W"))  # of a message they are not writable
    held = torch.empty(bits.shape, dtype=torch.uint8, pin_memory=True)
    np.copyto(held.numpy(), bits)
    return held.to(device, non_blocking=True)


def _mask(rows: np.ndarray, bits: np.ndarray, vocab_size: int) -> Edit:
    """bits [rows, W]: see Masks."""

    def edit(scores: torch.Tensor, put: Put) -> None:
        packed, index, of_rows = _put(bits, scores.device), put(rows), scores.view(-1, vocab_size)
        if scores.dtype == torch.float32:  # of rows that kernels draw
            drawing.mask(of_rows, index, packed)
            return
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
        kept = (packed[:, :, None] >> shifts & 1).flatten(1)[:, :vocab_size].bool()
        if kept.shape[1] < vocab_size:
            kept = torch.nn.functional.pad(kept, (0, vocab_size - kept.shape[1]))
        of_rows.index_copy_(0, index, of_rows[index].masked_fill(~kept, -torch.inf))

    return edit
