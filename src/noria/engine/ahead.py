"""Rank 0's source of steps where it is the only rank and has one group: a step sets out before it is known what the one before
sampled, so that the device never waits for the host. It takes those tokens from where they were sampled.

What ended in the step before is seen one step late: the token that it still gets is dropped by the admission.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

from noria.engine.executor import Composer, Wait
from noria.ring.ring import AnyRing
from noria.step import Result, Step


class Ahead:
    """`next_step` and `take_in` of Executor.run. `lock` is held while the admission is touched, never while this rank waits."""

    def __init__(
        self,
        ring: AnyRing,
        admission: Composer,
        after_step: Callable[[], None],
        lock: AbstractContextManager[object] = contextlib.nullcontext(),
    ):
        self._ring, self._admission, self._after_step, self._lock = ring, admission, after_step, lock
        self._under_way: Step | None = None

    def next_step(self, round: int, group: int, wait: Wait) -> Step:
        """Composes the next step. Where nothing can go on before the step under way has given its result, takes that in."""
        with self._lock:
            step = self._admission.compose(round, group)
        self._ring.send_header(step)
        if not step.num_tokens:
            self._apply(wait)
        self._after_step()
        return step

    def take_in(self, step: Step, wait: Wait) -> Step:
        """Takes in what the step before this one gave; this one with the tokens that it took from there, and masks if it needs
        any."""
        result = self._apply(wait)
        if result is not None:
            step = step.told(result.token_ids)
            with self._lock:
                step = self._admission.mask(step)
        if step.masked:
            self._ring.send_masks(step.group, self._admission.masks(step.group))
        self._under_way = step
        return step

    def _apply(self, wait: Wait) -> Result | None:
        """Takes in the result of the step that is under way, if one is."""
        before, self._under_way = self._under_way, None
        if before is None:
            return None
        result = wait("waiting for results", lambda: self._ring.receive_result(before.group))
        with self._lock:
            self._admission.apply(before, result)
        return result
