"""MPI takes a tensor's own memory: of the CPU with any MPI, of a GPU with a GPU-aware one.

Transfers are generators that advance each time they are resumed. Knows no groups and no streams: `ready` says when.
"""

from collections.abc import Generator

import torch
from mpi4py import MPI

from noria import transports
from noria.streams import Event

MAX_MESSAGE_NBYTES = 1 << 30  # MPI 3 counts bytes in 32 bits


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The contiguous tensor's memory as a flat uint8 view: MPI has no bfloat16."""
    assert tensor.is_contiguous(), "a message is one run of bytes"
    return tensor.reshape(-1).view(torch.uint8)


def message(data: torch.Tensor) -> tuple[MPI.buffer, MPI.Datatype]:
    """How MPI is told of a contiguous tensor of MAX_MESSAGE_NBYTES at most, on any device: an address and a length."""
    return MPI.buffer.fromaddress(data.data_ptr(), data.nbytes), MPI.BYTE


def messages(tensor: torch.Tensor) -> list[tuple[MPI.buffer, MPI.Datatype]]:
    """The same of one of any size, which travels as several messages where it is too large for one."""
    assert tensor.is_contiguous(), "a message is one run of bytes"
    if tensor.nbytes <= MAX_MESSAGE_NBYTES:
        return [message(tensor)]
    return [message(piece) for piece in bytes_of(tensor).split(MAX_MESSAGE_NBYTES)]


def completed(requests: list[MPI.Request]) -> Generator[None, None, None]:
    """Ends when all requests have completed."""
    for request in requests:
        while not request.Test():
            yield


def probed(comm: MPI.Comm, source: int, tag: int) -> Generator[None, None, bytes]:
    """Receives a host message of any size."""
    status = MPI.Status()
    while not (found := comm.Improbe(source, tag, status)):
        yield
    data = bytearray(status.Get_count(MPI.BYTE))
    yield from completed([found.Irecv([data, MPI.BYTE])])
    return bytes(data)


class MpiDevice:
    """Point-to-point messages of tensors and of small host data, all as bytes.

    Making and closing it is collective over `comm`: it has a communicator of its own, so its messages meet no others.
    With `synchronous`, a send completes only when its receive has been posted, whatever its size.
    """

    def __init__(self, comm: MPI.Comm, device: torch.device, synchronous: bool = False):
        self.device = device
        self.comm = comm.Dup()
        self.isend = self.comm.Issend if synchronous else self.comm.Isend
        self.irecv = self.comm.Irecv

    def send(self, tensor: torch.Tensor, dest: int, tag: int, ready: Event) -> Generator[None, None, None]:
        """Sends the tensor once the event `ready` has completed; until the generator ends nobody may write to it."""
        while not ready.query():  # MPI knows nothing of streams
            yield
        yield from completed([self.isend(one, dest, tag) for one in messages(tensor)])

    def receive(self, tensor: torch.Tensor, source: int, tag: int) -> Generator[None, None, None]:
        """Receives exactly the tensor's bytes; its memory is MPI's from the first step until the generator ends."""
        yield from completed([self.irecv(one, source, tag) for one in messages(tensor)])

    def send_bytes(self, data: bytes, dest: int, tag: int) -> Generator[None, None, None]:
        """Sends a small host message."""
        yield from completed([self.isend([data, MPI.BYTE], dest, tag)])

    def receive_bytes(self, source: int, tag: int) -> Generator[None, None, bytes]:
        """Returns a small host message, whatever its size."""
        return (yield from probed(self.comm, source, tag))

    def keep(self, work: list[Generator[None, None, None]]) -> None:
        """Keeps transfers, with the memory that MPI may still write to, as long as the communicator is not given back."""
        self.comm.Set_attr(MPI.Comm.Create_keyval(), work)

    def close(self) -> None:
        """Gives the communicator back, when no message is under way."""
        self.comm.Free()


TRANSPORT = MpiDevice  # what transports/__init__.py opens
_: type[transports.Transport] = MpiDevice  # as the others know it
