"""Bytes that went over each link, rounds of prefill and of decode apart.

A round with any chunk of a prompt is prefill; that is known when its last step is, so a round is counted as a whole.
"""

from collections import Counter

LINKS = ("disk_to_host", "host_to_gpu", "gpu_to_host", "host_to_disk", "rank_to_rank")


class Traffic:
    """Counts of one rank. `weights_unused`: bytes of blocks that were loaded ahead and never computed with."""

    def __init__(self) -> None:
        self._round: Counter[str] = Counter()
        self.prefill: Counter[str] = Counter()
        self.decode: Counter[str] = Counter()
        self.weights_unused = 0

    def add(self, link: str, nbytes: int) -> None:
        """Bytes over a link, in this round."""
        assert link in LINKS
        self._round[link] += nbytes

    def end_round(self, prefill: bool) -> None:
        phase = self.prefill if prefill else self.decode
        phase.update(self._round)
        self._round.clear()

    def columns(self) -> dict[str, int]:
        """One number a column, for the output's `timing`."""
        phases = {"prefill": self.prefill, "decode": self.decode}
        counts = {f"{name}_{link}_nbytes": phase[link] for name, phase in phases.items() for link in LINKS}
        return counts | {"weights_unused_nbytes": self.weights_unused}
