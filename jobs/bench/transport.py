"""The rate of Noria's own transport, one way between two ranks, beside plain MPI Send and Recv of the same memory:

    mpirun -n 2 python jobs/bench/transport.py [--transport mpi_device|mpi_host] [--device cpu|cuda]

Prints one JSON line: GB/s (10^9 bytes) by MiB, the best of the repeats. The transport's work goes through a
communication thread on either side, as in a run. Plain Send and Recv take the tensor's own memory with mpi_device, a
(pinned) host buffer with mpi_host.
"""

import argparse
import functools
import json
import time

import torch

from noria import transports
from noria.launch import launcher, mpi
from noria.ring.ring import communication_of
from noria.streams import streams_of

SIZES_MIB = (1, 4, 16, 64, 256)


def rate(comm, num_bytes: int, repeats: int, transfer) -> float:
    """GB/s of `transfer()`, which returns on either rank when its end of the messages is over."""
    seconds = []
    for _ in range(repeats + 1):
        comm.Barrier()
        before = time.perf_counter()
        transfer()
        # The messages are there when both ends say so.
        seconds.append(max(comm.allgather(time.perf_counter() - before)))
    return round(num_bytes / min(seconds[1:]) / 1e9, 3)


def through_transport(comm, communication, transport, buffers, streams):
    """All messages are handed over at once, as the groups of a ring are."""

    def transfer():
        if comm.Get_rank() == 0:
            works = [transport.send(buffer, 1, tag, streams.event()) for tag, buffer in enumerate(buffers)]
        else:
            works = [transport.receive(buffer, 0, tag) for tag, buffer in enumerate(buffers)]
        for ticket in [communication.start(work) for work in works]:
            ticket.wait()

    return transfer


def plain(comm, buffers):
    from mpi4py import MPI  # MPI has been started

    messages = [[MPI.buffer.fromaddress(buffer.data_ptr(), buffer.nbytes), MPI.BYTE] for buffer in buffers]

    def transfer():
        for message in messages:
            if comm.Get_rank() == 0:
                comm.Send(message, 1, 1)
            else:
                comm.Recv(message, 0, 1)

    return transfer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="auto", choices=("auto", "mpi_device", "mpi_host"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_MIB, help="MiB")
    parser.add_argument("--messages", type=int, default=4, help="messages under way at once, as groups are")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    comm = mpi.start()
    if comm.Get_size() != 2:
        raise SystemExit("start it with mpirun -n 2")
    rank = comm.Get_rank()
    launcher.location(comm)  # as a run does: on one core the two threads of a rank would wait for each other
    cuda = arguments.device == "cuda"
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    streams = streams_of(device)
    name, reason = transports.choose(comm, device, arguments.transport)
    transport = transports.open_transport(name, comm, device)
    communication = communication_of(streams)
    gbps, alone_gbps, plain_gbps, wrong = {}, {}, {}, 0
    for size in arguments.sizes:
        shape = (arguments.messages, size << 20)
        buffers = torch.full(shape, 1 - rank, dtype=torch.uint8, device=device)
        streams.event().synchronize()  # a receive must not be overtaken by this fill
        measure = functools.partial(rate, comm, repeats=arguments.repeats)
        own = through_transport(comm, communication, transport, buffers, streams)
        gbps[size] = measure(num_bytes=buffers.nbytes, transfer=own)
        wrong += int((buffers != 1).sum())
        own = through_transport(comm, communication, transport, buffers[:1], streams)
        alone_gbps[size] = measure(num_bytes=buffers[0].nbytes, transfer=own)
        host = buffers if name == "mpi_device" else torch.ones(shape, dtype=torch.uint8, pin_memory=cuda)
        plain_gbps[size] = measure(num_bytes=buffers.nbytes, transfer=plain(comm, host))
    communication.close()
    line = {
        "bench": "transport",
        "device": str(device),
        "transport": name,
        "reason": reason,
        "messages": arguments.messages,
        "gbps": gbps,
        "alone_gbps": alone_gbps,
        "plain_gbps": plain_gbps,
        "ratio": {size: round(gbps[size] / plain_gbps[size], 3) for size in gbps},
        "wrong_bytes": sum(comm.allgather(wrong)),
    }
    if rank == 0:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
