"""A plan: every choice of a run as plain data, as people read it, and held against what was measured.

Knows not why it was chosen.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from noria.limits import HOST_NBYTES, TIERS
from noria.model import ModelShape
from noria.step import PAGE_TOKENS
from noria.tools.text import nbytes_words, plural

TOLERANCE = 0.15  # of a prediction


def rate_words(rate: float) -> str:
    """Tokens/s as people read them: `10,080`, `118.5`, `0.0412`."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.1f}" if rate >= 10 else f"{rate:.3g}"


def coded_tiers(coded: bool, staged: bool) -> tuple[str, ...]:
    """The tiers whose blocks are coded on their way there, if any are; the disk's where they are copied to scratch."""
    return ("cpu", *["disk"] * staged) if coded else ()


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is chosen of steps and of what they pass through, whatever the blocks of each rank and their tiers are.

    weight_slots: buffers on the device for streamed blocks, each of the rank's largest one. cache_slots buffers of
    cache_slot_pages pages and state_rows states stage one layer's arrays of a microbatch whose pages are elsewhere; where
    there are states no microbatch has more than state_rows rows. decoding_room: bytes in which encoded parameters are
    decoded before they are used, where they need so many; decoded: those of blocks that stay on the device are decoded while
    they load; coded: blocks that stream from CPU memory, or from scratch (`staged`: weights on disk are copied there), are
    coded without loss while they load. graph_rows: decode steps of so many rows at most are captured as graphs, by ranks
    whose layers stay on the device. decoded_pages: of the buffer into which an encoded cache is decoded, of some rows at a
    time.
    """

    groups: int
    step_tokens: int
    microbatch_tokens: int
    weight_slots: int = 0
    cache_slots: int = 0
    cache_slot_pages: int = 0
    state_rows: int = 0
    activations: str = "gpu"
    decoding_room: int = 0
    decoded: bool = False
    coded: bool = False
    staged: bool = False
    graph_rows: int = 0
    decoded_pages: int = 0

    @property
    def coded_tiers(self) -> tuple[str, ...]:
        """The tiers whose blocks are coded without loss on their way there."""
        return coded_tiers(self.coded, self.staged)


@dataclass(frozen=True, kw_only=True)
class Plan(Choices):
    """Every choice of a run.

    weight_tiers: per rank, each of its blocks (embed, layers/0003, head) -> tier. pools: tier -> pool (pages, states) -> how
    many; ids: gpu first, then cpu, then disk. memory: per rank and tier, bytes by purpose. may_code: blocks could be `coded`.
    kv_cache_dtype: how the cache is kept; products: in what weights in fp8 are multiplied. chosen_tokens: where a single
    group has a step of at most so many, streamed layers come without their experts, and those that are chosen follow.
    rings: windowed layers keep their window alone, in what counts as states; windows: of them, in words.
    """

    num_ranks: int
    laps: int
    microbatches: int
    dtype: str
    num_pages: int
    stages: tuple[tuple[int, int], ...]
    blocking: bool
    schedule: str
    weight_tiers: tuple[dict[str, str], ...]
    pools: dict[str, dict[str, int]]
    memory: tuple[dict[str, Any], ...]
    predicted: dict[str, Any] = field(default_factory=dict)
    may_code: bool = field(default=False, compare=False)  # for words alone: a plan that is written says off
    kv_cache_dtype: str = "auto"
    products: str = "auto"
    chosen_tokens: int = 0
    rings: bool = False
    windows: str = ""

    def of_pool(self, name: str) -> dict[str, int]:
        """tier -> how many pages, or states, it has."""
        return {tier: pools[name] for tier, pools in self.pools.items()}

    def kept(self, shape: ModelShape) -> ModelShape:
        """The model's shape with what its layers keep."""
        return shape.with_rings() if self.rings else shape

    def ranges(self) -> list[range]:
        """The layers of each virtual stage."""
        return [range(*stage) for stage in self.stages]

    def holds(self, pages: int) -> bool:
        """Whether a row of so many pages finds room: all of them are in one tier."""
        return self.most_pages >= pages

    def decodes_later(self, name: str) -> bool:
        """Whether some rank has this block as it is stored when it computes: weights of others are decoded as they load."""
        return not self.decoded or any(its.get(name, "gpu") != "gpu" for its in self.weight_tiers)

    @property
    def composes_ahead(self) -> bool:
        """Whether one GPU may compute a step while rank 0 takes in what the one before gave (engine/ahead.py)."""
        alone = self.num_ranks == self.groups == self.laps == 1
        return alone and self.activations == "gpu" and self.weight_tiers[0].get("embed") == "gpu"

    @property
    def most_pages(self) -> int:
        """Pages of the tier that has most of them."""
        return max(self.of_pool("pages").values())

    def as_dict(self) -> dict[str, Any]:
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

    def lines(self, predicted: bool = True, memory: bool = True) -> list[str]:
        """The plan as people read it, with or without its prediction and a line for each rank's memory."""
        states = sum(self.of_pool("states").values())
        head = (
            f"plan: {plural(self.num_ranks, 'rank')}, {plural(self.laps, 'lap')}, {plural(self.groups, 'group')}, steps of"
            f" {plural(self.step_tokens, 'token')} in {self.microbatches}+ microbatches of {self.microbatch_tokens},"
            f" {self.dtype}{f' with products in {self.products}' * (self.products != 'auto')}, {self.schedule},"
            f" cache for {self.num_pages * PAGE_TOKENS:,} tokens"
            + (f" in {self.kv_cache_dtype}" if self.kv_cache_dtype != "auto" else "")
            + (f" and {states:,} {'windows' if self.rings else 'states'}" if states else "")
        )
        ranks = (line for rank in range(self.num_ranks) for line in self._rank_lines(rank) if memory)
        where = " and ".join({"cpu": "CPU memory", "disk": "scratch"}[tier] for tier in self.coded_tiers)
        said = f"plan: weights that stream from {where} are coded without loss while they load (--compress-weights off: not)"
        notes = [f"plan: {self.windows}"] * bool(self.windows) + [said] * self.coded
        if self.may_code and not self.coded and self._streams("cpu", *["disk"] * self.staged):
            notes.append("plan: weights that stream stay as they are: coded without loss they would come no faster")
        if self.chosen_tokens:
            notes.append(
                f"plan: where one group of at most {plural(self.chosen_tokens, 'token')} is left, streamed layers load the"
                " experts that are chosen and no others"
            )
        return [head, *ranks, *notes, *(self._predicted_lines() if predicted else ()), *self._too_small_lines()]

    def _streams(self, *tiers: str) -> bool:
        """Whether blocks stream from one of these tiers."""
        return any(tier in tiers for held in self.weight_tiers for name, tier in held.items() if name != "embed")

    def _too_small_lines(self) -> list[str]:
        """A warning where rows that are known find no room."""
        longest = self.predicted.get("longest_pages", 0)
        if self.holds(longest):
            return []
        return [
            f"plan: warning: rows of up to {longest * PAGE_TOKENS:,} tokens, prompt and new ones, but the cache has room for"
            f" {self.most_pages * PAGE_TOKENS:,}: longer ones will be errors"
        ]

    def _predicted_lines(self) -> list[str]:
        if not self.predicted:
            return []
        prefill, decode = self.predicted["prefill"], self.predicted["decode"]
        by = f"assumed rates of {self.predicted['device']}" if self.predicted["assumed"] else "measured rates"
        return [
            f"plan: predicted from {by}, {self.predicted['rows']:,} rows at once: prefill"
            f" {rate_words(prefill['tokens_per_second'])} tok/s ({prefill['binds']} binds), decode"
            f" {rate_words(decode['tokens_per_second'])} tok/s ({decode['binds']} binds,"
            f" {decode['round_seconds']:.3f} s a round), {rate_words(self.predicted['tokens_per_second'])} tok/s overall"
        ]

    def compare(self, measured: Mapping[str, Any]) -> list[str]:
        """Where a run differed from its plan, in words.

        `measured` may have prefill_tokens_per_second, decode_tokens_per_second and tokens_per_second, and, one number a
        rank, peak_device_nbytes and peak_host_nbytes.
        """
        said = []
        for phase in ("prefill", "decode", ""):
            name = f"{phase}_tokens_per_second".lstrip("_")
            planned = (self.predicted.get(phase) if phase else self.predicted or {}) or {}
            planned, found = planned.get("tokens_per_second"), measured.get(name)
            if planned and found is not None and abs(found / planned - 1) > TOLERANCE:
                said.append(
                    f"{phase or 'the whole run'}: {found:,.1f} tok/s, predicted {planned:,.1f}"
                    f" ({100 * (found / planned - 1):+.0f} %)"
                )
        for tier, name, extra in (("gpu", "peak_device_nbytes", 0), ("cpu", "peak_host_nbytes", HOST_NBYTES)):
            for rank, peak in enumerate(measured.get(name, ())):
                planned = sum(self.memory[rank][tier].values())
                if peak > planned + extra:
                    beside = f" and {nbytes_words(extra)} for the program itself" if extra else ""
                    said.append(
                        f"rank {rank}: {self._memory_words(tier)} peaked at {nbytes_words(peak)},"
                        f" planned {nbytes_words(planned)}{beside}"
                    )
        return said

    def _rank_lines(self, rank: int) -> list[str]:
        lines = []
        for tier in TIERS:
            table = self.memory[rank][tier]
            if table:
                blocks = {"weights": self._blocks(rank, tier)}
                sizes = ", ".join(
                    f"{name} {nbytes_words(nbytes)}{blocks.get(name, '')}" for name, nbytes in table.items()
                )
                held = f"layers {self._layers(rank)}; " if tier == "gpu" else ""
                lines.append(
                    f"plan: rank {rank}: {held}{self.tier_words(tier)} {nbytes_words(sum(table.values()))}: {sizes}"
                )
        return lines

    def tier_words(self, tier: str) -> str:
        """A tier's name; of a machine without a GPU the device's memory is just memory."""
        return "memory" if tier == "gpu" and self.predicted.get("device") == "CPU" else tier

    def _memory_words(self, tier: str) -> str:
        name = self.tier_words(tier)
        return name if name == "memory" else f"{name} memory"

    def _blocks(self, rank: int, tier: str) -> str:
        """How many of the rank's layers live in a tier, where not all of them live on the device."""
        layers = [at for name, at in self.weight_tiers[rank].items() if name.startswith("layers/")]
        if all(at == "gpu" for at in layers):
            return ""
        return f" ({layers.count(tier)} of {len(layers)} layers)"
