"""Plans a run without running it: memory of each rank and tier, predicted tokens/s, the bottleneck, job script lines.

Needs no GPU, no MPI and no ranks: use it on a login node. It takes the flags of noria run. What the machine does it takes
from --machine, else from the output's own jobs, else from what runs have measured and kept ($NORIA_CACHE, else
$XDG_CACHE_HOME/noria, else the output's folder): of as many ranks, else the latest. Else it is assumed.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from noria.checkpoint.quantization import forms_of
from noria.commands import flags
from noria.config import Config
from noria.desk.examination import dtype_of, open_model
from noria.desk.inputs import prompts_of
from noria.desk.lengths import look
from noria.desk.machine import device_of, machine_lines, machine_of, rates_for
from noria.desk.products import check_products
from noria.errors import InputError, require
from noria.model import OpenModel
from noria.plan import costs, planner
from noria.plan.asked import costly
from noria.plan.explained import binding_words, memory_lines, plan_as_dict, rehearsed_words, stage_words, term_lines
from noria.plan.plan import Plan
from noria.plan.problem import Problem
from noria.plan.rates import Rates
from noria.plan.rehearsal import rehearsed
from noria.plan.rivals import Rival, rivals
from noria.plan.rounds import Workload
from noria.plan.script import clock, script_lines
from noria.plan.stored import stored_as
from noria.plan.what_if import Bought, bought
from noria.plan.written import run_file
from noria.rows.chat import encoder_of
from noria.rows.prompt_files import PromptFiles, count
from noria.rows.template import template_helper
from noria.rows.tokenizer import tokenizer_of
from noria.tools.text import json_text, plural, printable

CONVERTED = "converted"  # what the plan would be with weights in fewer bits: noria convert --quantization


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, required=True, metavar="INT", help="number of ranks, one for each GPU")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object, for scripts: plan, memory, binds, terms, predicted, rivals, what_if, converted; later"
        " versions only add keys",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="write a run file with every planned key set: a run of it has this plan, and says where it has not; a file that"
        " exists is not overwritten",
    )
    flags.add_arguments(parser, "--ranks INT [--write FILE] ")


def run(arguments: argparse.Namespace) -> int:
    config, num_ranks = flags.load(arguments, "ranks", "json", "write"), arguments.ranks
    require(num_ranks >= 1, f"--ranks is {num_ranks}: it must be at least 1")
    files = prompts_of(config)
    num_rows = count(files)
    device = device_of(config)
    with contextlib.closing(open_model(config, dtype_of(config, None, device))) as checkpoint:
        check_products(config, device, dtype_of(config, checkpoint.dtype, device))
        workload = _looked(config, files, checkpoint, num_rows)
        known, source = rates_for(config, device, num_ranks)
        problem = _problem(config, checkpoint, num_ranks, num_rows, workload, known, device)
        asked = Planned(problem, known.needed(problem.dtype, problem.may_use_disk), source, checkpoint.dtype)
        if not arguments.json:
            for line in [*asked.lines(), *(("note", note) for note in checkpoint.notes)]:
                _say(*line)
        forms = forms_of(checkpoint.blocks, checkpoint.dtype)
        try:
            plan = planner.make(problem, asked.known)
        except InputError:  # in fewer bits it may fit
            for one in stored_as(problem, asked.known, None, {} if arguments.json else forms):
                if one.plan is not None:
                    _say(CONVERTED, one.words())
            raise
        if arguments.write is not None:
            _write(arguments.write, run_file(config, plan))
        others, more = rivals(problem, asked.known, plan), list(bought(problem, asked.known, plan))
        costs = costly(problem, asked.known, plan)
        fewer = stored_as(problem, asked.known, plan, forms)
        if asked.of_other_ranks:
            plan = rehearsed(problem, plan, asked.known)
    if arguments.json:
        told = _as_dict(problem, plan, others, more) | {"converted": [one.as_dict() for one in fewer]}
        _say("", json_text(asked.as_dict() | told))
        return 0
    for line in [*_plan_lines(problem, plan, others, more), *((CONVERTED, one.words()) for one in fewer)]:
        _say(*line)
    for words in costs:
        _say("warning", words)
    if arguments.write is not None:
        _say("written", f"{arguments.write}: mpirun -n {num_ranks} noria run {arguments.write}")
    return 0


def _write(path: Path, text: str) -> None:
    """Writes a new file. Raises InputError where one is there, or none can be made."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"--write {path}: the file exists: remove it, or name another") from None
    except OSError as error:
        raise InputError(f"--write {path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Planned:
    """What is planned, and from which rates; `source`: where these stand, "" for starting values."""

    problem: Problem
    known: Rates
    source: str
    dtype: str  # of the checkpoint

    @property
    def of_other_ranks(self) -> bool:
        """Whether the rates were measured with another number of ranks than is planned for, of which there are several."""
        measured = self.known.node.ranks * self.known.node.hosts
        return bool(self.source) and 0 != measured != self.problem.num_ranks > 1

    def lines(self) -> Iterator[tuple[str, str]]:
        config, shape, workload = self.problem.config, self.problem.shape, self.problem.workload
        yield (
            "model",
            f"{config.model or config.job.random_weights}: {shape.family}, {plural(shape.num_layers, 'layer')},"
            f" {self.dtype}",
        )
        yield (
            "rows",
            f"{workload.num_rows:,} of {workload.prompt_tokens:,.0f} prompt tokens and"
            f" {workload.new_tokens:,.0f} new ones on average"
            + (f"; of a prompt {workload.shared_tokens:,.0f} tokens are shared" if workload.shared_tokens else ""),
        )
        if workload.total_pages is None:  # nobody knows how long they are
            yield (
                "rows",
                "warning: no row was found that can run: planned as if one filled the context (noria validate)",
            )
        for line in machine_lines(config, self.known, self.source, self.problem.num_ranks):
            yield "machine", line
        if config.device == "auto" and not self.source:
            yield (
                "device",
                f"planned for {self.known.device}: name another with --device cpu, or with --machine FILE of noria probe",
            )

    def as_dict(self) -> dict[str, Any]:
        shape, workload, known = self.problem.shape, self.problem.workload, self.known
        return {
            "model": {"family": shape.family, "layers": shape.num_layers, "dtype": self.dtype},
            "rows": {
                "rows": workload.num_rows,
                "prompt_tokens": workload.prompt_tokens,
                "shared_tokens": workload.shared_tokens,
                "new_tokens": workload.new_tokens,
            },
            "machine": {
                "device": known.device,
                "source": self.source,
                "measured": known.measured,
                "ranks": known.node.ranks * known.node.hosts,
                "assumed": list(known.assumed),
                "limits": {tier: limit for tier, limit in self.problem.limits.items() if limit < 1 << 60},
            },
        }


def _looked(config: Config, files: PromptFiles, checkpoint: OpenModel, num_rows: int) -> Workload:
    """How long the rows are."""
    with template_helper() as helper:
        encode = encoder_of(
            checkpoint, tokenizer_of(checkpoint), config.sampling, datetime.now(), lambda message: None, helper
        )
        return look(config, files, checkpoint.shape.max_positions, num_rows, encode)


def _plan_lines(problem: Problem, plan: Plan, others: list[Rival], more: list[Bought]) -> Iterator[tuple[str, str]]:
    """The plan as people read it."""
    yield from (("", line) for line in plan.lines(memory=False))
    yield "stages", stage_words(plan)
    yield from (("memory", line) for line in memory_lines(plan, problem.limits))
    yield from (("terms", line) for line in term_lines(plan))
    yield from (("moved", line) for line in _moved(plan, problem))
    if "rehearsed" in plan.predicted:
        yield "ring", rehearsed_words(plan)
    yield "binds", binding_words(plan)
    yield "next best", others[0].words() if others else "no other plan fits what is asked"
    yield from ((one.name, one.words()) for one in more)
    yield "time", f"about {clock(plan.predicted['seconds'])} for all rows"
    yield from (("", line) for line in _script(problem, plan))


def _as_dict(problem: Problem, plan: Plan, others: list[Rival], more: list[Bought]) -> dict[str, Any]:
    return plan_as_dict(plan) | {
        "rivals": [one.as_dict() for one in others],
        "what_if": [one.as_dict() for one in more],
        "job_script": _script(problem, plan),
    }


def _script(problem: Problem, plan: Plan) -> list[str]:
    return script_lines(plan, problem.machine.device)


def _problem(
    config: Config, checkpoint: OpenModel, num_ranks: int, num_rows: int, workload: Workload, known: Rates, device: str
) -> Problem:
    """What to plan for this many ranks. Raises InputError for a pipeline that cannot be."""
    dtype = dtype_of(config, checkpoint.dtype, device)
    planner.check(config, num_ranks, checkpoint.shape)
    machine = machine_of(config, device, known)
    return Problem(config, checkpoint.shape, checkpoint.blocks, dtype, num_ranks, machine, num_rows, workload)


def _moved(plan: Plan, problem: Problem) -> list[str]:
    """What a decode round moves over each link."""
    lines, rows, shape = [], plan.predicted["rows"], problem.shape
    round = costs.decoding(rows, problem.workload)
    for rank in range(plan.num_ranks):
        chosen = plan.groups == 1 and round.tokens <= plan.chosen_tokens
        moved = costs.weights_nbytes(plan, problem.blocks, rank, costs.touched(shape, round.tokens) if chosen else 1.0)
        if moved["link"]:
            disk = f", {moved['disk'] / 1e9:.2f} GB of them from disk" if moved["disk"] else ""
            only = ", of experts those that are chosen" if chosen else ""
            lines.append(f"rank {rank}: {moved['link'] / 1e9:.2f} GB of weights to the GPU a round{disk}{only}")
        cache = costs.cache_nbytes(plan, shape, rank, round)
        for tier in (tier for tier in cache if cache[tier]["load"]):
            loaded, stored = cache[tier]["load"] / 1e9, cache[tier]["store"] / 1e6
            lines.append(f"rank {rank}: {loaded:.2f} GB of cache from {tier} to the GPU a round, {stored:.1f} MB back")
    if plan.num_ranks > 1:
        nbytes = costs.ring_nbytes(plan, shape, rows)
        lines.append(f"ring: {nbytes / 1e6:.2f} MB a decode round")
    return lines


def _say(name: str, message: str) -> None:
    sys.stdout.write(f"{name:<12}{printable(message)}\n" if name else f"{printable(message)}\n")
