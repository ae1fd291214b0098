"""Each term of a plan's rounds beside the seconds that the run kept it busy; those that differ, as lines for a run's end.

A stored plan and its timings may hold anything: a term is told where both are numbers. Pure arithmetic.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from noria.plan.plan import TOLERANCE
from noria.report.terms import Term, Timings, number, on_cpu, term
from noria.tools.text import plural, seconds_words

KERNELS = ("attention", "other kernels")
HIDDEN = 0.8  # of the device's time: launches that take less of the host's go on beside it, and
BUSY = 0.95  # of a round that the device computes: whatever launches take then, it waits for none
NOTES = {
    "launches": "Python and launches of layers on the host, while the device computes; it waits there where the queue is full",
    "host": "rank 0: takes results in, composes steps",
    "ring": "a group's way through all ranks, by what they compute and send",
}


def busy(plan: Mapping[str, Any], timings: Timings, phase: str) -> Iterator[Term]:
    """The terms of a phase's round: on the rank where they are longest, in the rounds that were looked at."""
    planned = planned_seconds(plan.get("predicted"), phase)
    measured = measured_seconds(timings, phase, plan)
    for name in measured:
        words = f"{phase}, {name}"
        found = term(words, planned.get(name), measured[name], seconds_words, NOTES.get(name, ""))
        if found is not None:
            yield replace(found, is_hidden=name == "launches" and _launches_hide(timings, phase, measured))


def _launches_hide(timings: Timings, phase: str, measured: Mapping[str, float]) -> bool:
    """Whether the device has enough to do meanwhile: all ranks compute through their rounds, or launches take less."""
    rounds = timings[f"{phase}_watched_rounds"]
    lasted, computed = (_a_round(timings, phase, name, rounds) for name in ("watched", "compute"))
    busy = bool((lasted > 0).all() and (computed >= BUSY * lasted).all())
    return busy or measured["launches"] < HIDDEN * measured["compute"]


def planned_seconds(predicted: object, phase: str) -> dict[str, float]:
    """Seconds of a round by what can be measured: products, attention and other kernels are the device's compute, and on a CPU
    launches too."""
    terms = predicted.get("terms") if isinstance(predicted, Mapping) else None
    found = {name: number(terms, phase, name) for name in ("link", "disk", "launches", "host", "ring")}
    products = [number(terms, phase, name) or 0.0 for name in ("matmul", "device memory")]
    kernels = [number(terms, phase, name) or 0.0 for name in KERNELS]
    if on_cpu(predicted):  # one thread launches and computes: a layer's time is both
        kernels.append(found.pop("launches") or 0.0)
    return {name: seconds for name, seconds in found.items() if seconds} | {"compute": max(products) + sum(kernels)}


def measured_seconds(timings: Timings, phase: str, plan: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a round, the most of any rank; `host` of rank 0; `ring`: a group's way, by what ranks compute and send."""
    groups = number(plan, "groups")
    rounds, all_rounds = timings.get(f"{phase}_watched_rounds"), timings.get(f"{phase}_rounds", np.zeros(0))
    if rounds is None or not len(rounds) or not (rounds > 0).all() or (all_rounds == 1).any():
        return {}  # a single step says nothing of others: it waits for what is loaded ahead in them
    of_ranks = {name: _a_round(timings, phase, name, rounds) for name in ("load", "store", "disk", "compute", "hops")}
    link = np.maximum(of_ranks["load"], of_ranks["store"])
    found = {"link": link.max(), "disk": of_ranks["disk"].max(), "compute": of_ranks["compute"].max()}
    if not on_cpu(plan.get("predicted")):
        found["launches"] = _a_round(timings, phase, "launches", rounds).max()
    found["host"] = _a_round(timings, phase, "host", rounds)[0]
    if len(rounds) > 1 and groups:
        longest = np.maximum(np.maximum(link, of_ranks["disk"]), of_ranks["compute"])
        found["ring"] = (longest + of_ranks["hops"]).sum() / groups
    return {name: float(seconds) for name, seconds in found.items()}


def _a_round(timings: Timings, phase: str, name: str, rounds: np.ndarray) -> np.ndarray:
    seconds = timings.get(f"{phase}_{name}_seconds", np.zeros(len(rounds)))
    return np.asarray(seconds[: len(rounds)] / rounds, float) if len(seconds) >= len(rounds) else np.zeros(len(rounds))


def end_lines(terms: Sequence[Term]) -> Iterator[str]:
    """A line of at most 80 characters for each term that is off; one line where none is. Tokens/s tell of a round too."""
    off = [one for one in terms if one.is_off and not one.name.endswith(", a round")]
    if terms and not off:
        yield f"as planned: {plural(len(terms), 'figure')} within {100 * TOLERANCE:.0f} %"
    elif off:
        yield f"{'not as planned':<24}{'planned':>12}{'measured':>12}"
    for one in off:
        yield f"{one.name:<24}{one.planned:>12}{one.measured:>12}{one.change:>9}"
