"""bfloat16 with its exponents in fewer bits: every bit comes back, in a layout that numpy reads by its docstring."""

import numpy as np
import pytest
import torch

from counts import count
from noria import encodings
from noria.blocks import lay_out
from noria.encodings import exponent
from noria.errors import InputError
from noria.pieces import Encoded, Matrix, Wanted


def bits(numbers):
    return numbers.contiguous().view(torch.int16)


def every_number():
    """All that bfloat16 has, in random order: zeros, denormals, infinities, each nan."""
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    return order.to(torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)


def normal(shape):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()


def student(shape):
    torch.manual_seed(2)
    return (torch.distributions.StudentT(3.0).sample(shape) * 0.02).bfloat16()


def outliers(shape):
    its = normal(shape)
    its[:, ::50] *= 64
    return its


def rare(shape):
    """Normal ones with a few of everything."""
    its, random = normal(shape), np.random.default_rng(3)
    where = torch.from_numpy(random.choice(its.numel(), its.numel() // 20, replace=False))
    its.view(-1)[where] = every_number().view(-1)[: len(where)]
    return its


def stacked(pieces):
    made = [exponent.encode(numbers, {}) for numbers in pieces]
    room = max(len(its["escapes"]) for its in made)
    pads = [torch.nn.functional.pad(its["escapes"], (0, room - len(its["escapes"]))) for its in made]
    fields = {name: torch.stack([its[name] for its in made]) for name in made[0] if name != "escapes"}
    return fields | {"escapes": torch.stack(pads)}


def decoded(fields, shape, dtype=torch.bfloat16):
    into = torch.zeros(len(fields["low"]), *shape, dtype=dtype)
    exponent.check(fields, shape, {})
    exponent.decode(fields, {}, into)
    return into


SHAPES = [(1, 1), (1, 7), (3, 5), (16, 16), (9, 455), (1, 4096), (64, 65), (70, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("made", [normal, student, outliers, rare])
def test_every_bit_comes_back(made, shape):
    numbers = torch.stack([made(shape), torch.zeros(shape, dtype=torch.bfloat16)])
    assert torch.equal(bits(decoded(stacked(numbers), shape)), bits(numbers))


def test_every_number_of_bfloat16_comes_back():
    numbers = every_number()
    assert torch.equal(bits(decoded(stacked([numbers]), (256, 256))[0]), bits(numbers))


def by_numpy(fields, numbers):
    """The bits of a piece, number by number."""
    low, planes, bases, starts, escapes = (its.numpy() for its in fields.values())
    found, before = [], 0
    for i in range(numbers):
        if i % 4096 == 0:
            assert starts[i // 4096] == before
        code = sum((int(planes[p, i // 8]) >> i % 8 & 1) << p for p in range(3))
        exponent = int(bases[i // 256]) - code & 255
        if code == 7:
            exponent, before = int(escapes[before]), before + 1
        found.append((int(low[i]) & 128) << 8 | exponent << 7 | int(low[i]) & 127)
    return np.array(found, np.uint16).view(np.int16)


@pytest.mark.parametrize("number", range(count(100)))
def test_the_layout_is_that_of_the_docstring(number):
    random = np.random.default_rng(number)
    shape = (int(random.integers(1, 60)), int(random.integers(1, 200)))
    numbers = [normal, student, outliers, rare][number % 4](shape)
    fields = exponent.encode(numbers, {})
    order = {name: fields[name] for name in ("low", "planes", "bases", "starts", "escapes")}
    assert np.array_equal(by_numpy(order, numbers.numel()), bits(numbers).flatten().numpy())


def test_large_matrices_are_done_in_parts(monkeypatch):
    numbers = rare((130, 303))
    whole = exponent.encode(numbers, {})
    monkeypatch.setattr(exponent, "DECODED_NUMBERS", 4 * exponent.CHUNK)
    parts = exponent.encode(numbers, {})
    assert all(torch.equal(its, parts[name]) for name, its in whole.items())
    turned = torch.zeros(1, 303, 130, dtype=torch.bfloat16).transpose(1, 2)
    exponent.decode({name: its[None] for name, its in whole.items()}, {}, turned)
    assert torch.equal(bits(turned[0]), bits(numbers))
    exponent.check({name: its[None] for name, its in whole.items()}, (130, 303), {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_dtypes_get_the_same_numbers(dtype):
    numbers = normal((20, 70))
    assert torch.equal(decoded(stacked([numbers]), (20, 70), dtype)[0], numbers.to(dtype))


def test_a_vector_is_stored_too():
    numbers = normal((1, 5000))[0]
    into = torch.zeros(1, 5000, dtype=torch.bfloat16)
    exponent.decode(stacked([numbers]), {}, into)
    assert torch.equal(bits(into[0]), bits(numbers))


def nbytes(fields):
    return sum(its.nbytes for its in fields.values())


def test_normal_weights_take_eleven_and_a_quarter_bits():
    numbers = (torch.randn(512, 2048, generator=torch.Generator().manual_seed(4)) * 0.02).bfloat16()
    assert nbytes(exponent.encode(numbers, {})) * 8 / numbers.numel() < 11.25


@pytest.mark.parametrize("made", [outliers, student])
def test_outliers_among_256_numbers_make_few_escapes(made):
    numbers = made((256, 1024))
    fields = exponent.encode(numbers, {})
    exponents = (bits(numbers).int() >> 7 & 255).view(-1, 256)
    from_the_largest = int((exponents.amax(1, keepdim=True) - exponents >= 7).sum())
    assert len(fields["escapes"]) < 0.6 * from_the_largest and nbytes(fields) * 8 / numbers.numel() < 11.6


@pytest.mark.parametrize("numbers", [64 * 256, 66, 700])
def test_bases_leave_the_fewest_escapes(numbers):
    its = rare((1, numbers))
    exponents = np.array_split((bits(its)[0].int() >> 7 & 255).numpy(), range(256, numbers, 256))
    fewest = [min(((row > base) | (row <= base - 7)).sum() for base in range(256)) for row in exponents]
    assert len(exponent.encode(its, {})["escapes"]) == sum(fewest)


def test_numbers_with_too_many_escapes_tell_so_by_their_length():
    numbers = every_number()
    room = exponent.fields((256, 256), "bfloat16", {})["escapes"][0][0]
    assert room == 256 * 256 // 8 and len(exponent.encode(numbers, {})["escapes"]) > room


def test_the_capacity_is_less_than_plain_numbers_take():
    for shape in ((64, 256), (4096, 4096)):
        piece = encodings.capacity("exponent", [Matrix("", shape)], "bfloat16", {})
        block = lay_out("b", {"it": Wanted(shape)}, "bfloat16", {"it": Encoded("exponent", {}, piece)})
        assert block.parameters[0].nbytes < 12.2 / 16 * block.parameters[0].computed_nbytes


def test_numbers_that_bfloat16_does_not_have_are_refused():
    assert torch.equal(exponent.encode(normal((3, 5)).double(), {})["low"], exponent.encode(normal((3, 5)), {})["low"])
    with pytest.raises(InputError, match=r"torch.float32 has some that it has not"):
        exponent.encode(torch.full((3, 5), 0.1), {})
    with pytest.raises(InputError, match="exponent stores numbers of bfloat16, not float16"):
        exponent.fields((3, 5), "float16", {})
    with pytest.raises(InputError, match=r"exponent has no settings, not \['room'\]"):
        exponent.fields((3, 5), "bfloat16", {"room": 8})


def harmed(name, place, value):
    fields = stacked([rare((30, 300)), rare((30, 300))])
    fields[name][(1, *place)] = value
    return fields


HOSTILE = [
    (lambda: harmed("starts", (0,), 1), "escapes of chunk 0 begin at 1, those before end at 0"),
    (lambda: harmed("starts", (1,), 2**31 - 1), "escapes of chunk 1 begin at 2147483647"),
    (lambda: harmed("starts", (2,), -(2**31)), "escapes of chunk 2 begin at -2147483648"),
    (lambda: harmed("planes", (slice(None), 0), 255), "escapes of chunk 1 begin at"),
    (lambda: harmed("planes", (slice(None), -1), 255), "exponents are escapes, there are"),
    (
        lambda: (its := harmed("starts", (0,), 0)) | {"escapes": its["escapes"][:, :-1]},
        "exponents are escapes, there are",
    ),
    (
        lambda: (its := harmed("starts", (0,), 0)) | {"escapes": its["escapes"][:, :0]},
        "exponents are escapes, there are 0",
    ),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_escapes_out_of_order_or_bounds_are_refused(number):
    made, words = HOSTILE[number]
    fields = made()
    with pytest.raises(InputError, match=words) as error:
        exponent.check(fields, (30, 300), {})
    assert "\n" not in str(error.value)
    around = torch.zeros(2, 32, 300, dtype=torch.bfloat16)
    exponent.decode(fields, {}, around[:, 1:31])
    assert not bits(around[:, 0]).any() and not bits(around[:, 31]).any()


def test_pieces_are_encoded_together_with_room_for_the_most_escapes():
    """Of matrices that lie as they are and transposed."""
    matrices = Matrix("", (20, 30)), Matrix("", (30, 30), transposed=True)
    pieces = torch.stack([rare((50, 30)), normal((50, 30)), torch.zeros(50, 30, dtype=torch.bfloat16)])
    numbers = pieces[:, :20], pieces[:, 20:].transpose(1, 2)
    together = encodings.encode_pieces("exponent", matrices, numbers, {})
    made = [encodings.encode("exponent", matrices, [its[piece] for its in numbers], {}) for piece in range(3)]
    lengths = {name: max(len(its[name]) for its in made) for name in made[0]}
    fitted = encodings.fitted(encodings.capacity("exponent", matrices, "bfloat16", {}), lengths)
    assert torch.equal(
        encodings.packed_pieces(fitted, together), torch.stack([encodings.packed(fitted, its) for its in made])
    )
    assert together["0.escapes"].shape == (3, lengths["0.escapes"]) and not together["0.escapes"][2].any()
