"""Whole numbers of 4 and 8 bits by groups, beside numpy that knows what their docstring says alone; searched clipping."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from counts import count
from noria import encodings, kinds
from noria.errors import InputError
from noria.pieces import Matrix

KINDS = ["int4", "int8"]
SCALES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def settings_of(encoding, **settings):
    return kinds.load("encodings", encoding).DEFAULTS | settings


def codes_of(encoding, stored, inputs):
    """The codes [outputs, inputs] one by one."""
    if encoding == "int8":
        return stored.astype(np.int64)
    return np.array([[row[i // 2] >> 4 * (i % 2) & 15 for i in range(inputs)] for row in stored], np.int64)


def dense(encoding, fields, settings, shape):
    """The numbers of a piece in float64, and the scale of each."""
    codes = codes_of(encoding, fields["codes"].numpy(), shape[1])
    scales = fields["scales"].double().numpy()
    size = settings["group_size"] if settings["group_size"] > 0 else shape[1]
    places = fields["permutation"].numpy() if settings["permuted"] else np.arange(shape[1])
    groups = [int(place) // size for place in places]
    zeros = np.full(scales.shape, {"int4": 8, "int8": 128}[encoding])
    if not settings["symmetric"]:
        zeros = fields["zeros"].numpy().astype(np.int64)
    return (codes - zeros[:, groups]) * scales[:, groups], scales[:, groups]


def random_fields(random, encoding, settings, shape):
    """Any bytes where all are right, of one piece."""
    capacity = encodings.capacity(encoding, [Matrix("", shape)], "float32", settings)
    found = {}
    for one in capacity.fields:
        if one.name == "scales":
            numbers = random.normal(size=one.shape) * 10.0 ** random.integers(-3, 3, one.shape)
            found[one.name] = torch.from_numpy(numbers).to(SCALES[one.dtype])
        elif one.name == "permutation":
            found[one.name] = torch.from_numpy(random.permutation(one.shape[0]).astype(np.int32))
        else:
            most = 17 if one.name == "zeros" and encoding == "int4" else 256
            found[one.name] = torch.from_numpy(random.integers(0, most, one.shape).astype(np.uint8))
    if encoding == "int4" and shape[1] % 2:
        found["codes"][:, -1] &= 15
    return found


def random_case(number):
    random = np.random.default_rng(number)
    encoding = KINDS[number % 2]
    settings = {
        "group_size": int(random.choice([-1, 16, 32, 48, 64, 128])),
        "symmetric": bool(random.integers(2)),
        "permuted": bool(random.integers(2)),
        "scale_dtype": str(random.choice(list(SCALES))),
    }
    shape = (int(random.integers(1, 40)), int(random.integers(1, 200)))
    return encoding, settings, shape, [random_fields(random, encoding, settings, shape) for _ in range(2)]


@pytest.mark.parametrize("number", range(count(400)))
def test_a_number_is_its_code_less_the_zero_times_the_scale_of_its_group(number):
    encoding, settings, shape, made = random_case(number)
    fields, kind = (
        {name: torch.stack([its[name] for its in made]) for name in made[0]},
        kinds.load("encodings", encoding),
    )
    kind.check(fields, shape, settings)
    wanted = np.stack([dense(encoding, its, settings, shape)[0] for its in made])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        into = torch.full((2, *shape[::-1]), torch.nan, dtype=dtype).transpose(1, 2)
        kind.decode(fields, settings, into)
        rounded = torch.from_numpy(wanted)
        rounded = rounded if dtype == torch.float64 else rounded.float().to(dtype)
        assert torch.equal(into, rounded)


@pytest.mark.parametrize("encoding", KINDS)
def test_large_matrices_are_decoded_in_parts(encoding, monkeypatch):
    kind, settings = kinds.load("encodings", encoding), settings_of(encoding, permuted=True)
    numbers = torch.randn(70, 150, generator=torch.Generator().manual_seed(1))
    fields = {name: its[None] for name, its in kind.encode(numbers, settings).items()}
    whole, parts = torch.empty(1, 70, 150), torch.empty(1, 70, 150)
    kind.decode(fields, settings, whole)
    monkeypatch.setattr("noria.encodings._scales.DECODED_NUMBERS", 900)
    kind.decode(fields, settings, parts)
    monkeypatch.setattr("noria.encodings._groups.CHUNK", 450)
    again = kind.encode(numbers, settings)
    assert torch.equal(whole, parts) and all(torch.equal(its, fields[name][0]) for name, its in again.items())


def decoded(encoding, numbers, settings):
    kind = kinds.load("encodings", encoding)
    fields = {name: its[None] for name, its in kind.encode(numbers, settings).items()}
    kind.check(fields, tuple(numbers.shape), settings)
    into = torch.empty(1, *numbers.shape, dtype=torch.float64)
    kind.decode(fields, settings, into)
    return into[0], fields


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("encoding", KINDS)
def test_encoding_takes_the_nearest_codes_under_its_scales(encoding, symmetric, permuted):
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(30, 150, generator=generator) * 10.0 ** torch.randint(-12, 6, (30, 1), generator=generator)
    numbers[4], numbers[5] = 0.0, numbers[5].abs()
    settings = settings_of(encoding, symmetric=symmetric, permuted=permuted)
    found, fields = decoded(encoding, numbers, settings)
    _, scales = dense(encoding, {name: its[0] for name, its in fields.items()}, settings, numbers.shape)
    top, scales = {"int4": 15, "int8": 255}[encoding], np.abs(scales)
    inner = np.abs(numbers.numpy()) < np.abs(found.numpy()).max(1, keepdims=True)
    assert (np.abs(found.numpy() - numbers.numpy())[inner] <= scales[inner] * (0.5 + 1e-4)).mean() > 0.9
    assert (scales * top <= 2.3 * np.abs(numbers.numpy()).max(1, keepdims=True))[np.arange(30) != 4].all()
    assert not found[4].any()


def as_published(encoding, published):
    """The fields and settings of a weight that compressed-tensors packed: int32, the first code in the lowest bits."""
    bits, outputs = {"int4": 4, "int8": 8}[encoding], len(published["weight"])
    fields = {"codes": published["weight_packed"].view(torch.uint8), "scales": published["weight_scale"]}
    group = 96 // published["weight_scale"].shape[1]
    if "weight_zero_point" in published:  # packed along the outputs
        words = published["weight_zero_point"].numpy().view(np.uint32)
        rows = [words[row * bits // 32] >> row * bits % 32 & 2**bits - 1 for row in range(outputs)]
        fields["zeros"] = torch.from_numpy(np.array(rows).astype(np.uint8))
    if "weight_g_idx" in published:
        fields["permutation"] = published["weight_g_idx"].argsort(stable=True).argsort().int()
    has = {"symmetric": "zeros" not in fields, "permuted": "permutation" in fields}
    return fields, settings_of(encoding, group_size=group if group < 96 else -1, scale_dtype="float32", **has)


@pytest.mark.parametrize(
    "case", ["int4.symmetric", "int4.zeros", "int4.channel", "int4.actorder", "int8.zeros", "int8.channel"]
)
def test_what_compressed_tensors_packs_is_expressed_and_decoded_as_it_does(case):
    encoding, tensors = case[:4], load_file(Path(__file__).parent / "data/packed/packed.safetensors")
    published = {name.removeprefix(case + "."): its for name, its in tensors.items() if name.startswith(case + ".")}
    fields, settings = as_published(encoding, published)
    kind, into = kinds.load("encodings", encoding), torch.empty(1, 8, 96)
    fields = {name: its[None] for name, its in fields.items()}
    kind.check(fields, (8, 96), settings)
    kind.decode(fields, settings, into)
    assert torch.equal(into[0], published["weight"])


def squared_error(found, wanted):
    return float((found.double() - wanted.double()).square().sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_searched_clipping_is_no_worse_than_any_range_of_a_fine_grid(group_size, symmetric):
    """Beside a search by numpy over 60 ranges a group, as wide as the numbers or less."""
    numbers = torch.randn(16, 256, generator=torch.Generator().manual_seed(4)) * 0.02
    settings = settings_of("int4", group_size=group_size, symmetric=symmetric, scale_dtype="float32")
    found, _ = decoded("int4", numbers, settings)
    groups = numbers.double().numpy().reshape(-1, group_size)
    least, most = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    errors = []
    for share in np.linspace(0.41, 1.0, 60):
        if symmetric:
            scales, zeros = share * np.where(most > -least, most, least) / -8, np.full(len(groups), 8)
        else:
            scales = share * (most - least) / 15
            zeros = np.clip(np.round(-share * least / scales), 0, 15)
        codes = np.clip(np.round(groups / scales[:, None] + zeros[:, None]), 0, 15)
        errors.append((((codes - zeros[:, None]) * scales[:, None] - groups) ** 2).sum(1))
    errors = np.array(errors)
    assert errors.min(0).sum() * 0.97 < squared_error(found, numbers) < errors.min(0).sum() * 1.02 < errors[-1].sum()


def by_ranges(numbers, group=64, bits=4):
    """FlexGen's way (its compression.py): codes between the least and the largest number of a group, both in float16."""
    groups = numbers.double().numpy().reshape(-1, group)
    least, most = (edge(1, keepdims=True).astype(np.float16).astype(float) for edge in (groups.min, groups.max))
    steps = (2**bits - 1) / (most - least)
    codes = np.clip(np.round((groups - least) * steps), 0, 2**bits - 1)
    return torch.from_numpy((codes / steps + least).reshape(numbers.shape))


