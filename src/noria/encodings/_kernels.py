"""Kernels that decode, and encode, on CUDA devices: a kind names one, which is used where it can be built and gives the kind's
own bits."""

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from noria import kinds
from noria.kernels.trying import tried

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that kernels decode to
SHAPE = (70, 300)  # of the matrix that is decoded both ways: tiles and groups that are whole, and others
WHOLE = (64, 512)  # of one that is encoded both ways too: all of its sizes are multiples of 16, as those of weights are

Decode = Callable[..., None]  # fields, settings, target, and for kernels which piece each of the target is
Encode = Callable[..., dict[str, torch.Tensor]]  # numbers [P, outputs, inputs], settings


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


def encoder(encoding: str, device: torch.device) -> tuple[Encode, str]:
    """What encodes pieces on this device; and why that is not the encoding's kernel, where it should be."""
    kind = kinds.load("encodings", encoding)
    by_torch = partial(_one_by_one, kind)
    if device.type != "cuda" or not hasattr(kind, "ENCODER"):
        return by_torch, ""
    why = _refused_to_encode(encoding, device)
    return (by_torch, why) if why else (_encoding_kernel(encoding), "")


@lru_cache
def _refused_to_encode(encoding: str, device: torch.device) -> str:
    """Why the kernel that encodes is not used; empty where it is. It is tried once, which builds it."""

    def trial() -> str:
        return "" if encodes_the_same(encoding, _encoding_kernel(encoding), device) else "it gives other bytes"

    return tried(trial)


def _encoding_kernel(encoding: str) -> Encode:
    found: Encode = importlib.import_module(f"noria.kernels.{kinds.load('encodings', encoding).ENCODER}").encode
    return found


def _one_by_one(kind: ModuleType, numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    made = [kind.encode(its, settings) for its in numbers]
    return {name: pad_sequence([its[name] for its in made], batch_first=True) for name in made[0]}


def encodes_the_same(encoding: str, kernel: Encode, device: torch.device) -> bool:
    """Whether a kernel gives the bytes of the encoding's own encode on the CPU, for numbers of any bits and near one another."""
    kind, draw = kinds.load("encodings", encoding), torch.Generator().manual_seed(0)
    for shape in (SHAPE, WHOLE):
        numbers = torch.randn(2, *shape, generator=draw).bfloat16()
        numbers[0, 0].view(torch.int16).random_(-(1 << 15), 1 << 15, generator=draw)
        wanted, found = _one_by_one(kind, numbers, kind.DEFAULTS), kernel(numbers.to(device), kind.DEFAULTS)
        if wanted.keys() != found.keys() or not all(
            torch.equal(its, found[name].cpu()) for name, its in wanted.items()
        ):
            return False
    return True
