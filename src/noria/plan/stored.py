"""What a model's weights in fewer bits would give: the plan made again for each form that they could be converted to.

Which forms these are is the caller's to say; no plan takes one by itself, since they change the numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from noria.blocks import Block
from noria.errors import InputError
from noria.plan import planner
from noria.plan.explained import times_as_fast, told_as_dict
from noria.plan.plan import Plan, rate_words
from noria.plan.problem import Problem
from noria.plan.rates import Rates
from noria.tools.text import nbytes_words


@dataclass(frozen=True)
class Stored:
    """A form by the word of noria convert, bytes and bits of all weights in it, the plan with it (None: `refused` says why
    there is none), and the plan without it, if there is one."""

    word: str
    nbytes: int
    bits: float
    plan: Plan | None
    beside: Plan | None
    refused: str = ""

    def words(self) -> str:
        """`fp8: 8.1 GiB of weights (8.5 bits), 1,200 tok/s overall, 1.92 x`."""
        held = f"{self.word}: {nbytes_words(self.nbytes)} of weights ({self.bits:.1f} bits)"
        if self.plan is None:
            return f"{held}, does not fit: {self.refused}"
        times = f", {times_as_fast(self.plan, self.beside):.2f} x" if self.beside else ", fits"
        return f"{held}, {rate_words(self.plan.predicted['tokens_per_second'])} tok/s overall{times}"

    def as_dict(self) -> dict[str, Any]:
        beside = self.beside or self.plan
        told = {"change": self.word, "refused": self.refused}
        told = told if beside is None else told_as_dict(self.word, self.plan, beside, self.refused)
        return told | {"nbytes": self.nbytes, "bits": self.bits}


def stored_as(
    problem: Problem, known: Rates, plan: Plan | None, forms: Mapping[str, Mapping[str, Block]]
) -> Sequence[Stored]:
    """The plan for the blocks of each form, by its word.

    What does not fit on the devices is planned with the laps, groups and steps of `plan`, which is fast and near enough.
    """
    found = []
    for word, blocks in forms.items():
        nbytes = sum(block.nbytes for block in blocks.values())
        held = word, nbytes, 8 * nbytes / sum(block.numbers for block in blocks.values())
        try:
            found.append(Stored(*held, planner.make(_like(replace(problem, blocks=blocks), plan, nbytes), known), plan))
        except InputError as error:
            found.append(Stored(*held, None, plan, str(error)))
    return found


def _like(problem: Problem, plan: Plan | None, nbytes: int) -> Problem:
    """The problem with the choices of a plan, where weights of so many bytes stream all the same."""
    if plan is None or not plan.weight_slots or nbytes < problem.limits["gpu"] * problem.num_ranks:
        return problem
    pipeline = replace(problem.config.pipeline, laps=plan.laps, groups=plan.groups, step_tokens=plan.step_tokens)
    return replace(problem, config=replace(problem.config, pipeline=pipeline))
