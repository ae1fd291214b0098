"""What a layer leaves in its cache: arrays with a row a token or a row a sequence, as data. Knows no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TypeAlias

from noria.blocks import DTYPE_NBYTES, round_up, wider
from noria.limits import RUN_PAGES
from noria.pieces import FIELD_NBYTES, VIEW_ALIGNMENT
from noria.step import PAGE_TOKENS

KEY_GROUP = 64  # numbers of a key, along its head, that share a scale where a cache is encoded; those of a value all do
BLOCK_TOKENS = RUN_PAGES * PAGE_TOKENS  # attention's block of keys
ENCODINGS = {"fp8": "fp8_block", "int8": "int8", "int4": "int4"}  # of kv_cache_dtype


@dataclass(frozen=True)
class Array:
    """One array of a layer's cache: a `row` of this shape for each token, or for each sequence (a state).

    dtype: its own, never narrower than the run's (None: the run's). window: how many of the last tokens are read (None:
    all); pages keep the others too, unless each sequence has a `ring` of so many tokens instead (0: none). encoding: how its
    rows are kept, a kind of encodings/ (None: as they are computed), with a scale for each `group` numbers of the last
    dimension (-1: one for all of them). exact: of its dtype in any run. value: how many of its first numbers are the value, of
    keys that have no values beside them.
    """

    name: str
    row: tuple[int, ...]
    per: str = "token"  # or "sequence"
    dtype: str | None = None
    window: int | None = None
    encoding: str | None = None
    group: int = -1
    exact: bool = False
    value: int | None = None
    ring: int = 0

    @property
    def kept(self) -> str:
        """What it takes room for: a token, or a sequence."""
        return "sequence" if self.ring else self.per

    def computed(self, dtype: str) -> str:
        """Its dtype in a run of this dtype."""
        return self.dtype if self.exact and self.dtype else wider(self.dtype, dtype)

    def nbytes(self, dtype: str) -> int:
        """Bytes that a row takes in a run of this dtype; of a state with what keeps the next one aligned; of a ring all of it."""
        if self.encoding:
            return sum(field.nbytes(dtype) for field in self.fields.values())
        nbytes = prod(self.row) * FIELD_NBYTES[self.computed(dtype)]
        if self.ring:
            return self.ring * nbytes
        return nbytes if self.per == "token" else round_up(nbytes, VIEW_ALIGNMENT)

    def decoded_nbytes(self, dtype: str) -> int:
        """Bytes of a row that is decoded before it is attended to; 0 of one that is not."""
        return prod(self.row) * DTYPE_NBYTES[self.computed(dtype)] if self.encoding else 0

    @cached_property
    def fields(self) -> dict[str, "Array"]:
        """The arrays that keep an encoded one, by their names in its encoding: a test compares them with the encoding's."""
        *heads, numbers = self.row
        groups = -(-numbers // self.group) if self.group > 0 else 1
        powers, halves = self.encoding == "fp8_block", self.encoding == "int4"
        kept = {
            "codes": (-(-numbers // 2) if halves else numbers, "uint8"),
            "scales": (groups, "uint8" if powers else "bfloat16"),
        }
        kept |= {"zeros": (groups, "uint8")} if halves else {}
        return {
            name: Array(f"{self.name}.{name}", (*heads, width), dtype=dtype, exact=True)
            for name, (width, dtype) in kept.items()
        }


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


def encoded(entry: Entry, encoding: str) -> Entry:
    """The entry with its arrays per token kept in fewer bits: keys, which are the first of them, by groups along their head,
    values by token. An array with a dtype of its own stays as it is."""
    if isinstance(entry, int):
        return entry
    keys = next((array.name for array in entry if array.per == "token"), None)
    return tuple(
        array
        if array.per != "token" or array.dtype
        else replace(array, encoding=encoding, group=KEY_GROUP if array.name == keys else -1)
        for array in entry
    )


def ring_of(window: int) -> int:
    """Tokens of a ring for this window: whole blocks of keys, as many as hold what a query sees and the block of the next."""
    return round_up(window, BLOCK_TOKENS) + BLOCK_TOKENS


def ringed(cache: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries, with a ring a sequence for arrays that are read by a window. A layer whose cache others read keeps all: they
    look at tokens of a chunk that its ring holds no more. So does what is encoded."""
    read = {entry for entry in cache if isinstance(entry, int)}
    return tuple(
        entry if isinstance(entry, int) or layer in read else tuple(map(_in_ring, entry))
        for layer, entry in enumerate(cache)
    )


def unringed(cache: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries without rings."""
    return tuple(
        entry if isinstance(entry, int) else tuple(replace(array, ring=0) for array in entry) for entry in cache
    )


def _in_ring(array: Array) -> Array:
    windowed = array.per == "token" and array.window is not None and not array.encoding
    return replace(array, ring=ring_of(array.window or 0)) if windowed else array


def stored(entry: tuple[Array, ...]) -> tuple[Array, ...]:
    """The arrays that a cache has of these: of encoded ones their fields."""
    return tuple(kept for array in entry for kept in (array.fields.values() if array.encoding else (array,)))


def nbytes(arrays: tuple[Array, ...], dtype: str, per: str = "token") -> int:
    """Bytes that a token, or a sequence, leaves in these arrays."""
    return sum(array.nbytes(dtype) for array in arrays if array.kept == per)


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
                self.nbytes += rows[array.kept] * array.nbytes(dtype)
