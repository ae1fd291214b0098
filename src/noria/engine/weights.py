"""This rank's weights: blocks that stay on the device, and the endless cycle that streams the others through its slots.

Knows blocks, bytes and tiers, not what a layer computes nor what a schedule is.
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from noria.blocks import Block, Parameter, round_up
from noria.engine.chosen import Runs, Tail, WithArriving, experts_of, runs_of, split, without_experts
from noria.engine.cycle import Cycle
from noria.engine.decoding import Computed, Decoder, Decoding
from noria.engine.parameters import Parameters, Undecoded, views
from noria.engine.timing import Traffic
from noria.streams import Event, Streams
from noria.tiers import Tier, Transfer


@dataclass(frozen=True)
class Home:
    """Where a streamed block lives: its layout, the tier that holds it, its place there and the links that it crosses.

    unseen: the file that it is read from, where nobody has looked at its fields yet.
    """

    block: Block
    tier: Tier
    offset: int
    links: tuple[str, ...]
    unseen: str | None = None


@dataclass
class WeightSlot:
    """A buffer on the device that holds one block while it is used; `free`: the events after which it may be rewritten."""

    buffer: torch.Tensor
    free: list[Event] = field(default_factory=list)
    views: dict[str, Parameters] = field(default_factory=dict)


@dataclass
class Coming:
    """A block on its way into a slot, or there. rest: what has not set out yet; nbytes: of what has. experts: those of them that
    are there, where they do not come with it."""

    name: str
    slot: WeightSlot
    rest: Runs
    transfers: list[Transfer] = field(default_factory=list)
    nbytes: int = 0
    experts: set[int] | None = None

    @property
    def settled(self) -> bool:
        return all(transfer.settled for transfer in self.transfers)


@dataclass(frozen=True)
class Placed:
    """A rank's blocks where its plan has them: those that stay, the homes of the streamed ones, and the tiers to be closed
    besides the homes' own. room: bytes in which encoded parameters are decoded, where they need so many. chosen_tokens: of a
    single group's step, for which streamed blocks come without their experts (chosen.py)."""

    resident: Mapping[str, Parameters | Undecoded]
    homes: Mapping[str, Home]
    tiers: Sequence[Tier] = ()
    room: int = Decoding().room
    chosen_tokens: int = 0


