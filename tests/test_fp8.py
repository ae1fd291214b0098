"""FP8 encodings beside numpy that knows the format's definition alone, and words for what they do not hold."""

import numpy as np
import pytest
import torch

from noria import encodings, kinds
from noria.blocks import lay_out
from noria.encodings import _kernels
from noria.errors import InputError
from noria.pieces import Encoded, Matrix, Wanted

KINDS = ["fp8_block", "fp8_channel"]


def e4m3(code):
    """What a code means: sign, 4 bits of exponent with a bias of 7, 3 of mantissa; no infinities, 127 is none."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if code & 127 == 127:
        return np.nan
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


CODES = np.array([e4m3(code) for code in range(256)])


def settings_of(encoding, **settings):
    return kinds.load("encodings", encoding).DEFAULTS | settings


def random_fields(shape, blocks, powers, seed=0):
    """All codes and scales of every magnitude, of one piece."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, shape, np.uint8)
    codes[(codes & 127) == 127] = 0
    if powers:
        scales = random.integers(0, 255, blocks, np.uint8)
        scales.flat[0] = 0
    else:
        scales = (2.0 ** random.integers(-140, 100, blocks) * random.random(blocks)).astype(np.float32)
    return {"codes": torch.from_numpy(codes)[None], "scales": torch.from_numpy(scales)[None]}


