"""Run by every rank: `noria run` in which one rank breaks at a given place. It prints when it does, in seconds.

Usage: failing_worker.py PLACE RANK run ARGUMENTS...
"""

import os
import signal
import sys
import time
from pathlib import Path

from noria import run
from noria.__main__ import main
from noria.desk import desk
from noria.engine.stage import Stage
from noria.engine.weights import Weights
from noria.errors import InputError
from noria.launch import mpi

BEFORE = 6  # visits, or prompts, that go well first


def fail_in_step(fail):
    forward, visits = Stage.forward, [0]

    def failing(self, *arguments):
        visits[0] += 1
        if visits[0] > BEFORE:
            fail()
        return forward(self, *arguments)

    Stage.forward = failing


def fail_in_load(fail):
    Weights.__init__ = lambda self, *arguments: fail()


def fail_in_communication(fail):
    open_the_ring = run.open_the_ring

    def failing(*arguments):
        ring = open_the_ring(*arguments)

        def work():
            until = time.monotonic() + 0.05
            while time.monotonic() < until:
                yield
            fail()

        ring._communication.start(work())
        return ring

    run.open_the_ring = failing


def fail_in_prompts(fail):
    open_prompts = desk.open_prompts

    def failing(path):
        for number, prompt in enumerate(open_prompts(path)):
            if number == BEFORE:
                fail()
            yield prompt

    desk.open_prompts = failing


def stumble():
    raise FloatingPointError("the bucket has a hole")


def find_damage():
    raise InputError("block layers/0001 is damaged: convert the model again")


def when_rows_are_sealed(fail):
    """Rank 0's sealing thread has its turn first."""
    parts, end = Path(f"{sys.argv[sys.argv.index('--output') + 1]}.parts"), time.monotonic() + 10
    while not list(parts.glob("part-*.h5")) and time.monotonic() < end:
        time.sleep(0.01)
    fail()


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_all():
    """As if the machine went away: the other ranks first, then this one."""
    own = os.environ.get("NORIA_TEST_CLIENT", str(os.getpid()))
    names = [entry for entry in os.listdir("/proc") if entry.isdigit() and entry != own]
    for name in names:
        if _mark(name) == _mark(own):
            os.kill(int(name), signal.SIGKILL)
    be_killed()


def _mark(process):
    """What tells this job's ranks from all else; mpirun itself has no rank."""
    try:
        with open(f"/proc/{process}/environ", "rb") as file:
            variables = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
    except OSError:
        return object()
    return variables.get(b"NORIA_TEST_LAUNCH", object()), b"OMPI_COMM_WORLD_RANK" in variables


PLACES = {
    "step": (fail_in_step, stumble),
    "load": (fail_in_load, stumble),
    "damaged block": (fail_in_load, find_damage),
    "communication": (fail_in_communication, stumble),
    "prompts": (fail_in_prompts, find_damage),
    "killed": (fail_in_step, lambda: when_rows_are_sealed(be_killed)),
    "all killed": (fail_in_step, lambda: when_rows_are_sealed(kill_all)),
    "leaves": (fail_in_step, lambda: sys.exit(0)),
}


def break_at(place):
    patch, fail = PLACES[place]

    def failing():
        print(time.time(), flush=True)
        fail()

    patch(failing)


if __name__ == "__main__":
    if mpi.launched_rank() == int(sys.argv[2]):
        break_at(sys.argv[1])
    sys.exit(main(sys.argv[3:]))
