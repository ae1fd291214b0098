"""Called on every rank by tests/test_ring.py: rings whose stages are arithmetic on whole numbers, every input checked.

As a program, `ring_worker.py` under mpirun: a ring whose wire breaks.
"""

import random
import time
from unittest.mock import patch

import numpy as np
import torch

from noria.arrays import Array
from noria.bundle import Bundle, of_hidden
from noria.launch import mpi
from noria.order import Place
from noria.ring.base import RingShape
from noria.ring.blocking import finish
from noria.ring.communication import CommunicationError
from noria.ring.messages import Answer, Hidden, arrays_in
from noria.ring.ring import Ring, open_ring
from noria.step import Result, Step, Word
from noria.streams import Done, streams_of

CPU = torch.device("cpu")
STREAMS = streams_of(CPU)
HIDDEN, STEP_TOKENS = 512, 256  # 512 KiB in float32, 128 times the eager limit of shared memory


def transports():
    """Of each kind the module. They import MPI, which must be up: not where a test imports this one."""
    from noria.transports import mpi_device, mpi_host

    return {"mpi_device": mpi_device, "mpi_host": mpi_host}


def embedding(token_ids):
    """Whole numbers below 251, which every dtype holds exactly, different for every token and place."""
    return (torch.from_numpy(token_ids.copy())[:, None] * 7 + torch.arange(HIDDEN)) % 251


def stage_of(hidden, stage):
    """What virtual stage `stage` computes: no two stages commute."""
    return (hidden * 3 + stage + 1) % 251


def expected(token_ids, num_stages):
    hidden = embedding(token_ids)
    for stage in range(num_stages):
        hidden = stage_of(hidden, stage)
    return hidden


def shape_of(place, dtype):
    """Messages that differ from hop to hop: beside the hidden states up to two arrays of whole numbers, of odd lengths."""
    beside = [
        [],
        [Array("ids", (3,), dtype="int32")],
        [Array("ids", (), dtype="int64"), Array("last", (1,), dtype="int8")],
    ]
    hidden = of_hidden(HIDDEN, str(dtype).removeprefix("torch.")).arrays
    bundles = [Bundle((*hidden, *beside[stage % 3])) for stage in range(place.num_ranks * place.laps)]
    return RingShape(place, tuple(bundles), STEP_TOKENS)


def beside_of(token_ids, bundle):
    """What travels beside the hidden states of these tokens."""
    ids = torch.from_numpy(token_ids.copy()) % 127
    return tuple(
        (ids.view(-1, *[1] * len(array.row)) - torch.ones(array.row)).to(getattr(torch, array.dtype))
        for array in bundle.arrays[1:]
    )


class Late:
    """A transport that delivers late on purpose: the data of a receive appear only some time after it was posted."""

    def __init__(self, transport):
        self._transport = transport
        self.send, self.send_bytes = transport.send, transport.send_bytes
        self.receive_bytes = transport.receive_bytes

    def receive(self, tensor, source, tag):
        arrived = torch.empty_like(tensor)
        yield from self._transport.receive(arrived, source, tag)
        until = time.monotonic() + random.uniform(0.002, 0.01)
        while time.monotonic() < until:
            yield
        tensor.copy_(arrived)


class Hasty(Ring):
    """A ring that has lost a wait."""

    def receive(self, group, lap, num_tokens):
        self._receives.pop(group, None)  # without data to wait for, a rank may be a round behind the headers
        return Hidden(arrays_in(self._inputs[group], self._shape.incoming(lap), num_tokens))


@torch.inference_mode()
def wrong_inputs(ring, dtype, seed, num_rounds=4):
    """Runs the executor's loop with steps of random sizes; returns how many inputs and results were wrong."""
    place, wrong, steps, waiting = ring.place, 0, {}, {}
    draw = random.Random(seed)
    rounds = [[draw.choice([0, 1, 17, STEP_TOKENS]) for _ in range(place.groups)] for _ in range(num_rounds)]
    for round, sizes in enumerate([*rounds, [0] * place.groups]):
        for lap in range(place.laps):
            for group in range(place.groups):
                if lap == 0 and place.rank == 0:
                    if group in waiting:
                        final = expected(waiting.pop(group), place.num_ranks * place.laps)[:, 0]
                        wrong += ring.receive_result(group).token_ids.tolist() != final.tolist()
                    ids = np.array([draw.randrange(251) for _ in range(sizes[group])], np.int32)
                    word = Word.STOP if round == num_rounds else Word.RUN
                    steps[group] = Step(round, group, word, token_ids=ids)
                    ring.send_header(steps[group])
                    if len(ids):
                        waiting[group] = ids
                elif lap == 0:
                    steps[group] = ring.receive_header(group)
                if steps[group].num_tokens:
                    wrong += visit(ring, steps[group].token_ids, lap, group, dtype)
    assert not waiting
    ring.close()
    return wrong


