"""Kernels that decode on CUDA devices: a kind names one, which is used where it can be built and gives the kind's own bits."""

import importlib
from collections.abc import Callable
from functools import lru_cache

import torch

from noria import kinds
from noria.kernels.trying import tried

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that kernels decode to
SHAPE = (70, 300)  # of the matrix that is decoded both ways: tiles and groups that are whole, and others

Decode = Callable[..., None]  # fields, settings, target, and for kernels which piece each of the target is


def decoder(encoding: str, device: torch.device, dtype: torch.dtype) -> tuple[Decode, str]:
    """What decodes to this dtype on this device; and why that is not the encoding's kernel, where it should be."""
    kind = kinds.load("encodings", encoding)
    if device.type != "cuda" or dtype not in DTYPES or not hasattr(kind, "KERNEL"):
        return kind.decode, ""
    why = _refused(encoding, device, dtype)
    return (kind.decode, why) if why else (_kernel(encoding), "")


@lru_cache
def _refused(encoding: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel of an encoding is not used; empty where it is. It is tried once, which builds it."""

    def trial() -> str:
        return "" if gives_the_same(encoding, _kernel(encoding), device, dtype) else "it gives other bits"

    return tried(trial)


def _kernel(encoding: str) -> Decode:
    found: Decode = importlib.import_module(f"noria.kernels.{kinds.load('encodings', encoding).KERNEL}").decode
    return found


def gives_the_same(encoding: str, kernel: Decode, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel gives the bits of the encoding's own decode, for random numbers under its default settings."""
    kind = kinds.load("encodings", encoding)
    numbers = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    fields = {name: its[None].to(device) for name, its in kind.encode(numbers, kind.DEFAULTS).items()}
    found = [torch.zeros(1, *SHAPE, dtype=dtype, device=device) for _ in range(2)]
    kernel(fields, kind.DEFAULTS, found[0])
    kind.decode(fields, kind.DEFAULTS, found[1])
    return torch.equal(*found)
