"""The machine that noria plan plans for where no rank can be asked: which rates are taken, and what is said of them."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime

from noria.config import Config
from noria.errors import InputError, require
from noria.output.stored_rates import stored_rates
from noria.plan import kept, planner, rates
from noria.plan.cards import card_of
from noria.plan.problem import Machine
from noria.plan.rates import DOUBTED, Rates, is_all_assumed
from noria.tools.text import plural
from noria.tools.values import parse_nbytes


def device_of(config: Config) -> str:
    """The kind of device that is planned for: a GPU, unless the run or the machine says CPU."""
    if config.device == "cpu":
        return "cpu"
    if config.device == "auto" and config.job.machine:
        return "cpu" if planner.rates_of(config, "cuda", 1).device == "CPU" else "cuda"
    return "cuda"


def rates_for(config: Config, device: str, num_ranks: int) -> tuple[Rates, str]:
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


def machine_of(config: Config, device: str, known: Rates) -> Machine:
    """What a rank of such rates may fill."""
    return Machine(
        device,
        _capacity(config.placement.gpu_memory, "gpu_memory", known, "device_capacity"),
        _capacity(config.placement.cpu_memory, "cpu_memory", known, "host_capacity"),
    )


def _capacity(asked: str | None, key: str, rates: Rates, name: str) -> int:
    """Bytes that a rank may fill: measured ones are a limit to what is asked, assumed ones are not."""
    has = int(getattr(rates, name))
    return max(has, parse_nbytes(asked, f"placement.{key}")) if asked and name in rates.assumed else has


def machine_lines(config: Config, known: Rates, source: str, num_ranks: int) -> Iterator[str]:
    """Which rates are taken, and what of them nobody measured."""
    node, when = known.node, f" on {known.measured[:10]}" if known.measured else ""
    count = f", {plural(node.ranks, 'rank')} a host" if node.ranks else ""
    where = f"{known.device}{count}, measured{when} ({source})" if source else known.device
    left = [name for name in known.assumed if num_ranks > 1 or not name.startswith("hop")]
    if left:
        names = ", ".join(left) if source else "all rates"
        unknown = known.device != "CPU" and card_of(known.device) is None
        names += f"; of its own no data sheet is known here, so these are an {Rates.device}'s" * unknown
        where += (
            f"; assumed, not measured: {names} (noria run measures them where it runs and keeps them, noria probe too)"
        )
    yield where
    if source and not config.job.machine and not kept.is_good(known, datetime.now(UTC)):
        why = "a run was not as they let expect" if known.standing == DOUBTED else "they are not of the last month"
        yield f"warning: {why}: the next run measures them again"
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
