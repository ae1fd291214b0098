"""NVFP4: numbers of 4 bits with an e4m3 scale for each 16 inputs and a float32 scale for the tensor (4.5 bits).

`codes` uint8 [outputs, half of the inputs, rounded up]: e2m1, two a byte, the first input in the low half. `scales` uint8
[outputs, groups]: the bits of float8_e4m3fn. `tensor_scale` float32 [1]; the setting of this name says whether it multiplies the
others, as ModelOpt has it (`weight_scale_2`), or divides them, as compressed-tensors has it (`weight_global_scale`).
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.encodings import _e2m1, _fp8, _groups, _scales
from noria.errors import require
from noria.kernels.stored import DIVIDED, E2M1, MULTIPLIED, TileForm

GROUP = 16
VARIABLE: tuple[str, ...] = ()
DEFAULTS: dict[str, Any] = {"tensor_scale": "multiplies"}
CHOICES = {"tensor_scale": ("multiplies", "divides")}
KERNEL = "decode_e2m1"


def fields(shape: tuple[int, ...], dtype: str, settings: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """`codes`, `scales` and `tensor_scale`."""
    _groups.check_settings("nvfp4", settings, CHOICES)
    outputs, inputs = _groups.matrix("nvfp4", shape)
    return {
        "codes": ((outputs, _groups.count(inputs, 2)), "uint8"),
        "scales": ((outputs, _groups.count(inputs, GROUP)), "uint8"),
        "tensor_scale": ((1,), "float32"),
    }


def form(settings: Mapping[str, Any]) -> TileForm:
    """e2m1 under e4m3, with a scale of the matrix."""
    return TileForm(E2M1, DIVIDED if settings["tensor_scale"] == "divides" else MULTIPLIED, GROUP)


def encode(numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The largest number of the tensor gets the largest code under the largest scale, that of a group the largest code
    under the nearest scale."""
    whole = _groups.finite("nvfp4", numbers)
    largest = whole.abs().max().clamp(min=2.0**-100)
    unit, divides = largest / (_e2m1.LARGEST * _fp8.LARGEST), settings["tensor_scale"] == "divides"
    tensor_scale = (1 / unit if divides else unit).view(1)
    codes, scales = [], []
    for some in whole.split(max(1, _groups.CHUNK // numbers.shape[1])):
        groups = _groups.grouped(some, GROUP)
        wanted = (groups.abs().amax(2) / _e2m1.LARGEST / unit).clamp(max=_fp8.LARGEST)
        scales.append(wanted.to(torch.float8_e4m3fn).view(torch.uint8))
        its = _of_groups(scales[-1], tensor_scale, settings, torch.float32)[..., None]
        steps = torch.where(its > 0, groups / its, 0.0)
        codes.append(_groups.packed(_e2m1.nearest(steps).flatten(1)[:, : numbers.shape[1]]))
    return {"codes": torch.cat(codes), "scales": torch.cat(scales), "tensor_scale": tensor_scale}


def _of_groups(
    scales: torch.Tensor, tensor_scale: torch.Tensor, settings: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor:
    """The scales of groups and tensor as one."""
    its = scales.view(torch.float8_e4m3fn).to(dtype)
    return its / tensor_scale.to(dtype) if settings["tensor_scale"] == "divides" else its * tensor_scale.to(dtype)


def decode(fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any], into: torch.Tensor) -> None:
    """Code times scale, the scale rounded before."""
    dtype = _scales.wide(into.dtype)
    for piece, rows, _ in _scales.parts(into, 1):
        scales = _of_groups(fields["scales"][piece, rows], fields["tensor_scale"][piece], settings, dtype)
        values = _e2m1.values(fields["codes"][piece, rows], into.shape[2], dtype)
        into[piece, rows].copy_(_groups.scale(values, GROUP, scales))


def most(fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> float:
    """The largest code under the largest scale of a group and of the tensor."""
    its = fields["tensor_scale"].double()
    tensor = 1 / its.min() if settings["tensor_scale"] == "divides" else its.max()
    return float(tensor) * _fp8.LARGEST * _e2m1.LARGEST


def check(fields: Mapping[str, torch.Tensor], shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """Scales are numbers, and that of the tensor one above 0."""
    require(not bool((fields["scales"] & 127 == _fp8.NO_NUMBER).any()), "a scale is nan")
    its = fields["tensor_scale"]
    right = bool((torch.isfinite(its) & (its > 0)).all())
    require(right, "the scale of a tensor is not a number above 0")
    _groups.check_halves(fields["codes"], shape[1])
