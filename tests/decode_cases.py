"""What kernels that decode are tried with: encodings, settings and shapes, and the bits that differ from torch's own."""

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from noria import kinds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (32, 128), (64, 256), (33, 129), (7, 600), (200, 40), (130, 260)]


INTEGERS = [
    {"symmetric": True},
    {"symmetric": False},
    {"group_size": 32, "permuted": True, "symmetric": True, "scale_dtype": "float16"},
    {"group_size": 48, "permuted": True, "symmetric": False},
    {"group_size": -1, "scale_dtype": "float32"},
]


@dataclass(frozen=True)
class Case:
    """An encoding with settings beside its defaults, and the shape of a matrix; `turned`: its target is a transpose."""

    encoding: str
    shape: tuple[int, int]
    settings: dict[str, Any] = field(default_factory=dict)
    pieces: int = 2
    turned: bool = False


CASES = [
    Case(encoding, shape, settings, turned=turned)
    for encoding, its in {
        "fp8_block": [
            {},
            {"scale_dtype": "e8m0"},
            {"block_size": [3, 50]},
            {"block_size": [1, 64]},
            {"block_size": [64, 256]},
        ],
        "fp8_channel": [{}, {"scale_dtype": "e8m0"}],
        "mxfp4": [{}],
        "nvfp4": [{"tensor_scale": "multiplies"}, {"tensor_scale": "divides"}],
        "exponent": [{}],
        "int4": INTEGERS,
        "int8": INTEGERS,
    }.items()
    for settings in its
    for shape in SHAPES
    for turned in (False, True)
]


def some_fields(case: Case, number: int) -> dict[str, torch.Tensor]:
    """The fields of random numbers of all magnitudes."""
    generator = torch.Generator().manual_seed(number)
    numbers = torch.randn(case.shape, generator=generator) * torch.randn(case.shape, generator=generator).exp()
    numbers *= torch.tensor([1e-3, 1.0, 1e3])[number % 3]
    kind = kinds.load("encodings", case.encoding)
    return kind.encode(numbers.bfloat16(), kind.DEFAULTS | case.settings)


def other_bits(case: Case, device: torch.device, dtype: torch.dtype) -> int:
    """How many numbers come out otherwise from the kernel on the device than from torch on the CPU.

    Fields have gaps between their pieces, as in a block, and the target is a part of a larger tensor that must stay as it is.
    """
    kind = kinds.load("encodings", case.encoding)
    settings, (outputs, inputs) = kind.DEFAULTS | case.settings, case.shape
    made = [some_fields(case, number) for number in range(case.pieces)]
    fields = {}
    for name in made[0]:
        whole = pad_sequence([its[name] for its in made], batch_first=True)  # the number of escapes differs
        room = torch.zeros(case.pieces, whole[0].numel() + 16, dtype=whole.dtype)
        fields[name] = room[:, : whole[0].numel()].unflatten(1, whole.shape[1:])
        fields[name].copy_(whole)
    found = []
    for its_decode, its_device in ((kind.decode, "cpu"), (kernel(case.encoding), device)):
        size = (inputs, outputs + 2) if case.turned else (outputs + 2, inputs)
        around = torch.full((case.pieces, *size), 7.0, dtype=dtype, device=its_device)
        target = around[:, :, 1:-1].transpose(1, 2) if case.turned else around[:, 1:-1]
        its_decode({name: its.to(its_device) for name, its in fields.items()}, settings, target)
        found.append(around.cpu())
    return int((found[0] != found[1]).sum())


def kernel(encoding: str):
    """What decodes it on a CUDA device."""
    return importlib.import_module(f"noria.kernels.{kinds.load('encodings', encoding).KERNEL}").decode
