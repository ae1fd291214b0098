"""Called on every rank: runs whose decode steps are captured and replayed, in rings of every kind. Prints one line a case."""

from worker import generate, share

from captured import captured

CASES = {
    1: {"laps": 2, "groups": 2},
    2: {"laps": 2, "groups": 3, "transport": "mpi_host"},
    3: {"groups": 3, "blocking": True},
    4: {"groups": 5},
}


def name(num_ranks):
    return f"graphs-N{num_ranks}"


def work(world, folder):
    """How many replays there were on this rank, by number of ranks."""
    counts = {}
    for num_ranks, keys in CASES.items():
        with share(world, num_ranks, [keys]) as (comm, mine):
            for its in mine:
                with captured() as graphs:
                    generate(folder, name(num_ranks), its, comm, scratch="")
                counts[num_ranks] = graphs.replays
    return counts
