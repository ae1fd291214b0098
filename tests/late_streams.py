"""A twin of the streams for tests on the CPU: every copy happens as late as its events allow.

A copy waits in its lane until somebody waits for an event that comes after it, so a reader that forgot to wait sees
old bytes. What is never waited for is never copied.
"""

import threading

import torch

from noria.streams import LANES, CpuStreams


class Late:
    """The event of a copy, or of work on the compute stream (which is done when its call returns)."""

    def __init__(self, streams=None, lane=None, number=0):
        self._streams, self._lane, self._number = streams, lane, number

    def record(self):
        pass

    def query(self):
        self.synchronize()  # a poll may find it done at any time: here it always does
        return True

    def synchronize(self):
        if self._lane is not None:
            self._streams.run(self._lane, self._number)


class LateStreams(CpuStreams):
    """CpuStreams whose copies wait in two queues, one a lane."""

    def __init__(self, device):
        super().__init__(device)
        self._queues = {lane: [] for lane in LANES}
        self._done = dict.fromkeys(LANES, 0)
        self._lock = threading.RLock()

    def event(self):
        return Late()

    def wait(self, event):
        event.synchronize()

    def copy(self, lane, pairs, after=()):
        with self._lock:
            queue = self._queues[lane]
            queue.append((list(pairs), list(after)))
            return Late(self, lane, len(queue))

    def run(self, lane, number):
        """Executes the lane's copies up to this one, in order."""
        with self._lock:
            while self._done[lane] < number:
                pairs, after = self._queues[lane][self._done[lane]]
                self._queues[lane][self._done[lane]] = None
                self._done[lane] += 1
                for event in after:
                    event.synchronize()
                with torch.inference_mode():
                    for destination, source in pairs:
                        destination.copy_(source)
