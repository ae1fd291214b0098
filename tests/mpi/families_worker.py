"""Run by every rank: a model of each family through rings of one and of all ranks, with one lap and with two.

Usage: families_worker.py FOLDER. FOLDER/<family>/ holds model.h5 and gets <case>.h5; prompts.jsonl and run.toml lie in
FOLDER. Prints one line a case.
"""

import sys
import traceback
from itertools import product
from pathlib import Path

import torch

from noria import config
from noria.launch import mpi
from noria.run import run


def cases(num_ranks):
    """(name, number of ranks, keys of the run file) of every ring."""
    for ranks, laps in product((1, num_ranks), (1, 2)):
        yield f"N{ranks}-V{laps}", ranks, {"laps": laps, "groups": ranks + laps - 1, "microbatches": laps}


def work(world, folder):
    torch.set_num_threads(1)
    models = sorted(path.parent for path in folder.glob("*/model.h5"))
    for num_ranks in (1, world.Get_size()):
        team = world.Get_rank() // num_ranks
        comm = world.Split(team, world.Get_rank())
        mine = models[team :: world.Get_size() // num_ranks]
        for model, (name, ranks, keys) in product(mine, cases(world.Get_size())):
            if ranks != num_ranks:
                continue
            files = {"model": model / "model.h5", "prompts": folder / "prompts.jsonl", "output": model / f"{name}.h5"}
            run(config.load(folder / "run.toml", {key: str(path) for key, path in files.items()} | keys), comm)
            if comm.Get_rank() == 0:
                print(model.name, name, flush=True)
    world.Barrier()


if __name__ == "__main__":
    try:
        work(mpi.start(), Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        mpi.abort(1)
        raise
