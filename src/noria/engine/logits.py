"""Logits of a step's rows, in pieces. Knows no weights: the head is a function."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F

from noria.engine.shortage import give_back, is_shortage
from noria.limits import LOGITS_ROWS, padded_rows
from noria.ring.messages import Arrays

T = TypeVar("T")


class Logits:
    """What `head` makes of hidden states: LOGITS_ROWS rows at a time, fewer where memory does not suffice, which `say` tells."""

    def __init__(self, head: Callable[[Arrays], torch.Tensor], device: torch.device, say: Callable[[str], None]):
        self._head, self._device, self._say = head, device, say
        self._most = LOGITS_ROWS

    def of(self, hidden: Arrays, rows: torch.Tensor, use: Callable[[slice, torch.Tensor], T]) -> list[T]:
        """What `use(rows, logits [_, V])` returns for the hidden states at these places, one for each piece. It must not mind to
        be called again."""
        found, start = list[T](), 0
        while start < len(rows):
            count = min(self._most, len(rows) - start)
            chunk = slice(start, start + count)
            try:
                found.append(use(chunk, self._at(hidden, rows[chunk])))
                start += count
                continue
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not is_shortage(error):
                    raise
            self._most = count // 2
            self._say(f"out of memory: logits of {self._most} rows at a time from now on")
            give_back(self._device)
        return found

    def _at(self, hidden: Arrays, rows: torch.Tensor) -> torch.Tensor:
        """Logits at these places. On a GPU so many rows are computed as others have been: cuBLASLt has a kernel for nearly each
        number of rows, and before a driver loads one the device must come to rest (measured: 0.36 s of waiting in prefill).
        """
        size = len(rows)
        if self._device.type == "cuda":
            rows = F.pad(rows, (0, min(padded_rows(size), self._most) - size))
        return self._head(tuple(array[rows] for array in hidden))[:size]
