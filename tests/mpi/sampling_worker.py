"""Called on every rank: the same prompts through a few shapes of ring.

Rank 0 of each ring leaves FOLDER/<case>.h5.
"""

from worker import generate

# name -> ranks, keys of the run file
CASES = {
    "N3-V1-M3-K1": (3, {"laps": 1, "groups": 3, "microbatches": 1}),
    "N3-V2-M4-K2": (3, {"laps": 2, "groups": 4, "microbatches": 2, "step_tokens": 40, "microbatch_tokens": 24}),
    "N2-V1-M2-K2-blocking": (2, {"laps": 1, "groups": 2, "microbatches": 2, "blocking": True}),
}


def work(world, folder):
    for name, (num_ranks, keys) in CASES.items():
        comm = world.Split(int(world.Get_rank() >= num_ranks), world.Get_rank())
        if world.Get_rank() < num_ranks:
            generate(folder, name, keys, comm)
        comm.Free()
