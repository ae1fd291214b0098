"""Many copies between two memories by one call of the CUDA driver: queued one by one they take the host longer than the link.

Knows addresses and bytes, not what lies there.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class CopyRuns:
    """Runs of bytes of `source` and where they go in `destination`, both uint8: to, at, nbytes [n] int64."""

    destination: torch.Tensor
    source: torch.Tensor
    to: np.ndarray
    at: np.ndarray
    nbytes: np.ndarray

    def __len__(self) -> int:
        return len(self.to)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(destination, source) of each."""
        for to, at, nbytes in zip(self.to.tolist(), self.at.tolist(), self.nbytes.tolist(), strict=True):
            yield self.destination[to : to + nbytes], self.source[at : at + nbytes]


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes: when a source may be read, where source and destination are (as it is known), flags."""

    _fields_ = [(name, ctypes.c_int) for name in ("order", "from_type", "from_id", "to_type", "to_id", "flags")]


IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
Batch = Callable[[CopyRuns, int], None]  # runs, and the stream


def batch_copies(stream: torch.cuda.Stream) -> Batch | None:
    """What queues runs on a stream of this one's device, page-locked memory at one of their ends.

    None where the driver has no such call (before CUDA 12.8), or a trial of it does not give what it should.
    """
    try:
        call = ctypes.CDLL("libcuda.so.1").cuMemcpyBatchAsync
    except (OSError, AttributeError):
        return None
    attributes, index = _Attributes(IN_STREAM_ORDER), ctypes.c_size_t(0)
    pointers, none, number = (ctypes.c_void_p,) * 3, ctypes.c_size_t(), ctypes.c_size_t
    call.argtypes = (*pointers, number, ctypes.c_void_p, ctypes.c_void_p, number, ctypes.c_void_p, ctypes.c_void_p)
    said = ctypes.addressof(attributes), ctypes.addressof(index), 1, ctypes.addressof(none)

    def queue(runs: CopyRuns, stream: int, kept: object = (attributes, index, none)) -> None:
        to, at = (memory.data_ptr() + first for memory, first in ((runs.destination, runs.to), (runs.source, runs.at)))
        code = call(to.ctypes.data, at.ctypes.data, runs.nbytes.ctypes.data, len(runs), *said, stream)
        if code:
            raise RuntimeError(f"the CUDA driver does not copy {len(runs)} runs of bytes: error {code}")

    return queue if _right(queue, stream) else None


def _right(queue: Batch, stream: torch.cuda.Stream) -> bool:
    """Whether three runs arrive where they should, there and back."""
    device, numbers = stream.device, torch.arange(64, dtype=torch.uint8)
    host, back, there = (
        numbers.pin_memory(),
        torch.zeros_like(numbers).pin_memory(),
        torch.zeros_like(numbers, device=device),
    )
    torch.cuda.synchronize(device)
    to, at, nbytes = (np.array(its) for its in ((40, 0, 17), (3, 32, 48), (20, 5, 16)))
    try:
        queue(CopyRuns(there, host, to, at, nbytes), stream.cuda_stream)
        queue(CopyRuns(back, there, at, to, nbytes), stream.cuda_stream)
    except RuntimeError:
        return False
    stream.synchronize()
    expected = torch.zeros_like(numbers)
    for first, count in zip(at, nbytes, strict=True):
        expected[first : first + count] = numbers[first : first + count]
    return torch.equal(back, expected)
