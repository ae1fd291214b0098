"""Runs on the CPU that capture graphs: what is captured is a function, which a replay calls again over the same memory."""

import contextlib
from dataclasses import dataclass
from unittest.mock import patch

from listed_kind import listed_kind
from noria.engine import graphs
from noria.plan import building

ROWS = 64


@dataclass
class Counted:
    """A capturer, and how much it captured and replayed."""

    captures: int = 0
    replays: int = 0
    nbytes: int = 0

    def capture(self, call):
        call()
        self.captures += 1

        def again():
            self.replays += 1
            call()

        return again


@contextlib.contextmanager
def captured(programs=30, seen=0, coded=False):
    """Every run inside attends by lists of work and captures decode steps of sizes that came `seen` times before. Yields how
    many there were. coded: as listed_kind has it."""
    counted = Counted()
    with (
        listed_kind(programs, coded),
        patch.object(graphs, "SEEN", seen),
        patch.object(graphs, "capturer_of", lambda _: counted),
        patch.object(building, "_graph_rows", lambda problem, _: ROWS * problem.config.pipeline.graphs),
    ):
        yield counted
