"""Called on every rank: runs with products in fp8, streamed and resident, through rings and laps.

FOLDER has NAME.h5 and prompts.jsonl. Rank 0 of each sub-communicator leaves <case>.h5 there.
"""

from unittest.mock import patch

from worker import generate, share

from late_streams import LateStreams
from noria import streams

WEIGHTS = [{"gpu": 100}, {"cpu": 100}, {"gpu": 30, "cpu": 30, "disk": 40}]


def cases(num_ranks):
    """(name, keys of the run file)"""
    for number, weights in enumerate(WEIGHTS):
        for laps in (1, 2)[: 1 + (num_ranks < 3)]:
            keys = {"products": "fp8", "weights": weights, "laps": laps, "groups": num_ranks + number % 2}
            keys |= {"step_tokens": 24, "microbatch_tokens": [24, 8][laps - 1]}
            yield f"N{num_ranks}-W{number}-V{laps}", keys


def work(world, folder, wanted):
    with patch.object(streams, "streams_of", LateStreams):  # every copy as late as its events allow
        for num_ranks in range(1, world.Get_size() + 1):
            its = [case for case in cases(num_ranks) if case[0] in wanted]
            with share(world, num_ranks, its) as (comm, mine):
                for name, keys in mine:
                    generate(folder, name, keys, comm, scratch="")
