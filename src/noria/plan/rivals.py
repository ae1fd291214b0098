"""The next best plans: the fastest ones that differ from a plan in one choice which the user left open."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from noria.config import Config
from noria.errors import InputError
from noria.plan import planner
from noria.plan.explained import times_as_fast, told_as_dict
from noria.plan.plan import Plan, rate_words
from noria.plan.problem import Problem
from noria.plan.rates import Rates
from noria.tools.text import plural


@dataclass(frozen=True)
class Rival:
    """Another plan: what it has otherwise than the one that was taken, in words."""

    change: str
    plan: Plan
    beside: Plan

    def words(self) -> str:
        """`2 laps: 110 tok/s overall, 0.93 x`."""
        speed = self.plan.predicted["tokens_per_second"]
        return f"{self.change}: {rate_words(speed)} tok/s overall, {times_as_fast(self.plan, self.beside):.2f} x"

    def as_dict(self) -> dict[str, Any]:
        return told_as_dict(self.change, self.plan, self.beside)


def rivals(problem: Problem, known: Rates, plan: Plan) -> list[Rival]:
    """The best plan for each other choice, the fastest first. Choices that cannot be are left out."""
    found = []
    for change, config in _others(problem.config, plan):
        try:
            other = planner.make(replace(problem, config=config), known)
        except InputError:
            continue
        found.append(Rival(change, other, plan))
    return sorted(found, key=lambda one: -one.plan.predicted["tokens_per_second"])


def _others(config: Config, plan: Plan) -> Iterator[tuple[str, Config]]:
    """(words, run) for each choice that the user left open, taken otherwise; laps and groups stay where they are not it."""
    pipeline, placement = config.pipeline, config.placement
    cut = replace(pipeline, laps=pipeline.laps or plan.laps, groups=pipeline.groups or plan.groups)
    num_ranks, longest = plan.num_ranks, max(len(layers) for layers in plan.ranges())
    if pipeline.laps is None and not isinstance(pipeline.partition, list):
        for laps in _except(plan.laps, 1, plan.laps // 2, 2 * plan.laps, plan.laps * longest):
            yield plural(laps, "lap"), replace(config, pipeline=replace(pipeline, laps=laps))
    if pipeline.groups is None and not pipeline.blocking:
        for groups in _except(plan.groups, num_ranks, num_ranks + 1, 2 * num_ranks):
            yield plural(groups, "group"), replace(config, pipeline=replace(pipeline, groups=groups))
    if pipeline.step_tokens is None:
        for tokens in _except(plan.step_tokens, plan.step_tokens // 2, 2 * plan.step_tokens):
            if tokens >= (pipeline.microbatch_tokens or 1):
                words = f"steps of {plural(tokens, 'token')}"
                yield words, replace(config, pipeline=replace(cut, step_tokens=tokens))
    if placement.cache is None:
        for tier in _except_tiers(plan):
            moved = replace(placement, cache={tier: 100.0})
            yield f"the cache in {tier} alone", replace(config, pipeline=cut, placement=moved)
    if plan.coded:
        yield "weights that stream as they are", replace(config, placement=replace(placement, compress_weights="off"))
    if placement.weights is None and plan.weight_slots:
        resident = replace(placement, weights={"gpu": 100.0})
        yield "all weights in gpu", replace(config, pipeline=cut, placement=resident)


def _except(taken: int, *values: int) -> list[int]:
    return [value for value in dict.fromkeys(values) if value >= 1 and value != taken]


def _except_tiers(plan: Plan) -> list[str]:
    """Tiers that could hold the whole cache, where the plan has it otherwise."""
    pages = plan.of_pool("pages")
    held = [tier for tier, count in pages.items() if count]
    return [tier for tier in ("gpu", "cpu") if held != [tier]] if plan.predicted["device"] != "CPU" else []
