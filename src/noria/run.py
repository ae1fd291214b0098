"""The whole program on one page: read, plan, place, build, execute, write."""

import contextlib
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from noria import streams, transports
from noria.communicator import Communicator
from noria.config import Config
from noria.desk.desk import Desk
from noria.desk.examination import Work, examine, open_model
from noria.desk.inputs import source_of
from noria.engine.assembly import build, load, open_the_ring
from noria.engine.executor import Executor, follow, lead
from noria.engine.timing import Meters, Timing, Traffic, figures
from noria.engine.trace import OFF, Trace, TraceFile, Tracing
from noria.errors import InputError
from noria.launch import deadline, launcher, mpi
from noria.launch.notices import Notices
from noria.launch.signals import Signals
from noria.launch.stop_file import StopFile
from noria.launch.stopping import STOPPED, Stopping
from noria.launch.watchdog import Watchdog
from noria.model import OpenModel
from noria.plan import planner
from noria.ring.heartbeat import SILENCE
from noria.ring.ring import AnyRing
from noria.rows.template import template_helper
from noria.streams import Streams
from noria.tools.atomic import check_folder
from noria.tools.helper import Helper
from noria.tools.lock import OutputLock
from noria.tools.progress import log
from noria.tools.provenance import now, provenance, segment_of

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
    signals.attended = True
    comm = launcher.by_node(comm)
    watchdog.rank, watchdog.num_ranks = comm.Get_rank(), comm.Get_size()
    with contextlib.ExitStack() as held:
        helper = helper or held.enter_context(template_helper())
        notices = held.enter_context(Notices(comm, signals))
        until = mpi.on_first_rank(comm, lambda: deadline.find(config.job.walltime, watchdog.began), share=False)
        stopping = None if until is None else held.enter_context(Stopping(signals, until, watchdog, notices))
        place = launcher.location(comm)
        device = mpi.on_every_rank(comm, lambda: launcher.device_of(config, place))
        if device.type == "cuda":
            notices.prepare = lambda: torch.cuda.set_device(device)
        if config.device == "auto" and (hidden := launcher.hidden_gpus(os.environ)):
            _say_once(comm, f"{hidden}: the CPU is used")
        place = launcher.settle(comm, place, device)
        mpi.on_every_rank(comm, lambda: launcher.check_sharing(config, comm, place, device))
        watchdog.doing = "opening the files"
        if trace_file := config.job.trace:
            mpi.on_first_rank(comm, lambda: _check_trace(config, Path(trace_file)))
        mpi.on_first_rank(comm, lambda: held.enter_context(_own(config, place.host)), share=False)
        mpi.on_first_rank(comm, lambda: stopping is not None and stopping.look_for(StopFile(config.output)))
        work = mpi.on_first_rank(comm, lambda: examine(config, comm.Get_size(), device.type, helper))
        if work.state == "finished":
            return _finished_already(config, work, comm.Get_rank())
        return _generate(config, comm, work, place, device, watchdog, stopping, helper)


