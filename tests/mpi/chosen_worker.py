"""Called on every rank: a mixture's streamed layers with whole blocks, and with chosen experts where one group is left.

FOLDER has plain.h5, prompts.jsonl and run.toml. Leaves <case>-<most>.h5 there. Prints one line a run.
"""

from unittest.mock import patch

from worker import generate

from late_streams import LateStreams
from noria import streams
from noria.plan import costs

CASES = {
    "laps": {"weights": {"cpu": 100}, "laps": 2, "groups": 2},
    "disk": {"weights": {"cpu": 50, "disk": 50}, "laps": 2, "groups": 3},
    "contiguous": {"weights": {"cpu": 100}, "laps": 1, "groups": 2},
}
MOST = (0, 4)  # tokens of a step whose experts are loaded when they are chosen


def work(world, folder):
    for most in MOST:
        with (
            patch.object(streams, "streams_of", LateStreams),
            patch.object(costs, "chosen_tokens", lambda plan, cut, rates, workload, most=most: most),
        ):
            for case, keys in CASES.items():
                generate(folder, f"{case}-{most}", keys, world, model="plain.h5", scratch="")
