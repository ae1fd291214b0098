"""When the job must be over: its --walltime, or what SLURM or PBS say. PBS sends no notice before it kills.

Knows nothing of the run.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from noria.launch import schedulers
from noria.launch.schedulers import SCHEDULERS
from noria.tools.values import parse_walltime


@dataclass(frozen=True)
class Deadline:
    """`at` (time.time()) the job is killed; `source` says who told. `at` is infinite without a limit."""

    at: float
    source: str

    @property
    def seconds_left(self) -> float:
        return self.at - time.time()


NONE = Deadline(float("inf"), "no walltime known")


def find(
    walltime: str | int | None,
    started: float,
    environment: Mapping[str, str] = os.environ,
    ask: schedulers.Ask = schedulers.ask,
) -> Deadline:
    """The earliest end that is known: `walltime` counts from `started`, a scheduler's limit from the job's own start.

    Raises InputError for a walltime that is no time, and in a shell that outlived its job.
    """
    found = [NONE]
    if walltime is not None:
        found.append(Deadline(started + parse_walltime(walltime), f"walltime {walltime}"))
    ends = (one.ends(environment, started, ask) for one in SCHEDULERS)
    found += [Deadline(*end) for end in ends if end is not None]
    return min(found, key=lambda deadline: deadline.at)
