"""Called on every rank: the same prompts under every placement, schedule and number of laps, on sub-communicators.

FOLDER has a model and the prompts few.jsonl, and FOLDER/short too. Rank 0 of each sub-communicator leaves <case>.h5
there. Prints one line a case.
"""

from itertools import product
from unittest.mock import patch

from worker import generate, share

from late_streams import LateStreams
from noria import streams

WEIGHTS = [{"gpu": 100}, {"cpu": 100}, {"gpu": 40, "cpu": 60}, {"cpu": 50, "disk": 50}, {"disk": 100}]
CACHE = [{"gpu": 100}, {"cpu": 100}, {"gpu": 40, "cpu": 60}, {"gpu": 30, "cpu": 30, "disk": 40}]
ACTIVATIONS = ["gpu", "cpu"]
SHORT = "short"  # where a model of 7 layers is, enough for two ranks of three laps
SCHEDULES = ["sequential", "single_batch", "multi_batch"]


def cases(num_ranks):
    """(name, keys of the run file): all of them on 1 and 2 ranks, beyond that each pair of values at least once."""
    every = list(product(range(len(WEIGHTS)), range(len(CACHE)), range(len(SCHEDULES)), (1, 2, 3)))
    if num_ranks > 2:  # rows of a Latin square: any two of the four columns meet
        every = [case for case in every if (case[0] + case[1] + 2 * case[2] + 3 * case[3] + num_ranks) % 5 == 0]
    for weights, cache, schedule, laps in every:
        keys = {
            "weights": WEIGHTS[weights],
            "cache": CACHE[cache],
            "schedule": SCHEDULES[schedule],
            "activations": ACTIVATIONS[(weights + cache + schedule + laps) % 2],
            "laps": laps,
            "microbatches": 1 + (weights + cache) % 3,
            "groups": num_ranks + laps % 2,
        }
        yield f"N{num_ranks}-W{weights}-C{cache}-{SCHEDULES[schedule]}-V{laps}", keys


def home(num_ranks):
    """Where in the folder the model of so many ranks is, and their outputs."""
    return SHORT if num_ranks <= 2 else ""


def work(world, folder):
    with patch.object(streams, "streams_of", LateStreams):  # every copy as late as its events allow
        for num_ranks in range(1, world.Get_size() + 1):
            with share(world, num_ranks, list(cases(num_ranks))) as (comm, mine):
                for name, keys in mine:
                    generate(folder / home(num_ranks), name, keys, comm, prompts="few.jsonl", scratch="")