def _generate(
    config: Config,
    comm: Communicator,
    work: Work,
    place: launcher.Location,
    device: torch.device,
    watchdog: Watchdog,
    stopping: Stopping | None,
    helper: Helper,
) -> int:
    """From the files to the output, on every rank; `stopping` is rank 0's."""
    started, rank, num_ranks = now(), comm.Get_rank(), comm.Get_size()
    transport_name, reason = mpi.on_every_rank(comm, lambda: transports.choose(comm, device, config.pipeline.transport))
    transport = transports.open_transport(transport_name, comm, device, config.pipeline.blocking)
    machine = mpi.on_every_rank(comm, lambda: launcher.machine(config, comm, place, device))
    plan = mpi.on_first_rank(
        comm,
        lambda: planner.make(config, work.shape, work.blocks, work.dtype, num_ranks, machine, work.num_rows, work.load),
    )
    watchdog.layers = plan.stage_words(rank)
    devices, hosts = comm.allgather(_device_name(place, device)), comm.allgather(place.host)
    segment = segment_of(os.environ, hosts, devices, sys.argv, started)
    opened = mpi.on_every_rank(comm, lambda: open_model(config, work.dtype))
    with contextlib.closing(opened) as checkpoint, contextlib.ExitStack() as on_error:
        mpi.on_every_rank(comm, lambda: _check_same(comm, hosts, config, work, checkpoint))
        watchdog.doing = "reading the sealed parts"
        desk = mpi.on_first_rank(comm, lambda: Desk(config, work, plan, checkpoint, segment, helper), share=False)
        if desk is not None:
            watchdog.record = desk.fail
            on_error.push(desk.withdraw)
        told = device.type == "cuda" or config.job.machine is not None  # nobody can assume what a CPU does
        _announce(
            comm, place, device, [*work.said, f"transport {transport_name}: {reason}", *plan.lines(predicted=told)]
        )
        traffic, timing, ring = Traffic(), Timing(), None
        title = f"rank {rank}: {devices[rank]}, {plan.stage_words(rank)}"
        its_streams = streams.streams_of(device)
        trace = Trace(rank, title, its_streams) if config.job.trace else OFF
        meters = Meters(traffic, trace, lambda message: log(rank, num_ranks, message))
        if config.placement.stage and not any("disk" in tiers.values() for tiers in plan.weight_tiers):
            _say_once(comm, "note: placement.stage does nothing: no weights are on disk")
        if not work.num_rows:
            _say_once(comm, f"warning: {source_of(config)} has no rows")
        if mpi.on_first_rank(comm, lambda: desk is not None and desk.complete):
            _say_once(comm, "no row is left to generate: the output is written without loading the model")
        else:
            ring = open_the_ring(plan, checkpoint.shape, trace.transport(transport), rank, its_streams)
            on_error.callback(ring.abandon)
            ring.watch(lambda other, seconds: _miss(watchdog, plan, hosts, other, seconds), SILENCE)
            executor = _build(config, comm, plan, checkpoint, ring, its_streams, meters, watchdog)
            timing = _execute(comm, plan, executor, ring, desk, trace, watchdog, stopping)
        watchdog.doing = "writing the output" if rank == 0 else "waiting for rank 0 to write the output"
        timings = comm.allgather(asdict(timing) | traffic.columns() | launcher.peak_memory(device))
        if desk is not None and not desk.complete:
            desk.leave()
        elif desk is not None:
            desk.close(_provenance(config, work, plan, checkpoint, devices, started), timings)
        watchdog.record = None
        if config.job.trace and isinstance(trace, Trace):
            _write_trace(comm, Path(config.job.trace), trace)
        complete, code = mpi.on_first_rank(comm, lambda: (desk is not None and desk.complete, desk.code if desk else 0))
        if ring is not None:
            ring.close()
        on_error.pop_all()
    otherwise = mpi.on_first_rank(comm, lambda: _say_otherwise(plan, timings, config.job.strict))
    if otherwise and config.job.strict:
        return NOT_AS_PLANNED
    return code if complete else STOPPED


def _build(
    config: Config,
    comm: Communicator,
    plan: planner.Plan,
    checkpoint: OpenModel,
    ring: AnyRing,
    its_streams: Streams,
    meters: Meters,
    watchdog: Watchdog,
) -> Executor:
    """This rank's engine around its weights. Raises InputError, on every rank, if those of one are damaged."""
    rank, scratch = comm.Get_rank(), launcher.scratch_folder(config)
    staged = scratch if config.placement.stage else None
    watchdog.doing = "loading its weights"
    weights = mpi.on_every_rank(
        comm,
        lambda: load(plan, checkpoint, rank, its_streams, meters.traffic, staged),
        lambda said: watchdog.end(said, 2),
    )
    return build(plan, checkpoint.shape, weights, ring, its_streams, meters, scratch)


def _execute(
    comm: Communicator,
    plan: planner.Plan,
    executor: Executor,
    ring: AnyRing,
    desk: Desk | None,
    trace: Tracing,
    watchdog: Watchdog,
    stopping: Stopping | None,
) -> Timing:
    """Every step of the job, begun together. `desk` and `stopping` are rank 0's: a signal finds who seals its rows."""
    if trace is not OFF:
        trace.start(mpi.clock_offset(comm), mpi.on_first_rank(comm, time.perf_counter_ns))
    comm.Barrier()
    watchdog.doing = executor.doing
    if desk is None or stopping is None:
        return executor.run(follow(ring))
    desk.seconds_left = lambda: stopping.seconds_left
    desk.nudge, stopping.seal, stopping.tend = stopping.nudge, desk.stop, desk.tend
    timing = executor.run(lead(ring, desk.admission, plan.groups, desk.tick, desk.lock))
    stopping.merging, stopping.seal = desk.complete, desk.stop  # until the last row is sealed
    return timing


