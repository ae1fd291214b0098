"""What every encoding keeps: its capacity, decode after encode, and words for fields that are not its own."""

import numpy as np
import pytest
import torch

from extra_kinds import extra_kinds
from noria import encodings, kinds
from noria.blocks import lay_out
from noria.errors import InputError
from noria.pieces import VIEW_ALIGNMENT, Encoded, Field, Matrix, Piece, Wanted

with extra_kinds():
    KINDS = kinds.names("encodings")
CODED = [name for name in KINDS if name != "plain"]
MOST = {
    "plain": 0.0,
    "exponent": 0.0,
    "int4": 0.35,
    "mxfp4": 0.5,
    "nvfp4": 0.35,
}  # by which a number below 2 may change; of the others
ROUGHLY = 0.25
DTYPES = {"exponent": "bfloat16"}  # of the numbers; of the others
ANY = "float32"
SHAPES = [(1, 1), (3, 5), (16, 64), (7, 33)]


@pytest.fixture(autouse=True)
def extra():
    with extra_kinds():
        yield


def parameter_of(encoding, matrices, pieces):
    """An encoded parameter of these matrices, and random numbers for each piece."""
    settings, dtype = kinds.load("encodings", encoding).DEFAULTS, DTYPES.get(encoding, ANY)
    piece = encodings.capacity(encoding, matrices, dtype, settings)
    rows = sum(matrix.stored[0] for matrix in matrices)
    wanted = Wanted((pieces, rows, matrices[0].stored[1]), matrices=tuple(matrices))
    block = lay_out("any", {"it": wanted}, dtype, {"it": Encoded(encoding, settings, piece)})
    generator = torch.Generator().manual_seed(rows)
    numbers = [[torch.rand(matrix.shape, generator=generator) * 4 - 2 for matrix in matrices] for _ in range(pieces)]
    return block.parameters[0], [[its.to(getattr(torch, dtype)) for its in piece] for piece in numbers]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("encoding", KINDS)
def test_pieces_are_decoded_to_their_numbers_within_their_capacity(encoding, shape, transposed):
    settings, most = kinds.load("encodings", encoding).DEFAULTS, MOST.get(encoding, ROUGHLY)
    matrices = [Matrix("a", shape), Matrix("a", (2, shape[1])), Matrix("b", shape[::-1], transposed)]
    parameter, numbers = parameter_of(encoding, matrices, 3)
    contents = []
    for piece in numbers:
        fields = encodings.encode(encoding, matrices, piece, settings)
        for field in parameter.piece.fields:
            assert field.offset % VIEW_ALIGNMENT == 0
            assert fields[field.name].dtype == getattr(torch, field.dtype)
            assert len(fields[field.name]) <= field.shape[0]
        contents.append(encodings.packed(parameter.piece, fields))
    pieces = torch.stack(contents)
    encodings.check(parameter, pieces)
    found = {"it.a": torch.full((3, shape[0] + 2, shape[1]), torch.nan, dtype=torch.float64)}
    found["it.b"] = torch.full((3, *shape[::-1]), torch.nan, dtype=torch.float64)
    encodings.decode(parameter, pieces, found)
    for number, (first, second, third) in enumerate(numbers):
        for its, wanted in ((found["it.a"], torch.cat((first, second))), (found["it.b"], third)):
            assert (its[number] - wanted).abs().max() <= most


@pytest.mark.parametrize("encoding", CODED)
def test_decoding_random_bytes_stays_within_its_memory(encoding):
    parameter, _ = parameter_of(encoding, [Matrix("", (9, 21))], 2)
    pieces = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, parameter.piece.nbytes), np.uint8))
    around = torch.zeros(2, 11, 21, dtype=torch.float32)
    encodings.decode(parameter, pieces, {"it": around[:, 1:10]})
    assert not around[:, 0].any() and not around[:, 10].any()


def changed(piece, field, /, **changes):
    """The piece with a field that is another."""
    fields = [Field(**(vars(one) | changes)) if one.name == field else one for one in piece.fields]
    return Piece(changes.get("whole", piece.nbytes), tuple(fields), piece.matrices)


