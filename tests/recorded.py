"""What a device captures, on the CPU: operations with the memory and the numbers that the host gave them then, and nothing else.

A replay does these again over the same memory. What the host decides by data of a step, or makes of its lists, stays as it was when
it was recorded, and what reads a number back cannot be recorded: as in a CUDA graph. Kernels of Triton are those of its interpreter.
"""

import contextlib
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

READS_BACK = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}
NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}  # memory, whatever it holds


class Recorder(TorchDispatchMode):
    """A capturer, and how much it captured and replayed."""

    def __init__(self):
        super().__init__()
        self.captures = self.replays = self.nbytes = self.kernels = 0
        self._calls = []

    def capture(self, call):
        call()  # whatever is made once
        self._calls = calls = []
        with self, _interpreted(self):
            call()
        self.captures += 1

        def replay():
            self.replays += 1
            for again in calls:
                again()

        return replay

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.name().removeprefix("aten::").partition(".")[0]
        if name in READS_BACK:
            raise RuntimeError(f"{name} waits for the device")
        made = func(*args, **kwargs)
        given = {its.untyped_storage().data_ptr() for its in _tensors((args, kwargs))}
        new = [its.untyped_storage().data_ptr() not in given for its in _tensors(made)]
        if name in NOTHING or (not any(new) and not func._schema.is_mutable):
            self._calls.append(lambda: made)  # kept: a later tensor is not to lie there
            return made

        def again():
            for held, its, is_new in zip(_tensors(made), _tensors(func(*args, **kwargs)), new, strict=True):
                if is_new:
                    held.copy_(its)

        self._calls.append(again)
        return made

    def launch(self, run, *arguments, **options):
        """A kernel, now and in each replay."""

        def again():
            with _disable_current_modes():
                run(*arguments, **options)

        self._calls.append(again)
        self.kernels += 1
        again()


@contextlib.contextmanager
def _interpreted(recorder):
    run = InterpretedFunction.run

    def launched(kernel, *arguments, **options):
        recorder.launch(run, kernel, *arguments, **options)

    with patch.object(InterpretedFunction, "run", launched):
        yield


def _tensors(some):
    return [its for its in torch.utils._pytree.tree_leaves(some) if isinstance(its, torch.Tensor)]
