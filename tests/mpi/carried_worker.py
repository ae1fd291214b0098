"""Called on every rank: prompts of the family `carried` through rings whose messages differ from hop to hop.

Rank 0 of each sub-communicator leaves FOLDER/<case>.h5. Prints one line a case.
"""

from contextlib import ExitStack
from unittest.mock import patch

from worker import generate, share

from extra_kinds import extra_kinds
from late_streams import LateStreams
from noria import run, streams
from noria.engine import assembly
from noria.order import HIDDEN, kind_of

# By number of ranks: laps, and the layers of each virtual stage that keep layers 1 and 4 of 7 on one rank.
PARTITIONS = {
    1: [(1, "greedy"), (3, [2, 4, 1])],
    2: [(1, "greedy"), (1, "balanced"), (1, [1, 6]), (2, "greedy"), (2, [1, 1, 2, 3]), (2, [2, 2, 2, 1])],
    3: [(1, "greedy"), (1, [1, 4, 2]), (2, [1, 1, 1, 1, 1, 2])],
    4: [(1, "greedy"), (1, [1, 4, 1, 1])],
}
WAYS = [
    {"microbatches": 3},
    {"microbatches": 2, "activations": "cpu", "schedule": "multi_batch", "transport": "mpi_host"},
    {"blocking": True},
    {"activations": "cpu", "weights": {"cpu": 100}, "cache": {"cpu": 100}, "schedule": "sequential"},
    {"activations": "cpu", "blocking": True, "transport": "mpi_host", "cache": {"gpu": 40, "cpu": 60}},
]


def cases(num_ranks):
    """(name, keys of the run file)"""
    for number, (laps, partition) in enumerate(PARTITIONS[num_ranks]):
        for way, keys in enumerate(WAYS):
            if num_ranks == 1 and (keys.get("blocking") or laps == 1):
                continue
            shape = {"laps": laps, "partition": partition, "groups": num_ranks + (laps + way) % 2}
            if keys.get("blocking"):
                shape["groups"] = num_ranks
            yield f"N{num_ranks}-P{number}-W{way}", shape | keys


def work(world, folder, names):
    with patch.object(streams, "streams_of", LateStreams), extra_kinds():  # every copy as late as its events allow
        for num_ranks in PARTITIONS:
            mine = [case for case in cases(num_ranks) if case[0] in names]
            with share(world, num_ranks, mine) as (comm, mine):
                for name, keys in mine:
                    assert generate(folder, name, keys, comm, scratch="") == 0


def sent(comm, folder, name, keys):
    """A run: the bytes of hidden states that this rank handed to MPI, of its ring's buffers, and of those between layers:
    in host memory, and on the device."""
    from noria.transports.mpi_device import MpiDevice

    counts, buffers, between = [], [], [0, 0]
    send, open_the_ring, in_host = MpiDevice.send, run.open_the_ring, assembly.InHost

    def counting(self, tensor, dest, tag, ready):
        counts.append(tensor.nbytes if kind_of(tag)[0] == HIDDEN else 0)
        return send(self, tensor, dest, tag, ready)

    def opening(*arguments):
        ring = open_the_ring(*arguments)
        buffers.extend(fixed.tensor.nbytes for fixed in ring._fixed)
        return ring

    def keeping(*arguments):
        made = in_host(*arguments)
        between[:] = made._fixed.tensor.nbytes, sum(slot.buffer.nbytes for slot in made._free)
        return made

    patches = (MpiDevice, "send", counting), (run, "open_the_ring", opening), (assembly, "InHost", keeping)
    with ExitStack() as held:
        for where, what, instead in patches:
            held.enter_context(patch.object(where, what, instead))
        held.enter_context(extra_kinds())
        assert generate(folder, name, keys, comm) == 0
    return sum(counts), sum(buffers), *between
