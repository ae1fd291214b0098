"""Measures a machine with all ranks at work: messages, links, memory, matmul and disk. noria plan reads the result.

Start it as the job will be started (mpirun -n N noria probe), or alone as one rank. It takes about ten seconds. noria run
measures the same for itself in less, and keeps it in $NORIA_CACHE, else in $XDG_CACHE_HOME/noria, else beside the output.
"""

import argparse
import sys
from pathlib import Path

from noria.communicator import Communicator
from noria.config import Config
from noria.errors import InputError, require
from noria.launch import launcher, mpi
from noria.launch.probe import Effort, Probe, choose_transport
from noria.launch.watchdog import Watchdog
from noria.plan.rates import Rates
from noria.tools.atomic import check_file, write_whole
from noria.tools.keys import check_path
from noria.tools.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="machine.toml", help="file to write, for noria plan --machine")
    parser.add_argument(
        "--scratch", metavar="DIR", help="folder on the disk to measure (default: as in noria run, else this folder)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="NUMBER",
        default=0.5,
        help="approximate time of each measurement (default: 0.5)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cuda", "cpu"),
        help="what to measure; auto takes the GPU if there is one",
    )
    parser.add_argument(
        "--transport",
        default="auto",
        choices=("auto", "mpi_device", "mpi_host"),
        help="how messages travel, as in noria run",
    )
    parser.add_argument(
        "--megabytes",
        type=int,
        metavar="INT",
        help="size of the buffers that are copied (default: 512 on a GPU, 64 on a CPU)",
    )


def run(arguments: argparse.Namespace) -> int:
    """The exit code of this rank. Raises mpi.Refused, on every rank, for the user's mistakes."""
    with Watchdog() as watchdog:
        try:
            comm = launcher.by_node(mpi.start())
            watchdog.is_rank(comm.Get_rank(), comm.Get_size())
            watchdog.begin("measuring")
            return _probe(arguments, comm)
        except mpi.Refused:
            raise
        except InputError as error:
            return watchdog.end(f"{error}", 2)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the job must end on every rank
            return watchdog.fail(error)


def _probe(arguments: argparse.Namespace, comm: Communicator) -> int:
    mpi.on_first_rank(comm, lambda: _check(arguments))
    config = Config(model="-", prompts="-", output=str(arguments.output or "machine.toml"), device=arguments.device)
    place = launcher.location(comm)
    device = mpi.on_every_rank(comm, lambda: launcher.device_of(config, place))
    place = launcher.with_cores(comm, place, device)
    folder = mpi.on_every_rank(comm, lambda: _folder(arguments, config, place))
    name, reason, transport = mpi.on_every_rank(comm, lambda: choose_transport(comm, device, arguments.transport))
    first = comm.Get_rank() == 0
    _say(
        first,
        "ranks",
        f"{comm.Get_size()} on {len(set(comm.allgather(place.host)))} host(s), {device.type}, {place.cores} each",
    )
    _say(first, "transport", f"{name}: {reason}")
    effort = Effort(arguments.seconds, arguments.megabytes and arguments.megabytes << 20)
    probe = Probe(comm, place, device, folder, effort)
    rates = probe.measure((name, transport), lambda what, value, unit: _say(first, what, _figure(value, unit)))
    if transport is not None:
        transport.close()
    mpi.on_first_rank(comm, lambda: _write(arguments.output, rates))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    require(0 < arguments.seconds <= 60, f"--seconds is {arguments.seconds:g}: it must be above 0 and at most 60")
    require(arguments.megabytes is None or 1 <= arguments.megabytes <= 8192, "--megabytes must be in 1 .. 8192")
    check_path(arguments.scratch, "--scratch")
    if arguments.output is not None:
        check_path(str(arguments.output), "--output")
        require(not arguments.output.is_dir(), f"--output {arguments.output} is a folder: name a file")
        check_file(arguments.output)


def _folder(arguments: argparse.Namespace, config: Config, place: launcher.Location) -> Path:
    folder = Path(arguments.scratch) if arguments.scratch else launcher.scratch_folder(config)
    require(folder.is_dir(), f"--scratch {folder} is not a folder on {place.host}: name one on the disk to measure")
    return folder


def _write(path: Path | None, rates: Rates) -> None:
    if path is None:
        return
    write_whole(path, rates.to_toml().encode())
    left = ", ".join(rates.assumed)
    _say(True, "written", f"{path}{f' (without {left}: not measured)' if left else ''}")


def _figure(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e6:.1f} us"
    if unit == "flop/s":
        return f"{_three_digits(value / 1e12)} TFLOP/s" if value >= 1e12 else f"{_three_digits(value / 1e9)} GFLOP/s"
    return f"{value / 1e9:.2f} G{unit}" if value >= 1e7 else f"{_three_digits(value / 1e6)} M{unit}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _say(first: bool, name: str, message: str) -> None:
    if first:
        sys.stdout.write(f"{name:<16}{printable(message)}\n")
        sys.stdout.flush()
