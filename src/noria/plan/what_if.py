"""What a larger machine would buy: the plan made again with one rank, some host memory or a faster disk more."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from noria.errors import InputError
from noria.plan import planner
from noria.plan.explained import times_as_fast, told_as_dict
from noria.plan.plan import Plan, rate_words
from noria.plan.problem import Problem
from noria.plan.rates import Rates
from noria.tools.text import plural

GiB = 1024**3
MORE_HOST_NBYTES = 64 * GiB  # of a host
RANKS_OF_A_NODE = 8  # where nobody measured how many there are
FASTER_DISK = 2.0
NOTICED = 1.005  # times as fast, from which on something is gained


@dataclass(frozen=True)
class Bought:
    """A change of the machine, the plan with it (None: `refused` says why there is none), and the plan without it."""

    name: str
    change: str
    plan: Plan | None
    beside: Plan
    refused: str = ""
    note: str = ""

    def words(self) -> str:
        """`3 ranks: 78.1 tok/s overall, 3.72 x`."""
        if self.plan is None:
            return f"{self.change}: {self.refused}"
        times, speed = times_as_fast(self.plan, self.beside), self.plan.predicted["tokens_per_second"]
        if times < NOTICED:
            return f"{self.change}: nothing ({self.note or f'{rate_words(speed)} tok/s overall, {times:.2f} x'})"
        return f"{self.change}: {rate_words(speed)} tok/s overall, {times:.2f} x"

    def as_dict(self) -> dict[str, Any]:
        return told_as_dict(self.change, self.plan, self.beside, self.refused)


def bought(problem: Problem, known: Rates, plan: Plan) -> Iterator[Bought]:
    """What one GPU (a rank), 64 GiB of a host's memory and a disk twice as fast would each buy, planned again."""
    change = plural(plan.num_ranks + 1, "rank")
    yield _tried("one more", change, plan, lambda: _one_more(problem, known))
    yield _tried("more memory", _memory_words(problem, known), plan, lambda: _more_memory(problem, known))
    change = f"a disk {FASTER_DISK:g} x as fast"
    if not problem.may_use_disk:
        yield Bought("faster disk", change, plan, plan, note="no plan of this run uses the disk")
        return
    faster = replace(known, disk_read=FASTER_DISK * known.disk_read, disk_write=FASTER_DISK * known.disk_write)
    yield _tried("faster disk", change, plan, lambda: planner.make(problem, faster))


def _tried(name: str, change: str, plan: Plan, make: Any) -> Bought:
    try:
        return Bought(name, change, make(), plan)
    except InputError as error:
        return Bought(name, change, None, plan, str(error))


def _one_more(problem: Problem, known: Rates) -> Plan:
    """With one rank more, each with as much memory; as many laps and groups where that many ranks can have them."""
    config = problem.config
    how = config.pipeline.partition
    as_asked = replace(config, pipeline=replace(config.pipeline, partition=None if isinstance(how, list) else how))
    free = replace(as_asked, pipeline=replace(as_asked.pipeline, groups=None, laps=None))
    more = replace(problem, num_ranks=problem.num_ranks + 1, config=as_asked)
    try:
        return planner.make(more, known)
    except InputError:
        return planner.make(replace(more, config=free), known)


def _memory_words(problem: Problem, known: Rates) -> str:
    ranks = _ranks_of_a_host(problem, known)
    shared = f", {ranks} ranks share them" if ranks > 1 else ""
    return f"64 GiB more host memory{shared}"


def _ranks_of_a_host(problem: Problem, known: Rates) -> int:
    return min(known.node.ranks or RANKS_OF_A_NODE, problem.num_ranks)


def _more_memory(problem: Problem, known: Rates) -> Plan:
    """With more host memory than the ranks may use now, whoever set that."""
    more, limits = MORE_HOST_NBYTES // _ranks_of_a_host(problem, known), problem.limits
    machine = replace(problem.machine, cpu_memory_nbytes=limits["cpu"] + more)
    placement = replace(problem.config.placement, cpu_memory=None)
    if machine.device == "cpu":  # one memory
        machine = replace(machine, memory_nbytes=limits["gpu"] + more)
        placement = replace(placement, gpu_memory=None)
    config = replace(problem.config, placement=placement)
    return planner.make(replace(problem, config=config, machine=machine), known)
