"""What admission may fill, as a plan has it. Arithmetic alone."""

from noria.limits import TIERS
from noria.model import ModelShape
from noria.plan.plan import Plan
from noria.rows.level import StepCosts
from noria.rows.slots import Capacity


def capacity_of(plan: Plan, shape: ModelShape, sharing: bool) -> Capacity:
    """The capacity of a run of this plan; `sharing`: rows that begin alike share the pages of that."""
    return Capacity(
        groups=plan.groups,
        num_pages=plan.num_pages,
        step_tokens=plan.step_tokens,
        microbatch_tokens=plan.microbatch_tokens,
        microbatches=plan.microbatches,
        max_positions=shape.max_positions,
        vocab_size=shape.vocab_size,
        tier_pages=tuple(plan.pools[tier]["pages"] for tier in TIERS),
        slot_pages=plan.cache_slot_pages,
        end_words=shape.end_words,
        tier_states=tuple(plan.pools[tier]["states"] for tier in TIERS),
        state_rows=plan.state_rows,
        sharing=sharing,
        costs=costs_of(plan),
        gathers=plan.graph_rows > 0,
    )


def costs_of(plan: Plan) -> StepCosts | None:
    """What steps cost, by the plan's prediction. None where one rank computes alone, and where weights stream through the ranks:
    their loads take the time of a round, however long its steps are."""
    if plan.num_ranks == 1 or plan.weight_slots or not plan.predicted:
        return None
    prefill, decode, terms = (plan.predicted[name] for name in ("prefill", "decode", "terms"))
    speed, seconds, rows = prefill["tokens_per_second"], decode["round_seconds"], plan.predicted["rows"]
    least = min(max(terms["decode"]["launches"], terms["decode"]["device memory"]), seconds)  # of a round, without rows
    return StepCosts(
        ranks=plan.num_ranks,
        step=speed * least / plan.groups,
        row=max(speed * (seconds - least) / rows, 1.0),
        turn=speed * terms["decode"].get("host", 0.0) / plan.groups,
    )
