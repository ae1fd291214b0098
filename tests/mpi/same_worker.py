"""Run by every rank: the same prompts through every shape of ring that these ranks can form, on sub-communicators.

Usage: same_worker.py FOLDER. Rank 0 of each sub-communicator leaves FOLDER/<case>.h5. Prints one line a case.
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
    """(name, keys of the run file) of every legal ring of `num_ranks` ranks."""
    transports = ["mpi_device", "mpi_host"] if num_ranks > 1 else ["auto"]
    for laps, groups, microbatches, transport in product((1, 2, 3), (num_ranks, num_ranks + 1), (1, 2), transports):
        keys = {"laps": laps, "groups": groups, "microbatches": microbatches, "transport": transport}
        yield f"N{num_ranks}-V{laps}-M{groups}-K{microbatches}-{transport}", keys
    if num_ranks > 1:
        for laps, microbatches, transport in product((1, 2, 3), (1, 2), transports):
            keys = {"laps": laps, "groups": num_ranks, "microbatches": microbatches, "transport": transport}
            yield f"N{num_ranks}-V{laps}-M{num_ranks}-K{microbatches}-{transport}-blocking", keys | {"blocking": True}


def work(world, folder):
    torch.set_num_threads(1)
    for num_ranks in range(1, world.Get_size() + 1):
        mine = list(cases(num_ranks))
        teams = world.Get_size() // num_ranks
        team = world.Get_rank() // num_ranks
        comm = world.Split(min(team, teams), world.Get_rank())
        if team >= teams:
            continue
        for name, keys in mine[team::teams]:
            files = {
                "model": str(folder / "model.h5"),
                "prompts": str(folder / "prompts.jsonl"),
                "output": str(folder / f"{name}.h5"),
            }
            run_file = config.load(folder / "run.toml", files | keys)
            run(run_file, comm)
            if comm.Get_rank() == 0:
                print(name, flush=True)
    world.Barrier()


if __name__ == "__main__":
    try:
        work(mpi.start(), Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        mpi.abort(1)
        raise