@pytest.mark.parametrize("weights", ["normal", "student", "outliers"])
def test_at_equal_bits_int4_is_no_worse_than_ranges_of_64(weights):
    """Those take 4.5 bits, Noria's own groups of 64 with zeros 4.375; groups of 32 without zeros 4.5."""
    torch.manual_seed(5)
    numbers = torch.randn(64, 1024) * 0.02
    if weights == "student":
        numbers = torch.distributions.StudentT(4.0).sample((64, 1024)) * 0.02
    if weights == "outliers":
        numbers[:, ::100] *= 10
    other = squared_error(by_ranges(numbers), numbers)
    for settings in [{}] if weights == "outliers" else [{}, {"group_size": 32, "symmetric": True}]:
        settings = settings_of("int4", **settings)
        found, fields = decoded("int4", numbers, settings)
        assert sum(its.nbytes for its in fields.values()) * 8 <= 4.5 * numbers.numel()
        assert squared_error(found, numbers) < other


def test_inputs_of_like_size_share_groups_where_permuted():
    torch.manual_seed(6)
    numbers = torch.randn(64, 1024) * 0.02
    numbers[:, ::100] *= 10
    errors = [
        squared_error(decoded("int4", numbers, settings_of("int4", permuted=its))[0], numbers) for its in (True, False)
    ]
    assert errors[0] < 0.85 * errors[1]


