"""A rank's communication: its work is done by a thread of its own, or by whoever waits for it.

Work is generators, resumed in turn until they end: MPI moves large messages only inside its calls, so somebody has to
call, one thread at a time. Knows no MPI and no ring: what the generators do is their own affair.
"""

import contextlib
import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

SHORTEST_PAUSE = 20e-6  # seconds between two polls; a pause is a 32nd of the idle time, between these two
LONGEST_PAUSE = 5e-4
# Seconds of polls with none but sleep(0) between them, after work has begun, moved on or ended: a sleep of 20 us takes 50, and a
# message several polls at either end. More of them by a thread that waits for work, and more again where no core computes.
EAGER, EAGER_AWAITED, EAGER_BESIDE_GPU = 1e-4, 2e-3, 2e-2
SHORTEST_BESIDE = 2e-4  # seconds; while nobody waits: a poll takes the interpreter from a thread that launches kernels
# Seconds after which a thread that runs Python lets another one run: by default 5 ms, for which a message would wait at either
# end whenever the main thread composes a step or launches a layer.
SWITCH = 1e-4
SLICE = 0.05  # seconds; who waits for the thread's end looks this often whether it has failed


T = TypeVar("T")


class CommunicationError(RuntimeError):
    """The communication thread has failed; the cause is its own exception."""


class Ticket(Generic[T]):
    """Stands for work that is being done."""

    def __init__(self, communication: "Communication"):
        self._communication = communication
        self._finished = False
        self._value: T

    @property
    def done(self) -> bool:
        return self._finished

    def wait(self) -> T:
        """What the work returned, once it has ended. Raises CommunicationError when communication has failed."""
        if not self._finished:
            self._communication.poll_until(lambda: self._finished)
        return self._value

    def finish(self, value: T) -> None:
        self._value = value
        self._finished = True


