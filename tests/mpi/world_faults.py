"""Called on every rank by tests/test_world.py: what goes wrong on rank 1, or nothing."""

import os
import signal
import threading
import time

kept = []


def place(comm, *arguments):
    return comm.Get_rank(), comm.Get_size(), *arguments


def hang(comm, folder):
    if comm.Get_rank() == 1:
        time.sleep(60)
    comm.Barrier()


def crash(comm, folder):
    if comm.Get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    comm.Barrier()


def leak(comm, folder):
    if comm.Get_rank() == 1:
        kept.append(open(folder / "leaked", "w"))  # noqa: SIM115 -- that is the fault


def stay(comm, folder):
    if comm.Get_rank() == 1:
        threading.Thread(target=time.sleep, args=[60], name="left behind", daemon=True).start()


def stumble(comm, folder):
    comm.Get_rank() / (comm.Get_rank() - 1)


def abort(comm, folder):
    if comm.Get_rank() == 1:
        comm.Abort(3)
    comm.Barrier()


def abort_once(comm, folder, said):
    """As glibc: it says so and ends the process. All ranks meet before the second time."""
    if comm.Get_rank() == 1 and not (folder / "aborted").exists():
        (folder / "aborted").touch()
        os.write(2, f"{said}\n".encode())
        os.abort()
    comm.Barrier()
    return "met"
