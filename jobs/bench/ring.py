"""Does the ring overlap, and is its bubble the theory's? Stages that sleep instead of compute, on 4 ranks:

    mpirun -n 4 python jobs/bench/ring.py [--stage-ms 40] [--rounds 8]

Prints one JSON line. `overlap`: M = 2N groups and hops as long as a stage, each message held back that long by a link
that carries one at a time: a round takes M x max(stage, hop) if hops overlap with stages, M x (stage + hop) if not.
`steady`: the share of time that ranks idle with M groups is max(0, 1 - M/N). `flushed`: one pass of M groups from empty
to empty idles (N-1) / (N-1+M). Hops of the latter two are the transport's own; a stage there takes 30 of them or more.
"""

import argparse
import json
import time

import numpy as np
import torch

from noria import transports
from noria.bundle import of_hidden
from noria.launch import mpi
from noria.order import Place
from noria.ring.base import RingShape
from noria.ring.messages import Answer, Hidden
from noria.ring.ring import open_ring
from noria.step import Result, Step, Word
from noria.streams import Done, streams_of

CPU = torch.device("cpu")
HIDDEN, TOKENS = 1024, 16  # 64 KiB a message
WARM_UP = 2  # rounds before the clock starts: the ring fills


class HeldBack:
    """A transport over a link that takes `seconds` for every message of hidden states, one after another."""

    def __init__(self, transport, seconds: float):
        self._transport, self._seconds, self._free_at = transport, seconds, 0.0
        self.receive, self.receive_bytes = transport.receive, transport.receive_bytes
        self.send_bytes = transport.send_bytes

    def send(self, tensor, dest, tag, ready):
        self._free_at = arrives = max(time.monotonic(), self._free_at) + self._seconds
        while time.monotonic() < arrives:
            yield
        yield from self._transport.send(tensor, dest, tag, ready)


class Clock:
    """When this rank's rounds began, and how long its stages slept in each."""

    def __init__(self):
        self.starts, self.busy = [], []

    def begin(self) -> None:
        self.starts.append(time.monotonic())
        self.busy.append(0.0)

    def sleep(self, seconds: float) -> None:
        before = time.monotonic()
        time.sleep(seconds)
        self.busy[-1] += time.monotonic() - before


def run_rounds(ring, stage_seconds: float, num_rounds: int) -> Clock:
    """The executor's loop with stages that sleep, one lap; the clock begins a round at its first visit."""
    clock, steps, rank, groups = Clock(), {}, ring.place.rank, ring.place.groups
    ids = np.zeros(TOKENS, np.int32)
    for round in range(num_rounds + 1):
        word = Word.STOP if round == num_rounds else Word.RUN
        for group in range(groups):
            if rank:
                steps[group] = ring.receive_header(group)
            else:
                if round:
                    ring.receive_result(group)
                steps[group] = Step(round, group, word, token_ids=ids[: 0 if word else TOKENS])
                ring.send_header(steps[group])
            if group == 0:
                clock.begin()
            if steps[group].num_tokens:
                visit(ring, group, clock, stage_seconds)
    clock.starts.append(time.monotonic())  # rank 0 has every result by now: the end of a flushed pass
    return clock


def visit(ring, group: int, clock: Clock, stage_seconds: float) -> None:
    hidden = ring.receive(group, 0, TOKENS) if ring.place.rank else Hidden((torch.zeros(TOKENS, HIDDEN),))
    clock.sleep(stage_seconds)
    if ring.place.answers(0):
        ring.send_result(group, Answer(Result(np.zeros(1, np.int64)), Done()))
    else:
        ring.send(group, 0, hidden)


