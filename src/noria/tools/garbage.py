"""Python's garbage collector beside a run: it does not look again and again at what was there when the run began."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Inside, what is there now is no garbage. For modules and kernels alone the collector stops all Python for 0.2 s."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
