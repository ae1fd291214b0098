"""What admission may fill, as a plan has it. Arithmetic alone."""

from noria.limits import TIERS
from noria.model import ModelShape
from noria.plan.planner import Plan
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
    )
