"""Finds the module of a kind by its file name: `load("models", "llama")` is noria/models/llama.py.

Knows folders and file names alone, not what the modules hold.
"""

import importlib
import pkgutil
import sys
from types import ModuleType

from noria.errors import InputError
from noria.tools.keys import nearest


def names(package: str) -> list[str]:
    """The kinds that `package` has, one a file."""
    folder = importlib.import_module(f"noria.{package}")
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__) if not module.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """The module of one kind. Raises InputError, with the known names, for one that does not exist.

    The folder is read for a kind that is not loaded yet: encodings are asked for with every parameter of a visit.
    """
    loaded = sys.modules.get(f"noria.{package}.{name}")
    if loaded is not None and not name.startswith("_"):
        return loaded
    known = names(package)
    if name not in known:
        raise InputError(f"{package}: no {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return importlib.import_module(f"noria.{package}.{name}")


def name_of(kind: ModuleType) -> str:
    """The name by which a kind is loaded."""
    return kind.__name__.rpartition(".")[2]