def dense(fields, rows, columns):
    """The numbers in float64, of one piece."""
    codes, scales = fields["codes"][0].numpy(), fields["scales"][0].numpy()
    scales = 2.0 ** (scales.astype(np.float64) - 127) if scales.dtype == np.uint8 else scales.astype(np.float64)
    its = scales.repeat(rows, 0).repeat(columns, 1)[: codes.shape[0], : codes.shape[1]]
    return CODES[codes] * its


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize(("shape", "block"), [((5, 7), [128, 128]), ((300, 130), [128, 128]), ((9, 20), [2, 3])])
def test_a_number_is_its_code_times_the_scale_of_its_block(shape, block, powers):
    settings = settings_of("fp8_block", block_size=block, scale_dtype="e8m0" if powers else "float32")
    fields = random_fields(shape, (-(-shape[0] // block[0]), -(-shape[1] // block[1])), powers)
    into = torch.empty(1, *shape, dtype=torch.float64)
    kinds.load("encodings", "fp8_block").decode(fields, settings, into)
    assert np.array_equal(into[0].numpy(), dense(fields, *block))


@pytest.mark.parametrize("powers", [False, True])
def test_a_number_is_its_code_times_the_scale_of_its_output(powers):
    settings = settings_of("fp8_channel", scale_dtype="e8m0" if powers else "float32")
    fields = random_fields((40, 23), (40, 1), powers)
    into = torch.empty(1, 40, 23, dtype=torch.float64)
    kinds.load("encodings", "fp8_channel").decode(fields, settings, into)
    assert np.array_equal(into[0].numpy(), dense(fields, 1, 23))


def test_products_are_made_in_float32_and_rounded_once():
    fields = random_fields((16, 16), (2, 3), powers=False)
    settings = settings_of("fp8_block", block_size=[8, 6])
    wide = dense(fields, 8, 6).astype(np.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        into = torch.empty(1, 16, 16, dtype=dtype)
        kinds.load("encodings", "fp8_block").decode(fields, settings, into)
        assert torch.equal(into[0], torch.from_numpy(wide).to(dtype))


@pytest.mark.parametrize("encoding", KINDS)
def test_large_matrices_are_decoded_in_parts(encoding, monkeypatch):
    numbers = torch.randn(2, 70, 50, generator=torch.Generator().manual_seed(1))
    kind, settings = kinds.load("encodings", encoding), settings_of(encoding) | {"block_size": [16, 16]}
    made = [kind.encode(its, settings) for its in numbers]
    fields = {name: torch.stack([its[name] for its in made]) for name in made[0]}
    whole = torch.empty_like(numbers)
    kind.decode(fields, settings, whole)
    monkeypatch.setattr("noria.encodings._scales.DECODED_NUMBERS", 900)
    parts = torch.empty_like(numbers)
    kind.decode(fields, settings, parts)
    assert torch.equal(whole, parts) and (whole - numbers).abs().max() < 0.25


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("encoding", KINDS)
def test_encoding_takes_the_nearest_code_under_the_least_scale(encoding, powers):
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randn(40, 60, generator=generator) * 10.0 ** torch.randint(-6, 6, (40, 1), generator=generator)
    numbers[3] = 0.0
    settings = settings_of(encoding, scale_dtype="e8m0" if powers else "float32") | {"block_size": [10, 20]}
    rows, columns = (10, 20) if encoding == "fp8_block" else (1, 60)
    fields = {name: its[None] for name, its in kinds.load("encodings", encoding).encode(numbers, settings).items()}
    ones = {"codes": torch.full_like(fields["codes"], 0x38), "scales": fields["scales"]}  # 1.0
    scales, largest = dense(ones, rows, columns), np.zeros(numbers.shape)
    for row in range(0, 40, rows):
        for column in range(0, 60, columns):
            its = slice(row, row + rows), slice(column, column + columns)
            largest[its] = np.abs(numbers.numpy()[its]).max()
    filled = largest > 0
    assert (scales >= largest / 448 * (1 - 1e-6))[filled].all() and (scales <= largest / 448 * 2)[filled].all()
    finite = CODES[~np.isnan(CODES)]
    scaled = numbers.double().numpy() / scales
    nearest = np.abs(finite[None, None] - scaled[:, :, None]).min(2)
    assert (np.abs(dense(fields, rows, columns) / scales - scaled) <= nearest + np.abs(scaled) * 1e-6).all()


@pytest.mark.parametrize("encoding", KINDS)
def test_a_matrix_of_zeros_stays_one(encoding):
    for scale_dtype in ("float32", "e8m0"):
        kind, settings = kinds.load("encodings", encoding), settings_of(encoding, scale_dtype=scale_dtype)
        fields = {name: its[None] for name, its in kind.encode(torch.zeros(3, 4), settings).items()}
        into = torch.ones(1, 3, 4)
        kind.decode(fields, settings, into)
        kind.check(fields, (3, 4), settings)
        assert not into.any()


HOSTILE = [
    ({"scale_dtype": "float32"}, "scales", torch.nan, "no numbers from 0 on, such as nan"),
    ({"scale_dtype": "float32"}, "scales", torch.inf, "such as inf"),
    ({"scale_dtype": "float32"}, "scales", -0.5, "1 of . scales are no numbers from 0 on, such as -0.5"),
    ({"scale_dtype": "e8m0"}, "scales", 255, "no numbers"),
    ({}, "codes", 127, "a code is 127 or 255"),
    ({}, "codes", 255, "a code is 127 or 255"),
]


@pytest.mark.parametrize(("said", "name", "value", "words"), HOSTILE)
@pytest.mark.parametrize("encoding", KINDS)
def test_fields_that_stand_for_no_numbers_are_refused(encoding, said, name, value, words):
    kind, settings = kinds.load("encodings", encoding), settings_of(encoding, **said)
    fields = {key: its[None] for key, its in kind.encode(torch.ones(3, 4), settings).items()}
    kind.check(fields, (3, 4), settings)
    fields[name].view(-1)[0] = value
    with pytest.raises(InputError, match=words):
        kind.check(fields, (3, 4), settings)


@pytest.mark.parametrize(
    ("encoding", "settings", "words"),
    [
        ("fp8_block", {"block_size": [0, 128]}, "block_size is"),
        ("fp8_block", {"block_size": 128}, "block_size is 128"),
        ("fp8_block", {"block_size": [128, True]}, "block_size is"),
        ("fp8_block", {"scale_dtype": "float8"}, "scale_dtype is 'float8': it may be float32 or e8m0"),
        ("fp8_channel", {"scale_dtype": ["e8m0"]}, "scale_dtype is"),
    ],
)
def test_settings_that_they_do_not_have_are_refused(encoding, settings, words):
    with pytest.raises(InputError, match=words):
        encodings.capacity(encoding, [Matrix("", (8, 20))], "float32", settings_of(encoding, **settings))


@pytest.mark.parametrize("encoding", KINDS)
def test_vectors_and_numbers_that_are_not_finite_are_refused(encoding):
    with pytest.raises(InputError, match=r"stores matrices, not a parameter of shape \[8\]"):
        encodings.capacity(encoding, [Matrix("", (8,))], "float32", settings_of(encoding))
    for value in (torch.inf, torch.nan, 1e300):
        with pytest.raises(InputError, match="a number is infinite or none"):
            kinds.load("encodings", encoding).encode(
                torch.full((2, 2), value, dtype=torch.float64), settings_of(encoding)
            )


def test_a_weight_takes_its_code_and_its_share_of_the_scale():
    for encoding, nbytes in (("fp8_block", 256 * 384 + 6 * 4), ("fp8_channel", 256 * 384 + 256 * 4)):
        settings = settings_of(encoding)
        piece = encodings.capacity(encoding, [Matrix("", (256, 384))], "bfloat16", settings)
        block = lay_out("b", {"it": Wanted((256, 384))}, "bfloat16", {"it": Encoded(encoding, settings, piece)})
        assert sum(one.nbytes for one in block.parameters[0].piece.fields) == nbytes


# ---- kernels


@pytest.mark.parametrize("encoding", KINDS)
def test_a_kernel_is_used_where_it_gives_the_same_bits(encoding, monkeypatch):
    cpu, dtype, kind = torch.device("cpu"), torch.bfloat16, kinds.load("encodings", encoding)
    assert _kernels.decoder(encoding, cpu, dtype) == (kind.decode, "")

    def wrong(fields, settings, into):
        kind.decode(fields, settings, into)
        into[0, 0, 0] += 1

    def broken(fields, settings, into):
        raise RuntimeError("no compiler\nwas found")

    for its, why in ((kind.decode, ""), (wrong, "it gives other bits"), (broken, "it cannot be built: no compiler")):
        monkeypatch.setattr(_kernels, "_kernel", lambda name, its=its: its)
        assert _kernels._refused.__wrapped__(encoding, cpu, dtype) == why
