"""A twin of the streams for tests on the CPU, with a clock: a copy takes its bytes over a lane's rate, computing what is said.

The host takes no time. Lanes and the compute stream go on beside each other as far as events let them; `check` goes through
what happened in the order of the clock, and finds what was read before it was there, or overwritten while it was read.
"""

from noria.streams import LANES, CpuStreams


class At:
    """An event: a moment of the clock."""

    def __init__(self, time):
        self.time = time

    def query(self):
        return True

    def synchronize(self):
        pass


COPIED, COMPUTED, WRITTEN, COPYING, COMPUTING = range(5)  # in the order in which they happen at one moment


class ClockedStreams(CpuStreams):
    """CpuStreams that copy when `check` comes to it. rate: bytes of each lane in a unit of time; now: that of the compute stream."""

    def __init__(self, device, rate):
        super().__init__(device)
        self._rate, self.now = rate, 0.0
        self._free = dict.fromkeys(LANES, 0.0)  # from when on a lane has nothing to do
        self._happens = []  # (time, which of the above, what is done)

    def event(self):
        return At(self.now)

    def wait(self, event):
        self.now = max(self.now, event.time)

    def copy(self, lane, pairs, after=()):
        pairs = list(pairs)
        begin = max([self._free[lane], *(event.time for event in after)])
        duration = sum(source.nbytes for _, source in pairs) / self._rate
        self._free[lane] = max(self._free[lane], begin + duration)
        self._happens.append((begin, COPYING, lambda: [there.fill_(0xFF) for there, _ in pairs]))
        self._happens.append((begin + duration, COPIED, lambda: [there.copy_(source) for there, source in pairs]))
        return At(begin + duration)

    def compute(self, duration, holds, write):
        """Computes for so long. holds: asserts that what it reads is there, at its begin and at its end; then it writes."""
        begin, self.now = self.now, self.now + duration
        self._happens += [(begin, COMPUTING, holds), (self.now, COMPUTED, holds), (self.now, WRITTEN, write)]

    def check(self):
        """Lets all that was queued happen, in the order of the clock."""
        for _, _, happen in sorted(self._happens, key=lambda one: one[:2]):
            happen()
