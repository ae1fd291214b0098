"""Called on every rank: mixtures of experts round rings, with weights and cache in several tiers.

FOLDER/<name>/ holds model.h5 and gets <case>.h5; prompts.jsonl and run.toml lie in FOLDER. Prints one line a case.
"""

from worker import generate, share

from counts import full

TIERS = {"weights": {"gpu": 40, "cpu": 60}, "cache": {"gpu": 40, "cpu": 60}}
DISK = {"weights": {"cpu": 50, "disk": 50}, "cache": {"gpu": 30, "cpu": 30, "disk": 40}, "scratch": ""}
# name: ranks, laps, and where weights and cache are. The first is what every run takes.
CASES = {
    "N3-V2": (3, 2, TIERS),
    "N1-V1": (1, 1, {}),
    "N1-V2-tiers": (1, 2, TIERS),
    "N1-V1-disk": (1, 1, DISK | {"schedule": "single_batch"}),
    "N3-V1-disk": (3, 1, DISK),
    "N2-V3": (2, 3, TIERS | {"activations": "cpu"}),
}


def cases():
    return CASES if full() else dict([*CASES.items()][:1])


def work(world, folder):
    names = sorted(path.parent.name for path in folder.glob("*/model.h5"))
    for num_ranks in (1, 2, 3):
        with share(world, num_ranks, names) as (comm, mine):
            for name in mine:
                for case, (ranks, laps, where) in cases().items():
                    if ranks == num_ranks:
                        keys = {"laps": laps, "groups": ranks + laps - 1, "microbatches": 2} | where
                        generate(folder, f"{name}/{case}", keys, comm, model=f"{name}/model.h5")
