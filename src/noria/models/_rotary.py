"""Rotary positions (RoFormer, arXiv 2104.09864): settings in a config.json, tables, and turning heads by them.

Functions of tensors: nothing of a family, of ranks or of files. T tokens, N heads, D head dim, R rotated part of D.
"""

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch

from noria.errors import InputError, require
from noria.models import _config as read

Scaling: TypeAlias = tuple[Any, ...]  # () or a type and its numbers, hashable: see _frequencies
Turn: TypeAlias = tuple[float, Scaling, int]  # theta, scaling, R
# Of a rope's object: what is read, and what says the same once more or belongs to contexts and images that are not computed.
KEYS = frozenset(
    "rope_type type rope_theta factor partial_rotary_factor original_max_position_embeddings attention_factor beta_fast"
    " beta_slow mscale mscale_all_dim truncate short_factor low_freq_factor high_freq_factor"
    " long_factor short_mscale long_mscale finetuned mrope_section mrope_interleaved".split()
)
TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


class Rotary(NamedTuple):
    """What becomes of queries and new keys before they attend: a norm of each head, and the turn by their positions.

    cosines, sines: of `tables`; None: they are not turned. pairs: as `rotate_pairs` turns, else as `rotate` does. norms:
    weights [D] of the queries' and the keys' RMSNorm, with eps; None: they are not normed.
    """

    cosines: torch.Tensor | None = None
    sines: torch.Tensor | None = None
    pairs: bool = False
    norms: tuple[torch.Tensor, torch.Tensor] | None = None
    eps: float = 0.0


def settings(config: Mapping[str, Any]) -> tuple[float, Scaling]:
    """Theta, and the scaling as a tuple: () for none, else its type and the type's numbers (see _frequencies).

    `rope_scaling` and its successor `rope_parameters` are both understood. Raises InputError.
    """
    parameters = _parameters(config)
    theta = read.number(parameters, "rope_theta", read.number(config, "rope_theta", 10000.0))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind in ("default", "mrope"):  # of images, whose text has one position a token
        return theta, ()
    if kind in ("linear", "dynamic"):
        return theta, (kind, read.number(parameters, "factor"))
    if kind == "proportional":
        return theta, (
            kind,
            read.number(parameters, "factor", 1.0),
            read.number(parameters, "partial_rotary_factor", 1.0),
        )
    if kind not in TYPES:
        raise InputError(
            f"config.json: rope type {read.shown(kind)} is not in this version of Noria; known: {', '.join(TYPES)}"
        )
    most = context = read.integer(config, "max_position_embeddings", 2048)
    for place in (parameters, config):
        context = _first_context(place, context)
    if kind == "yarn":
        require(theta > 1, f"config.json: rope_theta is {theta:g}: yarn needs one above 1")
        return theta, _yarn(parameters, float(context))
    if kind == "longrope":
        return theta, _longrope(parameters, float(context), most)
    factors = [read.number(parameters, key) for key in ("factor", "low_freq_factor", "high_freq_factor")]
    require(
        factors[1] <= factors[2],
        f"config.json: low_freq_factor ({factors[1]}) must not be above high_freq_factor ({factors[2]})",
    )
    return theta, ("llama3", *factors, float(context))


def score_scale(config: Mapping[str, Any]) -> float:
    """What `mscale_all_dim` of a rope that is scaled makes of the scores of latent attention (DeepSeek-V2): 1 without it."""
    parameters = _parameters(config)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default" or not parameters.get("mscale_all_dim"):
        return 1.0
    growth = math.log(max(read.number(parameters, "factor"), 1.0))
    return (0.1 * read.number(parameters, "mscale_all_dim") * growth + 1) ** 2


def _first_context(place: Mapping[str, Any], default: int) -> int:
    """The context of the first training; `original_max_position_embeddings` is published as a whole float too."""
    key = "original_max_position_embeddings"
    found = place.get(key)
    return read.integer({key: int(found) if isinstance(found, float) and found.is_integer() else found}, key, default)


def _yarn(parameters: Mapping[str, Any], context: float) -> Scaling:
    """("yarn", scale, context, factor, fast, slow, truncated); the scale of cosines and sines is YaRN's (2309.00071)."""
    factor = read.number(parameters, "factor")
    require(factor * context < 2**31, f"config.json: factor is {factor:g}: the context would be too long")
    growth = math.log(max(factor, 1.0))
    scale, names = 0.1 * growth + 1, ("mscale", "mscale_all_dim")
    if all(parameters.get(name) for name in names):
        above, below = (0.1 * read.number(parameters, name) * growth + 1 for name in names)
        scale = above / below
    fast, slow = read.number(parameters, "beta_fast", 32.0), read.number(parameters, "beta_slow", 1.0)
    require(slow <= fast, f"config.json: beta_slow ({slow:g}) must not be above beta_fast ({fast:g})")
    truncated = read.flag(parameters, "truncate", True)
    return "yarn", read.number(parameters, "attention_factor", scale), context, factor, fast, slow, truncated