class Communication:
    """Owns the thread. `prepare` is called in it first: it binds the thread to its device. eager: seconds of polls without a
    pause by a thread that waits. spins: it keeps its core meanwhile, which nobody else needs. outside: in which other threads
    do work, for modes that they may be in.

    Who waits for work does all that there is, until its own has ended: from thread to thread takes longer than most messages.
    """

    def __init__(
        self,
        prepare: Callable[[], None] = lambda: None,
        eager: float = EAGER_AWAITED,
        spins: bool = False,
        outside: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ):
        self._prepare, self._eager, self._spins, self._outside = prepare, eager, spins, outside
        self._new: deque[tuple[Generator[None, None, Any], Ticket[Any]]] = deque()
        self._live: list[tuple[Generator[None, None, Any], Ticket[Any]]] = []
        self._wake = threading.Event()
        self._turn = threading.Lock()  # held by the thread that takes work further
        self._turns_thread = 0  # which that is
        self._num_waits = 0  # of other threads for work
        self._counting = threading.Lock()
        self._closing = False
        self._abandoned = False
        self._moved = False
        self._error: BaseException | None = None
        self._switch = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH, self._switch))
        self._thread = threading.Thread(target=self._run, name="noria-communication", daemon=True)
        self._thread.start()

    def start(self, work: Generator[None, None, T], ticket: Ticket[T] | None = None) -> Ticket[T]:
        """Hands over work; never waits. Work started in the order of the calls takes its first step in that order.

        Work that other work starts takes its first step at once: a receive started before a send is posted before it. So
        does what another thread starts while nothing is taken further.
        """
        ticket = ticket or Ticket(self)
        if self._turns_thread == threading.get_ident():
            self._step(work, ticket)
            return ticket
        self.check()
        self._new.append((work, ticket))
        with self._outside():
            begun = self._take_turn(self._begin_new, blocking=False)
        if not begun:
            self._wake.set()
        return ticket

    @property
    def closing(self) -> bool:
        """The rank is through with its part: work without an end of its own ends now."""
        return self._closing

    def moved(self) -> None:
        """Work that has waited for something else goes on. Only in work itself."""
        self._moved = True

    def ticket(self) -> Ticket[Any]:
        """A ticket for work that is started later."""
        return Ticket(self)

    def poll_until(self, ended: Callable[[], bool]) -> None:
        """Does work until `ended`. Raises CommunicationError when communication has failed."""
        with self._counting:
            self._num_waits += 1
        try:
            last = time.monotonic()
            with self._outside():
                while not ended():
                    self.check()
                    if self._take_turn(self._advance):
                        last = time.monotonic()
                    elif (idle := time.monotonic() - last) > self._eager or not self._spins:
                        _rest(idle, self._eager)
        finally:
            with self._counting:
                self._num_waits -= 1

    def check(self) -> None:
        """Raises CommunicationError when work has failed, or was told to."""
        if self._error:
            raise CommunicationError(
                f"communication failed: {type(self._error).__name__}: {self._error}"
            ) from self._error

    def fail(self, error: BaseException) -> None:
        """Every wait, now and later, ends with this error. Any thread may call it, for instance to abort."""
        self._error = self._error or error
        self._wake.set()

    def close(self) -> None:
        """Waits until all work has ended and stops the thread. Raises CommunicationError when it has failed."""
        self._closing = True
        self._wake.set()
        try:
            while self._thread.is_alive():
                self._thread.join(SLICE)
                self.check()
        finally:
            sys.setswitchinterval(self._switch)
        self.check()

    def abandon(self) -> None:
        """Stops the thread, whatever is unfinished: for the way out after an error."""
        self._abandoned = True
        self._wake.set()
        self._thread.join(20 * SLICE)
        sys.setswitchinterval(self._switch)

    def _run(self) -> None:
        try:
            _sharpen_sleep()
            self._prepare()
            self._poll()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the main thread must hear of it
            self.fail(error)

    def _poll(self) -> None:
        last = time.monotonic()
        while not (self._abandoned or self._error):
            self._wake.clear()
            if self._num_waits:
                # Whoever waits does the work; afterwards it has better things to do than to wake this thread.
                self._wake.wait(LONGEST_PAUSE)
            elif self._take_turn(self._advance):
                last = time.monotonic()
            elif self._closing and not self._live and not self._new:
                return
            else:
                _rest(time.monotonic() - last, EAGER, lambda seconds: self._wake.wait(max(seconds, SHORTEST_BESIDE)))

    def _take_turn(self, do: Callable[[], bool], blocking: bool = True) -> bool:
        """What `do` returns, done by this thread alone; False where another one is at it and this one is not to wait.

        Raises CommunicationError where it fails: all that wait hear of it.
        """
        if not self._turn.acquire(blocking):
            return False
        self._turns_thread = threading.get_ident()
        try:
            return do()
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._turns_thread = 0
            self._turn.release()
        self.check()
        return False

    def _advance(self) -> bool:
        """Takes every piece of work one step further; says whether any began, moved on or ended."""
        self._moved = False
        live, self._live = self._live, []
        for work, ticket in live:
            self._step(work, ticket)
        return self._begin_new() or self._moved

    def _begin_new(self) -> bool:
        """The first step of what is new; says whether there was any."""
        any_new = bool(self._new)
        while self._new:
            self._step(*self._new.popleft())
        return any_new

    def _step(self, work: Generator[None, None, T], ticket: Ticket[T]) -> None:
        try:
            next(work)
        except StopIteration as end:
            self._moved = True
            ticket.finish(end.value)
        else:
            self._live.append((work, ticket))


def _rest(idle: float, eager: float, sleep: Callable[[float], object] = time.sleep) -> None:
    """Between two polls, after so many seconds in which nothing moved."""
    if idle > eager:
        sleep(pause(idle))
    else:
        time.sleep(0)  # 15 to 65 us: the core and the interpreter go to whoever needs them, who may be the other rank


def pause(idle: float) -> float:
    """Seconds to the next poll: a wait is late by a 32nd of its length at most, and a long one costs next to nothing."""
    return min(max(idle / 32, SHORTEST_PAUSE), LONGEST_PAUSE)


def _sharpen_sleep() -> None:
    """Lets this thread's sleeps end when they should: Linux adds 50 us to each by default (prctl PR_SET_TIMERSLACK)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(29, ctypes.c_ulong(1))
