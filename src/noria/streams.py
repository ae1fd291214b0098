"""Streams and events of a device, and their twin on the CPU that does nothing. The only file that names a CUDA stream.

Knows no tensors but the device's: who waits for what is said by its callers.
"""

import contextlib

import torch


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

    def copy_waits(self, event: Done) -> None:
        """The copy stream goes on after `event`."""


class CudaStreams:
    """One compute stream (the current one) and one copy stream of a CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.set_device(device)
        self.compute = torch.cuda.current_stream(device)
        self.copy = torch.cuda.Stream(device)

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
        return torch.cuda.stream(self.copy)

    def wait(self, event: torch.cuda.Event) -> None:
        """The compute stream goes on after `event`."""
        self.compute.wait_event(event)

    def copy_waits(self, event: torch.cuda.Event) -> None:
        """The copy stream goes on after `event`."""
        self.copy.wait_event(event)


def streams_of(device: torch.device) -> CpuStreams | CudaStreams:
    return CudaStreams(device) if device.type == "cuda" else CpuStreams(device)
