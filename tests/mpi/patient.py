"""A communicator whose ranks sleep while they wait for each other: MPI's own waiting takes a core, and there are two.

Imported when MPI is up.
"""

import time

from mpi4py import MPI

TOGETHER, BETWEEN = 2e-4, 5e-5  # seconds between two looks: until all have come, until a message has


def await_all(request):
    while not request.Test():
        time.sleep(BETWEEN)


class Patient(MPI.Intracomm):
    """The calls that wait, of those that Noria makes. Sends and receives mean what MPI's mean."""

    def _meet(self):
        all_here = self.Ibarrier()
        while not all_here.Test():
            time.sleep(TOGETHER)

    def Barrier(self):
        self._meet()

    def bcast(self, obj, root=0):
        self._meet()
        return super().bcast(obj, root)

    def allgather(self, sendobj):
        self._meet()
        return super().allgather(sendobj)

    def Split(self, color=0, key=0):
        self._meet()
        return Patient(super().Split(color, key))

    def Dup(self):
        self._meet()
        return Patient(super().Dup())

    def Ssend(self, buf, dest, tag=0):
        await_all(self.Issend(buf, dest, tag))

    def Recv(self, buf, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG):
        await_all(self.Irecv(buf, source, tag))

    def Mprobe(self, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG, status=None):
        while not (found := self.Improbe(source, tag, status)):
            time.sleep(BETWEEN)
        return found
