"""What the next tokens of a step's constrained rows may be, as data: a message of its own, beside the header.

Rank 0 makes it while the step is computed, and the last rank needs it when it samples, not before. Knows no grammar.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

ANY = -1  # in `forced`: what the bits allow


@dataclass(frozen=True)
class Masks:
    """C samples of a step are constrained, B of them by bits; the others are forced.

    samples: [C] int32, ascending, which of the step's samples; forced: [C] int32, the token id that each must be, or ANY;
    bits: [B, W] uint8, for those with ANY in their order: token id i may be sampled where bit i % 8 of byte i // 8 is 1.
    Ids beyond 8 * W may not.
    """

    samples: np.ndarray
    forced: np.ndarray
    bits: np.ndarray

    def within(self, first: int, last: int) -> "Masks":
        """Those of the samples first .. last-1, counted from the first of them."""
        start, stop = np.searchsorted(self.samples, (first, last)).tolist()
        before = int((self.forced[:start] == ANY).sum())
        after = before + int((self.forced[start:stop] == ANY).sum())
        return Masks(self.samples[start:stop] - first, self.forced[start:stop], self.bits[before:after])

    def encode(self) -> bytes:
        """Three 8-byte sizes (C, B, W), then the arrays one after another."""
        sizes = np.array([len(self.samples), *self.bits.shape], np.int64)
        arrays = [np.ascontiguousarray(array, kind) for array, kind in zip(self._arrays(), _TYPES, strict=True)]
        return b"".join([sizes.tobytes(), *(array.reshape(-1).view(np.uint8).data for array in arrays)])

    @classmethod
    def decode(cls, message: bytes) -> "Masks":
        """The masks of a message that `encode` made."""
        count, rows, width = np.frombuffer(message, np.int64, 3).tolist()
        samples, forced = np.frombuffer(message, np.int32, 2 * count, 24).reshape(2, count)
        return cls(samples, forced, np.frombuffer(message, np.uint8, rows * width, 24 + 8 * count).reshape(rows, width))

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.samples, self.forced, self.bits


_TYPES = (np.int32, np.int32, np.uint8)


class Pending(Protocol):
    """Masks that are being made, beside the step that will need them."""

    def done(self) -> bool: ...

    def result(self) -> Masks:
        """Waits for them."""
        ...
