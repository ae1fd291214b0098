"""Plans a run without running it: memory of each rank and tier, predicted tokens/s, the bottleneck, job script lines.

Needs no GPU, no MPI and no ranks: use it on a login node. It takes the flags of noria run.
"""

import argparse
import contextlib
import math
import sys
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
from noria.plan import costs, planner
from noria.plan.costs import Workload
from noria.plan.plan import Plan, rate_words
from noria.plan.problem import Machine, Problem
from noria.plan.rates import Rates
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
        rates = planner.rates_of(config, device, num_ranks)
        _say("model", f"{config.model or config.job.random_weights}: {checkpoint.shape.family},"
             f" {plural(checkpoint.shape.num_layers, 'layer')}, {checkpoint.dtype}")  # fmt: skip
        _say(
            "rows",
            f"{workload.num_rows:,} of {workload.prompt_tokens:,.0f} prompt tokens and"
            f" {workload.new_tokens:,.0f} new ones on average",
        )
        _say("machine", _machine_words(rates))
        if config.device == "auto" and not config.job.machine:
            _say(
                "device",
                f"planned for {rates.device}: name another with --device cpu, or with --machine FILE of noria probe",
            )
        plan = _plan(config, checkpoint, num_ranks, num_rows, workload, rates, device)
        for line in plan.lines():
            _say("", line)
        for line in _moved(plan, checkpoint, workload):
            _say("moved", line)
        _say("one more", _one_more(config, checkpoint, num_ranks, num_rows, workload, device, plan))
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


def _plan(
    config: Config, checkpoint: OpenModel, num_ranks: int, num_rows: int, workload: Workload, rates: Rates, device: str
) -> Plan:
    """The plan for this many ranks. Raises InputError if there is none."""
    dtype = dtype_of(config, checkpoint.dtype, device)
    planner.check(config, num_ranks, checkpoint.shape)
    machine = Machine(
        device,
        _capacity(config.placement.gpu_memory, "gpu_memory", rates, "device_capacity"),
        _capacity(config.placement.cpu_memory, "cpu_memory", rates, "host_capacity"),
    )
    shape, blocks = checkpoint.shape, checkpoint.blocks
    return planner.make(Problem(config, shape, blocks, dtype, num_ranks, machine, num_rows, workload))


def _capacity(asked: str | None, key: str, rates: Rates, name: str) -> int:
    """Bytes that a rank may fill: measured ones are a limit to what is asked, assumed ones are not."""
    has = int(getattr(rates, name))
    return max(has, parse_nbytes(asked, f"placement.{key}")) if asked and name in rates.assumed else has


def _machine_words(rates: Rates) -> str:
    if not rates.assumed:
        return f"{rates.device}, measured"
    names = "all rates" if len(rates.assumed) > 12 else ", ".join(rates.assumed)
    return f"{rates.device}; assumed, not measured: {names} (noria probe --output machine.toml measures them)"


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
    config: Config, checkpoint: OpenModel, num_ranks: int, num_rows: int, workload: Workload, device: str, plan: Plan
) -> str:
    """What one rank more would buy, with as many laps and groups where that many ranks can have them."""
    rates = planner.rates_of(config, device, num_ranks + 1)
    as_asked = replace(config, pipeline=replace(config.pipeline, partition="greedy"))
    free = replace(as_asked, pipeline=replace(as_asked.pipeline, groups=None, laps=None))
    try:
        try:
            more = _plan(as_asked, checkpoint, num_ranks + 1, num_rows, workload, rates, device)
        except InputError:
            more = _plan(free, checkpoint, num_ranks + 1, num_rows, workload, rates, device)
    except InputError as error:
        return f"{num_ranks + 1} ranks: {error}"
    now, then = plan.predicted["tokens_per_second"], more.predicted["tokens_per_second"]
    return f"{num_ranks + 1} ranks: {rate_words(then)} tok/s overall, {then / now:.2f} x"


def _clock(seconds: float) -> str:
    whole = max(round(seconds), 1)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _say(name: str, message: str) -> None:
    sys.stdout.write(f"{name:<12}{printable(message)}\n" if name else f"{printable(message)}\n")
