"""Rotary positions (RoFormer, arXiv 2104.09864): settings in a config.json, tables, and turning heads by them.

Functions of tensors: nothing of a family, of ranks or of files. T tokens, N heads, D head dim, R rotated part of D.
"""

import math
from collections.abc import Mapping
from functools import lru_cache

import torch

from noria.config import InputError, require
from noria.models import _config as read

TYPES = ("default", "linear", "dynamic", "llama3")


def settings(config: Mapping) -> tuple[float, tuple]:
    """Theta, and the scaling as a tuple: () for none, ("linear", factor), or ("llama3", factor, low, high, context).

    `rope_scaling` and its successor `rope_parameters` are both understood. The type `dynamic` changes nothing up to
    max_position_embeddings, which is where Noria ends a sequence, so it is computed as `default`. Raises InputError.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    require(isinstance(parameters, Mapping), f"config.json: rope_scaling is {read.shown(parameters)}: no object")
    theta = read.number(parameters, "rope_theta", read.number(config, "rope_theta", 10000.0))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind in ("default", "dynamic"):
        return theta, ()
    if kind == "linear":
        return theta, ("linear", read.number(parameters, "factor"))
    if kind == "llama3":
        context = config.get("max_position_embeddings") or 2048
        for place in (parameters, config):
            context = read.integer(place, "original_max_position_embeddings", context)
        factors = [read.number(parameters, key) for key in ("factor", "low_freq_factor", "high_freq_factor")]
        require(
            factors[1] < factors[2],
            f"config.json: low_freq_factor ({factors[1]}) must be below high_freq_factor ({factors[2]})",
        )
        return theta, ("llama3", *factors, float(context))
    raise InputError(
        f"config.json: rope type {read.shown(kind)} is not in this version of Noria; known: {', '.join(TYPES)}"
    )


def rotated_size(config: Mapping, head_dim: int, part: bool) -> int:
    """R: how many numbers of each head are rotated, all unless a `part` may be. Raises InputError."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for place in () if part else (config, parameters):
        read.only(place, "partial_rotary_factor", 1.0, "Noria computes this family with all of each head rotated")
    factor = read.number(parameters, "partial_rotary_factor", read.number(config, "partial_rotary_factor", 1.0))
    size = int(head_dim * factor)
    right = factor <= 1 and size >= 2 and size % 2 == 0
    require(right, f"config.json: {size} of head_dim {head_dim} are rotated: rotary positions need an even number")
    return size


def tables(theta: float, scaling: tuple, size: int, positions: torch.Tensor, dtype: torch.dtype) -> tuple:
    """Cosines [T, 1, R] and sines [T, 1, R/2] of positions [T], in `dtype`.

    Angles are computed in float32 as transformers does, whatever the half precision; in float64 they are float64, where
    transformers keeps float32: at position p the angle differs by up to p * 6e-8.
    """
    table = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions[:, None].to(table) * _frequencies(theta, size, scaling, table, positions.device)
    cosines, sines = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]
    return torch.cat((cosines, cosines), dim=-1), sines


@lru_cache(maxsize=16)
def _frequencies(theta: float, size: int, scaling: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[R/2] radians per position. llama3: long wavelengths slowed by `factor`, a smooth ramp between (Llama 3.1)."""
    exponents = torch.arange(0, size, 2, dtype=torch.int64).to(dtype) / size
    frequencies = 1.0 / theta**exponents
    if scaling and scaling[0] == "linear":
        frequencies = frequencies / scaling[1]
    elif scaling:
        _, factor, low, high, context = scaling
        wavelengths = 2 * math.pi / frequencies
        ramp = (context / wavelengths - low) / (high - low)
        smooth = (1 - ramp) * frequencies / factor + ramp * frequencies
        slowed = torch.where(wavelengths > context / low, frequencies / factor, smooth)
        frequencies = torch.where(wavelengths < context / high, frequencies, slowed)
    return frequencies.to(device)


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Heads [T, N, D] turned by their positions: the first half of R pairs with the second, as in transformers."""
    size = cosines.shape[-1]
    half = size // 2
    turned = heads[..., :size] * cosines
    turned[..., :half].addcmul_(heads[..., half:size], sines, value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sines)
    return turned if size == heads.shape[-1] else torch.cat((turned, heads[..., size:]), dim=-1)