class Weights:
    """`wait(name)` gives a block's parameters by name, `done(name)` lets its slot go.

    Blocks that stay are on the device (the embedding may be in host memory). Encoded parameters are decoded when a block is
    waited for, or when they are asked for (decoding.py), and what `wait` gives of them is good until another block is.
    `cycle`: the order of the streamed blocks (None without any). `ahead`: loads are sent before they are needed, when `load`
    says so. largest: bytes of the largest streamed block.
    """

    def __init__(
        self,
        placed: Placed,
        cycle: Cycle | None,
        streams: Streams,
        traffic: Traffic | None = None,
        ahead: bool = True,
    ):
        resident, homes = placed.resident, placed.homes
        self._tiers = {id(tier): tier for tier in (*placed.tiers, *(home.tier for home in homes.values()))}
        self._resident = {name: block for name, block in resident.items() if not isinstance(block, Undecoded)}
        self._undecoded = {name: block for name, block in resident.items() if isinstance(block, Undecoded)}
        self._homes, self._streams, self._prefetches = dict(homes), streams, ahead
        self._traffic, self._cycle = traffic or Traffic(), cycle
        self.largest = max((home.block.nbytes for home in homes.values()), default=0)
        slots = cycle.slots if cycle is not None else 0
        buffers = [torch.empty(self.largest, dtype=torch.uint8, device=streams.device) for _ in range(slots)]
        self._free = deque(map(WeightSlot, buffers))
        encoded = [held.block for held in self._undecoded.values()] + [home.block for home in homes.values()]
        self._decoder = Decoder(max((block.decoding_room(placed.room) for block in encoded), default=0), streams.device)
        self._ahead: deque[Coming] = deque()
        self._held: dict[str, Coming] = {}
        self._at = (0, 0, 0)
        self._tail = Tail(placed.chosen_tokens)
        self._came: set[str] = set()  # blocks that have been here whole: on disk they are checked then

    @property
    def nbytes(self) -> int:
        """Bytes of the resident blocks, what two of them share counted once, of the slots and of what is decoded."""
        blocks = [p.untyped_storage() for block in self._resident.values() for p in block.values()]
        blocks += [held.buffer.untyped_storage() for held in self._undecoded.values()]
        slots = [coming.slot for coming in (*self._ahead, *self._held.values())] + list(self._free)
        storages = [*blocks, self._decoder.buffer.untyped_storage()] + [slot.buffer.untyped_storage() for slot in slots]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def stay(self, names: Iterable[str]) -> bool:
        """Whether these blocks are on the device for the run."""
        return all(name in self._resident or name in self._undecoded for name in names)

    def forget(self) -> None:
        """What is decoded now may be written over, or must be decoded again: a graph holds all decoding that it needs."""
        self._decoder.forget()

    def begin(self, round: int, lap: int, group: int, tokens: int = 1) -> None:
        """A visit of a step of so many tokens begins, or is passed over because the group has nothing to compute."""
        if (round, lap) != self._at[:2]:
            for name in list(self._held):
                self._release(name)
        self._at = round, lap, group
        self._tail.visit(group, tokens)
        if not tokens and lap == 0 and self._cycle:
            needed = self._cycle.skip(round, group, [coming.name for coming in self._ahead])
            while not needed and self._ahead and self._ahead[0].settled:  # the host waits for no other here
                self._drop()
        if self._prefetches:
            self._send()

    def load(self, name: str | None = None, share: float | None = None) -> None:
        """What is used next should be on its way: `name`, or blocks of visits to come. For one that stays nothing is loaded.

        Ahead, all slots that are free are filled; with `share` by no more bytes than such a share of the largest block has.
        """
        if self._prefetches:
            self._send(None if share is None else round_up(round(share * self.largest)))
        elif name in self._homes and name not in self._held:
            self._send()

    def _send(self, nbytes: int | None = None) -> None:
        """Sends the next blocks of the cycle on their way, or so many bytes of them, into the slots that are free; without
        `ahead` one alone."""
        while (coming := self._next()) is not None:
            if nbytes is None:
                self._more(coming)
            elif nbytes or not self._in_parts(coming):
                nbytes = max(nbytes - self._more(coming, nbytes), 0)
            else:
                return

    def _next(self) -> Coming | None:
        """The block that is to set out next, or has in part; None if no slot is free for one."""
        if self._ahead and self._ahead[-1].rest:
            return self._ahead[-1]
        if not self._cycle or not self._free or (self._ahead and not self._prefetches):
            return None
        name, slot = self._cycle.next(), self._free.popleft()
        block = self._homes[name].block
        self._streams.label(slot.buffer, name)
        leaves = name in self._came and self._tail.leaves_experts()
        runs = without_experts(block) if leaves else [(0, block.nbytes)]
        self._ahead.append(Coming(name, slot, runs, experts=set() if leaves else None))
        return self._ahead[-1]

    def _in_parts(self, coming: Coming) -> bool:
        """Whether a block may be sent part by part. From a disk it comes whole: it is checked so, and read far ahead."""
        return len(self._homes[coming.name].links) == 1

    def _more(self, coming: Coming, nbytes: int | None = None) -> int:
        """Sends the rest of a block on its way, or so many bytes of it; returns how many that were."""
        home, rest = self._homes[coming.name], _nbytes(coming.rest)
        sent = rest if nbytes is None or not self._in_parts(coming) else min(nbytes, rest)
        runs, coming.rest = split(coming.rest, sent)
        if runs:
            coming.transfers.append(home.tier.load(_pieces(home, coming.slot, runs), coming.slot.free))
        coming.nbytes += sent
        return sent

    def wait(self, name: str) -> Computed:
        """The parameters of a block, ready to be used on the compute stream."""
        if name in self._resident:
            return self._resident[name]
        if name not in self._held:
            if name in self._undecoded:
                return self._decoder.parameters(name, self._undecoded[name])
            self._held[name] = self._arrive(name)
        coming, block = self._held[name], self._homes[name].block
        found = self._computed(name, coming.slot)
        if coming.experts is None:
            return found
        return WithArriving(
            found, {key: partial(self._bring, coming, one) for one in experts_of(block) for key in one.computed}
        )

    def _computed(self, name: str, slot: WeightSlot) -> Computed:
        """The parameters of a block that has come into a slot."""
        if name not in slot.views:
            block, unseen = self._homes[name].block, self._homes[name].unseen
            if block.encoded or unseen:
                return self._decoder.parameters(name, Undecoded(block, slot.buffer[: block.nbytes]), unseen)
            slot.views[name] = views(slot.buffer, block)
        return slot.views[name]

    def _bring(self, coming: Coming, parameter: Parameter, chosen: torch.Tensor) -> None:
        """Loads the experts that are chosen and not there. What to copy depends on the choice: the host waits for it."""
        began = time.perf_counter()
        wanted = chosen.cpu().unique().tolist()
        self._streams.took("launches", began - time.perf_counter())  # within a layer, but nothing is launched
        assert coming.experts is not None
        missing = [expert for expert in wanted if expert not in coming.experts]
        if not missing:
            return
        home, slot, runs = self._homes[coming.name], coming.slot, runs_of(parameter, missing)
        transfer = home.tier.load(_pieces(home, slot, runs), slot.free)
        with self._streams.waiting("experts"):
            self._streams.wait(transfer.event())
        coming.experts.update(missing)
        self._count(home, _nbytes(runs))

    def done(self, name: str) -> None:
        """This visit has queued all its work with the block. Its slot goes free unless another group needs it."""
        _, lap, group = self._at
        if name in self._held and self._cycle and self._cycle.lets_go(lap, group):
            self._release(name)

    def _arrive(self, name: str) -> Coming:
        """The next load of this name; those before it were for a visit that was passed over."""
        if name not in self._homes:
            raise KeyError(name)
        while True:
            coming = self._ahead[0] if self._ahead else self._next()
            assert coming is not None, f"no weight slot is free for {name}"
            if coming.name != name:
                self._drop()
                continue
            self._more(self._ahead.popleft())
            with self._streams.waiting("weights"):
                for transfer in coming.transfers:
                    self._streams.wait(transfer.event())
            self._count(self._homes[name], coming.nbytes)
            if coming.experts is None:
                self._came.add(name)
            return coming

    def _count(self, home: Home, nbytes: int) -> None:
        for link in home.links:
            self._traffic.add(link, nbytes)

    def _drop(self) -> list[Event]:
        """The oldest load ahead is in vain: its slot goes free after the events returned."""
        coming = self._ahead.popleft()
        events = [transfer.event() for transfer in coming.transfers]
        coming.slot.free = [*coming.slot.free, *events]
        self._free.append(coming.slot)
        self._traffic.weights_unused += coming.nbytes
        return events

    def _release(self, name: str) -> None:
        slot = self._held.pop(name).slot
        slot.free = [self._streams.event()]
        self._free.append(slot)

    def close(self) -> int:
        """Waits for loads under way, which were for rounds that did not come, and closes the tiers.

        Returns the bytes of host memory that were page-locked.
        """
        while self._ahead:
            for event in self._drop():
                event.synchronize()
        return sum(tier.close() for tier in self._tiers.values())


def _pieces(home: Home, slot: WeightSlot, runs: Runs) -> list[tuple[int, torch.Tensor]]:
    """Where these bytes of a block lie in its tier, and in a slot."""
    return [(home.offset + first, slot.buffer[first : first + nbytes]) for first, nbytes in runs]


def _nbytes(runs: Runs) -> int:
    return sum(nbytes for _, nbytes in runs)
