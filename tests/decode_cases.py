"""What kernels that decode are tried with: encodings, settings and shapes, and the bits that differ from torch's own."""

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from noria import kinds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AROUND = 7.0  # what lies around a target
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
    """How many numbers come out otherwise from the kernel on the device than from torch on the CPU."""
    return differences(case, all_fields(case), device, dtype)


def differences(case: Case, made: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> int:
    """The same of any fields [P, ...]."""
    by_torch = decoded(case, made, kinds.load("encodings", case.encoding).decode, torch.device("cpu"), dtype)
    by_kernel = decoded(case, made, kernel(case.encoding), device, dtype)
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    differ = by_torch.view(whole) != by_kernel.view(whole)  # 0 and -0 are two
    if case.encoding != "exponent" or dtype != torch.bfloat16:  # there each nan by itself
        differ &= ~(by_torch.isnan() & by_kernel.isnan())
    return int(differ.sum())


def changed_around(case: Case, made: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> int:
    """How many numbers beside its target the kernel changes."""
    found = decoded(case, made, kernel(case.encoding), device, dtype)
    found = found.transpose(1, 2) if case.turned else found
    return int((found[:, [0, -1]] != AROUND).sum())


def decoded(
    case: Case,
    made: dict[str, torch.Tensor],
    its_decode: Any,
    device: torch.device,
    dtype: torch.dtype,
    named: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a decode makes, and what lies around it; of the pieces that a list names.

    Fields have gaps between their pieces, as in a block, and the target is a part of a larger tensor that must stay as it is.
    """
    kind, fields = kinds.load("encodings", case.encoding), {}
    for name, whole in made.items():
        room = torch.zeros(case.pieces, whole[0].numel() + 16, dtype=whole.dtype, device=device)
        fields[name] = room[:, : whole[0].numel()].unflatten(1, whole.shape[1:])
        fields[name].copy_(whole)
    outputs, inputs = case.shape
    size = (inputs, outputs + 2) if case.turned else (outputs + 2, inputs)
    around = torch.full((case.pieces if named is None else len(named), *size), AROUND, dtype=dtype, device=device)
    target = around[:, :, 1:-1].transpose(1, 2) if case.turned else around[:, 1:-1]
    its_decode(fields, kind.DEFAULTS | case.settings, target, *(() if named is None else (named,)))
    return around.cpu()


def listed_bits(case: Case, device: torch.device, dtype: torch.dtype) -> int:
    """How many numbers a kernel makes otherwise of the pieces that a list names, and around and beside them."""
    made, named = all_fields(case), torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    in_turn = decoded(case, made, kernel(case.encoding), device, dtype)
    expected = torch.stack([in_turn[1], torch.full_like(in_turn[0], AROUND), in_turn[0]])
    by_list = decoded(case, made, kernel(case.encoding), device, dtype, named)
    return int((by_list != expected).logical_and_(~(by_list.isnan() & expected.isnan())).sum())


def extremes() -> list[tuple[Case, dict[str, torch.Tensor]]]:
    """Every number of bfloat16, and every code under every scale: those that are no normal numbers too."""
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    numbers = order.to(torch.int16).view(torch.bfloat16).view(256, 256)
    its = {"exponent": kinds.load("encodings", "exponent").encode(numbers, {})}
    scales, codes = torch.arange(255, dtype=torch.uint8)[:, None], torch.arange(0, 256, 17, dtype=torch.uint8)
    its["mxfp4"] = {"codes": codes.repeat(255, 1), "scales": scales}
    its["nvfp4"] = {"codes": codes.repeat(255, 1), "scales": scales.repeat(1, 2), "tensor_scale": torch.tensor([3e-3])}
    shapes = {"exponent": (256, 256), "mxfp4": (255, 32), "nvfp4": (255, 32)}
    return [
        (Case(encoding, shapes[encoding], pieces=1), {name: one[None] for name, one in fields.items()})
        for encoding, fields in its.items()
    ]


def hostile() -> list[tuple[Case, dict[str, torch.Tensor]]]:
    """Fields of any bytes."""
    generator, found = torch.Generator().manual_seed(1), []
    for case in CASES:
        if case.shape == (33, 129):
            made = all_fields(case)
            for one in made.values():
                whole = torch.randint(
                    0, 256, (one.numel() * one.element_size(),), generator=generator, dtype=torch.uint8
                )
                one.copy_(whole.view(one.dtype).view(one.shape))
            found.append((case, made))
    return found


def all_fields(case: Case) -> dict[str, torch.Tensor]:
    """Fields of random numbers, of all pieces; the number of escapes differs."""
    made = [some_fields(case, number) for number in range(case.pieces)]
    return {name: pad_sequence([its[name] for its in made], batch_first=True) for name in made[0]}


def kernel(encoding: str):
    """What decodes it on a CUDA device."""
    return importlib.import_module(f"noria.kernels.{kinds.load('encodings', encoding).KERNEL}").decode


def other_bytes(case: Case, device: torch.device) -> list[str]:
    """The fields that a kernel makes otherwise on the device than torch on the CPU, of pieces with gaps between them."""
    kind, draw = kinds.load("encodings", case.encoding), torch.Generator().manual_seed(1)
    whole = torch.randn(4, case.shape[0] + 3, case.shape[1], generator=draw) * 0.02
    whole *= torch.randn(whole.shape, generator=draw).exp()
    numbers = whole.bfloat16()[:, 2:-1]
    numbers[1] = 0
    numbers[2].view(torch.int16).random_(-(1 << 15), 1 << 15, generator=draw)  # any bits: more escapes than find room
    numbers[3] *= torch.logspace(-30, 30, case.shape[1]).bfloat16()
    made = [kind.encode(its, {}) for its in numbers]
    encode = importlib.import_module(f"noria.kernels.{kind.ENCODER}").encode
    found = encode(numbers.to(device), {})
    wanted = {name: pad_sequence([its[name] for its in made], batch_first=True) for name in made[0]}
    assert found.keys() == wanted.keys() and all(its.device.type == device.type for its in found.values())
    same = {
        name: its.dtype == found[name].dtype and torch.equal(its, found[name].cpu()) for name, its in wanted.items()
    }
    return [name for name, right in same.items() if not right]


CODED = [Case("exponent", shape) for shape in (*SHAPES, (9, 455), (64, 512), (1, 4096), (3, 4096))]
