"""What a plan predicted beside what the ranks measured, term by term; where each rank's time went; what passed its links.

A stored plan and its timings may hold anything: a term is told where both are numbers. Pure arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from noria.limits import HOST_NBYTES
from noria.plan.plan import rate_words
from noria.report.busy import busy
from noria.report.terms import PHASES, Term, Timings, number, on_cpu, term
from noria.tools.text import nbytes_words, seconds_words

# Of a phase, before its speed says anything: its first round waits for what is loaded ahead in the others.
MIN_ROUNDS = 3
LINKS = {
    "disk_to_host": "disk to CPU memory",
    "host_to_gpu": "CPU memory to GPU",
    "gpu_to_host": "GPU to CPU memory",
    "host_to_disk": "CPU memory to disk",
    "rank_to_rank": "rank to rank",
}


@dataclass(frozen=True)
class RankTime:
    """Seconds of a rank between its first step and its last: in rounds with a chunk of a prompt, in other rounds with tokens,
    and in those without; `waited` of all of them for the ring."""

    rank: int
    device: str
    prefill: float
    decode: float
    rest: float
    waited: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode + self.rest


@dataclass(frozen=True)
class LinkBytes:
    """Bytes over a link in a phase, of all ranks together, and bytes/s of the rank that moved the most."""

    link: str
    phase: str
    nbytes: float
    rate: float


def terms(plan: Mapping[str, Any], timings: Timings, tokens: int | None, whole: bool = False) -> list[Term]:
    """Every prediction of the plan that was measured; `tokens`: what the last job generated; `whole`: it did all of the run."""
    predicted = plan.get("predicted", {})
    found = [term("whole run, tokens/s", number(predicted, "tokens_per_second"), _overall(timings, tokens), rate_words)]
    for phase in PHASES:
        of_phase = predicted.get(phase) if isinstance(predicted, Mapping) else None
        binds = of_phase.get("binds") if isinstance(of_phase, Mapping) else None
        note = f"bound by {binds}" if isinstance(binds, str) else ""
        speed, seconds, rows = _phase(timings, phase)
        found.append(term(f"{phase}, tokens/s", number(of_phase, "tokens_per_second"), speed, rate_words, note))
        found.append(term(f"{phase}, a round", number(of_phase, "round_seconds"), seconds, seconds_words))
        if whole:
            found.append(
                term(
                    f"{phase}, all rounds", _whole(predicted, phase), _most(timings, f"{phase}_seconds"), seconds_words
                )
            )
        found += busy(plan, timings, phase)
        if phase == "decode":
            found.append(term("decode, rows a round", number(predicted, "rows"), rows, lambda rows: f"{rows:,.0f}"))
    return [one for one in found if one is not None] + _memory(plan, timings)


def _whole(predicted: object, phase: str) -> float | None:
    """Seconds of all rounds of a phase."""
    rounds, seconds = number(predicted, "rounds", phase), number(predicted, phase, "round_seconds")
    return rounds * seconds if rounds and seconds else None


def _overall(timings: Timings, tokens: int | None) -> float | None:
    seconds = _most(timings, "seconds")
    return tokens / seconds if seconds and tokens is not None else None


def _phase(timings: Timings, phase: str) -> tuple[float | None, float | None, float | None]:
    """Tokens/s, seconds of a round and tokens of a round of a phase, by its slowest rank."""
    names = [f"{phase}_{what}" for what in ("seconds", "tokens", "rounds")]
    if not all(name in timings for name in names):
        return None, None, None
    rank = int(np.argmax(timings[names[0]]))
    seconds, tokens, rounds = (float(timings[name][rank]) for name in names)
    if rounds < MIN_ROUNDS or seconds <= 0:
        return None, None, None
    return tokens / seconds, seconds / rounds, tokens / rounds


def _memory(plan: Mapping[str, Any], timings: Timings) -> list[Term]:
    """The most that a rank had, of the rank that came nearest to its plan or beyond."""
    memory = plan.get("memory")
    tables = memory if isinstance(memory, list) else []
    one_memory, found = on_cpu(plan.get("predicted")), []
    for name, words, tiers, extra in (
        ("peak_device_nbytes", "GPU memory", () if one_memory else ("gpu",), 0),
        ("peak_host_nbytes", "CPU memory", ("gpu", "cpu") if one_memory else ("cpu",), HOST_NBYTES),
    ):
        peaks = timings.get(name, np.empty(0))[: len(tables)]
        planned = [sum(_sum(table, tier) for tier in tiers) + extra for table in tables[: len(peaks)]] if tiers else []
        shares = [peak / plan if plan else 0.0 for peak, plan in zip(peaks, planned, strict=False)]
        if shares and max(shares) > 0:
            rank = int(np.argmax(shares))
            note = f"{nbytes_words(extra)} of it for the program itself" if extra else ""
            sizes = nbytes_words(int(planned[rank])), nbytes_words(int(peaks[rank]))
            found.append(
                Term(f"{words}, rank {rank}", *sizes, float(peaks[rank]) / planned[rank] - 1, note, is_limit=True)
            )
    return found


def _sum(table: object, tier: str) -> float:
    of_tier = table.get(tier) if isinstance(table, Mapping) else None
    return sum(number(of_tier, name) or 0.0 for name in of_tier) if isinstance(of_tier, Mapping) else 0.0


def rank_times(timings: Timings, devices: object) -> list[RankTime]:
    """Where each rank's time went; nothing where it was not measured."""
    names = ("prefill_seconds", "decode_seconds", "seconds", "waited")
    if not all(name in timings for name in names):
        return []
    words = devices if isinstance(devices, list) else []
    found = []
    for rank, (prefill, decode, seconds, waited) in enumerate(np.stack([timings[name] for name in names], 1).tolist()):
        device = str(words[rank]) if rank < len(words) else ""
        rest = max(seconds - prefill - decode, 0.0)
        found.append(RankTime(rank, device, max(prefill, 0.0), max(decode, 0.0), rest, max(waited, 0.0)))
    return found


def moved(timings: Timings) -> list[LinkBytes]:
    """What passed each link, where anything did."""
    found = []
    for phase in PHASES:
        for link, words in LINKS.items():
            nbytes, seconds = timings.get(f"{phase}_{link}_nbytes"), timings.get(f"{phase}_seconds")
            if nbytes is not None and seconds is not None and nbytes.sum() > 0:
                rank = int(np.argmax(nbytes))
                rate = float(nbytes[rank] / seconds[rank]) if seconds[rank] > 0 else 0.0
                found.append(LinkBytes(words, phase, float(nbytes.sum()), rate))
    return found


def _most(timings: Timings, name: str) -> float | None:
    return float(timings[name].max()) if name in timings else None
