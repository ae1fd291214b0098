"""Floats of 4 bits by groups, beside numpy that knows the formats' definitions alone, and what others make of the bytes."""

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from counts import count
from noria import kinds
from noria.errors import InputError


def e2m1(code):
    """What a code means: sign, 2 bits of exponent with a bias of 1, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    value = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -value if code & 8 else value


CODES = np.array([e2m1(code) for code in range(16)])


def dense(codes, scales, inputs, group):
    """The numbers in float64 of bytes [outputs, half of the inputs] and scales [outputs, groups]."""
    numbers = [
        [CODES[row[i // 2] >> 4 * (i % 2) & 15] * its[i // group] for i in range(inputs)]
        for row, its in zip(codes, scales, strict=True)
    ]
    return np.array(numbers)


def decoded(encoding, fields, shape, dtype=torch.float64, **settings):
    kind, into = (
        kinds.load("encodings", encoding),
        torch.full((1, *shape[::-1]), torch.nan, dtype=dtype).transpose(1, 2),
    )
    kind.check({name: its[None] for name, its in fields.items()}, shape, kind.DEFAULTS | settings)
    kind.decode({name: its[None] for name, its in fields.items()}, kind.DEFAULTS | settings, into)
    return into[0]


def random_bytes(random, shape, most=256):
    return torch.from_numpy(random.integers(0, most, shape).astype(np.uint8))


@pytest.mark.parametrize("number", range(count(200)))
def test_mxfp4_is_code_times_power_of_two(number):
    random = np.random.default_rng(number)
    shape = (int(random.integers(1, 30)), int(random.integers(1, 150)))
    fields = {
        "codes": random_bytes(random, (shape[0], -(-shape[1] // 2))),
        "scales": random_bytes(random, (shape[0], -(-shape[1] // 32)), 255),
    }
    fields["scales"].view(-1)[0] = 0
    if shape[1] % 2:
        fields["codes"][:, -1] &= 15
    wanted = dense(fields["codes"].numpy(), 2.0 ** (fields["scales"].double().numpy() - 127), shape[1], 32)
    assert np.array_equal(decoded("mxfp4", fields, shape).numpy(), wanted)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with np.errstate(over="ignore"):
            rounded = torch.from_numpy(wanted).float().to(dtype)
        assert torch.equal(decoded("mxfp4", fields, shape, dtype), rounded)


def test_mxfp4_is_what_transformers_makes_of_the_same_bytes():
    random = np.random.default_rng(1)
    blocks, scales = random_bytes(random, (3, 40, 5, 16)), random_bytes(random, (3, 40, 5), 255)
    theirs = convert_moe_packed_tensors(blocks, scales.clone(), dtype=torch.float32)  # [experts, inputs, outputs]
    for expert in range(3):
        fields = {"codes": blocks[expert].flatten(1), "scales": scales[expert]}
        assert torch.equal(decoded("mxfp4", fields, (40, 160), torch.float32), theirs[expert].t())


def test_powers_of_two_are_torchs_own():
    scales = torch.arange(255, dtype=torch.uint8)
    fields = {"codes": torch.full((255, 16), 0x22, dtype=torch.uint8), "scales": scales[:, None]}
    found = decoded("mxfp4", fields, (255, 32), torch.float32)
    assert torch.equal(found, scales.view(torch.float8_e8m0fnu).float()[:, None].expand(255, 32))


@pytest.mark.parametrize("shape", [(40, 96), (5, 7), (3, 33), (1, 1)])
def test_encoding_mxfp4_follows_the_specification(shape):
    random = np.random.default_rng(2)
    numbers = (random.normal(size=shape) * 10.0 ** random.integers(-6, 6, (shape[0], 1))).astype(np.float32)
    numbers[0, : shape[1] // 2] = 0.0
    fields = kinds.load("encodings", "mxfp4").encode(torch.from_numpy(numbers), {})
    wanted = np.zeros(shape)
    for row in range(shape[0]):
        for first in range(0, shape[1], 32):
            its = numbers[row, first : first + 32].astype(float)
            largest = np.abs(its).max()
            scale = 2.0 ** (np.floor(np.log2(largest)) - 2) if largest else 2.0**-127
            distances = np.abs(CODES[None, :8] * scale - np.abs(its)[:, None])
            codes = np.array([min(np.flatnonzero(one == one.min()), key=lambda code: code % 2) for one in distances])
            wanted[row, first : first + 32] = CODES[codes] * scale * np.sign(its)
    assert np.array_equal(decoded("mxfp4", fields, shape).numpy(), wanted)


def test_numbers_of_every_magnitude_of_float32_are_encoded():
    numbers = torch.ldexp(torch.ones(278), torch.arange(-149, 129).clamp(max=127)).unsqueeze(1).expand(278, 32)
    fields = kinds.load("encodings", "mxfp4").encode(numbers, {})
    found = decoded("mxfp4", fields, (278, 32))
    assert (
        torch.equal(found[22:], numbers[22:].double()) and (found[:22] - numbers[:22].double()).abs().max() <= 2.0**-129
    )


HOSTILE = [
    ("scales", 255, "1 of 4 scales are no numbers"),
    ("codes", 16, "a code stands behind the last of 33 of its row"),
]


@pytest.mark.parametrize(("name", "value", "words"), HOSTILE)
def test_fields_of_mxfp4_that_stand_for_no_numbers_are_refused(name, value, words):
    kind = kinds.load("encodings", "mxfp4")
    fields = {key: its[None] for key, its in kind.encode(torch.randn(2, 33), {}).items()}
    kind.check(fields, (2, 33), {})
    fields[name].view(-1)[-1] = value
    with pytest.raises(InputError, match=words):
        kind.check(fields, (2, 33), {})


def test_mxfp4_has_no_settings():
    with pytest.raises(InputError, match="mxfp4 has no setting 'group'"):
        kinds.load("encodings", "mxfp4").fields((4, 64), "float32", {"group": 32})
