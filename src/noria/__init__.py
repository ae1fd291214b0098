"""Noria: MPI batch text generation with models that do not fit one GPU."""

__version__ = "0.1.0"
