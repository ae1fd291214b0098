"""This rank: its communicator, where it runs, and its device's streams. What is said once is said by rank 0."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from noria import streams
from noria.communicator import Communicator
from noria.config import Config
from noria.errors import InputError
from noria.launch import launcher, mpi
from noria.launch.launcher import Location
from noria.launch.notices import Notices
from noria.launch.schedulers import job_id
from noria.output.sealed import parts_folder
from noria.streams import Streams
from noria.tools.lock import OutputLock
from noria.tools.log import log
from noria.tools.provenance import now


@dataclass(frozen=True)
class ThisRank:
    """`rank` of `num_ranks`, as `comm` counts them."""

    comm: Communicator
    location: Location
    streams: Streams

    @property
    def rank(self) -> int:
        return self.comm.Get_rank()

    @property
    def num_ranks(self) -> int:
        return self.comm.Get_size()

    @property
    def device(self) -> torch.device:
        return self.streams.device

    @property
    def name(self) -> str:
        """`node3 cuda:0 (NVIDIA H200)`."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{self.location.host} {self.device} ({name})"

    def log(self, line: str) -> None:
        log(self.rank, self.num_ranks, line)

    def say(self, *lines: str) -> None:
        """On rank 0, a line each."""
        for line in lines if self.rank == 0 else ():
            self.log(line)

    def show(self, *lines: str) -> None:
        """On rank 0, lines of a table: as wide as they are, without a time before them."""
        for line in lines if self.rank == 0 else ():
            log(self.rank, self.num_ranks, line, bare=True)

    def announce(self) -> None:
        """Who runs where. Collective."""
        placed = self.comm.allgather(f"{self.name}, {self.location.cores}")
        self.say(*(f"rank {rank}: {where}" for rank, where in enumerate(placed)))

    @contextlib.contextmanager
    def own(self, output: str) -> Iterator[None]:
        """This job's locks, which rank 0 takes: on the output, and on a folder of parts that is a link, since another
        output may have a link to the same."""
        holder = {"job": job_id(), "host": self.location.host, "process": os.getpid(), "start": now()}
        with contextlib.ExitStack() as held:
            held.enter_context(OutputLock(output, holder, lambda message: log(0, 1, message)))
            folder = parts_folder(output)
            if folder.is_symlink() and folder.is_dir():
                held.enter_context(OutputLock(folder.resolve() / "parts", holder, lambda message: log(0, 1, message)))
            yield

    def check_same(self, model: str | None, nbytes: int, header_hash: str, examined: str) -> None:
        """Raises InputError, naming the ranks, if they do not all see the same checkpoint under its name. Collective.

        `examined`: the hash that rank 0 found before.
        """
        seen = self.comm.allgather((nbytes, header_hash, self.location.host))
        other = next((rank for rank, one in enumerate(seen) if one[:2] != seen[0][:2]), None)
        if other is None and header_hash != examined:
            raise InputError(f"model {model} changed while the run opened it: start the run again")
        if other is None:
            return
        first, second = (
            f"{nbytes:,} bytes with header {hash[:12]} on {host}" for nbytes, hash, host in (seen[0], seen[other])
        )
        raise InputError(
            f"model {model} is {first} (rank 0) but {second} (rank {other}): every rank must see the same checkpoint, so"
            " copy it again or name one on a shared file system"
        )


def settle(config: Config, comm: Communicator, notices: Notices) -> ThisRank:
    """This rank with its device and its cores. Raises InputError, on every rank, for a device that one cannot have."""
    location = launcher.location(comm)
    device = mpi.on_every_rank(comm, lambda: launcher.device_of(config, location))
    if device.type == "cuda":
        notices.prepare_by(lambda: torch.cuda.set_device(device))
    here = ThisRank(comm, launcher.with_cores(comm, location, device), streams.streams_of(device))
    if config.device == "auto" and (hidden := launcher.hidden_gpus(os.environ)):
        here.say(f"{hidden}: the CPU is used")
    mpi.on_every_rank(comm, lambda: launcher.check_sharing(config, comm, here.location, device))
    return here
