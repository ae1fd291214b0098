"""Called on every rank: the same prompts with caches in fewer bits, in every tier, through rings, laps, groups and chunks.

FOLDER has a model and prompts.jsonl. Rank 0 of each sub-communicator leaves <case>.h5 there. Prints one line a case.
"""

from itertools import product
from unittest.mock import patch

from worker import generate, share

from late_streams import LateStreams
from noria import streams
from noria.plan import building

KINDS = ["fp8", "int4", "int8"]
CACHE = [{"gpu": 100}, {"cpu": 100}, {"gpu": 40, "cpu": 60}, {"gpu": 30, "cpu": 30, "disk": 40}]
STEPS = [(48, 32), (24, 16), (160, 160)]  # tokens of a step, and of a microbatch


def cases(num_ranks):
    """(name, keys of the run file)"""
    every = product(range(len(KINDS)), range(len(CACHE)), range(len(STEPS)), (1, 2), (True, False))
    for number, (kind, cache, steps, laps, sharing) in enumerate(every):
        if (number + num_ranks) % 4 and num_ranks > 1:
            continue
        keys = {
            "kv_cache_dtype": KINDS[kind],
            "cache": CACHE[cache],
            "step_tokens": STEPS[steps][0],
            "microbatch_tokens": STEPS[steps][1],
            "laps": laps,
            "groups": num_ranks + number % 2,
            "prefix_sharing": sharing,
            "schedule": ["sequential", "single_batch", "multi_batch"][number % 3],
        }
        yield f"N{num_ranks}-{KINDS[kind]}-C{cache}-S{steps}-V{laps}-{'shared' * sharing}", keys


def work(world, folder, wanted):
    # every copy as late as its events allow; as few rows decoded at a time as can be
    with patch.object(streams, "streams_of", LateStreams), patch.object(building, "DECODED_CACHE_NBYTES", 0):
        for num_ranks in range(1, world.Get_size() + 1):
            its = [case for case in cases(num_ranks) if case[0] in wanted]
            with share(world, num_ranks, its) as (comm, mine):
                for name, keys in mine:
                    generate(folder, name, keys, comm, scratch="")
