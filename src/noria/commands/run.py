"""Generates text: reads a file of prompts, runs the model on the ring of ranks and writes the generations to HDF5.

Start it with mpirun, one rank per GPU; without mpirun it runs as one rank. Every key of the run file is also a flag;
`noria help keys` lists them on one line each. A signal, the end of the job's time or a file named like the output with .stop
behind it (touch run.h5.stop) stops the run in order: it exits with 75, and the same command goes on.
"""

import argparse
import contextlib
import sys

from noria.commands.flags import add_arguments, load
from noria.errors import Changed, InputError
from noria.launch import mpi
from noria.launch.signals import Signals
from noria.launch.watchdog import Watchdog
from noria.run import run as run_job
from noria.tools.helper import Helper
from noria.tools.lossy import lossy

__all__ = ["add_arguments", "load", "run"]


def run(arguments: argparse.Namespace, signals: Signals, helper: Helper) -> int:
    """The exit code of this rank. An error that the other ranks do not share ends them all at once.

    `helper` renders rank 0's conversations.

    Raises mpi.Refused, on every rank, for the user's mistakes.
    """
    # A bar may stand on stdout. The output does not go there, so that nothing is lost with it.
    with contextlib.redirect_stdout(lossy(sys.stdout)), Watchdog() as watchdog:
        try:
            comm = mpi.start()
            config = mpi.on_first_rank(comm, lambda: load(arguments))
            return run_job(config, comm, watchdog, signals, helper)
        except mpi.Refused:
            raise
        except InputError as error:
            return watchdog.end(f"{error}", 2)
        except Changed as error:
            return watchdog.end(f"failed: {error}", 1)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the job must end on every rank
            return watchdog.fail(error)
