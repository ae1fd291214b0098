"""Called on every rank: the same prompts through every shape of ring that these ranks can form, on sub-communicators.

Rank 0 of each sub-communicator leaves FOLDER/<case>.h5. Prints one line a case.
"""

from itertools import product

from worker import generate, share


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
    for num_ranks in range(1, world.Get_size() + 1):
        with share(world, num_ranks, list(cases(num_ranks))) as (comm, mine):
            for name, keys in mine:
                generate(folder, name, keys, comm)
