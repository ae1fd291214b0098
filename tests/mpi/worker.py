"""What the programs have in common that every rank runs: how they start, part into rings and generate."""

import sys
import traceback
from pathlib import Path

import torch

from noria import config
from noria.launch import mpi
from noria.run import run


def main(work):
    """`work` with all ranks' communicator and the folder that the program was given; an error ends all ranks."""
    try:
        torch.set_num_threads(1)
        work(mpi.start(), Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        mpi.abort(1)
        raise


def share(world, num_ranks, cases):
    """This rank's ring of so many ranks, and which of the cases it takes: none if the rank is left over."""
    teams, team = world.Get_size() // num_ranks, world.Get_rank() // num_ranks
    comm = world.Split(min(team, teams), world.Get_rank())
    return comm, cases[team::teams] if team < teams else []


def generate(folder, name, keys, comm, **files):
    """A run of FOLDER/run.toml: FOLDER/model.h5, prompts.jsonl -> NAME.h5, or other `files`. Prints the name; returns the code."""
    files = {"model": "model.h5", "prompts": "prompts.jsonl", "output": f"{name}.h5"} | files
    flags = {key: str(folder / file) for key, file in files.items()}
    code = run(config.load(folder / "run.toml", flags | keys), comm)
    if comm.Get_rank() == 0:
        print(name, flush=True)
    return code
