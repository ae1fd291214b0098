"""What Noria asks of a communicator: mpi4py's, or launch.mpi.Solo for a process alone. Imports no MPI.

Names are MPI's. All but send, recv and iprobe are collective.
"""

from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Communicator(Protocol):
    """The ranks of a job, as the engine and the launcher talk to each other outside the ring."""

    def Get_rank(self) -> int: ...

    def Get_size(self) -> int: ...

    def Barrier(self) -> None: ...

    def bcast(self, value: T, /) -> T:
        """Rank 0's value, on every rank."""

    def allgather(self, value: T, /) -> list[T]:
        """Every rank's value, in the order of the ranks."""

    def Split(self, color: int, /, key: int) -> "Communicator":
        """A communicator of the ranks with this color, in the order of their keys."""

    def send(self, value: Any, /, dest: int, tag: int) -> None:
        """To one rank, which calls `recv`."""

    def recv(self, *, source: int = ..., tag: int) -> Any:
        """What that rank, or any, sends next with this tag."""

    def iprobe(self, *, tag: int) -> bool:
        """Whether `recv` of any rank's message with this tag would not wait."""
