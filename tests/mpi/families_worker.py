"""Run by every rank: a model of each family through rings of one and of all ranks, with one lap and with two.

Usage: families_worker.py FOLDER. FOLDER/<family>/ holds model.h5 and gets <case>.h5; prompts.jsonl and run.toml lie in
FOLDER. Prints one line a case.
"""

from itertools import product

from worker import generate, main, share


def cases(num_ranks):
    """(name, number of ranks, keys of the run file) of every ring."""
    for ranks, laps in product((1, num_ranks), (1, 2)):
        yield f"N{ranks}-V{laps}", ranks, {"laps": laps, "groups": ranks + laps - 1, "microbatches": laps}


def work(world, folder):
    models = sorted(path.parent.name for path in folder.glob("*/model.h5"))
    for num_ranks in (1, world.Get_size()):
        comm, mine = share(world, num_ranks, models)
        for model, (name, ranks, keys) in product(mine, cases(world.Get_size())):
            if ranks == num_ranks:
                generate(folder, f"{model}/{name}", keys, comm, model=f"{model}/model.h5")
    world.Barrier()


if __name__ == "__main__":
    main(work)
