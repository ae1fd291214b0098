"""Kernels are tried once before they serve: they may be impossible to build, or wrong."""

from collections.abc import Callable

import torch


def tried(trial: Callable[[], str], they: str = "it") -> str:
    """What a trial of kernels says is wrong with them, or why they cannot be built; empty where they serve.

    Raises torch.OutOfMemoryError, which says nothing of them.
    """
    try:
        return trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 -- whatever Triton, its compiler and its driver raise
        words = str(error).strip() or type(error).__name__
        return f"{they} cannot be built: {words.splitlines()[0][:200]}"
