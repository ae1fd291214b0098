"""Called on every rank: prompts of the family `turns` through rings, laps, tiers and chunks, on sub-communicators.

FOLDER has few.jsonl. Rank 0 of each sub-communicator leaves <case>.h5 there. Prints one line a case.
"""

from itertools import product
from unittest.mock import patch

from worker import generate, share

from extra_kinds import extra_kinds
from late_streams import LateStreams
from noria import streams

CACHE = [{"gpu": 100}, {"cpu": 100}, {"disk": 100}, {"gpu": 40, "cpu": 60}, {"gpu": 30, "cpu": 30, "disk": 40}]
SCHEDULES = ["sequential", "single_batch", "multi_batch"]
TOKENS = [(24, 16), (7, 5), (64, 64), (17, 17)]  # of a step and a microbatch: how prompts are cut into chunks


def cases(num_ranks):
    """(name, keys of the run file), in which each pair of values meets on some number of ranks."""
    every = product(range(len(CACHE)), range(len(SCHEDULES)), (1, 2), range(len(TOKENS)))
    for place, (cache, schedule, laps, tokens) in enumerate(every):
        if place % 3 == num_ranks % 3:
            keys = {
                "cache": CACHE[cache],
                "schedule": SCHEDULES[schedule],
                "laps": laps,
                "step_tokens": TOKENS[tokens][0],
                "microbatch_tokens": TOKENS[tokens][1],
                "microbatches": 1 + place % 3,
                "groups": num_ranks + (place // 3) % 2,
                "activations": ["gpu", "cpu"][place % 2],
                "weights": [{"gpu": 100}, {"cpu": 100}][(place // 2) % 2],
            }
            yield f"N{num_ranks}-C{cache}-{SCHEDULES[schedule]}-V{laps}-T{tokens}", keys


def work(world, folder, names):
    with patch.object(streams, "streams_of", LateStreams), extra_kinds():  # every copy as late as its events allow
        for num_ranks in range(1, 4):
            taken = [(name, keys) for name, keys in cases(num_ranks) if name in names]
            with share(world, num_ranks, taken) as (comm, mine):
                for name, keys in mine:
                    generate(folder, name, keys, comm, prompts="few.jsonl", scratch="")
