"""What the program around a model knows of it: its sizes, and what a run reads of it. Knows no torch and no file format."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, product
from pathlib import Path
from typing import Any, Protocol

from noria.arrays import Array, Entry, attended, check, keys_and_values, nbytes, ringed, stored, unringed
from noria.blocks import DTYPE_NBYTES, Block, Parameter

NOT_PRODUCTS = ("router", "correction")  # of a layer: computed in other ways, as numbers
MORE_TEMPLATES = "additional_chat_templates.json"  # the folder of this name as one file: name -> template


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that the program around it needs; `details` holds what its family alone understands.

    bundle: by border between layers, from before the first to after the last one, the arrays that travel beside the hidden
    states; empty: none at any.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied: bool
    mixture_size: int = 0  # numbers that a token takes while a mixture of experts is computed
    experts_share: float = 1.0  # of a mixture's experts, those that one token goes to
    end_words: str = ""  # why no position beyond max_positions can be computed, where config.json says so
    details: Mapping[str, Any] = field(default_factory=dict)
    cache: tuple[Entry, ...] = ()  # of each layer; a family that says nothing has keys and values in all of them
    soft_cap: float | None = None  # c: attention scores are c * tanh(score / c)
    sinks: frozenset[int] = frozenset()  # layers whose softmax has a key without a value for each head
    bundle: tuple[tuple[Array, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.cache:
            entry = keys_and_values(self.num_kv_heads, self.head_dim)
            object.__setattr__(self, "cache", (entry,) * self.num_layers)
        assert len(self.cache) == self.num_layers, f"{len(self.cache)} caches of {self.num_layers} layers"
        check(self.cache)

    def arrays(self, layer: int) -> tuple[Array, ...]:
        """The arrays that a layer itself has; none where it reads another's."""
        entry = self.cache[layer]
        return () if isinstance(entry, int) else entry

    def stored(self, layer: int) -> tuple[Array, ...]:
        """The arrays that its cache has: of encoded ones their fields."""
        return stored(self.arrays(layer))

    def reads(self, layer: int) -> int:
        """The layer whose cache a layer reads: its own, or an earlier one's."""
        entry = self.cache[layer]
        return entry if isinstance(entry, int) else layer

    @cached_property
    def has_states(self) -> bool:
        """Whether some layer has what each sequence takes room for: arrays per sequence, or rings of windows."""
        return any(array.kept == "sequence" for layer in range(self.num_layers) for array in self.arrays(layer))

    @cached_property
    def rings(self) -> dict[int, int]:
        """window -> tokens of the ring that a sequence has in each layer of this window."""
        arrays = (array for layer in range(self.num_layers) for array in self.arrays(layer))
        return {array.window: array.ring for array in arrays if array.ring and array.window is not None}

    def ring_row(self, layers: Iterable[range], dtype: str) -> int:
        """The most bytes that a token takes in the rings of one of these layers."""
        own = (self.arrays(layer) for span in layers for layer in span)
        return max((sum(a.nbytes(dtype) // a.ring for a in arrays if a.ring) for arrays in own), default=0)

    def with_rings(self) -> "ModelShape":
        """The shape, where windowed layers keep their window alone."""
        return replace(self, cache=ringed(self.cache))

    def without_rings(self) -> "ModelShape":
        """The shape, where all layers keep all tokens."""
        return replace(self, cache=unringed(self.cache)) if self.rings else self

    @cached_property
    def tied_layers(self) -> tuple[tuple[int, ...], ...]:
        """Groups of layers of which the others read the first one's cache: they are on one rank."""
        groups: dict[int, list[int]] = {}
        for layer in range(self.num_layers):
            groups.setdefault(self.reads(layer), []).append(layer)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    def cache_nbytes(self, layers: Iterable[range], dtype: str, per: str = "token") -> int:
        """Bytes that a token, or a sequence, leaves in the caches of these layers."""
        return _between(self._nbytes[dtype, per], layers)

    @cached_property
    def cache_encoding(self) -> str:
        """The encoding of the cache's arrays; empty where they are kept as they are computed."""
        entries = map(self.arrays, range(self.num_layers))
        return next((array.encoding for entry in entries for array in entry if array.encoding), "")

    @cached_property
    def values_within(self) -> bool:
        """Whether some layer has no values beside its keys: they lie within them."""
        return any(array.value for layer in range(self.num_layers) for array in self.arrays(layer))

    def decoded_nbytes(self, layers: Iterable[range], dtype: str) -> int:
        """Bytes of what a token leaves in the caches that these layers read, decoded; 0 where nothing is encoded."""
        return _between(self._decoded[dtype], layers)

    def attended(self, layers: Iterable[range]) -> int:
        """Numbers that a query head of each of these layers multiplies for each token that it looks at."""
        return _between(self._attended, layers)

    def cache_rows(self, layers: Iterable[range], dtype: str) -> frozenset[tuple[int, int]]:
        """The different bytes that a token, and a sequence, leave in one of these layers."""
        of_layer = self._of_layer[dtype]
        return frozenset[tuple[int, int]]().union(*(of_layer[span.start : span.stop] for span in layers))

    @cached_property
    def widest_row(self) -> int:
        """The most numbers of a key or value that a layer has of a token; 0 where none has any."""
        arrays = (array for layer in range(self.num_layers) for array in self.arrays(layer))
        return max((array.row[-1] for array in arrays if array.per == "token"), default=0)

    @cached_property
    def _of_layer(self) -> dict[str, list[tuple[int, int]]]:
        """Of each layer in a run of each dtype: the bytes that a token leaves, and a sequence."""
        own = [self.arrays(layer) for layer in range(self.num_layers)]
        return {dtype: [(nbytes(a, dtype), nbytes(a, dtype, "sequence")) for a in own] for dtype in DTYPE_NBYTES}

    @cached_property
    def _nbytes(self) -> dict[tuple[str, str], list[int]]:
        kinds = product(DTYPE_NBYTES, enumerate(("token", "sequence")))
        return {(dtype, per): _sums(own[place] for own in self._of_layer[dtype]) for dtype, (place, per) in kinds}

    @cached_property
    def _decoded(self) -> dict[str, list[int]]:
        read = [self.arrays(self.reads(layer)) for layer in range(self.num_layers)]
        return {dtype: _sums(sum(a.decoded_nbytes(dtype) for a in own) for own in read) for dtype in DTYPE_NBYTES}

    @cached_property
    def _attended(self) -> list[int]:
        return _sums(attended(self.arrays(self.reads(layer))) for layer in range(self.num_layers))


def _sums(numbers: Iterable[int]) -> list[int]:
    """The sum of the numbers before each one, and of all: plans ask for them again and again."""
    return list(accumulate(numbers, initial=0))


def _between(sums: list[int], layers: Iterable[range]) -> int:
    return sum(sums[span.stop] - sums[span.start] for span in layers)


def in_products(block: Block) -> tuple[Parameter, ...]:
    """The matrices of a layer that families take in products of hidden states alone, by `models._linear.linear`."""
    if not block.name.startswith("layers/"):
        return ()
    absorbed = {"up"} if any(one.name == "latent" for one in block.parameters) else set[str]()  # by queries too
    matrices = (one for one in block.parameters if len(one.shape) == 2 and not one.name.endswith("_bias"))
    its = (one for one in matrices if one.own_dtype is None and not one.wanted.named)
    return tuple(one for one in its if one.name not in NOT_PRODUCTS and one.name not in absorbed)


class OpenModel(Protocol):
    """A model as a run reads it: a Checkpoint, which says what the attributes are, or random weights."""

    path: Path
    shape: ModelShape
    family: str
    dtype: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    blocks: dict[str, Block]
    tokenizer: dict[str, bytes]
    header_hash: str
    adapter: str  # name and hash of the adapter that was merged into it; "" of none
    nbytes: int
    notes: list[str]

    def read_block(self, name: str, into: bytearray | memoryview) -> None: ...

    def close(self) -> None: ...
