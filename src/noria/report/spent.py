"""Where the time of a run went: shares of its ranks' time by phase, beside what of the machine's measured rates they used.

Timings and rates of an output may hold anything: what they do not say is left out. Pure arithmetic.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from noria.errors import InputError
from noria.plan import rates as machine
from noria.plan.plan import rate_words
from noria.plan.rates import Rates
from noria.report.terms import PHASES, Timings, number
from noria.tools.text import seconds_words

PLACES = {
    "compute": "computing",
    "idle_input": "waiting for input",
    "idle_weights": "waiting for weights",
    "idle_cache": "waiting for cache",
}
REST = "host, not hidden"
LINKS = {
    "host_to_gpu": ("link to the GPU", "host_to_device"),
    "gpu_to_host": ("link from the GPU", "device_to_host"),
    "rank_to_rank": ("link to next rank", "hop"),
}
MOST_USED = 1.05  # of a rate: beyond it rows have shared what was counted for each of them
LEAST_TOLD = 0.005  # of the time: less on all ranks is left out
NAMES, CELLS = 20, 30  # characters of a line: a name and a cell for each phase


@dataclass(frozen=True)
class Spread:
    """Of a share: that of the rank with the least, of all ranks together, of the rank with the most."""

    least: float
    mean: float
    most: float


@dataclass(frozen=True)
class PhaseSpent:
    """`seconds`: of the slowest rank in all rounds of the phase. shares: of the ranks' time in rounds that were looked at, by
    what the device did or waited for; used: of measured rates, by resource."""

    phase: str
    seconds: float
    rounds: int
    shares: Mapping[str, Spread]
    used: Mapping[str, Spread]


@dataclass(frozen=True)
class Spent:
    """A run, between its first step and its last. rate: tokens/s that were generated, or computed where none were. bubble: the
    share of the ranks' time that they waited for input; one_pass: (N-1) / (N-1+M), what one pass of M groups through N ranks
    waits from empty to empty."""

    num_ranks: int
    groups: int
    seconds: float
    generated: int
    computed: int
    phases: tuple[PhaseSpent, ...]
    bubble: float | None

    @property
    def rate(self) -> float:
        return (self.generated or self.computed) / self.seconds

    @property
    def one_pass(self) -> float:
        return (self.num_ranks - 1) / (self.num_ranks - 1 + self.groups)

    def as_dict(self) -> dict[str, Any]:
        """For scripts; keys are only ever added."""
        found: dict[str, Any] = {"ranks": self.num_ranks, "seconds": self.seconds, "tokens_per_second": self.rate}
        for one in self.phases:
            tables = {"shares": one.shares, "of_measured_rates": one.used}
            found[one.phase] = {"seconds": one.seconds, "rounds": one.rounds} | {
                name: {what: [spread.least, spread.mean, spread.most] for what, spread in table.items()}
                for name, table in tables.items()
            }
        if self.bubble is not None:
            found["bubble"] = {"measured": self.bubble, "one_pass": self.one_pass, "groups": self.groups}
        return found


def spent(plan: Mapping[str, Any], timings: Timings, rates: Rates | str | None) -> Spent | None:
    """Where the time went; None where that was not measured. `rates`: of the machine, or the text of its file."""
    seconds, groups = timings.get("seconds", np.zeros(0)), number(plan, "groups")
    if not len(seconds) or not 0 < seconds.max() < 1e12 or not groups or groups < 1:
        return None
    known = _known(rates)
    phases = tuple(
        one for phase in PHASES if (one := _phase(phase, timings, known, str(plan.get("dtype")))) is not None
    )
    sampled, computed = (sum(_first(timings, f"{phase}_{name}") for phase in PHASES) for name in ("sampled", "tokens"))
    waited = [(one.seconds, one.shares[PLACES["idle_input"]].mean) for one in phases if one.shares]
    total = sum(length for length, _ in waited)
    bubble = sum(length * share for length, share in waited) / total if len(seconds) > 1 and total > 0 else None
    told, last = tuple(_with_one_link(phases)), float(seconds.max())
    return Spent(len(seconds), int(groups), last, int(sampled), int(computed), told, bubble)


def _known(rates: Rates | str | None) -> Rates | None:
    if not isinstance(rates, str):
        return rates
    try:
        return machine.parse(rates)
    except InputError:
        return None


def _phase(phase: str, timings: Timings, rates: Rates | None, dtype: str) -> PhaseSpent | None:
    seconds, rounds = timings.get(f"{phase}_seconds"), _first(timings, f"{phase}_rounds")
    if seconds is None or not 0 < seconds.max() < 1e12 or not 1 <= rounds < 1e12:
        return None
    used = {} if rates is None else dict(_used(phase, timings, rates, dtype))
    return PhaseSpent(phase, float(seconds.max()), int(rounds), _shares(phase, timings), used)


def _shares(phase: str, timings: Timings) -> dict[str, Spread]:
    """Of the time of rounds that were looked at; nothing where none was."""
    watched = timings.get(f"{phase}_watched_seconds")
    names = [f"{phase}_{name}_seconds" for name in PLACES]
    if watched is None or not (watched > 0).all() or not all(name in timings for name in names):
        return {}
    parts = np.clip(np.stack([timings[name] for name in names]), 0, 1e12)
    whole = np.maximum(np.clip(watched, 0, 1e12), parts.sum(0))
    shares = [*(parts / whole), np.clip(1 - parts.sum(0) / whole, 0, 1)]
    return {words: _spread(share, whole) for words, share in zip((*PLACES.values(), REST), shares, strict=True)}


def _used(phase: str, timings: Timings, rates: Rates, dtype: str) -> Iterator[tuple[str, Spread]]:
    """Shares of the rates that somebody measured."""
    seconds = np.clip(timings[f"{phase}_seconds"], 1e-9, 1e12)
    of_rates = {"memory bandwidth": ("memory_nbytes", "device_memory", rates.device_memory)}
    of_rates["peak FLOP/s"] = "flops", f"matmul.{dtype}", rates.matmul.get(dtype, 0.0)
    for words, (counted, name, rate) in of_rates.items():
        done = timings.get(f"{phase}_{counted}")
        if done is not None and rate > 0 and name not in rates.assumed and (done > 0).any():
            share = _spread(done / seconds / rate, seconds)
            if share.mean <= MOST_USED:
                yield words, share
    for link, (words, name) in LINKS.items():
        moved = timings.get(f"{phase}_{link}_nbytes", np.zeros(len(seconds)))
        if name not in rates.assumed and (moved > 0).any():
            yield words, _spread(moved / seconds / getattr(rates, name), seconds)


def _with_one_link(phases: tuple[PhaseSpent, ...]) -> Iterator[PhaseSpent]:
    """The phases with the link that is the busiest of all in one of them."""
    links = [words for words, _ in LINKS.values()]
    busiest = max(links, key=lambda link: max((one.used[link].most for one in phases if link in one.used), default=0.0))
    for one in phases:
        yield replace(one, used={name: one.used[name] for name in one.used if name == busiest or name not in links})


def _spread(shares: np.ndarray, weights: np.ndarray) -> Spread:
    return Spread(float(shares.min()), float((shares * weights).sum() / weights.sum()), float(shares.max()))


def _first(timings: Timings, name: str) -> float:
    """A count that is the same on all ranks."""
    values = timings.get(name, np.zeros(0))
    return float(values[0]) if len(values) and 0 <= values[0] < 1e18 else 0.0


def table_rows(found: Spent) -> Iterator[list[str]]:
    """Rows of cells: a first one with the phases, then shares, `least mean most` of them with several ranks."""
    several = found.num_ranks > 1
    yield ["", *(_head(one) for one in found.phases)]
    for part in ("shares", "used"):
        named = dict.fromkeys(name for one in found.phases for name in getattr(one, part))
        for name in named:
            spreads = [getattr(one, part).get(name) for one in found.phases]
            if name == PLACES["compute"] or any(one is not None and one.most >= LEAST_TOLD for one in spreads):
                yield [name, *(_cell(one, several) for one in spreads)]


def _head(one: PhaseSpent) -> str:
    many = f"{one.rounds:,} rounds" if one.rounds < 10_000 else f"{one.rounds // 1000:,}k rounds"
    return f"{one.phase} {seconds_words(one.seconds)}, {'one step' if one.rounds == 1 else many}"


def _cell(spread: Spread | None, several: bool) -> str:
    if spread is None:
        return "-"
    shares = (spread.least, spread.mean, spread.most) if several else (spread.mean,)
    return "".join(f"{_percent(share):>8}" for share in shares)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share < 100 else "> 9999 %"


def headline(found: Spent) -> str:
    """The rate of the whole run."""
    of = f" on {found.num_ranks} ranks" if found.num_ranks > 1 else ""
    generated = f"{found.generated:,} tokens generated, " if found.generated else ""
    return f"{rate_words(found.rate)} tokens/s: {generated}{found.computed:,} computed in {seconds_words(found.seconds)}{of}"


def bubble_words(found: Spent) -> str:
    """What several ranks waited for each other, beside what one pass does; nothing of one rank."""
    if found.bubble is None:
        return ""
    groups = f"N = {found.num_ranks}, M = {found.groups}"
    measured, expected = _percent(found.bubble), _percent(found.one_pass)
    return f"bubble (waiting for input) {measured}; one pass, (N-1)/(N-1+M), {groups}: {expected}"


def table_lines(found: Spent) -> Iterator[str]:
    """At most 12 lines of at most 80 characters: the rate, the table, and the bubble of several ranks."""
    yield headline(found)
    if not found.phases:
        return
    first, *rows = table_rows(found)
    yield f"{'share of the time':<{NAMES}}" + "".join(f"{cell:>{CELLS}}" for cell in first[1:])
    if found.num_ranks > 1:
        yield f"{'':<{NAMES}}" + f"{'least':>{CELLS - 16}}{'mean':>8}{'most':>8}" * len(found.phases)
    for name, *cells in rows:
        yield f"{name:<{NAMES}}" + "".join(f"{cell:>{CELLS}}" for cell in cells)
    if words := bubble_words(found):
        yield words
