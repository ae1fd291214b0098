"""What a plan is made for: the run, the machine, and what one candidate fixes before memory is counted."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from noria.blocks import Block
from noria.config import Config
from noria.errors import require
from noria.model import ModelShape
from noria.plan.costs import Workload
from noria.plan.memory import Weighed, head_in_layers, weigh
from noria.plan.placement import partition
from noria.step import pages_for
from noria.tools.text import nbytes_words
from noria.tools.values import parse_nbytes

PROMPT_TOKENS = 512  # of a row, where nobody looked


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
    """What one candidate fixes before memory is counted.

    `weights`, `cache`: shares in % or sizes, by tier, as the user gives them. `weights` None: resident what the device
    holds beside `reserved` pages of the cache (by tier), then CPU memory, then disk. `cache` None: what the tiers in
    `cache_tiers` hold, in their order. `decoded`: encoded blocks that stay on the device are decoded while they load.
    `coded`: those that stream from CPU memory are coded without loss meanwhile.
    """

    laps: int
    groups: int
    step_tokens: int
    weights: Mapping[str, Any] | None
    cache: Mapping[str, Any] | None
    reserved: Mapping[str, int] | None = None
    cache_tiers: tuple[str, ...] = ("gpu",)
    decoded: bool = False
    coded: bool = False

    @property
    def elsewhere(self) -> bool:
        """Whether some of the cache lives in another tier than the device."""
        held = self.cache_tiers if self.cache is None else [tier for tier, share in self.cache.items() if share]
        return any(tier != "gpu" for tier in held)


@dataclass(frozen=True)
class Problem:
    """What every candidate has in common: a run of `num_rows` prompts in `dtype`, on the ranks' machines.

    `looked_at` says how long the rows are, if somebody looked. `longest`: pages of the longest row that there can be.
    """

    config: Config
    shape: ModelShape
    blocks: Mapping[str, Block]
    dtype: str
    num_ranks: int
    machine: Machine
    num_rows: int
    looked_at: Workload | None = None

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
        most = max(self.num_rows, 1) * self.config.sampling.n * self.longest  # were all as long as the context
        if self.workload.total_pages is None:
            return most
        return min(most, max(self.workload.total_pages + groups * self.workload.pages, self.longest))

    @property
    def longest(self) -> int:
        return pages_for(self.shape.max_positions)

    def stages(self, laps: int) -> list[range]:
        """The layers of each virtual stage with so many laps. Raises InputError where they cannot be cut so."""
        if laps not in self._stages:
            shape, how = self.shape, self.config.pipeline.partition
            self._stages[laps] = partition(
                shape.num_layers,
                self.num_ranks * laps,
                how,
                head_in_layers(self.blocks),
                shape.tied_layers,
                self.num_ranks,
            )
        return self._stages[laps]

    @cached_property
    def _stages(self) -> dict[int, list[range]]:
        """By laps: many candidates have the same."""
        return {}

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


def _limit(asked: str | None, name: str, has: int, most: int | None = None) -> int:
    """Bytes that a rank may use: `has`, or what is asked, up to `most`."""
    if asked is None:
        return has
    limit, most = parse_nbytes(asked, name), max(has, most or 0)
    said = f"{name} is {nbytes_words(limit)}, but the rank with the least has {nbytes_words(most)} to use: lower it"
    require(limit <= most, said)
    return limit