def visit(ring, ids, lap, group, dtype):
    """One visit; returns 1 if its input was wrong."""
    place = ring.place
    stage = lap * place.num_ranks + place.rank
    if place.embeds(lap):
        hidden, wrong = embedding(ids), False
    else:
        hidden, *beside = ring.receive(group, lap, len(ids)).arrays
        wanted = beside_of(ids, ring._shape.incoming(lap))
        hidden, wrong = hidden.long(), not all(map(torch.equal, beside, wanted)) or len(beside) != len(wanted)
    wrong = wrong or not torch.equal(hidden, expected(ids, stage))
    output = stage_of(hidden, stage)
    if place.answers(lap):
        ring.send_result(group, Answer(Result(output[:, 0].numpy()), Done()))
    else:
        bundle = ring._shape.outgoing(lap)
        sent = ring.send(group, lap, Hidden((output.to(dtype), *beside_of(ids, bundle))))
        assert sent == bundle.nbytes(len(ids))
    return wrong


def cases(comm):
    """How many inputs and results of this rank were wrong, by the case's name."""
    # Messages go in pieces here, as they do above 1 GiB and 8 MiB.
    device, host = transports().values()
    with patch.object(device, "MAX_MESSAGE_NBYTES", 300_000), patch.object(host, "CHUNK_NBYTES", 100_000):
        return dict([*ring_cases(comm), *late_cases(comm), *event_cases(comm)])


def ring_cases(comm):
    rank, num_ranks = comm.Get_rank(), comm.Get_size()
    shapes = [(blocking, laps, groups) for blocking in (False, True) for laps in (1, 3) for groups in (num_ranks, 0)]
    for name, module in transports().items():
        for number, (blocking, laps, groups) in enumerate(shapes):
            groups = groups or (2 if blocking else num_ranks + 1)
            dtype = (torch.float32, torch.bfloat16)[number % 2]
            transport = module.TRANSPORT(comm, CPU, synchronous=True)
            shape = shape_of(Place(rank, num_ranks, groups, laps), dtype)
            wrong = wrong_inputs(open_ring(transport, shape, STREAMS, blocking), dtype, seed=number)
            transport.close()
            yield f"{name} {'blocking ' * blocking}laps={laps} groups={groups}", wrong


def late_cases(comm):
    # Of several laps, a ring that has lost a wait posts receives out of order: MPI writes longer messages than there is room for.
    for kind, laps in ((Ring, 2), (Hasty, 1)):
        transport = transports()["mpi_device"].TRANSPORT(comm, CPU)
        place = Place(comm.Get_rank(), comm.Get_size(), 5, laps)
        ring = kind(Late(transport), shape_of(place, torch.float32), STREAMS)
        yield f"late {kind.__name__}", wrong_inputs(ring, torch.float32, seed=1)
        transport.close()


class LateEvent:
    """The event of a computation that writes its tensor only when the event completes."""

    def __init__(self, write):
        self._write, self._at = write, time.monotonic() + 0.05

    def query(self):
        if self._write and time.monotonic() > self._at:
            self._write()
            self._write = None
        return self._write is None

    def synchronize(self):
        while not self.query():
            time.sleep(0.001)


def event_cases(comm):
    """Tensors that are written late, sent round by each transport: once with their event, once without."""
    for name, module in transports().items():
        for waits in (True, False):
            for blocking in (False, True):
                transport = module.TRANSPORT(comm, CPU, synchronous=blocking)
                sent, received = torch.zeros(STEP_TOKENS), torch.full((STEP_TOKENS,), -1.0)
                written = LateEvent(lambda sent=sent: sent.fill_(1))
                ready = written if waits else Done()
                send = exchange_now if blocking else exchange
                send(comm, transport, sent, received, ready)
                yield f"{name} event={waits} blocking={blocking}", int(received.ne(1).any())
                transport.close()


def exchange(comm, transport, sent, received, ready):
    rank, num_ranks = comm.Get_rank(), comm.Get_size()
    live = [
        transport.receive(received, (rank - 1) % num_ranks, 5),
        transport.send(sent, (rank + 1) % num_ranks, 5, ready),
    ]
    while live := [work for work in live if next(work, "done") != "done"]:
        time.sleep(1e-4)


def exchange_now(comm, transport, sent, received, ready):
    rank, num_ranks = comm.Get_rank(), comm.Get_size()
    ends = [
        lambda: finish(transport.send(sent, (rank + 1) % num_ranks, 5, ready)),
        lambda: finish(transport.receive(received, (rank - 1) % num_ranks, 5)),
    ]
    for end in ends if rank else reversed(ends):
        end()


class Broken:
    """A transport whose wire breaks at the first hidden states."""

    def __init__(self, transport):
        self.send_bytes, self.receive_bytes = transport.send_bytes, transport.receive_bytes
        self.receive = transport.receive

    def send(self, tensor, dest, tag, ready):
        yield
        raise OSError("broken wire")


def failure(comm):
    """Rank 1's communication thread fails: its main thread, which waits for the next header, must hear of it."""
    rank, num_ranks = comm.Get_rank(), comm.Get_size()
    transport = transports()["mpi_device"].TRANSPORT(comm, CPU)
    transport = Broken(transport) if rank == 1 else transport
    ring = open_ring(transport, shape_of(Place(rank, num_ranks, 2, 2), torch.float32), STREAMS)
    try:
        wrong_inputs(ring, torch.float32, seed=1)
    except CommunicationError as error:
        print(f"rank {rank} heard: {error}; cause {type(error.__cause__).__name__}", flush=True)
        time.sleep(0.2)
        comm.Abort(9)


if __name__ == "__main__":
    torch.set_num_threads(1)
    failure(mpi.start())