def _longrope(parameters: Mapping[str, Any], context: float, most: int) -> Scaling:
    """("longrope", scale, context, *factors) with the factors for the context of the first training.

    A longer sequence has other factors, for all of its positions, the cached ones too: see `context`.
    """
    factor = read.number(parameters, "factor", most / context)
    scale = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 and context > 1 else 1.0
    found = parameters.get("short_factor")
    listed = isinstance(found, list)
    require(listed, f"config.json: short_factor is {read.shown(found)}: it must be a list of numbers")
    short = [read.number({"short_factor": one}, "short_factor") for one in found or []]
    return "longrope", read.number(parameters, "attention_factor", scale), context, *short


def context(scaling: Scaling, most: int) -> int:
    """The positions that a model has, of which its config.json says `most`.

    YaRN's has its factor times those of its first training, which a config.json may leave at the old number; linear scaling
    has its factor times `most`, as vLLM takes it. longrope and dynamic end as `end_words` says.
    """
    if scaling and scaling[0] == "linear":
        require(most * scaling[1] < 2**31, f"config.json: factor is {scaling[1]:g}: the context would be too long")
        return max(1, int(most * scaling[1]))
    if scaling and scaling[0] == "yarn":
        return max(most, int(scaling[2] * scaling[3]))
    return min(most, int(scaling[2])) if scaling and scaling[0] == "longrope" else most


def end_words(scaling: Scaling) -> str:
    """Why no position beyond the context can be computed, or nothing: with these types the turn of a position would
    depend on what comes after it, in transformers on how many tokens are given at once.
    """
    kind = scaling[0] if scaling else "default"
    words = {
        "dynamic": "rope type dynamic rotates all positions differently beyond it, which Noria does not compute",
        "longrope": "rope type longrope has other factors beyond it, which Noria does not compute",
    }
    return words.get(kind, "")


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    require(isinstance(parameters, Mapping), f"config.json: rope_scaling is {read.shown(parameters)}: no object")
    if unknown := [key for key, value in parameters.items() if key not in KEYS and value is not None]:
        raise read.UnknownKeys(unknown, parameters[unknown[0]], ("rope_scaling", "rope_parameters"))
    return parameters


def rotated_size(config: Mapping[str, Any], head_dim: int, part: bool) -> int:
    """R: how many numbers of each head are rotated, all unless a `part` may be. Raises InputError."""
    parameters = _parameters(config)
    for place in () if part else (config, parameters):
        read.only(place, "partial_rotary_factor", 1.0, "Noria computes this family with all of each head rotated")
    factor = read.number(parameters, "partial_rotary_factor", read.number(config, "partial_rotary_factor", 1.0))
    kind = parameters.get("rope_type") or parameters.get("type")
    size = head_dim if kind == "proportional" and factor <= 1 else int(head_dim * factor)
    right = factor <= 1 and size >= 2 and size % 2 == 0
    require(right, f"config.json: {size} of head_dim {head_dim} are rotated: rotary positions need an even number")
    short = parameters.get("short_factor")
    if isinstance(short, list):
        require(
            len(short) == size // 2, f"config.json: short_factor has {len(short)} numbers, it must have {size // 2}"
        )
    return size


def by_kind(config: Mapping[str, Any], kinds: Iterable[str], head_dim: int) -> dict[str, Turn | None]:
    """Theta, scaling and R of each kind of layer, of which `rope_parameters` has an object each; None where it is null.

    Raises InputError.
    """
    parameters: Any = config.get("rope_parameters")
    found = {kind: _of_kind(config, parameters, kind) for kind in sorted({*kinds})}
    return {
        kind: None if its is None else (*settings(its), rotated_size(its, head_dim, True))
        for kind, its in found.items()
    }


def _of_kind(config: Mapping[str, Any], parameters: Any, kind: str) -> dict[str, Any] | None:
    """What a config.json says of the rope of one kind of layer alone; None: it has none. Raises InputError."""
    known = isinstance(parameters, Mapping) and isinstance(parameters.get(kind, 0), Mapping | None)
    require(known, f"config.json: rope_parameters is {read.shown(parameters)}: it must have an object {kind}")
    read.objects_alone(parameters, "rope_parameters")
    rope = parameters[kind]
    if rope is None:
        return None
    keys = ("rope_theta", "max_position_embeddings", "original_max_position_embeddings")
    its = {"rope_parameters": rope} | {key: config.get(key) for key in keys}
    theta = rope.get("rope_theta") is not None or its["rope_theta"] is not None
    require(theta, f"config.json: rope_theta of {kind} in rope_parameters is missing")
    share = config.get("partial_rotary_factor")
    require(
        share in (None, 1.0) or rope.get("partial_rotary_factor") is not None,
        f"config.json: partial_rotary_factor is {read.shown(share)}: {kind} of rope_parameters does not say its own,"
        " which it must where not all of each head is rotated",
    )
    return its


