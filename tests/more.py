"""Families that only tests know: files of more_models/, found like those of noria.models while a test has them there."""

import contextlib
from pathlib import Path

import noria.models

FOLDER = str(Path(__file__).parent / "more_models")


@contextlib.contextmanager
def families():
    """While this lasts, in this process."""
    noria.models.__path__.append(FOLDER)
    try:
        yield
    finally:
        noria.models.__path__.remove(FOLDER)
