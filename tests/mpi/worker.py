"""What the functions have in common that every rank calls: how ranks part into rings and generate."""

import contextlib

from noria import config
from noria.run import run


@contextlib.contextmanager
def share(world, num_ranks, cases):
    """This rank's ring of so many ranks, and which of the cases it takes: none if the rank is left over."""
    teams, team = world.Get_size() // num_ranks, world.Get_rank() // num_ranks
    comm = world.Split(min(team, teams), world.Get_rank())
    yield comm, cases[team::teams] if team < teams else []
    comm.Free()


def generate(folder, name, keys, comm, **files):
    """A run of FOLDER/run.toml: FOLDER/model.h5, prompts.jsonl -> NAME.h5, or other `files`. Prints the name; returns the code."""
    files = {"model": "model.h5", "prompts": "prompts.jsonl", "output": f"{name}.h5"} | files
    flags = {key: str(folder / file) for key, file in files.items()}
    code = run(config.load(folder / "run.toml", flags | keys), comm)
    if comm.Get_rank() == 0:
        print(name, flush=True)
    return code
