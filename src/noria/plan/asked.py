"""What it costs that a user has fixed sizes of steps, or has not said how long rows can get: the plan beside the other one."""

from dataclasses import replace

from noria.config import Pipeline
from noria.errors import InputError
from noria.plan import planner
from noria.plan.explained import times_as_fast
from noria.plan.plan import Plan, rate_words
from noria.plan.problem import Problem
from noria.plan.rates import Rates
from noria.step import PAGE_TOKENS
from noria.tools.text import plural

COSTLY = 1.25  # times as fast is the other plan, from where on it is told
MANY = 8  # microbatches of a decode step: with more it is looked at
LARGE = 4  # one in so many pages of the cache, or more, are kept for a row as long as the context: this is looked at


def costly(problem: Problem, known: Rates, plan: Plan) -> list[str]:
    """A line for each thing that the user has asked for, or not said, and that costs much."""
    return [*cost_of_asked(problem, known, plan), *cost_of_context(problem, known, plan)]


def cost_of_asked(problem: Problem, known: Rates, plan: Plan) -> list[str]:
    """A line with both plans' numbers if what the user asked for costs much, else none.

    Looks only where sizes are small for the rows, since the other plan is searched for too.
    """
    asked = _doubtful(problem, plan)
    if not asked:
        return []
    free = {name: getattr(Pipeline(), name) for name in asked}
    pipeline = replace(problem.config.pipeline, **free)
    given = " and ".join(f"pipeline.{name} {value:,}" for name, value in asked.items())
    open_problem = replace(problem, config=replace(problem.config, pipeline=pipeline))
    return _beside(given, plan, "left open", open_problem, known)


def cost_of_context(problem: Problem, known: Rates, plan: Plan) -> list[str]:
    """A line with both plans' numbers if it costs much that rows nobody looked at may be as long as the context, else none."""
    looked, most = problem.looked_at, problem.shape.max_positions
    if looked is None or looked.whole or LARGE * problem.longest < plan.num_pages:
        return []
    tokens = min(looked.longest * PAGE_TOKENS, most)
    kept = f"room is kept for a row as long as the context, {most:,} tokens, since not all rows were looked at"
    given = f"with max_context {tokens:,}, which is enough for those that were"
    return _beside(kept, plan, given, replace(problem, looked_at=replace(looked, whole=True)), known)


def _beside(why: str, plan: Plan, instead: str, problem: Problem, known: Rates) -> list[str]:
    """A line of a plan and of the one for another problem if that is much faster, else none."""
    try:
        other = planner.make(problem, known)
    except InputError:
        return []
    times = times_as_fast(other, plan)
    return [f"{why}: {_words(plan)}; {instead}: {_words(other)}, {times:,.3g} x"] if times >= COSTLY else []


def _doubtful(problem: Problem, plan: Plan) -> dict[str, int]:
    """The sizes that the user gave which may be too small, or too many, for the rows."""
    pipeline, rows = problem.config.pipeline, plan.predicted["rows"]
    few_slots = plan.groups * plan.step_tokens <= rows < problem.workload.num_rows
    many_cuts = max(plan.microbatches, rows / plan.groups / plan.microbatch_tokens) > MANY
    sizes = {
        "step_tokens": few_slots,
        "groups": plan.groups > 2 * plan.num_ranks,
        "microbatches": many_cuts,
        "microbatch_tokens": many_cuts,
    }
    given = {name: getattr(pipeline, name) for name, doubted in sizes.items() if doubted}
    return {name: value for name, value in given.items() if value != getattr(Pipeline(), name)}


def _words(plan: Plan) -> str:
    """`40 rows at once in 1 group, steps of 512 tokens: 1,833 tok/s predicted`."""
    rows, speed = plan.predicted["rows"], plan.predicted["tokens_per_second"]
    cut = f" in microbatches of {plan.microbatch_tokens:,}" if plan.microbatch_tokens < plan.step_tokens else ""
    return (
        f"{plural(rows, 'row')} at once in {plural(plan.groups, 'group')}, steps of {plural(plan.step_tokens, 'token')}{cut}:"
        f" {rate_words(speed)} tok/s predicted"
    )
