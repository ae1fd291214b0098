"""Products with weights as they are stored on a CUDA device: the bits of torch's unsplit products of their decoded numbers."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs triton")

import stored_weights
from noria import encodings
from noria.blocks import lay_out
from noria.engine.decoding import Decoder
from noria.engine.parameters import Undecoded
from noria.kernels import as_stored, in_order, products, products_stored
from noria.launch import few_rows
from noria.launch.choosing import multiply
from noria.launch.exact import products_in_one_order
from noria.limits import STORED_ROWS
from noria.models._linear import linear
from stored_cases import FORMS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
HALVES = [torch.bfloat16, torch.float16]
ROWS = (1, 16, 64)
SHAPES = [((1024, 256, 256), 2048), ((4096,), 1024), ((5000, 40), 4160), ((70, 33, 9), 200)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FORMS)
def test_it_has_the_bits_of_torchs_products_of_decoded_numbers(name, dtype):
    with products_in_one_order(dtype):
        for parts, inputs in SHAPES:
            hidden, stored, decoded, bias = stored_weights.made(name, parts, inputs, 100, dtype, DEVICE)
            for its_bias in (None, bias):
                expected = F.linear(hidden, decoded, its_bias)
                assert torch.equal(products.product(hidden, decoded, its_bias), expected), (parts, inputs)
                for rows in (*ROWS, 100):
                    found = products_stored.product(hidden[:rows], stored, its_bias)
                    assert torch.equal(found, expected[:rows]), (parts, inputs, rows)


@pytest.mark.parametrize("name", ["mxfp4", "int4", "fp8 blocks", "nvfp4"])
def test_tiles_of_any_size_give_one_result(name):
    hidden, stored, decoded, _ = stored_weights.made(name, (200, 130), 640, 70, torch.bfloat16, DEVICE)
    expected = products.product(hidden, decoded)
    for columns in (16, 32, 64, 128):
        for depth in (64, 128):
            its = products.ProductTile(64, columns, depth, 4, 3)
            assert torch.equal(products_stored.product(hidden, stored, None, its), expected), its


def test_codes_of_every_magnitude_are_decoded_as_before():
    for name in FORMS:
        weight, decoded = (
            stored_weights.parameter_of(name, (64, 64), 512),
            torch.empty(128, 512, device=DEVICE).bfloat16(),
        )
        pieces = few_rows.random_pieces(weight, DEVICE)
        stored = encodings.in_tiles(weight, pieces, "weight")
        for part in stored.parts:
            part.codes.random_(0, 127, generator=torch.Generator(DEVICE).manual_seed(0))  # 127 in e4m3 is no number
        encodings.decode(weight, pieces, {"weight": decoded})
        hidden = torch.randn(8, 512, device=DEVICE).bfloat16()
        assert torch.equal(products_stored.product(hidden, stored), products.product(hidden, decoded)), name


@pytest.mark.parametrize("dtype", HALVES)
def test_a_run_chooses_every_form_and_says_nothing(dtype):
    weights = {f"w{n}": stored_weights.parameter_of(name, (2048, 512), 4096) for n, name in enumerate(FORMS)}
    shapes = {name: one.shape for name, one in weights.items()}
    block = lay_out("layers/0000", shapes, "bfloat16", {name: one.encoded for name, one in weights.items()})
    with products_in_one_order(dtype):
        for its in (multiply, in_order.product):
            found, lines = few_rows.chosen([block], DEVICE, dtype, its)
            assert not lines and len(found) == len(FORMS)


@pytest.mark.parametrize("name", ["mxfp4", "int4", "fp8 channels"])
def test_few_rows_have_the_bits_of_many_and_are_captured_without_decoding(name, monkeypatch):
    weight = stored_weights.parameter_of(name, (1536, 512), 1024)
    block = lay_out("layers/0000", {"qkv": weight.shape, "qkv_bias": (2048,)}, "bfloat16", {"qkv": weight.encoded})
    pieces = few_rows.random_pieces(weight, DEVICE)
    buffer = torch.zeros(block.nbytes, dtype=torch.uint8, device=DEVICE)
    place = block.parameters[0]
    buffer[place.offset : place.offset + place.nbytes] = pieces[0]
    decoder, held = Decoder(block.decoded_nbytes, DEVICE), Undecoded(block, buffer)
    bias = torch.randn(2048, device=DEVICE).bfloat16()
    its = decoder.parameters(block.name, held)["qkv"]
    hidden = torch.randn(300, 1024, device=DEVICE).bfloat16()
    with products_in_one_order(torch.bfloat16), as_stored.multiplied_so({(its.kind, True)}):
        whole, decoded = linear(hidden, its, bias), []
        decoder.forget()
        decode = encodings.decode
        monkeypatch.setattr(encodings, "decode", lambda *given: (decoded.append(1), decode(*given)))
        for rows in (*ROWS, STORED_ROWS):
            few, graph = hidden[:rows].clone(), torch.cuda.CUDAGraph()
            linear(few, decoder.parameters(block.name, held)["qkv"], bias)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                found = linear(few, decoder.parameters(block.name, held)["qkv"], bias)
            few.copy_(hidden[100 : 100 + rows])
            graph.replay()
            assert torch.equal(found, whole[100 : 100 + rows]), rows
    assert not decoded
