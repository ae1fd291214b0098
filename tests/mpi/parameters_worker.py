"""Called on every rank: models whose parameters are not all plain, in every tier, with laps, on rings of one and two ranks."""

import contextlib
from itertools import product
from unittest.mock import patch

from worker import generate, share

from extra_kinds import extra_kinds
from late_streams import LateStreams
from noria import streams
from noria.plan import building, search

WEIGHTS = {
    "gpu": {"gpu": 100},
    "cpu": {"cpu": 100},
    "disk": {"disk": 100},
    "mixed": {"gpu": 30, "cpu": 30, "disk": 40},
}


def cases(num_ranks):
    """(name, keys of the run file)."""
    for (name, weights), laps in product(WEIGHTS.items(), (1, 2)):
        keys = {"weights": weights, "laps": laps, "groups": num_ranks + laps - 1, "microbatches": laps}
        yield f"N{num_ranks}-{name}-V{laps}", keys


def in_parts(laps):
    """With two laps no block is decoded whole, nor while it loads."""
    held = contextlib.ExitStack()
    if laps == 2:
        held.enter_context(patch.object(building, "DECODING_SHARE", 1 << 60))
        held.enter_context(patch.object(search, "_coded_best", lambda tried, here: here))
    return held


def work(world, folder, models):
    with patch.object(streams, "streams_of", LateStreams), extra_kinds():  # every copy as late as its events allow
        for num_ranks in (1, 2):
            every = [(model, case) for model in models for case in cases(num_ranks)]
            with share(world, num_ranks, every) as (comm, mine):
                for model, (name, keys) in mine:
                    with in_parts(keys["laps"]):
                        generate(folder, f"{model}-{name}", keys, comm, model=f"{model}.h5", scratch="")
