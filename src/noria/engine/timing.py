"""What a rank measures: seconds of its rounds and bytes over its links, rounds of prefill and of decode apart.

A round with any chunk of a prompt is prefill; that is known when its last step is, so a round is counted as a whole.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from noria.engine.gauge import Gauging, Unwatched
from noria.engine.trace import Tracing
from noria.step import Step
from noria.transports import Transport

LINKS = ("disk_to_host", "host_to_gpu", "gpu_to_host", "host_to_disk", "rank_to_rank")
MIN_ROUNDS = 3  # of a phase, before its speed is compared with the plan's
MIN_SECONDS = 1.0  # of a phase: a shorter one shows how long starting takes


class Traffic:
    """Counts of one rank. `weights_unused`: bytes of blocks that were loaded ahead and never computed with."""

    def __init__(self) -> None:
        self._round: Counter[str] = Counter()
        self.prefill: Counter[str] = Counter()
        self.decode: Counter[str] = Counter()
        self.weights_unused = 0

    def add(self, link: str, nbytes: int) -> None:
        """Bytes over a link, in this round."""
        assert link in LINKS
        self._round[link] += nbytes

    def end_round(self, prefill: bool) -> None:
        phase = self.prefill if prefill else self.decode
        phase.update(self._round)
        self._round.clear()

    def columns(self) -> dict[str, int]:
        """One number a column, for the output's `timing`."""
        phases = {"prefill": self.prefill, "decode": self.decode}
        counts = {f"{name}_{link}_nbytes": phase[link] for name, phase in phases.items() for link in LINKS}
        return counts | {"weights_unused_nbytes": self.weights_unused}


@dataclass
class Timing:
    """Seconds of a rank between its first step and its last; `waited` of them for the ring.

    Rounds with any chunk of a prompt are prefill, the others with tokens decode. What `work_of` counts, by phase.
    """

    rounds: int = 0
    visits: int = 0  # of each lap, by groups that had something to compute
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    prefill_rounds: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    prefill_passes: int = 0
    prefill_sampled: int = 0
    prefill_scored: int = 0
    prefill_seen: int = 0
    prefill_pairs: int = 0
    decode_rounds: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_passes: int = 0
    decode_sampled: int = 0
    decode_scored: int = 0
    decode_seen: int = 0
    decode_pairs: int = 0

    def end_round(self, prefill: bool, work: Mapping[str, int], seconds: float) -> None:
        """Adds a round to its phase; `work`: of its steps together."""
        tokens, phase = work["tokens"], "prefill" if prefill else "decode"
        self.rounds, self.tokens = self.rounds + 1, self.tokens + tokens
        if not tokens:
            return
        for name, value in (("rounds", 1), ("seconds", seconds), *work.items()):
            setattr(self, f"{phase}_{name}", getattr(self, f"{phase}_{name}") + value)


def work_of(steps: Sequence[Step]) -> dict[str, int]:
    """What steps have to do, together: tokens, microbatches (`passes`), tokens that are sampled and scored, cached tokens that
    their rows look at (`seen`), and pairs of a token and one that it looks at."""
    work = dict.fromkeys(("tokens", "passes", "sampled", "scored", "seen", "pairs"), 0)
    for step in steps:
        if step.num_tokens:
            counts, positions = step.counts.astype(np.int64), step.positions.astype(np.int64)
            pairs = int((counts * positions + counts * (counts + 1) // 2).sum())
            its = step.num_tokens, len(step.borders) - 1, step.num_samples, len(step.score_ids)
            for name, value in zip(work, (*its, int((positions + counts).sum()), pairs), strict=True):
                work[name] += value
    return work


def figures(timings: Sequence[Mapping[str, Any]], speeds: bool) -> dict[str, Any]:
    """What the ranks measured, for a comparison with the plan: peaks of memory, one a rank, and tokens per second.

    Of a phase with few rounds, or a short one, nothing is said: its first round waits for what is loaded ahead in the others.
    """
    found: dict[str, Any] = {
        name: [timing[name] for timing in timings] for name in ("peak_device_nbytes", "peak_host_nbytes")
    }
    for phase in ("prefill", "decode") if speeds else ():
        slowest = max(timings, key=lambda timing: timing[f"{phase}_seconds"])
        if slowest[f"{phase}_rounds"] >= MIN_ROUNDS and slowest[f"{phase}_seconds"] >= MIN_SECONDS:
            found[f"{phase}_tokens_per_second"] = slowest[f"{phase}_tokens"] / slowest[f"{phase}_seconds"]
    return found


@dataclass(frozen=True)
class Meters:
    """Where a rank's engine counts its bytes, keeps its trace, and says what people should read in the log."""

    traffic: Traffic
    trace: Tracing
    say: Callable[[str], None]
    gauge: Gauging = field(default_factory=Unwatched)

    def transport(self, transport: Transport | None) -> Transport | None:
        """The transport, with its messages timed and traced."""
        return self.trace.transport(self.gauge.transport(transport))

    def columns(self) -> dict[str, float]:
        """One number a column, for the output's `timing`. After the last step."""
        return {**self.traffic.columns(), **self.gauge.columns()}
