"""Each term of a plan's rounds beside the seconds that the run kept it busy, and both as lines for the end of a run.

A stored plan and its timings may hold anything: a term is told where both are numbers. Pure arithmetic.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from noria.report.terms import PHASES, Term, Timings, number, term
from noria.tools.text import seconds_words

KERNELS = ("attention", "other kernels")


def busy(plan: Mapping[str, Any], timings: Timings, phase: str) -> Iterator[Term]:
    """The terms of a phase's round: on the rank where they are longest, in the rounds that were looked at."""
    predicted = plan.get("predicted")
    planned = _planned(predicted.get("terms") if isinstance(predicted, Mapping) else None, phase)
    measured = _measured(timings, phase, number(plan, "groups"))
    on_cpu = isinstance(predicted, Mapping) and predicted.get("device") == "CPU"  # there compute is what the host does
    for name in measured:
        if not (on_cpu and name == "launches"):
            found = term(f"{phase}, {name}", planned.get(name), measured[name], seconds_words)
            if found is not None:
                yield found


def _planned(terms: object, phase: str) -> dict[str, float]:
    """Seconds of a round by what can be measured: products, attention and other kernels are the device's compute."""
    found = {name: number(terms, phase, name) for name in ("link", "disk", "launches", "host", "ring")}
    products = [number(terms, phase, name) or 0.0 for name in ("matmul", "device memory")]
    kernels = [number(terms, phase, name) or 0.0 for name in KERNELS]
    return {name: seconds for name, seconds in found.items() if seconds} | {"compute": max(products) + sum(kernels)}


def _measured(timings: Timings, phase: str, groups: float | None) -> dict[str, float]:
    """Seconds of a round, the most of any rank; `host` of rank 0; `ring`: a group's way, by what ranks compute and send."""
    rounds = timings.get(f"{phase}_watched_rounds")
    if rounds is None or not len(rounds) or not (rounds > 0).all():
        return {}
    of_ranks = {name: _a_round(timings, phase, name, rounds) for name in ("load", "store", "disk", "compute", "hops")}
    link = np.maximum(of_ranks["load"], of_ranks["store"])
    found = {"link": link.max(), "disk": of_ranks["disk"].max(), "compute": of_ranks["compute"].max()}
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
    """A line for each phase, and first for what is of the whole run; terms that are off are named with their difference."""
    phases = ("", *PHASES)
    its: dict[str, list[str]] = {phase: [] for phase in phases}
    for one in terms:
        phase = next(phase for phase in reversed(phases) if not phase or one.name.startswith(f"{phase}, "))
        its[phase].append(_words(one, one.name.removeprefix(f"{phase}, ")))
    for phase in phases:
        if its[phase]:
            yield f"planned and measured{f', {phase}' if phase else ''}: {'; '.join(its[phase])}"


def _words(one: Term, name: str) -> str:
    off = f" ({100 * one.difference:+.0f} %)" if one.is_off else ""
    return f"{name}: {one.planned}, {one.measured}{off}"
