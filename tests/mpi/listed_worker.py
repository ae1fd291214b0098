"""Called on every rank: runs whose attention goes through the lists, in rings of every kind. Prints one line a case."""

from worker import generate, share

from listed_kind import listed_kind

CASES = {
    1: {},
    2: {"laps": 2, "groups": 3, "microbatches": 2, "cache": {"gpu": 40, "cpu": 60}, "transport": "mpi_host"},
    3: {"laps": 3, "groups": 3, "weights": {"gpu": 40, "cpu": 60}, "blocking": True},
    4: {"laps": 1, "groups": 5, "microbatches": 3, "cache": {"gpu": 30, "cpu": 30, "disk": 40}, "activations": "cpu"},
}


def name(num_ranks):
    return f"listed-N{num_ranks}"


def work(world, folder):
    for num_ranks, keys in CASES.items():
        with share(world, num_ranks, [keys]) as (comm, mine):
            for its in mine:
                with listed_kind():
                    generate(folder, name(num_ranks), its, comm, scratch="")