class Bench:
    def __init__(self, comm, stage_seconds: float, num_rounds: int):
        self.comm, self.stage_seconds, self.num_rounds = comm, stage_seconds, num_rounds
        self.rank, self.num_ranks = comm.Get_rank(), comm.Get_size()
        self.transport = transports.open_transport("mpi_device", comm, CPU)

    def run(self, groups: int, num_rounds: int, hop_seconds: float = 0.0) -> Clock:
        transport = HeldBack(self.transport, hop_seconds) if hop_seconds else self.transport
        place, bundles = Place(self.rank, self.num_ranks, groups, 1), (of_hidden(HIDDEN, "float32"),) * self.num_ranks
        shape = RingShape(place, bundles, TOKENS)
        ring = open_ring(transport, shape, streams_of(CPU))
        self.comm.Barrier()
        clock = run_rounds(ring, self.stage_seconds, num_rounds)
        ring.close()
        return clock

    def hop(self, repeats: int = 50) -> float:
        """Seconds of a hop, measured: one group goes round without sleeping, N hops a round."""
        stage_seconds, self.stage_seconds = self.stage_seconds, 0.0
        clock = self.run(1, repeats)
        self.stage_seconds = stage_seconds
        rounds = np.diff(clock.starts[WARM_UP : repeats + 1])
        return self.comm.bcast(float(np.median(rounds)) / self.num_ranks)

    def overlap(self) -> dict:
        groups = 2 * self.num_ranks
        clock = self.run(groups, WARM_UP + self.num_rounds, hop_seconds=self.stage_seconds)
        stages = sum(self.comm.allgather(sum(clock.busy))) / (groups * self.num_ranks * (WARM_UP + self.num_rounds))
        round_seconds = np.mean(np.diff(clock.starts[WARM_UP : WARM_UP + self.num_rounds + 1]))
        bound = groups * max(stages, self.stage_seconds)
        return {
            "groups": groups,
            "round_s": round(float(round_seconds), 4),
            "held_back_s": self.stage_seconds,
            "bound_s": round(bound, 4),
            "ratio": round(float(round_seconds) / bound, 3),
        }

    def steady(self, groups: int) -> dict:
        """Idle share of all ranks over the rounds after the warm-up, each rank's by its own clock."""
        clock = self.run(groups, WARM_UP + self.num_rounds)
        counted = slice(WARM_UP, WARM_UP + self.num_rounds)
        seconds = clock.starts[WARM_UP + self.num_rounds] - clock.starts[WARM_UP]
        idle = np.mean(self.comm.allgather(1 - sum(clock.busy[counted]) / seconds))
        return figures(groups, idle, max(0.0, 1 - groups / self.num_ranks))

    def flushed(self, groups: int) -> dict:
        """Idle share of a single pass, from rank 0's first visit to its last result; the median of three passes."""
        idles = []
        for _ in range(3):
            clock = self.run(groups, 1)
            seconds = self.comm.bcast(clock.starts[-1] - clock.starts[0])
            idles.append(1 - sum(self.comm.allgather(clock.busy[0])) / (self.num_ranks * seconds))
        return figures(groups, np.median(idles), (self.num_ranks - 1) / (self.num_ranks - 1 + groups))


def figures(groups: int, idle: float, expected: float) -> dict:
    return {"groups": groups, "idle": round(float(idle), 4), "expected": round(expected, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage-ms", type=float, default=40, help="how long a stage sleeps")
    parser.add_argument("--rounds", type=int, default=8, help="rounds measured in each case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(mpi.start(), arguments.stage_ms / 1e3, arguments.rounds)
    groups = range(1, 2 * bench.num_ranks + 1)
    hop = bench.hop()
    overlap = bench.overlap()
    bench.stage_seconds = max(bench.stage_seconds, 30 * hop)
    line = {
        "bench": "ring",
        "ranks": bench.num_ranks,
        "hop_s": round(hop, 6),
        "overlap": overlap,
        "stage_s": round(bench.stage_seconds, 4),
        "steady": [bench.steady(count) for count in groups],
        "flushed": [bench.flushed(count) for count in groups],
    }
    if bench.rank == 0:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
