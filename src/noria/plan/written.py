"""A plan as keys of a run file, so that a run plans it again; and where a run's plan is not the one that was written."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from noria.config import Config
from noria.limits import TIERS
from noria.plan.plan import Plan, rate_words
from noria.tools.listed import listed
from noria.tools.text import plural

SAME = 0.01  # of a speed: the rates of a machine that is measured again
MOST_SHOWN = 50  # characters of a text
MOST_STAGES = 8  # that are told one by one


def planned_config(config: Config, plan: Plan) -> Config:
    """The run with every key set that the plan has chosen, and with what else the plan came to."""
    pipeline = replace(
        config.pipeline,
        laps=plan.laps,
        groups=plan.groups,
        step_tokens=plan.step_tokens,
        microbatch_tokens=plan.microbatch_tokens,
        partition=[last - first for first, last in plan.stages],
        schedule=plan.schedule,
    )
    asked = config.placement
    placement = replace(
        asked,
        weights=asked.weights or _weights(plan),  # what the user gives is cut up in the same way again
        cache=_cache(plan),
        activations=plan.activations,
        compress_weights=asked.compress_weights if plan.coded else "off",
    )
    job = replace(config.job, planned=numbers_of(plan))
    return replace(config, pipeline=pipeline, placement=placement, job=job)


def run_file(config: Config, plan: Plan) -> str:
    """The run file of the plan, with a line above it that says what it is."""
    speed, seconds = (plan.predicted[name] for name in ("tokens_per_second", "seconds"))
    head = (
        f"# Planned for {plural(plan.num_ranks, 'rank')} by noria plan: {rate_words(speed)} tokens/s, {seconds:,.0f} s"
        " predicted.\n"
        f"# mpirun -n {plan.num_ranks} noria run THIS_FILE\n"
    )
    return head + planned_config(config, plan).to_toml()


def _weights(plan: Plan) -> dict[str, Any]:
    """The blocks of each tier, of all ranks."""
    tiers = {name: tier for held in plan.weight_tiers for name, tier in held.items()}
    if set(tiers.values()) == {"gpu"}:
        return {"gpu": 100.0}
    return {tier: listed(name for name, at in tiers.items() if at == tier) for tier in dict.fromkeys(tiers.values())}


def _cache(plan: Plan) -> dict[str, Any]:
    """The pages of each tier."""
    return {tier: f"{pages} pages" for tier, pages in plan.of_pool("pages").items() if pages}


def numbers_of(plan: Plan) -> dict[str, Any]:
    """What a run's own plan is held beside: its choices, which flags may change, and what no key of a run file says."""
    tiers = [tier for held in plan.weight_tiers for tier in held.values()]
    return {
        "ranks": plan.num_ranks,
        **{name: getattr(plan, name) for name in ("laps", "groups", "step_tokens", "microbatch_tokens")},
        **{name: getattr(plan, name) for name in ("schedule", "activations")},
        "partition": [last - first for first, last in plan.stages],
        **{f"{tier}_blocks": tiers.count(tier) for tier in TIERS},
        **{f"{tier}_pages": count for tier, count in plan.of_pool("pages").items()},
        **{name: getattr(plan, name) for name in ("weight_slots", "cache_slots", "cache_slot_pages")},
        "tokens_per_second": float(f"{plan.predicted['tokens_per_second']:.4g}"),
    }


def otherwise(planned: Mapping[str, Any], plan: Plan) -> str:
    """A line that says where a run's plan is not what was planned for its run file, or that it is."""
    found = numbers_of(plan)
    zeros = {name: 0 for name in found if name.endswith(("_pages", "_slots")) and name not in planned}  # once left out
    differing = [
        f"{name.replace('_', ' ')} {_words(found[name])} ({_words(value)} planned)"
        for name, value in (*planned.items(), *zeros.items())
        if found[name] != value and not (name == "tokens_per_second" and abs(found[name] - value) <= SAME * value)
    ]
    return f"plan: not as noria plan wrote it: {', '.join(differing)}" if differing else "plan: as noria plan wrote it"


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value if len(value) <= MOST_STAGES else [*value[:3], "...", value[-1]]))
    return value[:MOST_SHOWN] if isinstance(value, str) else f"{value:,.10g}"
