"""Called on every rank with a GPU: the same rows in bfloat16 through every shape of run. Prints one line a case.

FOLDER has run.toml, config.json and prompts; rank 0 leaves FOLDER/<case>.h5.
"""

from dataclasses import fields

from noria import config
from noria.run import run

ALONE = (0, 5, 17, 40)  # rows that are computed without any other: FOLDER/row-N.jsonl
WHOLE = "N1-whole"
HALF = {"gpu": 50, "cpu": 50}
CASES = {
    1: {
        "whole": {},
        "chunks": {"step_tokens": 96, "microbatch_tokens": 40},
        "microbatches": {"microbatches": 3, "groups": 2},
        "laps": {"laps": 3, "groups": 2},
        "weights-cpu": {"weights": {"cpu": 100}, "laps": 2},
        "weights-disk": {"weights": {"gpu": 70, "disk": 30}, "stage": True, "schedule": "sequential"},
        "cache-cpu": {"cache": {"cpu": 100}, "microbatches": 2},
        "cache-everywhere": {"cache": {"gpu": 40, "cpu": 30, "disk": 30}, "weights": HALF},
        "hidden-cpu": {"activations": "cpu", "microbatch_tokens": 64},
        "not-shared": {"prefix_sharing": False},
    },
    2: {"whole": {}, "laps": {"laps": 2, "groups": 3}, "streamed": {"laps": 2, "weights": HALF, "cache": {"cpu": 100}}},
}


def cases(num_ranks):
    """name -> keys of the run file and the prompts; those without a key that this version lacks."""
    known = {one.name for section in (config.Pipeline, config.Placement) for one in fields(section)}
    found = {
        f"N{num_ranks}-{name}": (keys, "prompts.jsonl") for name, keys in CASES[num_ranks].items() if {*keys} <= known
    }
    return found | ({f"row-{row}": ({}, f"row-{row}.jsonl") for row in ALONE} if num_ranks == 1 else {})


def flags(folder, name, prompts, keys=()):
    files = {"prompts": prompts, "output": f"{name}.h5", "random_weights": "config.json", "scratch": "."}
    return {key: str(folder / file) for key, file in files.items()} | dict(keys)


def work(comm, folder, only=None):
    """All cases, or the one of this name."""
    for name, (keys, prompts) in cases(comm.Get_size()).items():
        if only not in (None, name):
            continue
        assert run(config.load(folder / "run.toml", flags(folder, name, prompts, keys)), comm) == 0
        if comm.Get_rank() == 0:
            print(name, flush=True)
