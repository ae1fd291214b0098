"""Called on every rank: a model of each family through rings of one and of all ranks, with one lap and with two.

FOLDER/<family>/ holds model.h5 and gets <case>.h5; prompts.jsonl and run.toml lie in
FOLDER. Prints one line a case.
"""

from itertools import product

from worker import generate, share


def cases(num_ranks):
    """(name, number of ranks, keys of the run file) of every ring."""
    for ranks, laps in product((1, num_ranks), (1, 2)):
        yield f"N{ranks}-V{laps}", ranks, {"laps": laps, "groups": ranks + laps - 1, "microbatches": laps}


def work(world, folder):
    models = sorted(path.parent.name for path in folder.glob("*/model.h5"))
    for num_ranks in (1, world.Get_size()):
        with share(world, num_ranks, models) as (comm, mine):
            for model, (name, ranks, keys) in product(mine, cases(world.Get_size())):
                if ranks == num_ranks:
                    generate(folder, f"{model}/{name}", keys, comm, model=f"{model}/model.h5")
