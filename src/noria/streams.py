"""Streams and events of a device, and their twin on the CPU that does nothing. The only file that names a CUDA stream.

Knows no tensors but the device's: who waits for what is said by its callers.
"""

import contextlib
from collections.abc import Iterable

import torch

LANES = ("load", "store")  # to the device and from it: a link carries both at once
Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]  # (destination, source) of copies


class Done:
    """The CPU's event: work there is complete when the call returns."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CpuStreams:
    """The streams of a device that computes in order: nothing to wait for."""

    def __init__(self, device: torch.device):
        self.device = device

    def event(self) -> Done:
        """An event that marks all work queued so far on the compute stream."""
        return Done()

    def set_device(self) -> None:
        """Binds the calling thread to the device."""

    def copying(self):
        """Work inside the context goes to the copy stream."""
        return contextlib.nullcontext()

    def wait(self, event: Done) -> None:
        """The compute stream goes on after `event`."""

    def copy(self, lane: str, pairs: Pairs, after: Iterable[Done] = ()) -> Done:
        """Copies on the lane's own stream, in order, after the given events. The event returned completes with them.

        Any thread may call it. Until the event has completed, sources must not be written to, nor destinations read.
        """
        assert lane in LANES
        with torch.inference_mode():  # a mode of the thread: views that another made in it may be written to in it alone
            for destination, source in pairs:
                destination.copy_(source)
        return Done()


class CudaStreams:
    """One compute stream (the current one), one for the transports' copies and one for each lane, of a CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.set_device(device)
        self.compute = torch.cuda.current_stream(device)
        self._copying = torch.cuda.Stream(device)
        self._lanes = {lane: torch.cuda.Stream(device) for lane in LANES}

    def event(self) -> torch.cuda.Event:
        """An event that marks all work queued so far on the current stream."""
        event = torch.cuda.Event()
        event.record()
        return event

    def set_device(self) -> None:
        """Binds the calling thread to the device."""
        torch.cuda.set_device(self.device)

    def copying(self):
        """Work inside the context goes to the copy stream."""
        return torch.cuda.stream(self._copying)

    def wait(self, event: torch.cuda.Event) -> None:
        """The compute stream goes on after `event`."""
        self.compute.wait_event(event)

    def copy(self, lane: str, pairs: Pairs, after: Iterable[torch.cuda.Event] = ()) -> torch.cuda.Event:
        """Copies on the lane's own stream, in order, after the given events. The event returned completes with them.

        Any thread may call it. Until the event has completed, sources must not be written to, nor destinations read.
        """
        stream = self._lanes[lane]
        for event in after:
            stream.wait_event(event)
        with torch.inference_mode(), torch.cuda.stream(stream):
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return event


def streams_of(device: torch.device) -> CpuStreams | CudaStreams:
    return CudaStreams(device) if device.type == "cuda" else CpuStreams(device)
