"""Whole numbers of 4 or 8 bits with a scale, and perhaps a zero, for a group of inputs: what int4 and int8 share.

`codes` uint8: a number is (code - zero) x scale. Of 8 bits [outputs, inputs]; of 4 bits [outputs, half of the inputs, rounded
up], two a byte, the first input in the low half. `scales` [outputs, groups] of `scale_dtype`, of either sign. `zeros` uint8
[outputs, groups] unless symmetric, where the zero is 8 or 128; of 4 bits up to 16, which some files of GPTQ mean. `permutation`
int32 [inputs] if permuted: the place of each input in the order in which they make up groups, so that input i belongs to the
group permutation[i] // group_size; codes stay in the order of the inputs. A g_idx of GPTQ or compressed-tensors is
g_idx.argsort(stable=True).argsort(). group_size -1: one group, a whole row (a channel).
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.encodings import _groups, _scales
from noria.errors import require
from noria.kernels.stored import BYTES, HALVES, NUMBERS, WHOLE_ROW, TileForm

LEAST = {"bfloat16": 2.0**-120, "float16": 2.0**-24, "float32": 2.0**-120}  # dtypes of scales, and the least scale
# How much of a group's range the codes span: cutting its ends makes the steps smaller, more than all lets the zero fit.
SHARES = {4: (1.05, 1.0, 0.94, 0.88, 0.82, 0.76, 0.68, 0.6), 8: (1.004, 1.0, 0.99, 0.98, 0.96, 0.93)}


def fields(bits: int, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """`codes`, `scales`, and what the settings ask for beside them."""
    outputs, inputs = _groups.matrix(f"int{bits}", shape)
    groups = _groups.count(inputs, _group(bits, settings, inputs))
    found: dict[str, tuple[tuple[int, ...], str]] = {
        "codes": ((outputs, _groups.count(inputs * bits, 8)), "uint8"),
        "scales": ((outputs, groups), settings["scale_dtype"]),
    }
    if not settings["symmetric"]:
        found["zeros"] = (outputs, groups), "uint8"
    if settings["permuted"]:
        found["permutation"] = (inputs,), "int32"
    return found


def _group(bits: int, settings: Mapping[str, Any], inputs: int) -> int:
    """The size of a group. Raises InputError for settings that are none."""
    both = (True, False)
    choices = {"group_size": None, "symmetric": both, "permuted": both, "scale_dtype": tuple(LEAST)}
    _groups.check_settings(f"int{bits}", settings, choices)
    size = settings["group_size"]
    right = type(size) is int and (size == -1 or (16 <= size and size % 16 == 0))
    require(right, f"int{bits}: group_size is {str(size)[:80]!r}, it must be a multiple of 16, or -1 for a whole row")
    return min(size, inputs) if size > 0 else inputs


def encode(bits: int, numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Clipping is searched: a group's scale is the one of a few, and of a last one fitted to its codes, that leaves the
    least squared error. Where permuted, inputs of like size share groups."""
    inputs = numbers.shape[1]
    group, whole = _group(bits, settings, inputs), _groups.finite(f"int{bits}", numbers)
    order = whole.abs().amax(0).argsort(stable=True) if settings["permuted"] else None
    found: dict[str, list[torch.Tensor]] = {}
    for some in whole.split(max(1, _groups.CHUNK // inputs)):
        groups = _groups.grouped(some if order is None else some[:, order], group)
        scales, zeros = _searched(groups, bits, settings)
        codes = _codes(groups, scales, zeros, bits)[1].flatten(1)[:, :inputs].to(torch.uint8)
        codes = codes if order is None else codes[:, order.argsort()]
        its = {"codes": _groups.packed(codes) if bits == 4 else codes, "scales": scales.to(_scale_dtype(settings))}
        for name, value in (its | ({} if settings["symmetric"] else {"zeros": zeros.to(torch.uint8)})).items():
            found.setdefault(name, []).append(value)
    fields = {name: torch.cat(values) for name, values in found.items()}
    return fields if order is None else fields | {"permutation": order.argsort().int()}


def form(bits: int, settings: Mapping[str, Any]) -> TileForm | None:
    """How tiles are decoded, unless inputs make up groups in another order."""
    if settings["permuted"]:
        return None
    group = settings["group_size"] if settings["group_size"] > 0 else WHOLE_ROW
    return TileForm(HALVES if bits == 4 else BYTES, NUMBERS, group, zeroed=not settings["symmetric"])


def quick(bits: int, numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The scale by a group's extremes: of both where there are zeros, else of the larger one, which gets code 0."""
    inputs, top = numbers.shape[1], 2**bits - 1
    groups = _groups.grouped(numbers.to(_scales.wide(numbers.dtype)), _group(bits, settings, inputs))
    least, most = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
    if settings["symmetric"]:
        wanted = torch.where(most > -least, most, least) / -(2 ** (bits - 1))
    else:
        wanted = _scales.quotient(most - least, top)
    stored = wanted.masked_fill_(wanted.abs() < LEAST[settings["scale_dtype"]], LEAST[settings["scale_dtype"]])
    stored = stored.to(_scale_dtype(settings))
    scales = stored.to(groups.dtype)
    zeros = 2 ** (bits - 1) if settings["symmetric"] else (least / scales).neg_().round_().clamp_(0, top)
    steps = (groups / scales[..., None]).add_(zeros if settings["symmetric"] else zeros[..., None])
    codes = steps.round_().clamp_(0, top).to(torch.uint8).flatten(1)[:, :inputs]
    found = {"codes": _groups.packed(codes) if bits == 4 else codes.contiguous(), "scales": stored}
    return found if settings["symmetric"] else found | {"zeros": zeros.to(torch.uint8)}


def rows(settings: Mapping[str, Any]) -> int:
    """Each output has its own scales; all share a permutation."""
    return 0 if settings["permuted"] else 1


def _scale_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    found: torch.dtype = getattr(torch, settings["scale_dtype"])
    return found


def _codes(
    groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [R, G, group] in steps from the lowest code on, and the codes next to them; float32."""
    steps = (groups / scales[..., None]).add_(zeros[..., None])
    return steps, steps.round().clamp_(0, 2**bits - 1)


def _searched(groups: torch.Tensor, bits: int, settings: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, as they are stored, and zeros [R, G] float32 of numbers [R, G, group]."""
    least, most, top = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0), 2**bits - 1
    middle = torch.full_like(most, 2.0 ** (bits - 1))
    extreme = torch.where(most > -least, most, least)  # gets code 0: there is one more below the middle than above it
    best: tuple[torch.Tensor, ...] = torch.full_like(most, torch.inf), middle, middle  # errors, scales, zeros

    def tried(scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
        steps, codes = _codes(groups, scales, zeros, bits)
        errors = codes.sub_(steps).square_().sum(2).sqrt_() * scales.abs()
        better = errors < best[0]
        return tuple(torch.where(better, new, old) for new, old in zip((errors, scales, zeros), best, strict=True))

    for share in SHARES[bits]:
        if settings["symmetric"]:
            best = tried(_stored(extreme * (-share / 2 ** (bits - 1)), settings), middle)
        else:
            scales = _stored((most - least) * (share / top), settings)
            best = tried(scales, (-least * share / scales).round_().clamp_(0, top))
    distances = _codes(groups, best[1], best[2], bits)[1].sub_(best[2][..., None])
    fitted = (groups * distances).sum(2) / distances.square().sum(2).clamp(min=1)
    _, scales, zeros = tried(_stored(fitted, settings), best[2])
    return scales, zeros


def _stored(scales: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """Scales as they are when they have been stored, and none 0. Raises InputError for those that are too large."""
    found, least = scales.to(_scale_dtype(settings)).float(), LEAST[settings["scale_dtype"]]
    require(bool(torch.isfinite(found).all()), f"numbers are too large for a scale of {settings['scale_dtype']}")
    return found.masked_fill_(found.abs() < least, least)


def decode(bits: int, fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any], into: torch.Tensor) -> None:
    """(code - zero) x scale, rounded once."""
    dtype, inputs = _scales.wide(into.dtype), into.shape[2]
    group = _group(bits, settings, inputs)
    for piece, rows, _ in _scales.parts(into, 1):
        codes, scales = fields["codes"][piece, rows], fields["scales"][piece, rows].to(dtype)
        zeros = None if settings["symmetric"] else fields["zeros"][piece, rows].to(dtype)
        values = (_groups.unpacked(codes, inputs) if bits == 4 else codes).to(dtype)
        if zeros is None:
            values.sub_(2 ** (bits - 1))
        if settings["permuted"]:
            of_input = (fields["permutation"][piece].long() // group).clamp_(0, scales.shape[1] - 1)
            scales, zeros = scales[:, of_input], None if zeros is None else zeros[:, of_input]
        into[piece, rows].copy_(_groups.scale(values, 1 if settings["permuted"] else group, scales, zeros))


def most(bits: int, fields: Mapping[str, torch.Tensor]) -> float:
    """The largest scale, as many times as there are codes."""
    return float(fields["scales"].abs().max()) * 2**bits


def check(bits: int, fields: Mapping[str, torch.Tensor], shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """Scales are finite, zeros are ones that a code can be less, a permutation has each input once."""
    require(bool(torch.isfinite(fields["scales"]).all()), "a scale is inf or nan")
    if bits == 4:
        _groups.check_halves(fields["codes"], shape[1])
        if not settings["symmetric"]:
            most = int(fields["zeros"].max())
            require(most <= 16, f"a zero is {most}, they are 16 at most")
    if settings["permuted"]:
        places = fields["permutation"].long().sort(1).values
        right = bool((places == torch.arange(shape[1], device=places.device)).all())
        require(right, f"its permutation has not each of the {shape[1]} inputs once")