def tables(
    theta: float, scaling: Scaling, size: int, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines [T, 1, R] and sines [T, 1, R/2] of positions [T], in `dtype`.

    Angles are computed in float32 as transformers does, whatever the half precision; in float64 they are float64, where
    transformers keeps float32: at position p the angle differs by up to p * 6e-8.
    """
    table = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions[:, None].to(table) * _frequencies(theta, size, scaling, table, positions.device)
    found = angles.cos(), angles.sin()
    if scaling and scaling[0] in ("yarn", "longrope"):
        found = found[0].mul_(scaling[1]), found[1].mul_(scaling[1])
    cosines, sines = (turn.to(dtype)[:, None] for turn in found)
    return torch.cat((cosines, cosines), dim=-1), sines


@lru_cache(maxsize=16)
def _frequencies(theta: float, size: int, scaling: Scaling, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[R/2] radians per position.

    linear: all slowed by `factor`; dynamic: none up to the context; longrope: each by its own (LongRoPE, arXiv 2402.13753).
    proportional: the first `part` of them, as those of the whole head are; the others do not turn (Gemma 4).
    llama3: long wavelengths slowed by `factor`, a smooth ramp between (Llama 3.1). yarn: those that turn less than `slow`
    times in the context slowed by `factor`, those that turn more than `fast` times left, a ramp over the indices between
    (YaRN, arXiv 2309.00071).
    """
    exponents = torch.arange(0, size, 2, dtype=torch.int64).to(dtype) / size
    frequencies = 1.0 / theta**exponents
    kind, *numbers = scaling or ("default",)
    if kind == "linear":
        frequencies = frequencies / numbers[0]
    elif kind == "longrope":
        frequencies = frequencies / torch.tensor(numbers[2:], dtype=dtype)
    elif kind == "yarn":
        _, context, factor, fast, slow, truncated = numbers
        first, last = (
            size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow)
        )
        first, last = (math.floor(first), math.ceil(last)) if truncated else (first, last)
        first, last = max(first, 0), min(last, size - 1)
        ramp = (torch.arange(size // 2, dtype=dtype) - first) / (last - first if last != first else 0.001)
        frequencies = torch.lerp(frequencies, frequencies / factor, ramp.clamp(0, 1))
    elif kind == "proportional":
        factor, part = numbers
        turned = torch.arange(size // 2) < int(part * size // 2)
        frequencies = torch.where(turned, frequencies / factor, 0.0)
    elif kind == "llama3":
        factor, low, high, context = numbers
        wavelengths = 2 * math.pi / frequencies
        ramp = (context / wavelengths - low) / (high - low)
        smooth = (1 - ramp) * frequencies / factor + ramp * frequencies
        slowed = torch.where(wavelengths > context / low, frequencies / factor, smooth)
        frequencies = torch.where(wavelengths < context / high, frequencies, slowed)
    return frequencies.to(device)


def tables_by(
    turns: Iterable[Turn | None], positions: torch.Tensor, dtype: torch.dtype
) -> dict[Turn, tuple[torch.Tensor, torch.Tensor]]:
    """The tables of each of these turns, by it."""
    return {turn: tables(*turn, positions, dtype) for turn in {*turns} if turn}


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Heads [T, N, D] turned by their positions: the first half of R pairs with the second, as in transformers."""
    size = cosines.shape[-1]
    half = size // 2
    turned = heads[..., :size] * cosines
    turned[..., :half].addcmul_(heads[..., half:size], sines, value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sines)
    return turned if size == heads.shape[-1] else torch.cat((turned, heads[..., size:]), dim=-1)


def rotate_pairs(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Heads [T, N, D] turned by their positions, where of the first R numbers each of even index pairs with the one behind it.

    In the dtype of the cosines and sines (of `tables`), which may be wider than that of the heads.
    """
    size = cosines.shape[-1]
    even, odd = heads[..., 0:size:2], heads[..., 1:size:2]
    cosines = cosines[..., : sines.shape[-1]]
    turned = torch.stack((even * cosines - odd * sines, odd * cosines + even * sines), dim=-1)
    turned = turned.flatten(-2).to(heads.dtype)
    return turned if size == heads.shape[-1] else torch.cat((turned, heads[..., size:]), dim=-1)
