"""An encoding for the tests: codes of 8 bits with a scale a group along the inputs, and large numbers by themselves.

`codes` uint8 [outputs, inputs]: 128 + number / scale; 0 says that the number stands in `large`, in the order of the codes.
`scales` float32 [outputs, groups], the last group of a row may be smaller. `large` float32: at most one number in eight.
"""

import torch

from noria.errors import InputError, require

VARIABLE = ("large",)
DEFAULTS = {"group": 5}
LIMIT = 2.0  # what is larger stands by itself


def fields(shape, dtype, settings):
    outputs, inputs = shape
    group = settings["group"]
    require(type(group) is int and group > 0, f"group is {group!r}: it must be a whole number above 0")
    return {
        "codes": ((outputs, inputs), "uint8"),
        "scales": ((outputs, -(-inputs // group)), "float32"),
        "large": ((outputs * inputs // 8 + 1,), "float32"),
    }


def _of_numbers(scales, inputs, group):
    return scales.repeat_interleave(group, dim=-1)[..., :inputs]


def encode(numbers, settings):
    numbers, group = numbers.float(), settings["group"]
    is_large = numbers.abs() > LIMIT
    small = numbers.masked_fill(is_large, 0.0)
    padded = torch.nn.functional.pad(small, (0, -numbers.shape[1] % group))
    scales = padded.unflatten(1, (-1, group)).abs().amax(2).clamp(min=1e-6) / 127
    codes = 128 + (small / _of_numbers(scales, numbers.shape[1], group)).round()
    codes = codes.masked_fill(is_large, 0).to(torch.uint8)
    return {"codes": codes, "scales": scales, "large": numbers[is_large]}


def decode(fields, settings, into):
    codes = fields["codes"]
    numbers = (codes.float() - 128) * _of_numbers(fields["scales"], codes.shape[-1], settings["group"])
    for its_numbers, its_codes, large in zip(numbers, codes, fields["large"], strict=True):
        where = (its_codes == 0).flatten().nonzero().flatten()[: len(large)]
        its_numbers.view(-1)[where] = large[: len(where)]
    into.copy_(numbers)


def check(fields, shape, settings):
    scales, large = fields["scales"], fields["large"]
    require(bool((torch.isfinite(scales) & (scales > 0)).all()), "a scale is not a number above 0")
    most = int((fields["codes"] == 0).flatten(1).sum(1).max())
    if most > large.shape[1]:
        raise InputError(f"{most} codes stand for large numbers, there are {large.shape[1]}")