def _provenance(
    config: Config, work: Work, plan: planner.Plan, checkpoint: OpenModel, devices: list[str], started: str
) -> dict[str, Any]:
    """How the output was made: its attributes."""
    more: dict[str, Any] = {"prompt_files": work.prompt_files} if work.prompt_files else {}
    return provenance(
        run_file=config.to_toml(),
        checkpoint_hash=checkpoint.header_hash,
        prompts_hash=work.prompts_hash,
        launcher=mpi.launcher_name(),
        devices=devices,
        start=started,
        mpi_library=mpi.library_version(),
        argv=sys.argv,
        plan=plan.as_dict(),
        **more,
    )


def _say_otherwise(plan: planner.Plan, timings: list[dict[str, Any]], strict: bool) -> list[str]:
    """Says where the run differed from its plan; of its speed only if the plan's rates were measured, on a GPU."""
    predicted = plan.predicted
    known = not predicted.get("assumed", True) and predicted.get("device") != "CPU"
    otherwise = plan.compare(figures(timings, speeds=known))
    for line in otherwise:
        log(0, plan.num_ranks, f"{'error' if strict else 'warning'}: not as planned: {line}")
    return otherwise


def _own(config: Config, host: str) -> OutputLock:
    """This job's lock on the output."""
    holder = {"job": deadline.job_id(), "host": host, "process": os.getpid(), "start": now()}
    return OutputLock(config.output, holder, lambda message: log(0, 1, message))


def _check_same(comm: Communicator, hosts: list[str], config: Config, work: Work, checkpoint: OpenModel) -> None:
    """Raises InputError, naming the ranks, if they do not all see the same checkpoint under its name, or another by now."""
    seen = comm.allgather((checkpoint.nbytes, checkpoint.header_hash))
    other = next((rank for rank, one in enumerate(seen) if one != seen[0]), None)
    if other is not None:
        words = [f"{nbytes:,} bytes with header {hash[:12]}" for nbytes, hash in (seen[0], seen[other])]
        raise InputError(
            f"model {config.model} is {words[0]} on {hosts[0]} (rank 0) but {words[1]} on {hosts[other]} (rank {other}):"
            " every rank must see the same checkpoint, so copy it again or name one on a shared file system"
        )
    if seen[0][1] != work.identity.header["checkpoint"]:
        raise InputError(f"model {config.model} changed while the run opened it: start the run again")


def _miss(watchdog: Watchdog, plan: planner.Plan, hosts: list[str], rank: int, seconds: float) -> None:
    """Ends the job when a rank has not been heard of."""
    who = f"rank {rank} on {hosts[rank]}, {plan.stage_words(rank)}"
    watchdog.end(f"failed: nothing heard for {seconds:.0f} s from {who}: it is stopped, or its machine is gone", 1)


def _check_trace(config: Config, path: Path) -> None:
    """Raises InputError unless a trace could be written, over no file but an older trace."""
    files = [os.path.realpath(file) for file in (config.model, *source_of(config).files, config.output) if file]
    if path.is_dir() or os.path.realpath(path) in files:
        raise InputError(f"job.trace is {path}, which is a folder or a file of this run: name a file of its own")
    check_folder(path)


def _write_trace(comm: Communicator, path: Path, trace: Trace) -> None:
    """Every rank's spans into rank 0's file. That it cannot be written costs the trace alone."""
    events, file = list(trace.events(mpi.clock_offset(comm))), TraceFile(path)
    mpi.in_turn(comm, events, file.add)
    if comm.Get_rank() == 0:
        try:
            file.close()
            log(0, comm.Get_size(), f"trace {path}: open it at https://ui.perfetto.dev")
        except OSError as error:
            log(0, comm.Get_size(), f"warning: the trace {path} was not written: {error}")


def _announce(comm: Communicator, place: launcher.Location, device: torch.device, lines: list[str]) -> None:
    """Once, before the weights are loaded: who runs where, and the plan."""
    placed = comm.allgather(f"{_device_name(place, device)}, {place.cores}")
    for line in [f"rank {rank}: {where}" for rank, where in enumerate(placed)] + lines:
        _say_once(comm, line)


def _say_once(comm: Communicator, line: str) -> None:
    if comm.Get_rank() == 0:
        log(0, comm.Get_size(), line)


def _device_name(place: launcher.Location, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{place.host} {device} ({name})"


def _finished_already(config: Config, work: Work, rank: int) -> int:
    if rank == 0:
        log(0, 1, f"{config.output} is finished: nothing to do (noria export reads it; --overwrite starts again)")
        for line in work.said:
            log(0, 1, line)
    return work.code
