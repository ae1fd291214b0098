"""Run by every rank: `noria run` in which, at a given place, a given thing happens to the job.

The file NORIA_TEST_HAPPENED says when it happened, in seconds: what a rank prints may be lost.

Usage: stopping_worker.py PLACE ACTION RANK run ARGUMENTS...   (RANK: where it happens)
"""

import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from noria import run
from noria.__main__ import main
from noria.desk import desk
from noria.engine.stage import Stage
from noria.launch import mpi
from noria.launch.signals import Signals

VISIT = 0.02  # seconds that a visit takes at least, so that there is a middle to be stopped in
SILENCE = 2.0
AGAIN_SECONDS = 10.0
HEARD = threading.Event()
PLACES = {"prefill": 1, "decode": 12}


def at(place, act):
    """Calls `act` once, at this place of the run."""
    if place == "load":
        load = run.load
        run.load = lambda *arguments: act() or load(*arguments)
    elif place == "merge":
        merge = desk.merge
        desk.merge = lambda *arguments, **more: act() or merge(*arguments, **more)
    else:
        forward, visits = Stage.forward, [0]

        def acting(self, *arguments):
            visits[0] += 1
            if visits[0] == PLACES[place]:
                act()
            return forward(self, *arguments)

        Stage.forward = acting


def slow_down():
    forward = Stage.forward

    def slowly(self, *arguments):
        time.sleep(VISIT)
        return forward(self, *arguments)

    Stage.forward = slowly


def launcher():
    """mpirun's process, which may have another between it and its ranks; this one where no launcher is."""
    process = int(os.environ.get("NORIA_TEST_CLIENT", os.getpid()))
    while mpi.launched() > 1 and process > 1:
        said = status(process)
        if said.split()[1] in ("prterun", "mpirun", "mpiexec", "mpiexec.hydra"):
            return process
        process = int(re.search(r"PPid:\s+(\d+)", said)[1])
    return os.getpid()


def twice(number):
    ask(number)
    time.sleep(0.2)
    os.kill(launcher(), number)
    time.sleep(0.5)


def once(number):
    ask(number)
    time.sleep(1.0)


def ask(number):
    """Returns when this rank has had what the launcher hands on, which takes it seconds on a busy machine.

    Looks again and again: a signal that another thread takes wakes no wait of the main thread, where handlers run. A launcher
    that hands nothing on is asked again: one was seen to lose a signal.
    """
    asked, began = 0, time.monotonic()
    while not HEARD.is_set():
        waited = time.monotonic() - began
        assert waited < 30, f"the launcher handed nothing on: {on_its_way()}"
        if waited >= AGAIN_SECONDS * asked:
            os.kill(launcher(), number)
            asked += 1
        time.sleep(0.01)


def on_its_way():
    """Where a signal can be: which ones are pending, held back, ignored and caught by the launcher, the client and this rank."""
    processes = {"launcher": launcher(), "client": os.environ.get("NORIA_TEST_CLIENT", "self"), "rank": "self"}
    masks = {
        name: re.findall(r"(Name|State|S\w\w\w?Pnd|SigBlk|SigIgn|SigCgt):\s+(\S+)", status(process))
        for name, process in processes.items()
    }
    return "; ".join(f"{name} {' '.join(map(' '.join, found))}" for name, found in masks.items())


def status(process):
    return Path(f"/proc/{process}/status").read_text()


def listen():
    note = Signals._note

    def noting(self, *arguments):
        note(self, *arguments)
        HEARD.set()

    Signals._note = noting


def interrupt_twice():
    os.kill(launcher(), signal.SIGINT)
    time.sleep(0.8)
    os.kill(launcher(), signal.SIGINT)
    time.sleep(30)


def output():
    return Path(value_of("--output"))


def value_of(flag):
    """The last one's, which holds."""
    return sys.argv[len(sys.argv) - sys.argv[::-1].index(flag)]


def fill_the_disk():
    """As a full disk would: no file of this process grows beyond this."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


ACTIONS = {
    "USR1": lambda: once(signal.SIGUSR1),
    "USR1 twice": lambda: twice(signal.SIGUSR1),
    "TERM": lambda: once(signal.SIGTERM),
    "INT": lambda: once(signal.SIGINT),
    "INT twice": interrupt_twice,
    "STOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "full": fill_the_disk,
    "parts removed": lambda: shutil.rmtree(f"{output()}.parts"),
    "folder removed": lambda: shutil.rmtree(output().parent),
    "truncate": lambda: os.truncate(value_of("--model"), 9000),
    "pause": lambda: time.sleep(5),
    "nothing": lambda: None,
}


def happen(action):
    Path(os.environ["NORIA_TEST_HAPPENED"]).write_text(f"{time.time()}")
    ACTIONS[action]()


if __name__ == "__main__":
    place, action, rank, *arguments = sys.argv[1:]
    run.SILENCE = SILENCE
    slow_down()
    if mpi.launched_rank() == int(rank):
        listen()
        at(place, lambda: happen(action))
    sys.exit(main(arguments))
