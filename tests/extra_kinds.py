"""Kinds that the tests have beside Noria's own: tests/extra/FOLDER/NAME.py is found as noria/FOLDER/NAME.py is."""

import contextlib
import importlib
import sys
from pathlib import Path

EXTRA = Path(__file__).parent / "extra"


@contextlib.contextmanager
def extra_kinds():
    """They are there inside the context, in this process."""
    packages = {folder: importlib.import_module(f"noria.{folder.name}") for folder in EXTRA.iterdir()}
    for folder, package in packages.items():
        package.__path__.append(str(folder))
    try:
        yield
    finally:
        for folder, package in packages.items():
            package.__path__.remove(str(folder))
            for file in folder.glob("*.py"):
                sys.modules.pop(f"{package.__name__}.{file.stem}", None)
                vars(package).pop(file.stem, None)