HOSTILE = [
    ("int4", {}, "scales", torch.nan, "a scale is inf or nan"),
    ("int8", {}, "scales", -torch.inf, "a scale is inf or nan"),
    ("int4", {"symmetric": False}, "zeros", 17, "a zero is 17, they are 16 at most"),
    ("int4", {}, "codes", 16, "a code stands behind the last of 33 of its row"),
    ("int4", {"permuted": True}, "permutation", 7, "has not each of the 33 inputs once"),
    ("int8", {"permuted": True}, "permutation", -1, "has not each of the 33 inputs once"),
    ("int8", {"permuted": True}, "permutation", 2**31 - 1, "has not each of the 33 inputs once"),
]


@pytest.mark.parametrize(("encoding", "said", "name", "value", "words"), HOSTILE)
def test_fields_that_stand_for_no_numbers_are_refused(encoding, said, name, value, words):
    kind, settings = kinds.load("encodings", encoding), settings_of(encoding, **said)
    made = [kind.encode(torch.randn(4, 33), settings) for _ in range(2)]
    fields = {key: torch.stack([its[key] for its in made]) for key in made[0]}
    kind.check(fields, (4, 33), settings)
    fields[name][1].view(-1)[-1] = value
    with pytest.raises(InputError, match=words):
        kind.check(fields, (4, 33), settings)
    into = torch.zeros(2, 6, 33)
    kind.decode(fields, settings, into[:, 1:5])
    assert not into[:, 0].any() and not into[:, 5].any()


WRONG = [
    ({"group_size": 0}, "group_size is '0', it must be a multiple of 16, or -1"),
    ({"group_size": -2}, "group_size is"),
    ({"group_size": 24}, "group_size is"),
    ({"group_size": 64.0}, "group_size is"),
    ({"group_size": True}, "group_size is"),
    ({"symmetric": 1}, "symmetric is '1', it must be one of"),
    ({"permuted": None}, "permuted is"),
    ({"scale_dtype": "int8"}, "scale_dtype is 'int8', it must be one of"),
    ({"more": 1}, "no setting 'more'"),
]


@pytest.mark.parametrize("encoding", KINDS)
@pytest.mark.parametrize(("said", "words"), WRONG)
def test_settings_that_they_do_not_have_are_refused(encoding, said, words):
    with pytest.raises(InputError, match=words):
        encodings.capacity(encoding, [Matrix("", (8, 20))], "float32", settings_of(encoding, **said))


@pytest.mark.parametrize("encoding", [*KINDS, "mxfp4", "nvfp4"])
def test_vectors_and_numbers_that_are_not_finite_are_refused(encoding):
    kind, settings = kinds.load("encodings", encoding), settings_of(encoding)
    with pytest.raises(InputError, match=r"encodes matrices, not what has the shape \[8\]"):
        encodings.capacity(encoding, [Matrix("", (8,))], "float32", settings)
    for value in (torch.inf, torch.nan, 1e300):
        numbers = torch.ones(4, 8, dtype=torch.float64)
        numbers[2, 1] = value
        with pytest.raises(InputError, match="row 2 has one that is none"):
            kind.encode(numbers, settings)


def test_numbers_that_a_scale_cannot_hold_are_refused():
    with pytest.raises(InputError, match="numbers are too large for a scale of float16"):
        kinds.load("encodings", "int4").encode(torch.full((2, 32), 1e7), settings_of("int4", scale_dtype="float16"))


@pytest.mark.parametrize(("said", "bits"), [({}, 4.375), ({"symmetric": True}, 4.25), ({"group_size": -1}, 4.006)])
def test_a_weight_takes_its_code_and_its_share_of_scale_and_zero(said, bits):
    piece = encodings.capacity("int4", [Matrix("", (64, 4096))], "bfloat16", settings_of("int4", **said))
    assert sum(one.nbytes for one in piece.fields) * 8 / (64 * 4096) == pytest.approx(bits, abs=1e-3)
