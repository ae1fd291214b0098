"""A plan: every choice of a run as plain data, and as people read it. Knows nothing of how it was chosen."""

from dataclasses import asdict, dataclass, field

from noria.config import TIERS
from noria.plan.tiers import size_words
from noria.step import PAGE_TOKENS


@dataclass(frozen=True)
class Plan:
    """Every choice of a run.

    weight_tiers: per rank, each of its blocks (embed, layers/0003, head) -> tier. weight_slots: buffers on the device for
    streamed blocks, each of the rank's largest one. cache_pages: tier -> pages; page ids: gpu first, then cpu, then disk.
    cache_slots buffers of cache_slot_pages pages stage one layer's K and V of a microbatch whose pages are elsewhere.
    memory: per rank and tier, bytes by purpose.
    """

    num_ranks: int
    laps: int
    groups: int
    microbatches: int
    step_tokens: int
    microbatch_tokens: int
    dtype: str
    num_pages: int
    stages: tuple[tuple[int, int], ...]
    blocking: bool
    schedule: str
    weight_tiers: tuple[dict[str, str], ...]
    weight_slots: int
    cache_pages: dict[str, int]
    cache_slots: int
    cache_slot_pages: int
    activations: str
    memory: tuple[dict, ...]
    predicted: dict = field(default_factory=dict)

    def ranges(self) -> list[range]:
        """The layers of each virtual stage."""
        return [range(*stage) for stage in self.stages]

    def as_dict(self) -> dict:
        return asdict(self)

    def stage_words(self, rank: int) -> str:
        """A rank's place, as `stage 1 (layers 4-7)`."""
        return f"stage {rank} (layers {self._layers(rank)})"

    def _layers(self, rank: int) -> str:
        pieces = [
            f"{first}-{last - 1}" if last - first > 1 else f"{first}"
            for first, last in self.stages[rank :: self.num_ranks]
        ]
        return ", ".join(pieces if len(pieces) <= 6 else [*pieces[:3], "...", pieces[-1]])

    def lines(self) -> list[str]:
        """The plan as people read it."""
        head = (
            f"plan: {self.num_ranks} ranks x {self.laps} laps, {self.groups} groups, steps of {self.step_tokens} tokens"
            f" in {self.microbatches}+ microbatches of {self.microbatch_tokens}, {self.dtype}, {self.schedule},"
            f" cache for {self.num_pages * PAGE_TOKENS:,} tokens"
        )
        return [head, *(line for rank in range(self.num_ranks) for line in self._rank_lines(rank))]

    def _rank_lines(self, rank: int) -> list[str]:
        lines = []
        for tier in TIERS:
            table = self.memory[rank][tier]
            if table:
                sizes = ", ".join(f"{purpose} {size_words(nbytes)}" for purpose, nbytes in table.items())
                held = f"layers {self._layers(rank)}; " if tier == "gpu" else ""
                lines.append(
                    f"plan: rank {rank}: {held}{tier} {size_words(sum(table.values()))}: {sizes}{self._blocks(rank, tier)}"
                )
        return lines

    def _blocks(self, rank: int, tier: str) -> str:
        """How many of the rank's layers live in a tier, where not all of them live on the device."""
        layers = [at for name, at in self.weight_tiers[rank].items() if name.startswith("layers/")]
        if all(at == "gpu" for at in layers):
            return ""
        return f" ({layers.count(tier)} of {len(layers)} layers)"
