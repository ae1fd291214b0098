"""What a layer asks of attention beside its tensors: the shape of its heads, and how keys are scored. Data for every kind.

T tokens, H heads, Hkv key heads, D numbers of a key, Dv of a value.
"""

from dataclasses import dataclass

import torch

from noria.kernels.coded import Coded

VALUES_WITHIN = -1  # a form of keys and values: the first numbers of a key are its value (others: rounded.FORMS)


@dataclass(frozen=True)
class HeadShape:
    """The heads of a layer; `dim` and `width`: numbers of a key and of a value. within: a value is the first of its key's."""

    num_heads: int
    num_key_heads: int
    dim: int
    width: int
    within: bool = False

    @classmethod
    def of(cls, queries: torch.Tensor, keys: torch.Tensor | Coded, values: torch.Tensor | Coded) -> "HeadShape":
        """Of queries [T, H, D] and caches [rows, Hkv, D] and [rows, Hkv, Dv]."""
        return cls(queries.shape[1], keys.shape[1], keys.shape[2], values.shape[2], lie_within(values, keys))

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_key_heads


@dataclass(frozen=True)
class ScoringKind:
    """What a kernel is compiled for: how many keys a query sees, whether a soft cap bends scores, whether there are sinks."""

    window: int | None = None
    capped: bool = False
    sinks: bool = False


@dataclass(frozen=True)
class Scoring:
    """How a layer scores its keys."""

    scale: float
    window: int | None = None  # how many keys a query sees, its own the last
    soft_cap: float | None = None  # c: scores are c * tanh(score / c)
    sinks: torch.Tensor | None = None  # [H]: the score of a key without a value, which no cap changes

    @property
    def plain(self) -> bool:
        """Whether exponents are those of the scaled products alone."""
        return self.soft_cap is None and self.sinks is None


def lie_within(values: torch.Tensor | Coded, keys: torch.Tensor | Coded) -> bool:
    """Whether values are the first numbers of the keys, in the same memory."""
    if not (isinstance(values, torch.Tensor) and isinstance(keys, torch.Tensor)):
        return False
    same = values.data_ptr() == keys.data_ptr() and values.stride() == keys.stride()
    return same and values.shape[2] < keys.shape[2]
