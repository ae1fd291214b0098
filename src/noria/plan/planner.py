"""From a run's settings, a model's blocks and the ranks' memory to a plan: every number that the run needs.

Where the user left choices open, the search finds the plan with the most predicted tokens/s.
Needs no torch, no MPI and no GPU.
"""

from dataclasses import replace

from noria.config import Config
from noria.errors import InputError, require
from noria.model import ModelShape
from noria.order import check_blocking
from noria.plan import costs, rates, search
from noria.plan.building import check_disk
from noria.plan.placement import partition
from noria.plan.plan import Plan
from noria.plan.problem import Problem
from noria.plan.shares import check_list
from noria.tools.text import plural

GiB = 1024**3


def check(config: Config, num_ranks: int, shape: ModelShape) -> None:
    """Refuses settings of the pipeline that contradict each other or the model. Raises InputError."""
    pipeline, laps = config.pipeline, config.pipeline.laps or 1
    # Where laps are open, the candidates for a plan say whether some number of them keeps tied layers together.
    ties = shape.tied_layers if pipeline.laps or isinstance(pipeline.partition, list) else ()
    try:
        partition(shape.num_layers, num_ranks * laps, pipeline.partition or "greedy", ties=ties, num_ranks=num_ranks)
    except InputError as error:
        raise InputError(f"{error}{_for_others(config, num_ranks)}") from None
    check_list(config.placement.weights, shape.num_layers)
    if pipeline.blocking:
        check_blocking(num_ranks, pipeline.groups or num_ranks)
    step, micro = pipeline.step_tokens, pipeline.microbatch_tokens
    require(
        step is None or micro is None or micro <= step,
        f"pipeline.microbatch_tokens is {micro}, more than pipeline.step_tokens ({step}): lower it",
    )


def _for_others(config: Config, num_ranks: int) -> str:
    """What is said beside a refusal where noria plan --write wrote the run file for another number of ranks."""
    planned = (config.job.planned or {}).get("ranks", num_ranks)
    if planned == num_ranks:
        return ""
    return (
        f"; it was planned for {plural(planned, 'rank')} (job.planned): start so many, or write another with noria plan --ranks"
        f" {num_ranks} --write FILE and the run file that it was made of"
    )


def make(problem: Problem, known: rates.Rates | None = None) -> Plan:
    """The plan of a run: what the user asked for, and the rest chosen. `known`: the machine's rates (None: rates_of).

    Raises InputError, with the numbers and the remedy, where the memory does not suffice.
    """
    check(problem.config, problem.num_ranks, problem.shape)
    known = known or rates_of(problem.config, problem.machine.device, problem.num_ranks)
    plan = search.best(problem, known)
    check_disk(problem, plan)
    cut = problem.cut_into(tuple(plan.ranges()))
    return replace(plan, chosen_tokens=costs.chosen_tokens(plan, cut, known, problem.workload))


def rates_of(config: Config, device: str, num_ranks: int) -> rates.Rates:
    """The machine's rates: measured ones of job.machine, else built-in ones, where the ranks share one disk."""
    if config.job.machine:
        return rates.read(config.job.machine, device)
    known = rates.assumed(device)
    return replace(known, disk_read=known.disk_read / num_ranks, disk_write=known.disk_write / num_ranks)