@pytest.mark.parametrize("encoding", CODED)
def test_fields_that_are_not_the_encoding_s_are_refused_in_words(encoding):
    settings, dtype = kinds.load("encodings", encoding).DEFAULTS, DTYPES.get(encoding, ANY)
    piece = encodings.capacity(encoding, [Matrix("", (8, 20))], dtype, settings)
    encodings.check_fields(encoding, piece, dtype, settings)
    first, last = piece.fields[0], piece.fields[-1]
    wrong = [
        (changed(piece, first.name, dtype="float64"), f"its field {first.name} is float64"),
        (changed(piece, first.name, shape=(8, 21)), r"\[8, 21\]"),
        (changed(piece, first.name, shape=(9, 20)), r"\[9, 20\]"),
        (changed(piece, last.name, offset=last.offset + 8), "multiples of 16"),
        (changed(piece, last.name, offset=last.offset + 4096), "of a piece"),
        (changed(piece, last.name, offset=0), "lies from byte 0"),
        (changed(piece, last.name, name=first.name), "has the fields"),
        (changed(piece, last.name, name="other"), "has the fields"),
        (Piece(piece.nbytes, piece.fields[:-1], piece.matrices), "has the fields"),
        (Piece(piece.nbytes, (), piece.matrices), "has the fields none"),
        (Piece(piece.nbytes - 16, piece.fields, piece.matrices), "of a piece"),
    ]
    for told, words in wrong:
        with pytest.raises(InputError, match=words) as error:
            encodings.check_fields(encoding, told, dtype, settings)
        assert "\n" not in str(error.value)


def test_a_field_that_an_encoding_makes_otherwise_than_it_says_is_named():
    piece = encodings.capacity("grouped", [Matrix("", (8, 20))], "float32", {"group": 5})
    fields = encodings.encode("grouped", [Matrix("", (8, 20))], [torch.rand(8, 20)], {"group": 5})
    encodings.packed(piece, fields)
    for wrong in (fields["scales"].double(), fields["scales"][:, :3], torch.ones(9, 4)):
        with pytest.raises(
            AssertionError, match=r"field scales is torch.float(32|64) \[., .\], it is float32 \[8, 4\]"
        ):
            encodings.packed(piece, fields | {"scales": wrong})


# Of each a matrix of one row: the codes of its numbers, and a scale of which some products are beyond float32.
BEYOND = {
    "fp8_block": (
        {"block_size": [128, 128], "scale_dtype": "e8m0"},
        {"codes": [56, 126, 0], "scales": [254]},
        1,
    ),  # 1, 448
    "fp8_channel": ({"scale_dtype": "float32"}, {"codes": [56, 126, 254], "scales": [2.0**127]}, 2),
    "mxfp4": ({}, {"codes": [0x72, 0x01], "scales": [254]}, 1),  # 1, 6, 0.5
    "nvfp4": ({"tensor_scale": "divides"}, {"codes": [0x72, 0x01], "scales": [56], "tensor_scale": [2.0**-126]}, 1),
    "int8": ({"scale_dtype": "bfloat16"}, {"codes": [128, 129, 255], "scales": [2.0**127]}, 1),
    "int4": ({"symmetric": False}, {"codes": [0x50, 0x00], "scales": [2.0**127], "zeros": [0]}, 1),
}


def test_each_encoding_that_has_scales_has_a_case_of_numbers_beyond_float32():
    assert BEYOND.keys() == {name for name in KINDS if hasattr(kinds.load("encodings", name), "most")}


@pytest.mark.parametrize("encoding", BEYOND)
def test_numbers_beyond_float32_are_refused_where_a_large_scale_makes_some(encoding):
    given, values, beyond = BEYOND[encoding]
    kind, matrix = kinds.load("encodings", encoding), Matrix("", (1, 3))
    settings = kind.DEFAULTS | given
    piece = encodings.capacity(encoding, [matrix], "float32", settings)
    block = lay_out("any", {"it": Wanted((1, 3))}, "float32", {"it": Encoded(encoding, settings, piece)})
    fields = {
        one.name: torch.tensor(values[one.name]).to(getattr(torch, one.dtype)).view(one.shape) for one in piece.fields
    }
    with pytest.raises(InputError, match=f"^{beyond} of its numbers are beyond float32, 3.4e"):
        encodings.check(block.parameters[0], encodings.packed(piece, fields)[None])
    fields["codes"] = torch.full_like(fields["codes"], {"int8": 128, "int4": 0}.get(encoding, 0))
    encodings.check(block.parameters[0], encodings.packed(piece, fields)[None])
