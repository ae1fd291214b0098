"""What the host queues on a device, captured once and queued again by one call. Knows nothing of what is computed."""

import contextlib
from collections.abc import Callable

import torch

from noria.streams import Streams


class Capturer:
    """CUDA graphs whose memory is one pool: they compute one after another, and leave nothing in it."""

    def __init__(self, streams: Streams):
        self._streams, self._pool = streams, torch.cuda.graph_pool_handle()
        self.nbytes = 0  # of the device's memory, that graphs took

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Calls it once, to warm it up, and captures it. What is returned queues the same on the current stream.

        Raises what it raises, and RuntimeError for what cannot be captured, which leaves the device as it was.
        """
        with self._streams.aside():  # no capture is possible on the stream that a program begins with
            call()
            torch.cuda.synchronize(self._streams.device)
            torch.cuda.empty_cache()  # a capture cannot give back what torch keeps for later
            before, _ = torch.cuda.mem_get_info(self._streams.device)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
            except BaseException:
                self._undo(graph)
                self._pool = torch.cuda.graph_pool_handle()
                raise
            graph.capture_end()
            self.nbytes += max(before - torch.cuda.mem_get_info(self._streams.device)[0], 0)
        replay: Callable[[], None] = graph.replay
        return replay

    def _undo(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture that failed; an end that fails too does not do all that it should."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._streams.device.index, self._pool)


def capturer_of(streams: Streams) -> Capturer | None:
    """What captures on this device; None where nothing does."""
    return Capturer(streams) if streams.device.type == "cuda" else None
