"""Tensors travel through staging buffers in host memory: works with every MPI, and MPI never sees device memory.

What is in host memory already goes as it is. A message goes in chunks through two halves, so that the copy of one
overlaps with the transfer of the other. Copies run on streams of this file's own.
"""

from collections.abc import Generator

import torch
from mpi4py import MPI

from noria import transports
from noria.streams import Event, Streams, streams_of
from noria.transports import mpi_device
from noria.transports.mpi_device import bytes_of, completed, message

CHUNK_NBYTES = 8 << 20  # both ends cut messages alike; a link needs copies of this size


class MpiHost:
    """The methods of mpi_device.MpiDevice."""

    def __init__(self, comm: MPI.Comm, device: torch.device, synchronous: bool = False):
        self.device = device
        self._mpi = mpi_device.MpiDevice(comm, torch.device("cpu"), synchronous)
        self.send_bytes = self._mpi.send_bytes
        self.receive_bytes = self._mpi.receive_bytes
        self.close = self._mpi.close
        # One stream a direction: a copy to the host does not queue behind one to the device.
        self._sending, self._receiving = streams_of(device), streams_of(device)
        self._staging: dict[tuple[str, int], list[torch.Tensor]] = {}

    def send(self, tensor: torch.Tensor, dest: int, tag: int, ready: Event) -> Generator[None, None, None]:
        """Sends the tensor once the event `ready` has completed; until the generator ends nobody may write to it."""
        if self._in_host(tensor):
            yield from self._mpi.send(tensor, dest, tag, ready)
            return
        while not ready.query():
            yield
        data = bytes_of(tensor)
        halves = self._halves("send", tag, len(data))
        busy: list[list[MPI.Request]] = [[], []]
        for index, chunk in enumerate(data.split(CHUNK_NBYTES)):
            half = index % 2
            yield from completed(busy[half])
            staged = halves[half][: len(chunk)]
            yield from _copied(chunk, staged, self._sending)
            busy[half] = [self._mpi.isend(message(staged), dest, tag)]
        yield from completed(busy[0] + busy[1])

    def receive(self, tensor: torch.Tensor, source: int, tag: int) -> Generator[None, None, None]:
        """Receives exactly the tensor's bytes; it may be written to from the first step until the generator ends."""
        if self._in_host(tensor):
            yield from self._mpi.receive(tensor, source, tag)
            return
        chunks = bytes_of(tensor).split(CHUNK_NBYTES)
        halves = self._halves("receive", tag, tensor.nbytes)
        staged = [halves[index % 2][: len(chunk)] for index, chunk in enumerate(chunks)]
        requests = [self._mpi.irecv(message(part), source, tag) for part in staged[:2]]
        for index, chunk in enumerate(chunks):
            yield from completed([requests[index]])
            yield from _copied(staged[index], chunk, self._receiving)
            if index + 2 < len(chunks):
                requests.append(self._mpi.irecv(message(staged[index + 2]), source, tag))

    def _in_host(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is in host memory, and its rank's device is another."""
        return tensor.device.type == "cpu" != self.device.type

    def _halves(self, direction: str, tag: int, nbytes: int) -> list[torch.Tensor]:
        """Two host buffers of a chunk each, the same for every message of this direction and tag."""
        nbytes = min(nbytes, CHUNK_NBYTES)
        halves = self._staging.get((direction, tag))
        if halves is None or len(halves[0]) < nbytes:
            capacity = 1 << max(nbytes - 1, 0).bit_length()
            pinned = self.device.type == "cuda"
            halves = [torch.empty(capacity, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
            self._staging[direction, tag] = halves
        return halves


def _copied(source: torch.Tensor, target: torch.Tensor, streams: Streams) -> Generator[None, None, None]:
    """Queues the copy on the copy stream, and ends with it."""
    with streams.copying():
        target.copy_(source, non_blocking=True)
        event = streams.event()
    while not event.query():
        yield


TRANSPORT = MpiHost  # what transports/__init__.py opens
_: type[transports.Transport] = MpiHost  # as the others know it
