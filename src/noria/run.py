"""The whole program on one page: read, plan, place, build, execute, write."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from noria import transports
from noria.blocks import Block
from noria.communicator import Communicator
from noria.config import Config
from noria.desk.desk import Desk
from noria.desk.examination import Examined, examine, open_model
from noria.desk.exports import write_exports
from noria.desk.how import how_made, remarks
from noria.desk.inputs import files_of_run
from noria.desk.step_sizes import Sized, adapting
from noria.engine.ahead import Ahead
from noria.engine.assembly import build, load, open_the_ring
from noria.engine.decoding import samples
from noria.engine.executor import Composer, Executor, follow, lead
from noria.engine.gauge import Gauge
from noria.engine.timing import Meters, Timing, Traffic, figures
from noria.engine.trace import OFF, Trace
from noria.job import Job
from noria.launch import building, deadline, launcher, measuring, mpi, tracing
from noria.launch.exact import exact_bits
from noria.launch.here import ThisRank, settle
from noria.launch.notices import Notices
from noria.launch.schedulers import job_ids
from noria.launch.signals import Signals
from noria.launch.stop_file import StopFile
from noria.launch.stopping import STOPPED, Stopping
from noria.launch.watchdog import Watchdog
from noria.limits import CODED
from noria.model import OpenModel
from noria.output.stored_rates import store_rates
from noria.plan import planner
from noria.plan.asked import costly
from noria.plan.done import with_work
from noria.plan.plan import Plan
from noria.plan.problem import Problem
from noria.plan.rates import Rates
from noria.report.busy import end_lines
from noria.report.measured import terms
from noria.report.spent import spent, table_lines
from noria.report.terms import PHASES
from noria.ring.heartbeat import SILENCE
from noria.ring.ring import AnyRing
from noria.rows.template import template_helper
from noria.tools.garbage import set_aside
from noria.tools.helper import Helper
from noria.tools.provenance import now, segment_of

# Of prefill and decode together, from which on a run ends with where its time went: noria report shows it of all runs.
TOLD_SECONDS = 5.0
NOT_AS_PLANNED = 1  # exit code of a whole run under job.strict that differed from its plan


def run(
    config: Config,
    comm: Communicator,
    watchdog: Watchdog | None = None,
    signals: Signals | None = None,
    helper: Helper | None = None,
) -> int:
    """One job on the ranks of `comm`. Returns its exit code; raises InputError, on every rank, for the user's mistakes.

    `helper` renders the conversations of rank 0.
    """
    watchdog, signals = watchdog or Watchdog(), signals or Signals()
    signals.attend()
    comm = launcher.by_node(comm)
    watchdog.is_rank(comm.Get_rank(), comm.Get_size())
    with contextlib.ExitStack() as held:
        helper = helper or held.enter_context(template_helper())
        notices = held.enter_context(Notices(comm, signals))
        until = mpi.on_first_rank(comm, lambda: deadline.find(config.job.walltime, watchdog.began), share=False)
        stopping = None if until is None else held.enter_context(Stopping(signals, until, watchdog, notices))
        here = settle(config, comm, notices)
        watchdog.begin("opening the files")
        mpi.on_first_rank(comm, lambda: tracing.check(config.job.trace, lambda: files_of_run(config)))
        mpi.on_first_rank(comm, lambda: held.enter_context(here.own(config.output)), share=False)
        mpi.on_first_rank(comm, lambda: stopping is not None and stopping.look_for(StopFile(config.output)))
        work = mpi.on_first_rank(comm, lambda: examine(config, here.num_ranks, here.device.type, helper))
        if work.state == "finished":
            here.say(f"{config.output} is finished: nothing to do (noria export reads it; --overwrite starts again)")
            here.say(*work.said)
            mpi.on_first_rank(comm, lambda: write_exports(config, here.log))
            return work.code
        return _generate(config, here, work, watchdog, stopping, helper)


def _generate(
    config: Config, here: ThisRank, work: Examined, watchdog: Watchdog, stopping: Stopping | None, helper: Helper
) -> int:
    """From the files to the output, on every rank; `stopping` is rank 0's."""
    started, comm = now(), here.comm
    transport, reason = mpi.on_every_rank(comm, lambda: transports.choose(comm, here.device, config.pipeline.transport))
    watchdog.begin("measuring its machine")
    plan, rates, said = _plan(config, here, work, transport)
    watchdog.computes(plan.stage_words(here.rank))
    devices, hosts = comm.allgather(here.name), comm.allgather(here.location.host)
    segment = segment_of(job_ids(), hosts, devices, sys.argv, started) | {"rates": rates.to_toml()}
    opened = mpi.on_every_rank(comm, lambda: open_model(config, work.dtype))
    ran: dict[str, Any] = mpi.described() | {"devices": devices, "start": started}
    with contextlib.closing(opened) as model, contextlib.ExitStack() as on_error:
        seen = config.model, model.nbytes, model.header_hash, work.identity.header["checkpoint"]
        mpi.on_every_rank(comm, lambda: here.check_same(*seen))
        watchdog.begin("reading the sealed parts")
        desk = mpi.on_first_rank(comm, lambda: Desk(config, work, plan, model, segment, helper, stopping), share=False)
        if desk is not None:
            watchdog.record_by(desk.fail)
            on_error.push(desk.withdraw)
        here.announce()
        here.say(*work.said, f"transport {transport}: {reason}", *said)
        meters, timing, ring = _meters(config, here, plan), Timing(), None
        if mpi.on_first_rank(comm, lambda: desk is not None and desk.complete):
            here.say("no row is left to generate: the output is written without loading the model")
        else:
            travels = transports.open_transport(transport, comm, here.device, config.pipeline.blocking)
            ring = open_the_ring(plan, model.shape, meters.transport(travels), here.rank, here.streams)
            on_error.callback(ring.abandon)
            ring.watch(lambda rank, seconds: watchdog.miss(rank, hosts[rank], plan.stage_words(rank), seconds), SILENCE)
            watchdog.begin("building its kernels")
            with exact_bits(config, here, model, plan.dtype, _held_encoded(plan, model)) as exact:
                executor = _build(config, here, plan, model, ring, meters, watchdog)
                timing = _execute(here, executor, ring, desk, stopping, watchdog, adapting(config, plan, here.say))
            ran |= exact
        watchdog.begin("writing the output" if here.rank == 0 else "waiting for rank 0 to write the output")
        timings = _gathered(here, plan, model, asdict(timing) | meters.columns())
        if desk is not None:
            _end(desk, config, plan, rates, how_made(config, work, plan, model, ran), timings)
        watchdog.record_by(None)
        if config.job.trace is not None:
            tracing.write(here, meters.trace, Path(config.job.trace))
        code = mpi.on_first_rank(comm, lambda: STOPPED if desk is None or not desk.complete else desk.code)
        if ring is not None:
            ring.close()
        on_error.pop_all()
    otherwise = mpi.on_first_rank(comm, lambda: _say_how_it_went(here, plan, rates, timings, config.job))
    return NOT_AS_PLANNED if otherwise and config.job.strict else code


