"""Plans a run without running it: memory of each rank and tier, predicted tokens/s, the bottleneck, job script lines.

Needs no GPU, no MPI and no ranks: use it on a login node. It takes the flags of noria run. What the machine does it takes
from --machine, else from the output's own jobs, else from what runs have measured and kept ($NORIA_CACHE, else
$XDG_CACHE_HOME/noria, else the output's folder): of as many ranks, else the latest. Else it is assumed.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

from noria.commands import flags
from noria.config import Config
from noria.desk.examination import dtype_of, open_model
from noria.desk.inputs import prompts_of
from noria.desk.lengths import look
from noria.errors import InputError, require
from noria.limits import HOST_NBYTES, MEMORY_SHARE
from noria.model import OpenModel
from noria.output.stored_rates import stored_rates
from noria.plan import costs, kept, planner, rates
from noria.plan.costs import Workload
from noria.plan.plan import Plan, rate_words
from noria.plan.problem import Machine, Problem
from noria.plan.rates import Rates, is_all_assumed
from noria.rows.chat import encoder_of
from noria.rows.prompt_files import count
from noria.rows.template import template_helper
from noria.rows.tokenizer import tokenizer_of
from noria.tools.text import plural, printable
from noria.tools.values import parse_nbytes

CORES = 8  # of a rank: loading and reading threads, and messages
RANKS_OF_A_NODE = 8
STARTING_SECONDS = 300
SHORTEST_SECONDS = 900  # of a walltime: a scheduler's notice and the start-up must fit in
SLACK = 1.5  # times the predicted time is asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, required=True, metavar="INT", help="number of ranks, one for each GPU")
    flags.add_arguments(parser, "--ranks INT ")


def run(arguments: argparse.Namespace) -> int:
    config, num_ranks = flags.load(arguments, "ranks"), arguments.ranks
    require(num_ranks >= 1, f"--ranks is {num_ranks}: it must be at least 1")
    files = prompts_of(config)
    num_rows = count(files)
    device = _device(config)
    with contextlib.closing(open_model(config, dtype_of(config, None, device))) as checkpoint:
        with template_helper() as helper:
            encode = encoder_of(
                checkpoint, tokenizer_of(checkpoint), config.sampling, datetime.now(), lambda message: None, helper
            )
            workload = look(config, files, checkpoint.shape.max_positions, num_rows, encode)
        known, source = _rates(config, device, num_ranks)
        _say("model", f"{config.model or config.job.random_weights}: {checkpoint.shape.family},"
             f" {plural(checkpoint.shape.num_layers, 'layer')}, {checkpoint.dtype}")  # fmt: skip
        _say(
            "rows",
            f"{workload.num_rows:,} of {workload.prompt_tokens:,.0f} prompt tokens and"
            f" {workload.new_tokens:,.0f} new ones on average",
        )
        problem = _problem(config, checkpoint, num_ranks, num_rows, workload, known, device)
        known = known.needed(problem.dtype, problem.may_use_disk)
        for line in _machine_lines(config, known, source, num_ranks):
            _say("machine", line)
        if config.device == "auto" and not source:
            _say(
                "device",
                f"planned for {known.device}: name another with --device cpu, or with --machine FILE of noria probe",
            )
        plan = planner.make(problem, known)
        for line in plan.lines():
            _say("", line)
        for line in _moved(plan, checkpoint, workload):
            _say("moved", line)
        _say("one more", _one_more(config, checkpoint, num_rows, workload, known, device, plan))
    seconds = plan.predicted["seconds"]
    _say("time", f"about {_clock(seconds)} for all rows")
    for line in script_lines(plan, device, STARTING_SECONDS + SLACK * seconds):
        _say("", line)
    return 0


def script_lines(plan: Plan, device: str, seconds: float) -> list[str]:
    """What a job script asks a scheduler for. `seconds`: of walltime."""
    num_ranks = plan.num_ranks
    nodes = math.ceil(num_ranks / RANKS_OF_A_NODE)
    per_node = math.ceil(num_ranks / nodes)
    full = num_ranks - nodes * (per_node - 1)  # nodes of so many ranks; the others have one less
    tiers = ("gpu", "cpu") if device == "cpu" else ("cpu",)
    host = max(sum(sum(table[tier].values()) for tier in tiers) for table in plan.memory)
    memory = math.ceil(per_node * (host / MEMORY_SHARE + HOST_NBYTES) / 1024**3)
    time = _clock(math.ceil(seconds / SHORTEST_SECONDS) * SHORTEST_SECONDS)
    gpus = device != "cpu"
    return [
        f"#SBATCH --nodes={nodes}",
        *([f"#SBATCH --ntasks={num_ranks}"] * (full < nodes)),
        f"#SBATCH --ntasks-per-node={per_node}",
        *([f"#SBATCH --gres=gpu:{per_node}"] * gpus),
        f"#SBATCH --cpus-per-task={CORES}",
        f"#SBATCH --mem={memory}G",
        f"#SBATCH --time={time}",
        "#PBS -l select="
        + "+".join(
            f"{count}:ncpus={CORES * ranks}:mpiprocs={ranks}{f':ngpus={ranks}' * gpus}:mem={memory}gb"
            for count, ranks in ((full, per_node), (nodes - full, per_node - 1))
            if count
        ),
        f"#PBS -l walltime={time}",
    ]


def _device(config: Config) -> str:
    """The kind of device that is planned for: a GPU, unless the run or the machine says CPU."""
    if config.device == "cpu":
        return "cpu"
    if config.device == "auto" and config.job.machine:
        return "cpu" if planner.rates_of(config, "cuda", 1).device == "CPU" else "cuda"
    return "cuda"


def _rates(config: Config, device: str, num_ranks: int) -> tuple[Rates, str]:
    """The rates to plan with and where they stand ("" for starting values): of job.machine; of the jobs of this output; those
    that jobs have kept."""
    if config.job.machine:
        known = planner.rates_of(config, device, num_ranks)
        require(
            (known.device == "CPU") == (device == "cpu"),
            f"--machine {config.job.machine} is of {known.device}, but device is {config.device!r}: leave one of them out",
        )
        return known, "" if is_all_assumed(known) else config.job.machine
    of_output = None if config.job.overwrite else stored_rates(config.output)
    with contextlib.suppress(InputError):
        found = None if of_output is None else rates.parse(of_output)
        if found is not None and (found.device == "CPU") == (device == "cpu"):
            return found, f"the jobs of {config.output}"
    one = kept.for_plan(kept.folder_of(config.output), device, num_ranks)
    return (planner.rates_of(config, device, num_ranks), "") if one is None else (one.rates, str(one.path))


def _problem(
    config: Config, checkpoint: OpenModel, num_ranks: int, num_rows: int, workload: Workload, known: Rates, device: str
) -> Problem:
    """What to plan for this many ranks. Raises InputError for a pipeline that cannot be."""
    dtype = dtype_of(config, checkpoint.dtype, device)
    planner.check(config, num_ranks, checkpoint.shape)
    machine = Machine(
        device,
        _capacity(config.placement.gpu_memory, "gpu_memory", known, "device_capacity"),
        _capacity(config.placement.cpu_memory, "cpu_memory", known, "host_capacity"),
    )
    return Problem(config, checkpoint.shape, checkpoint.blocks, dtype, num_ranks, machine, num_rows, workload)


def _capacity(asked: str | None, key: str, rates: Rates, name: str) -> int:
    """Bytes that a rank may fill: measured ones are a limit to what is asked, assumed ones are not."""
    has = int(getattr(rates, name))
    return max(has, parse_nbytes(asked, f"placement.{key}")) if asked and name in rates.assumed else has


def _machine_lines(config: Config, known: Rates, source: str, num_ranks: int) -> Iterator[str]:
    """Which rates are taken, and what of them nobody measured."""
    node, when = known.node, f" on {known.measured[:10]}" if known.measured else ""
    count = f", {plural(node.ranks, 'rank')} a host" if node.ranks else ""
    where = f"{known.device}{count}, measured{when} ({source})" if source else known.device
    left = [name for name in known.assumed if num_ranks > 1 or not name.startswith("hop")]
    if left:
        names = ", ".join(left) if source else "all rates"
        where += (
            f"; assumed, not measured: {names} (noria run measures them where it runs and keeps them, noria probe too)"
        )
    yield where
    if source and node.ranks and num_ranks != node.ranks * node.hosts:
        measured = f"{plural(node.ranks, 'rank')} on {plural(node.hosts, 'host')}"
        yield f"warning: measured with {measured}, planned for {num_ranks}: what ranks share is another"
    other = "" if config.job.machine or not source else _other_device(config, known)
    if other:
        yield f"kept too: {other} (--machine FILE plans for it)"


def _other_device(config: Config, known: Rates) -> str:
    """Rates of another GPU that are kept beside those that are taken."""
    for one in kept.all_kept(kept.folder_of(config.output)):
        if one.rates.device not in (known.device, "CPU") and known.device != "CPU":
            return f"{one.rates.device} in {one.path}"
    return ""


def _moved(plan: Plan, checkpoint: OpenModel, workload: Workload) -> list[str]:
    """What a decode round moves over each link."""
    lines, rows, shape = [], plan.predicted["rows"], checkpoint.shape
    turn = costs.decoding(rows, workload)
    for rank in range(plan.num_ranks):
        moved = costs.weights_nbytes(plan, checkpoint.blocks, rank)
        if moved["link"]:
            disk = f", {moved['disk'] / 1e9:.2f} GB of them from disk" if moved["disk"] else ""
            lines.append(f"rank {rank}: {moved['link'] / 1e9:.2f} GB of weights to the GPU a round{disk}")
        cache = costs.cache_nbytes(plan, shape, rank, turn)
        for tier in (tier for tier in cache if cache[tier]["load"]):
            loaded, stored = cache[tier]["load"] / 1e9, cache[tier]["store"] / 1e6
            lines.append(f"rank {rank}: {loaded:.2f} GB of cache from {tier} to the GPU a round, {stored:.1f} MB back")
    if plan.num_ranks > 1:
        nbytes = costs.ring_nbytes(plan, shape, rows)
        lines.append(f"ring: {nbytes / 1e6:.2f} MB a decode round")
    return lines


def _one_more(
    config: Config, checkpoint: OpenModel, num_rows: int, workload: Workload, known: Rates, device: str, plan: Plan
) -> str:
    """What one rank more would buy, with as many laps and groups where that many ranks can have them."""
    as_asked = replace(config, pipeline=replace(config.pipeline, partition="greedy"))
    free = replace(as_asked, pipeline=replace(as_asked.pipeline, groups=None, laps=None))
    num_ranks = plan.num_ranks + 1

    def planned(asked: Config) -> Plan:
        return planner.make(_problem(asked, checkpoint, num_ranks, num_rows, workload, known, device), known)

    try:
        try:
            more = planned(as_asked)
        except InputError:
            more = planned(free)
    except InputError as error:
        return f"{num_ranks} ranks: {error}"
    now, then = plan.predicted["tokens_per_second"], more.predicted["tokens_per_second"]
    return f"{num_ranks} ranks: {rate_words(then)} tok/s overall, {then / now:.2f} x"


def _clock(seconds: float) -> str:
    whole = max(round(seconds), 1)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _say(name: str, message: str) -> None:
    sys.stdout.write(f"{name:<12}{printable(message)}\n" if name else f"{printable(message)}\n")
