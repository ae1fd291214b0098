"""The rates that a run plans with: those of its output, those that are kept for its kind of node, or measured now.

Knows neither rows nor layers.
"""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from noria import transports
from noria.config import Config
from noria.errors import InputError
from noria.launch import launcher, mpi
from noria.launch.here import ThisRank
from noria.launch.node import mount_of, node_of
from noria.launch.probe import GROUPS, Effort, Probe
from noria.output.stored_rates import stored_rates
from noria.plan import kept, rates
from noria.plan.cards import card_of
from noria.plan.plan import TOLERANCE, Plan
from noria.plan.rates import Node, Rates
from noria.tools.text import plural

# Of each figure, so that all take at most three seconds on a GPU, and about one and a half on a CPU, where a plan decides less.
EFFORTS = {"cuda": Effort(0.12, 512 << 20, strict=False), "cpu": Effort(0.1, 64 << 20, strict=False)}


def rates_of_run(config: Config, here: ThisRank, dtype: str, disk: bool, transport: str) -> tuple[Rates, list[str]]:
    """The rates to plan a run with that computes in `dtype`, and whose plan may use the disk, or not. Collective.

    With them, in a line or more, where they come from. Raises InputError for what is wrong with a machine file.
    """
    comm, (device, node) = here.comm, node_of(here.comm, here.location, here.device)
    if config.job.machine:
        given = mpi.on_first_rank(comm, lambda: rates.read(config.job.machine or "", here.device.type))
        otherwise = _otherwise(config.job.machine, given, device, node)
        return given, [f"rates: {config.job.machine}, of {given.device}", *otherwise]
    disk_of = mount_of(launcher.scratch_folder(config))
    known, source = mpi.on_first_rank(comm, lambda: _known(config, device, node, disk_of, transport))
    groups = {
        name
        for name, figures in GROUPS.items()
        if (known is None or set(figures) & set(known.assumed))
        and (name != "hop" or here.num_ranks > 1)
        and (name != "disk" or disk)
    }
    dtypes = [dtype] if known is None or f"matmul.{dtype}" in known.assumed else []
    if groups or dtypes:
        began = time.perf_counter()
        found = _measure(config, here, groups, dtypes, transport)
        found = mpi.on_first_rank(comm, lambda: _kept(config, known, found))
        return found, [f"rates: {_words(found)}, measured in {time.perf_counter() - began:.1f} s"]
    assert known is not None
    return known, [f"rates: {_words(known)}, measured {known.measured[:10] or 'before'} ({source})"]


def _known(config: Config, device: str, node: Node, disk_of: str, transport: str) -> tuple[Rates | None, str]:
    """What need not be measured, and where it stands: doubted or old rates do, and so do those of another disk."""
    found, source = _of_output(config, device, node), "by the job before, of this output"
    if found is None and (one := kept.find(kept.folder_of(config.output), device, node)) is not None:
        found, source = one.rates, str(one.path)
    if found is None:
        return None, ""
    stale: set[str] = set()
    if not kept.is_good(found, datetime.now(UTC)):
        stale = {*(name for figures in GROUPS.values() for name in figures), *(f"matmul.{one}" for one in found.matmul)}
    if found.scratch not in ("", disk_of):
        stale |= set(GROUPS["disk"])
    if found.transport not in ("", transport):
        stale |= set(GROUPS["hop"])
    return kept.without(found, stale), source


def _of_output(config: Config, device: str, node: Node) -> Rates | None:
    """The good rates of the output's latest job, if that was on this kind of node."""
    text = None if config.job.overwrite else stored_rates(config.output)
    try:
        found = None if text is None else rates.parse(text)
    except InputError:
        return None
    good = found is not None and kept.is_of(found, device, node) and kept.is_good(found, datetime.now(UTC))
    return found if good else None


def _measure(config: Config, here: ThisRank, groups: set[str], dtypes: list[str], transport: str) -> Rates:
    probe = Probe(here.comm, here.location, here.device, launcher.scratch_folder(config), EFFORTS[here.device.type])
    travels = transports.open_transport(transport, here.comm, here.device) if "hop" in groups else None
    try:
        return probe.measure((transport, travels), groups=groups, dtypes=dtypes)
    finally:
        if travels is not None:
            travels.close()


def _kept(config: Config, known: Rates | None, found: Rates) -> Rates:
    """What was measured beside what was known, kept for later jobs, or what another job has kept meanwhile."""
    folder, now = kept.folder_of(config.output), datetime.now(UTC)
    old = kept.find(folder, found.device, found.node)
    found = kept.standing_of(old.rates if old else None, found)
    if known is not None:
        found = rates.joined(known, found)
    found = rates.parse(found.to_toml())  # as the next job of this output will read them, to the last digit
    one = kept.keep(folder, found, now)
    return found if one is None else one.rates


def _words(known: Rates) -> str:
    return f"{known.device}, {plural(known.node.ranks, 'rank')} a host" if known.node.ranks else known.device


def _otherwise(path: str, given: Rates, device: str, node: Node) -> list[str]:
    """What is said where a machine file is of another device, or of another number of ranks, than the run's."""
    said, ranks, card = [], given.node.ranks, card_of(device)
    if given.device != device and (card is None or card_of(given.device) is not card):
        said.append(f"{path} is of {given.device}, the ranks have {device}")
    if ranks and ranks != node.ranks:
        said.append(f"{path} was measured with {plural(ranks, 'rank')} a host, here are {node.ranks}")
    return [
        f"warning: {text}: what is predicted may be far off (without --machine it is measured here)" for text in said
    ]


def deviates(plan: Plan, found: Mapping[str, Any]) -> bool:
    """Whether a phase of a run on GPUs, of which `found` has the tokens/s, was not what its measured rates let expect."""
    if plan.predicted.get("assumed", True) or plan.predicted["device"] == "CPU":
        return False
    for phase in ("prefill", "decode"):
        planned, measured = plan.predicted[phase]["tokens_per_second"], found.get(f"{phase}_tokens_per_second")
        if measured is not None and abs(measured / planned - 1) > TOLERANCE:
            return True
    return False


def doubted(config: Config, known: Rates) -> Rates:
    """The rates of a run that deviated, marked where they are kept and for its output: the next job measures them again.

    For rank 0. Those of a machine file stay as they are.
    """
    if config.job.machine:
        return known
    return kept.doubt(kept.folder_of(config.output), known, datetime.now(UTC))