def _plan(config: Config, here: ThisRank, work: Examined, transport: str) -> tuple[Plan, Rates, list[str]]:
    """The plan, the rates that it is made from, and what people are told of both."""
    machine = mpi.on_every_rank(here.comm, lambda: launcher.machine(config, here.comm, here.location, here.device))
    of_work = work.shape, work.blocks, work.dtype, here.num_ranks, machine, work.num_rows, work.load
    problem = Problem(config, *of_work)
    may_use_disk = mpi.on_first_rank(here.comm, lambda: problem.may_use_disk)
    rates, said = measuring.rates_of_run(config, here, work.dtype, may_use_disk, transport)
    needed = rates.needed(work.dtype, may_use_disk)
    plan = mpi.on_first_rank(here.comm, lambda: planner.make(problem, needed))
    costs = mpi.on_first_rank(here.comm, lambda: costly(problem, needed, plan))
    of_plan = remarks(config, here.device.type, work.num_rows, plan)
    return plan, rates, [*said, *of_plan, *(f"warning: {words}" for words in costs)]


def _gathered(here: ThisRank, plan: Plan, model: OpenModel, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank measured, and what it has computed. Collective."""
    counted = here.comm.allgather(measured | launcher.peak_memory(here.device))
    return with_work(plan, model.shape, model.blocks, counted)


def _meters(config: Config, here: ThisRank, plan: Plan) -> Meters:
    title = f"rank {here.rank}: {here.name}, {plan.stage_words(here.rank)}"
    trace = Trace(here.rank, title, here.streams) if config.job.trace else OFF
    return Meters(Traffic(), trace, here.log, Gauge(here.streams))


def _build(
    config: Config, here: ThisRank, plan: Plan, model: OpenModel, ring: AnyRing, meters: Meters, watchdog: Watchdog
) -> Executor:
    """This rank's engine around its weights. Raises InputError, on every rank, if those of one are damaged."""
    encoded = {one.encoding for block in model.blocks.values() for one in block.encoded}
    blocks = [block.cast(plan.dtype) for block in _held_encoded(plan, model).values()]
    building.build_mixtures(here, model.shape, plan.dtype, lambda: samples(blocks, here.device))
    building.build_fused(here, model.shape, plan.dtype)
    building.build_cache(here, model.shape, plan.dtype)
    building.build_fp8(here, model.blocks, plan.dtype)
    building.build_decoders(here, encoded | ({CODED} if plan.coded else set()), plan.dtype)
    scratch = launcher.scratch_folder(config)
    staged = scratch if config.placement.stage else None
    watchdog.begin("loading its weights")
    weights = mpi.on_every_rank(
        here.comm,
        lambda: load(plan, model, here.rank, here.streams, meters, staged),
        lambda said: watchdog.end(said, 2),
    )
    return build(plan, model.shape, weights, ring, here.streams, meters, scratch)


def _held_encoded(plan: Plan, model: OpenModel) -> dict[str, Block]:
    """The blocks whose encoded weights are as they are stored while ranks compute."""
    return {name: block for name, block in model.blocks.items() if plan.decodes_later(name)}


@set_aside()
def _execute(
    here: ThisRank,
    executor: Executor,
    ring: AnyRing,
    desk: Desk | None,
    stopping: Stopping | None,
    watchdog: Watchdog,
    sizes: Callable[[Sized], Composer],
) -> Timing:
    """Every step of the job, begun together. `desk` and `stopping` are rank 0's: a signal finds who seals its rows.

    `sizes` makes the admission's steps adapt.
    """
    watchdog.begin(executor.doing)
    if executor.trace is not OFF:
        tracing.start(here, executor.trace)
    here.comm.Barrier()
    if desk is None or stopping is None:
        return executor.run(follow(ring))
    stopping.serve(desk)
    admission = sizes(desk.admission)
    if executor.may_compose_ahead:
        ahead = Ahead(ring, admission, desk.tick, desk.lock)
        timing = executor.run(ahead.next_step, ahead.take_in)
    else:
        timing = executor.run(lead(ring, admission, ring.place.groups, desk.tick, desk.lock))
    stopping.drained(desk.complete)
    return timing


def _end(
    desk: Desk, config: Config, plan: Plan, rates: Rates, how: dict[str, Any], timings: list[dict[str, Any]]
) -> None:
    """Rank 0's output, or what the next job of it needs. `how`: it was made."""
    if measuring.deviates(plan, figures(timings, speeds=True)):
        rates = measuring.doubted(config, rates)
    if desk.complete:
        desk.close({**how, "rates": rates.to_toml()}, timings)
        return
    desk.leave()
    store_rates(config.output, rates.to_toml())


def _tell_time(here: ThisRank, plan: Plan, rates: Rates, timings: list[dict[str, Any]]) -> None:
    """Says where the time went, and which terms differ from the plan's, where the run took long enough to say something."""
    columns = {name: np.array([timing[name] for timing in timings]) for name in timings[0]}
    if sum(columns[f"{phase}_seconds"].max() for phase in PHASES) < TOLD_SECONDS:
        return
    found = spent(plan.as_dict(), columns, rates)
    here.show(*(() if found is None else table_lines(found)), *end_lines(terms(plan.as_dict(), columns, None)))


def _say_how_it_went(here: ThisRank, plan: Plan, rates: Rates, timings: list[dict[str, Any]], job: Job) -> list[str]:
    """Says where the time went, and where the run differed from its plan; returns what of that `strict` counts.

    Of its speed it says so only if the plan's rates were measured, on a GPU; `strict` counts that if they are of a file.
    """
    _tell_time(here, plan, rates, timings)
    predicted = plan.predicted
    known = not predicted.get("assumed", True) and predicted.get("device") != "CPU"
    otherwise = plan.compare(figures(timings, speeds=known))
    counted = otherwise if job.machine else plan.compare(figures(timings, speeds=False))
    for line in otherwise:
        here.say(f"{'error' if job.strict and line in counted else 'warning'}: not as planned: {line}")
    return counted
