"""Called on every rank: the rates of a run whose output is in FOLDER, where nothing is kept yet. (Their text, seconds.)"""

import os
import time

from noria import config
from noria.launch import launcher, measuring, mpi
from noria.launch.here import ThisRank
from noria.streams import streams_of


def work(world, folder):
    kept = os.environ.pop("NORIA_CACHE", None)
    try:
        run = config.load(None, {"model": "m.h5", "prompts": "p.jsonl", "output": str(folder / "run.h5")})
        place = launcher.location(world)
        device = mpi.on_every_rank(world, lambda: launcher.device_of(run, place))
        here = ThisRank(world, launcher.with_cores(world, place, device), streams_of(device))
        began = time.perf_counter()
        found, _ = measuring.rates_of_run(run, here, "float32", True, "mpi_device")
        return found.to_toml(), time.perf_counter() - began
    finally:
        if kept is not None:
            os.environ["NORIA_CACHE"] = kept
