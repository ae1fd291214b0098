"""Called on every rank: prompts that begin alike through rings, laps, tiers, chunks and small caches, on sub-communicators.

FOLDER has few.jsonl. Rank 0 of each sub-communicator leaves <case>.h5 there. Prints one line a case.
"""

import contextlib
from itertools import product
from unittest.mock import patch

from worker import generate, share

from late_streams import LateStreams
from noria import streams
from noria.rows import reservations, waiting

CACHE = [
    {"gpu": 100},
    {"cpu": 100},
    {"disk": 100},
    {"gpu": 40, "cpu": 60},
    {"gpu": "1500KiB"},
    {"gpu": "1500KiB", "cpu": "1500KiB"},
]
TOKENS = [(400, 250), (64, 64), (130, 50)]  # of a step and a microbatch
NUM_ROWS = 14  # of few.jsonl
SCHEDULES = ["sequential", "single_batch", "multi_batch"]


def cases(num_ranks):
    """(name, keys of the run file), in which each pair of values meets on some number of ranks."""
    every = product(range(len(CACHE)), range(len(TOKENS)), (1, 2))
    for place, (cache, tokens, laps) in enumerate(every):
        keys = {
            "cache": CACHE[cache],
            "schedule": SCHEDULES[(place + num_ranks) % 3],
            "laps": laps,
            "step_tokens": TOKENS[tokens][0],
            "microbatch_tokens": TOKENS[tokens][1],
            "microbatches": 1 + place % 2,
            "groups": num_ranks + (place // 3) % 2,
            "activations": ["gpu", "cpu"][(place // 2) % 2],
            "prefix_sharing": place % 6 != num_ranks,
        }
        yield f"N{num_ranks}-C{cache}-T{tokens}-V{laps}", keys


@contextlib.contextmanager
def soon():
    """Rows reserve what the first ones have needed that end, and few prompts are read ahead."""
    with (
        patch.object(reservations, "ENOUGH", 4),
        patch.object(reservations, "GROWTH_TOKENS", 64),
        patch.object(waiting, "READ_FIRST", 6),
    ):
        yield


def work(world, folder, names):
    with patch.object(streams, "streams_of", LateStreams), soon():  # every copy as late as its events allow
        for num_ranks in range(1, 4):
            taken = [(name, keys) for name, keys in cases(num_ranks) if name in names]
            with share(world, num_ranks, taken) as (comm, mine):
                for name, keys in mine:
                    generate(folder, name, keys, comm, prompts="few.jsonl", scratch="")
