"""What admission may fill, as a plan has it. Arithmetic alone."""

from noria.limits import TIERS
from noria.model import ModelShape
from noria.plan.plan import Plan
from noria.rows.level import StepCosts
from noria.rows.slots import Capacity


def capacity_of(plan: Plan, shape: ModelShape, sharing: bool) -> Capacity:
    """The capacity of a run of this plan; `sharing`: rows that begin alike share the pages of that."""
    return Capacity(
        plan.groups,
        plan.num_pages,
        plan.step_tokens,
        plan.microbatch_tokens,
        plan.microbatches,
        shape.max_positions,
        shape.vocab_size,
        tuple(plan.pools[tier]["pages"] for tier in TIERS),
        plan.cache_slot_pages,
        shape.end_words,
        tuple(plan.pools[tier]["states"] for tier in TIERS),
        plan.state_rows,
        sharing,
        costs_of(plan),
        plan.graph_rows > 0,
    )


def costs_of(plan: Plan) -> StepCosts | None:
    """What steps cost, by the plan's prediction. None where one rank computes alone, and where weights stream through the ranks:
    their loads take the time of a round, however long its steps are."""
    if plan.num_ranks == 1 or plan.weight_slots or not plan.predicted:
        return None
    prefill, decode, terms = (plan.predicted[name] for name in ("prefill", "decode", "terms"))
    speed, seconds, rows = prefill["tokens_per_second"], decode["round_seconds"], plan.predicted["rows"]
    step = min(max(terms["decode"]["launches"], terms["decode"]["device memory"]), seconds)
    turn = terms["decode"].get("host", 0.0)
    each = (speed * part / plan.groups for part in (step, turn))
    return StepCosts(plan.num_ranks, next(each), max(speed * (seconds - step) / rows, 1.0), next(each))
