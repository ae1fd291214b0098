"""Noria: MPI batch text generation with models that do not fit one GPU.

In Python: `noria.open("run.h5")` has the rows of an output, `noria.generate(...)` starts a run and returns its output.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noria.errors import InputError as InputError
    from noria.launch.call import Stopped as Stopped
    from noria.launch.call import generate as generate
    from noria.output.opened import Output as Output
    from noria.output.opened import open as open

__version__ = "0.1.0"

# Imported when they are asked for: `import noria` costs nothing, and the command line loads what it needs alone.
_PUBLIC = {
    "generate": ("noria.launch.call", "generate"),
    "open": ("noria.output.opened", "open"),
    "Output": ("noria.output.opened", "Output"),
    "Stopped": ("noria.launch.call", "Stopped"),
    "InputError": ("noria.errors", "InputError"),
}


if not TYPE_CHECKING:  # for whom every other name would be there too

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'noria' has no attribute {name!r}")
        module, inner = _PUBLIC[name]
        return getattr(importlib.import_module(module), inner)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
