"""What a layer leaves in its cache: arrays with a row a token or a row a sequence, as data. Knows no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from noria.blocks import DTYPE_NBYTES, round_up, wider
from noria.pieces import VIEW_ALIGNMENT
from noria.step import PAGE_TOKENS


@dataclass(frozen=True)
class Array:
    """One array of a layer's cache: a `row` of this shape for each token, or for each sequence (a state).

    dtype: its own, never narrower than the run's (None: the run's). window: how many of the last tokens are read (None:
    all); pages keep the others too.
    """

    name: str
    row: tuple[int, ...]
    per: str = "token"  # or "sequence"
    dtype: str | None = None
    window: int | None = None

    def computed(self, dtype: str) -> str:
        """Its dtype in a run of this dtype."""
        return wider(self.dtype, dtype)

    def nbytes(self, dtype: str) -> int:
        """Bytes of a row in a run of this dtype; of a state with what keeps the next one aligned."""
        nbytes = prod(self.row) * DTYPE_NBYTES[self.computed(dtype)]
        return nbytes if self.per == "token" else round_up(nbytes, VIEW_ALIGNMENT)


# Of a layer: its arrays, or the layer whose cache it reads.
Entry: TypeAlias = tuple[Array, ...] | int


def keys_and_values(num_kv_heads: int, head_dim: int, window: int | None = None) -> tuple[Array, Array]:
    """The entry of a layer whose queries look at keys [Hkv, D] and take values of the same shape."""
    row = num_kv_heads, head_dim
    return Array("key", row, window=window), Array("value", row, window=window)


def check(cache: Sequence[Entry]) -> None:
    """Asserts that the entries of a model's layers are ones that a cache can be made of."""
    for layer, entry in enumerate(cache):
        if isinstance(entry, int):
            has_arrays = 0 <= entry < layer and not isinstance(cache[entry], int)
            assert has_arrays, f"layer {layer} reads the cache of layer {entry}, which is no earlier one with arrays"
            continue
        names = [array.name for array in entry]
        assert len({*names}) == len(names), f"layer {layer} has arrays of one name: {', '.join(names)}"
        for array in entry:
            assert array.per in ("token", "sequence"), f"{array.name!r} is per {array.per!r}: token or sequence"
            known = array.dtype is None or array.dtype in DTYPE_NBYTES
            assert known, f"{array.name!r} has dtype {array.dtype!r}: a cache has {', '.join(DTYPE_NBYTES)}"


def nbytes(arrays: tuple[Array, ...], dtype: str, per: str = "token") -> int:
    """Bytes that a token, or a sequence, leaves in these arrays."""
    return sum(array.nbytes(dtype) for array in arrays if array.per == per)


def attended(arrays: tuple[Array, ...]) -> int:
    """Numbers that a query head multiplies for each token that it looks at: its key and its value."""
    rows = [array.row[-1] for array in arrays if array.per == "token"]
    return sum((rows * 2)[:2])  # of a single array keys and values are the same


class Layout:
    """Where the rows of each layer's arrays lie in a run of bytes: layer after layer, array after array.

    offsets: of (layer, array's name), in bytes, multiples of VIEW_ALIGNMENT; nbytes: of all.
    """

    def __init__(self, layers: Mapping[int, tuple[Array, ...]], dtype: str, pages: int, states: int = 0):
        self.offsets: dict[tuple[int, str], int] = {}
        self.nbytes = 0
        rows = {"token": pages * PAGE_TOKENS, "sequence": states}
        for layer, arrays in layers.items():
            for array in arrays:
                self.offsets[layer, array.name] = self.nbytes
                self.nbytes += rows[array.per] * array.nbytes(dtype)
