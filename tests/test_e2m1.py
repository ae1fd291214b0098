"""Floats of 4 bits by groups, beside numpy that knows the formats' definitions alone, and what others make of the bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from counts import count
from noria import kinds
from noria.encodings import _e2m1
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


def published(case):
    """What others made: data/README.md says how."""
    tensors = load_file(Path(__file__).parent / "data/packed/packed.safetensors")
    return {name.removeprefix(case + "."): its for name, its in tensors.items() if name.startswith(case + ".")}


def test_codes_are_those_of_ml_dtypes():
    its = published("e2m1")
    assert torch.equal(_e2m1.nearest(its["numbers"]), its["codes"])


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
    ("mxfp4", "scales", 255, "1 of 4 scales are no numbers"),
    ("mxfp4", "codes", 16, "a code stands behind the last of 33 of its row"),
    ("nvfp4", "codes", 16, "a code stands behind the last of 33 of its row"),
    ("nvfp4", "scales", 127, "a scale is nan"),
    ("nvfp4", "scales", 255, "a scale is nan"),
    ("nvfp4", "tensor_scale", torch.nan, "the scale of a tensor is not a number above 0"),
    ("nvfp4", "tensor_scale", torch.inf, "the scale of a tensor is not a number above 0"),
    ("nvfp4", "tensor_scale", 0.0, "the scale of a tensor is not a number above 0"),
]


@pytest.mark.parametrize(("encoding", "name", "value", "words"), HOSTILE)
def test_fields_that_stand_for_no_numbers_are_refused(encoding, name, value, words):
    kind = kinds.load("encodings", encoding)
    fields = {key: its[None] for key, its in kind.encode(torch.randn(2, 33), kind.DEFAULTS).items()}
    kind.check(fields, (2, 33), kind.DEFAULTS)
    fields[name].view(-1)[-1] = value
    with pytest.raises(InputError, match=words):
        kind.check(fields, (2, 33), kind.DEFAULTS)


@pytest.mark.parametrize(
    ("encoding", "settings", "words"),
    [
        ("mxfp4", {"group": 32}, "mxfp4 has no setting 'group'"),
        ("nvfp4", {}, "nvfp4 needs the setting 'tensor_scale'"),
        ("nvfp4", {"tensor_scale": "adds"}, "tensor_scale is 'adds', it must be one of"),
    ],
)
def test_settings_that_they_do_not_have_are_refused(encoding, settings, words):
    with pytest.raises(InputError, match=words):
        kinds.load("encodings", encoding).fields((4, 64), "float32", settings)


# ---- NVFP4


def e4m3(code):
    """What a code means: sign, 4 bits of exponent with a bias of 7, 3 of mantissa."""
    exponent, mantissa = code >> 3 & 15, code & 7
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if code & 128 else value


E4M3 = np.array([e4m3(code) for code in range(256)])


@pytest.mark.parametrize("tensor_scale", ["multiplies", "divides"])
@pytest.mark.parametrize("number", range(count(200)))
def test_nvfp4_is_code_times_scale_of_group_and_tensor(number, tensor_scale):
    random = np.random.default_rng(number)
    shape = (int(random.integers(1, 30)), int(random.integers(1, 150)))
    scales = random_bytes(random, (shape[0], -(-shape[1] // 16)), 127)
    of_tensor = torch.tensor([random.random() * 10.0 ** random.integers(-6, 6)], dtype=torch.float32)
    fields = {"codes": random_bytes(random, (shape[0], -(-shape[1] // 2))), "scales": scales, "tensor_scale": of_tensor}
    if shape[1] % 2:
        fields["codes"][:, -1] &= 15
    for dtype, wide in ((torch.float64, np.float64), (torch.float32, np.float32), (torch.bfloat16, np.float32)):
        its, other = E4M3[scales.numpy()].astype(wide), of_tensor.numpy().astype(wide)
        together = its * other if tensor_scale == "multiplies" else its / other
        wanted = torch.from_numpy(dense(fields["codes"].numpy(), together, shape[1], 16).astype(wide)).to(dtype)
        assert torch.equal(decoded("nvfp4", fields, shape, dtype, tensor_scale=tensor_scale), wanted)


def test_what_compressed_tensors_packs_as_nvfp4_is_decoded_as_it_does():
    its = published("nvfp4")
    fields = {"codes": its["weight_packed"], "scales": its["weight_scale"], "tensor_scale": its["weight_global_scale"]}
    found = decoded("nvfp4", fields, (8, 96), torch.bfloat16, tensor_scale="divides")
    assert torch.equal(found, its["weight"])


@pytest.mark.parametrize("tensor_scale", ["multiplies", "divides"])
@pytest.mark.parametrize("shape", [(40, 96), (5, 7), (3, 33), (1, 1)])
def test_encoding_nvfp4_takes_the_nearest_codes_under_the_nearest_scales(shape, tensor_scale):
    random = np.random.default_rng(3)
    numbers = random.normal(size=shape) * 10.0 ** random.integers(-2, 2, (shape[0], 1))
    numbers[0, : shape[1] // 2] = 0.0
    settings = {"tensor_scale": tensor_scale}
    fields = kinds.load("encodings", "nvfp4").encode(torch.from_numpy(numbers), settings)
    found = decoded("nvfp4", fields, shape, **settings).numpy()
    unit = max(np.abs(numbers).max(), 2.0**-100) / 6 / 448
    for row in range(shape[0]):
        for first in range(0, shape[1], 16):
            its = numbers[row, first : first + 16]
            scale = E4M3[:127][np.abs(E4M3[:127] - np.abs(its).max() / 6 / unit).argmin()] * unit
            best = np.abs(CODES[None] * scale - its[:, None]).min(1)
            assert (np.abs(found[row, first : first + 16] - its) <= best + 1e-5 * np.abs(its)).all()


def test_a_matrix_of_zeros_stays_one():
    for encoding in ("mxfp4", "nvfp4"):
        kind = kinds.load("encodings", encoding)
        fields = kind.encode(torch.zeros(3, 40), kind.DEFAULTS)
        assert not decoded(encoding, fields, (3, 40)).any() and not fields["codes"].any()
