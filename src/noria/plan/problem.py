"""What a plan is made for: the run, the machine, and what one candidate fixes before memory is counted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from noria.blocks import Block, layer_name
from noria.config import Config
from noria.errors import require
from noria.model import ModelShape
from noria.plan import windows
from noria.plan.cut import Cut
from noria.plan.memory import Weighed, head_in_layers, weigh
from noria.plan.placement import partition
from noria.plan.rounds import Workload
from noria.step import pages_for
from noria.tools.listed import is_listed
from noria.tools.text import nbytes_words
from noria.tools.values import parse_nbytes

PROMPT_TOKENS = 512  # of a row, where nobody looked
LEAST_STEP_TOKENS, CPU_STEP_TOKENS = 128, 512
EVEN = (0.0, 0.0)
STEP_TOKENS = 2**16  # at most: a run is stopped between steps


@dataclass(frozen=True)
class Machine:
    """What the planner must know of the ranks, each number the least over them.

    The device's kind, bytes of the device and of host memory that each may use (on a CPU they are the same memory), and
    free bytes in scratch (None: not known). `most_memory_nbytes`: what of the device a user may ask for (None: no more).
    `scratch`: that folder, for messages.
    """

    device: str
    memory_nbytes: int
    cpu_memory_nbytes: int = 1 << 62
    scratch_nbytes: int | None = None
    most_memory_nbytes: int | None = None
    scratch: str = "the scratch folder"


@dataclass(frozen=True)
class Candidate:
    """The numbers that a plan is made of, before memory is counted. What the user gave of them is in the run's keys.

    prefill_rounds: in which the prompts of all rows that are generated at once are computed; 1.5 are a full one and a half. rows:
    these rows; on_device: the part of their pages on the device, the others are in CPU memory. What the device has left holds
    blocks; decoded: encoded ones are decoded while they load; coded: those that stream from CPU memory are coded without loss.
    ends: what the first and the last virtual stage are taken to carry beside their layers, in layers, so that they have fewer.
    beside: steps of whole prompts have room for the rows of a group that decode meanwhile.
    """

    laps: int
    groups: int
    prefill_rounds: float
    microbatch_tokens: int
    rows: int
    on_device: float = 1.0
    activations: str = "gpu"
    decoded: bool = False
    coded: bool = False
    ends: tuple[float, float] = EVEN
    beside: bool = False


@dataclass(frozen=True)
class Problem:
    """What every candidate has in common: a run of `num_rows` prompts in `dtype`, on the ranks' machines.

    `looked_at` says how long the rows are, if somebody looked. `longest`: pages of the longest row that there can be.
    `shape` comes to have rings in windowed layers, or none, whichever takes less; `windows` says so.
    """

    config: Config
    shape: ModelShape
    blocks: Mapping[str, Block]
    dtype: str
    num_ranks: int
    machine: Machine
    num_rows: int
    looked_at: Workload | None = None
    windows: str = field(init=False, default="")

    def __post_init__(self) -> None:
        shape, said = windows.keeping(self.shape, self.workload, self.dtype, self.config.sampling.ignore_eos)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "windows", said)

    @cached_property
    def workload(self) -> Workload:
        """How long the rows are; of a usual length, in the model's context, where nobody looked."""
        if self.looked_at is not None:
            return self.looked_at
        sampling, most = self.config.sampling, self.shape.max_positions
        new = min(max(sampling.most_new_tokens, 1), most)
        return Workload(max(self.num_rows, 1) * sampling.n, max(min(PROMPT_TOKENS, most - new), 1), new)

    def cap(self, groups: int) -> int:
        """Pages that all rows can use, where every group has an equal share of them."""
        in_group = -(-self.workload.num_rows // groups)
        most = groups * in_group * self.longest  # were all as long as the context
        if self.workload.total_pages is None:
            return most
        return min(most, max(self.workload.total_pages + groups * self.workload.pages, self.longest))

    def pages(self, rows: int, groups: int) -> int:
        """Pages for so many rows at once; for at least one that is as long as the context."""
        usual = -(-rows // groups) * groups * self.workload.pages
        return min(max(usual, self.longest), self.cap(groups))

    def step_tokens(self, candidate: Candidate) -> int:
        """Tokens of a step in which a group's rows have whole prompts, and find room when they decode."""
        asked, least = self.config.pipeline.step_tokens, self.config.pipeline.microbatch_tokens or 1
        if asked or self.machine.device == "cpu":
            return asked or max(CPU_STEP_TOKENS, least)
        in_group, prompt = -(-candidate.rows // candidate.groups), max(round(self.workload.prompt_tokens), 1)
        tokens = max(rounded_up(in_group * prompt / candidate.prefill_rounds), in_group)
        whole = -(-tokens // prompt)  # prompts
        if candidate.beside:
            tokens = whole * prompt + in_group - whole
        elif whole > 2:
            tokens = whole * prompt  # more of them are whole
        return max(min(tokens, STEP_TOKENS), LEAST_STEP_TOKENS, least)

    def elsewhere(self, candidate: Candidate) -> bool:
        """Whether some of the cache lives in another tier than the device."""
        asked = self.config.placement.cache
        if asked is None:
            return candidate.on_device < 1
        return any(tier != "gpu" for tier, share in asked.items() if share)

    @property
    def longest(self) -> int:
        """Pages of the longest row that there can be: as long as the context, unless somebody looked at all of them."""
        return self.workload.longest if self.workload.whole else pages_for(self.shape.max_positions)

    def cut(self, laps: int, ends: tuple[float, float] = EVEN) -> Cut:
        """The model cut into virtual stages with so many laps; `ends`: see Candidate. Raises InputError where it cannot be so."""
        if (laps, ends) not in self._cuts:
            shape, asked = self.shape, self.config.pipeline.partition
            extra, how = (ends, "balanced") if asked is None else (self.head_in_layers, asked)
            number = self.num_ranks * laps
            stages = partition(shape.num_layers, number, how, extra, shape.tied_layers, self.num_ranks)
            self._cuts[laps, ends] = self.cut_into(tuple(stages))
        return self._cuts[laps, ends]

    def cut_into(self, stages: tuple[range, ...]) -> Cut:
        """The model cut into these virtual stages."""
        if stages not in self._cuts_into:
            kinds = self._layer_kinds
            self._cuts_into[stages] = Cut(self.shape, self.blocks, kinds, self.dtype, self.num_ranks, stages)
        return self._cuts_into[stages]

    @cached_property
    def _cuts(self) -> dict[tuple[int, tuple[float, float]], Cut]:
        """By laps and ends: many candidates have the same."""
        return {}

    @cached_property
    def _cuts_into(self) -> dict[tuple[range, ...], Cut]:
        return {}

    @cached_property
    def head_in_layers(self) -> tuple[float, float]:
        """What embedding and head weigh."""
        return head_in_layers(self.blocks)

    @cached_property
    def _layer_kinds(self) -> tuple[int, ...]:
        """A number for each layer: layers of one number have as many bytes and numbers of everything that is counted."""
        if is_listed(self.config.placement.weights or {}):
            return tuple(range(self.shape.num_layers))  # each has a tier of its own
        kinds: dict[object, int] = {}
        shape, weighed, found = self.shape, self.weighed, []
        for layer, name in enumerate(map(layer_name, range(shape.num_layers))):
            block, beside = self.blocks[name], shape.bundle[layer : layer + 2]
            counted = weighed.held[name], weighed.stored[name], weighed.decoded.get(name), name in weighed.changed
            numbers = block.numbers, block.expert_numbers, block.between_nbytes, block.computed_nbytes, block.widest
            own = shape.arrays(layer), shape.arrays(shape.reads(layer)), beside
            found.append(kinds.setdefault((counted, numbers, own), len(kinds)))
        return tuple(found)

    @cached_property
    def weighed(self) -> Weighed:
        """Bytes of the blocks."""
        return weigh(self.blocks, self.dtype)

    @property
    def nbytes(self) -> Mapping[str, int]:
        """Bytes of each block as the run has it."""
        return self.weighed.held

    @cached_property
    def limits(self) -> dict[str, int]:
        """Bytes of each tier that a rank may use."""
        placement, machine = self.config.placement, self.machine
        return {
            "gpu": _limit(
                placement.gpu_memory, "placement.gpu_memory", machine.memory_nbytes, machine.most_memory_nbytes
            ),
            "cpu": _limit(placement.cpu_memory, "placement.cpu_memory", machine.cpu_memory_nbytes),
            "disk": 1 << 62 if machine.scratch_nbytes is None else machine.scratch_nbytes,
        }

    @property
    def may_use_disk(self) -> bool:
        """Whether a plan may put anything on disk: asked for, or weights that fill most of the memory of all ranks."""
        placement, limits = self.config.placement, self.limits
        if placement.stage or any((asked or {}).get("disk") for asked in (placement.weights, placement.cache)):
            return True
        memory = limits["gpu"] + (limits["cpu"] if self.machine.device != "cpu" else 0)
        return placement.weights is None and sum(self.nbytes.values()) > 0.8 * memory * self.num_ranks

    @property
    def disk_allowed(self) -> bool:
        """Whether weights can be read from disk: as a checkpoint stores them that is there, or will be."""
        placement, job = self.config.placement, self.config.job
        return self.as_stored and (job.random_weights is None or placement.stage)

    @property
    def may_code(self) -> bool:
        """Whether blocks may be coded without loss while they load."""
        wanted = self.config.placement.compress_weights != "off"
        return wanted and self.machine.device == "cuda" and bool(self.weighed.coded)

    @property
    def as_stored(self) -> bool:
        """Whether the run takes all weights as they are stored, none of them cast."""
        return not self.weighed.changed


def rounded_up(number: float) -> int:
    """The least whole number that is no smaller, but for what a division leaves."""
    return math.ceil(number - 1e-6)


def _limit(asked: str | None, name: str, has: int, most: int | None = None) -> int:
    """Bytes that a rank may use: `has`, or what is asked, up to `most`."""
    if asked is None:
        return has
    limit, most = parse_nbytes(asked, name), max(has, most or 0)
    said = f"{name} is {nbytes_words(limit)}, but the rank with the least has {nbytes_words(most)} to use: lower it"
    require(limit <= most, said)
    return limit
