"""Called on every rank: models with windows through rings, laps and tiers. FOLDER/<family>/ has model.h5 and gets <case>.h5."""

from worker import generate, share

CASES = {
    1: {"laps": {"laps": 3, "groups": 2}},
    2: {"ranks": {"groups": 3, "microbatches": 2}, "cpu": {"groups": 2, "cache": {"cpu": 100}}},
    3: {"blocking": {"groups": 3, "blocking": True, "step_tokens": 200, "microbatch_tokens": 120}},
}
NAMES = [f"N{num_ranks}-{name}" for num_ranks, cases in CASES.items() for name in cases]


def work(world, folder, models):
    for num_ranks, cases in CASES.items():
        every = [(model, name, keys) for model in models for name, keys in cases.items()]
        with share(world, num_ranks, every) as (comm, mine):
            for model, name, keys in mine:
                generate(folder, f"{model}/N{num_ranks}-{name}", keys, comm, model=f"{model}/model.h5", scratch="")
