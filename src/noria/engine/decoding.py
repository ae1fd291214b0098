"""Decodes encoded parameters before a layer computes with them, into memory that the plan counts.

All on the compute stream: what is decoded takes the place of what was decoded before, behind all that computes with it.
Knows layouts and encodings, nothing of tiers or steps.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch

from noria import encodings
from noria.blocks import Block, Parameter, end_of, round_up
from noria.engine.parameters import Parameters, Undecoded, named, stored, views
from noria.kernels.as_stored import StoredWeight
from noria.kernels.stored import StoredMatrices
from noria.model import in_products

# What a layer gets by name: tensors, of a parameter that is decoded in runs of pieces a SomePieces, of a weight that may be
# multiplied as it is stored a StoredWeight.
Computed: TypeAlias = Mapping[str, Any]
Which: TypeAlias = tuple[int, ...] | torch.Tensor  # pieces: their numbers, or a list of the device


@dataclass(frozen=True)
class Decoding:
    """What a plan says of encoded parameters: in how many bytes they are decoded (a piece of each finds room whatever it
    says), whether blocks that stay on the device are decoded once, while they load, and whether those that stream from CPU
    memory or scratch are coded without loss meanwhile."""

    room: int = 1 << 62
    residents: bool = False
    coded: bool = False


class Decoder:
    """The memory into which encoded parameters are decoded.

    A block that finds room in it is decoded whole, once for all that ask for it one after another, but for weights whose
    numbers nobody asks for, and for parameters in several pieces (experts): of these what is asked for, all of them or a few.
    Of a larger block a parameter is decoded when it is asked for, and takes the place of the one before; of pieces as many at a
    time as find room.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._now: tuple[object, ...] = ()  # what is decoded: a whole block by its name, or also one parameter of it
        self._decoded: Parameters = {}
        self._some: dict[str, Which] = {}  # by parameter, which of its several pieces are decoded
        self._dense: set[str] = set()  # weights of a whole block whose numbers were asked for
        self._weights: dict[tuple[str, int], dict[str, StoredWeight]] = {}  # by block and where it lies
        self._several: dict[tuple[str, int], dict[str, SomePieces]] = {}  # the same
        self._checked: set[str] = set()

    def parameters(self, name: str, held: Undecoded, path: str | None = None) -> Computed:
        """What a model computes with; valid until another block is asked for.

        `path`: the file from which the block came unseen: its fields are checked the first time. Raises InputError.
        """
        if path is not None and name not in self._checked:
            encodings.check_block(held.block, held.buffer, path)
            self._checked.add(name)
        if not self._whole(held.block):
            return _ByParameter(self, name, held)
        self._begin(name, held)
        return views(held.buffer, held.block) | self._decoded | self.several(name, held) | self.weights(name, held)

    def _begin(self, name: str, held: Undecoded) -> None:
        """Decodes of a whole block, unless it is there, what is neither in several pieces nor multiplied as it is stored."""
        if self._now != (name,):
            self._now = ()  # until all is decoded: memory may fail on the way
            self._decoded, self._some, self._dense = named(self.buffer, held.block.decoded), {}, set()
            weights = self.weights(name, held)
            for parameter, pieces in _encoded(held):
                if parameter.pieces == 1 and parameter.name not in weights:
                    encodings.decode(parameter, pieces, {key: self._decoded[key] for key in parameter.computed})
            self._now = (name,)

    def several(self, name: str, held: Undecoded) -> dict[str, "SomePieces"]:
        """The tensors of a block's encoded parameters in several pieces."""
        key = name, held.buffer.data_ptr()
        if key not in self._several:
            several = [its for its in _encoded(held) if its[0].pieces > 1]
            self._several[key] = {one: SomePieces(self, name, one, *its) for its in several for one in its[0].computed}
        return self._several[key]

    def weights(self, name: str, held: Undecoded) -> dict[str, StoredWeight]:
        """The encoded weights of a block that kernels may multiply as they are stored."""
        key = name, held.buffer.data_ptr()
        if key not in self._weights:
            self._weights[key], pieces = {}, stored(held.buffer, held.block)
            for one in in_products(held.block):
                its = None if one.plain or one.multiplied else encodings.in_tiles(one, pieces[one.name], one.name)
                if its is not None:
                    self._weights[key][one.name] = StoredWeight(its, partial(self._numbers, name, held, one))
        return self._weights[key]

    def _numbers(self, name: str, held: Undecoded, weight: Parameter) -> torch.Tensor:
        """A weight of a block, decoded when it is first asked for; of a larger block in the place of the one before."""
        pieces = stored(held.buffer, held.block)[weight.name]
        if not self._whole(held.block):
            return self.parameter(name, weight, pieces)[weight.name]
        self._begin(name, held)
        if weight.name not in self._dense:
            encodings.decode(weight, pieces, {weight.name: self._decoded[weight.name]})
            self._dense.add(weight.name)
        return self._decoded[weight.name]

    def forget(self) -> None:
        """What is asked for next is decoded, whatever was decoded before."""
        self._now, self._some = (), {}

    def _whole(self, block: Block) -> bool:
        unasked = self.buffer.device.type == "cpu" and any(parameter.pieces > 1 for parameter in block.encoded)
        return block.decoded_nbytes <= len(self.buffer) and not unasked

    def parameter(self, block: str, parameter: Parameter, pieces: torch.Tensor) -> Parameters:
        """The tensors of one parameter, decoded from its pieces [P, bytes of a piece]."""
        if self._now != (block, parameter.name):
            self._now = ()
            self._decoded = named(self.buffer, parameter.decoded())
            encodings.decode(parameter, pieces, self._decoded)
            self._now = block, parameter.name
        return self._decoded

    def some(self, block: str, parameter: Parameter, pieces: torch.Tensor, wanted: Which) -> Parameters:
        """The tensors [wanted, ...] of some of a parameter's pieces: in their place in a block that is decoded whole, or alone
        in the memory."""
        whole, same = self._now == (block,), _same(self._some.get(parameter.name), wanted)
        if not whole and not (same and self._now == (block, parameter.name)):
            self._now, self._decoded, same = (), named(self.buffer, parameter.decoded(len(wanted))), False
        into = {key: self._decoded[key][: len(wanted)] for key in parameter.computed}
        if not same:
            self._some.pop(parameter.name, None)
            self._decode_some(parameter, pieces, into, wanted)
            self._some[parameter.name] = wanted
            self._now = (block,) if whole else (block, parameter.name)
        return into

    def _decode_some(
        self, parameter: Parameter, pieces: torch.Tensor, into: Mapping[str, torch.Tensor], wanted: Which
    ) -> None:
        if isinstance(wanted, torch.Tensor):
            encodings.decode(parameter, pieces, into, wanted)
            return
        for place, first, count in _consecutive(wanted):
            its = {name: tensor[place : place + count] for name, tensor in into.items()}
            encodings.decode(parameter, pieces[first : first + count], its)

    def most(self, block: str, parameter: Parameter) -> int:
        """How many pieces of a parameter find room."""
        if self._now == (block,):
            return parameter.pieces
        most = max(len(self.buffer) // max(end_of(parameter.decoded(1)), 1), 1)
        while most > 1 and end_of(parameter.decoded(most)) > len(self.buffer):
            most -= 1
        return min(most, parameter.pieces)


class _ByParameter(Mapping[str, Any]):
    """The parameters of a block, each decoded when it is asked for."""

    def __init__(self, decoder: Decoder, name: str, held: Undecoded):
        self._decoder, self._name = decoder, name
        self._given = views(held.buffer, held.block) | decoder.weights(name, held) | decoder.several(name, held)
        others = (its for its in _encoded(held) if its[0].pieces == 1 and its[0].name not in self._given)
        self._encoded = {key: (parameter, its) for parameter, its in others for key in parameter.computed}

    def __getitem__(self, name: str) -> Any:
        if name in self._given:
            return self._given[name]
        parameter, pieces = self._encoded[name]
        return self._decoder.parameter(self._name, parameter, pieces)[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own decodes it
        return name in self._given or name in self._encoded

    def __iter__(self) -> Iterator[str]:
        yield from self._given
        yield from self._encoded

    def __len__(self) -> int:
        return len(self._given) + len(self._encoded)


class SomePieces:
    """One of the tensors [pieces, ...] that a parameter in several pieces is computed as, of which some are decoded at a time."""

    def __init__(self, decoder: Decoder, block: str, name: str, parameter: Parameter, pieces: torch.Tensor):
        self._decoder, self._block, self._name, self._parameter, self._pieces = decoder, block, name, parameter, pieces

    def __len__(self) -> int:
        return self._parameter.pieces

    @property
    def most(self) -> int:
        """How many pieces may be asked for at once."""
        return self._decoder.most(self._block, self._parameter)

    def of(self, wanted: Sequence[int]) -> torch.Tensor:
        """[wanted, ...]: these pieces, in ascending order; valid until others or another parameter are asked for."""
        return self._decoded(tuple(wanted))

    @cached_property
    def stored(self) -> StoredMatrices | None:
        """All of them as they are stored, for kernels that decode their own tiles; none where they cannot."""
        return encodings.in_tiles(self._parameter, self._pieces, self._name)

    def listed(self, named: torch.Tensor) -> torch.Tensor:
        """[n, ...]: those that a list of the device [n] int32 names, at most `most`; -1: none. Valid as what `of` gives.

        What is asked for by the same list, one after another, is decoded once.
        """
        return self._decoded(named)

    def _decoded(self, wanted: Which) -> torch.Tensor:
        return self._decoder.some(self._block, self._parameter, self._pieces, wanted)[self._name]


def samples(blocks: Iterable[Block], device: torch.device) -> list[tuple[SomePieces, SomePieces]]:
    """Of each kind of encoded experts gates and ups, and downs, two of each, all zeros: what kernels are built for."""
    several = (one for block in blocks for one in block.encoded if one.pieces > 1)
    kinds = {(one.encoding, str(one.settings), one.piece): one for one in several}
    found = []
    for one in kinds.values():
        few = replace(one, shape=(2, *one.shape[1:]), pieces=2)
        decoder, pieces = (
            Decoder(round_up(end_of(few.decoded())), device),
            torch.zeros(2, one.piece.nbytes, dtype=torch.uint8),
        )
        gate_up, down = (SomePieces(decoder, "", name, few, pieces.to(device)) for name in few.computed)
        found.append((gate_up, down))
    return found


def _same(one: Which | None, other: Which) -> bool:
    """Whether both want the same for sure: lists of the device are not looked into."""
    return one is other or (isinstance(one, tuple) and isinstance(other, tuple) and one == other)


def _encoded(held: Undecoded) -> list[tuple[Parameter, torch.Tensor]]:
    """The encoded parameters of a block with their pieces as they are stored."""
    pieces = stored(held.buffer, held.block)
    return [(parameter, pieces[parameter.name]) for parameter in held.block.encoded]


def _consecutive(wanted: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive numbers: where each begins in `wanted`, its first number, and how many it has."""
    begin = 0
    for place in range(1, len(wanted) + 1):
        if place == len(wanted) or wanted[place] != wanted[place - 1] + 1:
            yield begin, wanted[begin], place - begin
            begin = place
