"""Blocks that are decoded whole or a part at a time: the same numbers, no more memory than planned, no expert unasked."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from noria import encodings, kinds, run
from noria.blocks import lay_out, layer_name
from noria.engine.decoding import Decoder, Decoding, SomePieces
from noria.engine.parameters import Undecoded, stored, views
from noria.kernels.expert_layer import Arriving, ExpertLayer, Gate
from noria.kernels.stored import StoredMatrices
from noria.limits import STORED_PAIRS
from noria.models import _experts, _tiles
from noria.models._experts import SWIGLU
from noria.pieces import Encoded, Matrix, Wanted
from noria.plan.plan import Plan
from noria.step import Run
from test_models import CONFIGS, FAMILIES, Whole, random_model, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FP8 = "fp8_channel"


def encoded(block, computed):
    """A plain block, whose tensors are given by name, with its matrices in FP8; and its bytes."""
    settings, forms = kinds.load("encodings", FP8).DEFAULTS, {}
    for one in block.parameters:
        if len(one.shape) > 1 and one.name != "router":
            named = one.wanted.named
            matrices = [
                replace(its, transposed=False) for its in (one.piece.matrices if named else [Matrix("", one.shape)])
            ]
            piece = encodings.capacity(FP8, matrices, one.dtype, settings)
            forms[one.name] = Encoded(FP8, settings, piece)
    made = lay_out(block.name, {one.name: one.wanted for one in block.parameters}, block.parameters[0].dtype, forms)
    buffer = torch.zeros(made.nbytes, dtype=torch.uint8)
    parts = stored(buffer, made)
    for one in made.parameters:
        if one.plain:
            parts[one.name].copy_(computed[one.name])
            continue
        for number, piece in enumerate(parts[one.name]):
            piece.copy_(
                encodings.packed(
                    one.piece, encodings.encode(FP8, one.piece.matrices, numbers_of(one, computed, number), settings)
                )
            )
    return Undecoded(made, buffer)


def numbers_of(parameter, computed, number):
    """The matrices of one piece of a parameter."""
    found, rows = [], dict.fromkeys(parameter.computed, 0)
    for matrix in parameter.piece.matrices:
        name = matrix.within(parameter.name)
        whole = computed[name][number] if len(parameter.shape) == 3 else computed[name]
        found.append(whole[rows[name] : rows[name] + matrix.shape[0]])
        rows[name] += matrix.shape[0]
    return found


def apart(held):
    """What a model computes with, every tensor decoded into memory of its own, in which it lies as a plain one does."""
    found, pieces = views(held.buffer, held.block), stored(held.buffer, held.block)
    for one in held.block.encoded:
        into = {field.name: laid(field) for field in one.decoded()}
        encodings.decode(one, pieces[one.name], into)
        found |= into
    return found


def laid(field):
    """Memory for a decoded tensor."""
    if not field.turned:
        return torch.empty(field.shape, dtype=torch.float64)
    *first, outputs, inputs = field.shape
    return torch.empty(*first, inputs, outputs, dtype=torch.float64).transpose(-1, -2)


@pytest.mark.parametrize("room", [0, 3000, 1 << 40])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same_whether_a_block_is_decoded_whole_or_in_parts(name, room):
    whole = Whole(CONFIGS[name], random_model(name)[1], torch.float64)
    blocks = []
    for number, computed in enumerate(whole.layers):
        shapes = whole.model.layer_parameters(whole.shape, number)
        blocks.append(encoded(lay_out(layer_name(number), shapes, "float64"), computed))
    part = [(tokens_of(3, 21), 0, (Run(0, 4),))]
    whole.layers = [apart(held) for held in blocks]
    expected = whole.logits(part)[0]
    decoder = Decoder(max(held.block.decoding_room(room) for held in blocks), CPU)
    whole.layers = [decoder.parameters(held.block.name, held) for held in blocks]
    if room > 1 << 30:  # what a decoder gave is good until another block is asked for
        for number, held in enumerate(blocks):
            whole.layers[number] = _Asking(decoder, held)
    assert torch.equal(whole.logits(part)[0], expected)


class _Asking:
    """Asks for its block when the first parameter is wanted, as a visit does."""

    def __init__(self, decoder, held):
        self._decoder, self._held = decoder, held

    def __getattr__(self, name):
        return getattr(self._decoder.parameters(self._held.block.name, self._held), name)

    def __getitem__(self, name):
        return self._decoder.parameters(self._held.block.name, self._held)[name]

    def __contains__(self, name):
        return name in self._decoder.parameters(self._held.block.name, self._held)


# ---- a mixture


def mixture(pieces=6, inner=4, hidden=8, dtype="float64"):
    """A block of random experts and a matrix beside them."""
    up = Matrix("gate_up", (inner, hidden))
    matrices = (up, up, Matrix("down", (hidden, inner)))
    shapes = {
        "norm": (hidden,),
        "out": (2 * hidden, hidden),
        "experts": Wanted((pieces, 3 * inner, hidden), matrices=matrices),
    }
    generator = torch.Generator().manual_seed(1)
    computed = {
        "norm": torch.ones(hidden, dtype=torch.float64),
        "out": torch.randn(2 * hidden, hidden, generator=generator, dtype=torch.float64),
        "experts.gate_up": torch.randn(pieces, 2 * inner, hidden, generator=generator, dtype=torch.float64),
        "experts.down": torch.randn(pieces, hidden, inner, generator=generator, dtype=torch.float64),
    }
    computed = {name: its.to(getattr(torch, dtype)) for name, its in computed.items()}
    return encoded(lay_out("layers/0000", shapes, dtype), computed)


def test_experts_that_are_not_asked_for_are_not_decoded(monkeypatch):
    held, decoded = mixture(), []
    decode = encodings.decode

    def counted(parameter, pieces, into, *named):
        decoded.append((parameter.name, len(named[0]) if named else len(pieces)))
        decode(parameter, pieces, into, *named)

    monkeypatch.setattr(encodings, "decode", counted)
    parameters = Decoder(held.block.decoded_nbytes, CPU).parameters("layers/0000", held)
    expected = apart(held)
    decoded.clear()
    gate_up, down = parameters["experts.gate_up"], parameters["experts.down"]
    assert isinstance(gate_up, SomePieces) and len(gate_up) == 6 and not decoded
    for wanted in ([1, 2, 5], [0], [0, 1, 2, 3, 4, 5]):
        assert torch.equal(gate_up.of(wanted), expected["experts.gate_up"][wanted])
        assert torch.equal(down.of(wanted), expected["experts.down"][wanted])
    for wanted in ([4, 0, -1], [4, 0, -1], [3]):  # equal lists may be of other steps: each is decoded anew
        named = torch.tensor(wanted, dtype=torch.int32)
        for tensor, name in ((gate_up, "experts.gate_up"), (down, "experts.down")):
            found, there = tensor.listed(named), named >= 0
            assert torch.equal(found[there], expected[name][named[there].long()])
    counts = [2, 1, 1, 6, 3, 3, 1]  # consecutive experts together, those of a list too, once for both matrices
    assert [count for name, count in decoded if name == "experts"] == counts
    assert torch.equal(parameters["out"], expected["out"]) and "out" in parameters
    assert {*parameters} == {"norm", "out", "experts.gate_up", "experts.down"} and len(parameters) == 4


def test_of_a_block_that_is_decoded_whole_experts_are_decoded_where_they_are_asked_for(monkeypatch):
    held, decoded, decode = mixture(), [], encodings.decode
    expected = apart(held)

    def counted(parameter, pieces, into, *named):
        decoded.append((parameter.name, len(named[0]) if named else len(pieces)))
        decode(parameter, pieces, into, *named)

    monkeypatch.setattr(encodings, "decode", counted)
    monkeypatch.setattr(Decoder, "_whole", lambda decoder, block: True)  # as on a GPU
    decoder = Decoder(held.block.decoded_nbytes, CPU)
    for _ in range(2):  # microbatches, one after another
        parameters = decoder.parameters("layers/0000", held)
        gate_up, down = parameters["experts.gate_up"], parameters["experts.down"]
        assert gate_up.most == len(gate_up) == 6
        assert torch.equal(gate_up.of(range(6)), expected["experts.gate_up"])
        assert torch.equal(down.of(range(6)), expected["experts.down"])
        assert torch.equal(parameters["out"], expected["out"])
    assert decoded == [("experts", 6), ("out", 1)]
    few = torch.tensor([5, 2, -1], dtype=torch.int32)
    assert torch.equal(gate_up.listed(few)[:2], expected["experts.gate_up"][[5, 2]])
    assert torch.equal(down.listed(few)[:2], expected["experts.down"][[5, 2]])
    assert torch.equal(down.listed(few.clone())[:2], expected["experts.down"][[5, 2]])
    assert torch.equal(parameters["out"], expected["out"]) and len(down.of([1])) == 1
    assert decoded[2:] == [("experts", 3), ("experts", 3), ("experts", 1)]


# Six experts. Served: by kernels that take them as they are stored.
@pytest.mark.parametrize(
    ("pairs", "tiles", "served", "how"),
    [
        (6, True, False, "some"),
        (7, True, False, "all"),
        (1, False, True, "all"),
        (1, True, True, "stored"),
        (6 * STORED_PAIRS, True, True, "stored"),
        (6 * STORED_PAIRS + 1, True, True, "all"),
    ],
)
def test_on_a_gpu_few_rows_take_experts_as_they_are_stored_or_are_decoded(pairs, tiles, served, how, monkeypatch):
    held = mixture()
    monkeypatch.setattr(Decoder, "_whole", lambda decoder, block: True)
    monkeypatch.setattr(_tiles, "fits", lambda rows, layer: tiles)
    monkeypatch.setattr(_tiles, "refuses_stored", lambda device, dtype, *kind: "" if served else "not here")
    parameters = Decoder(held.block.decoded_nbytes, CPU).parameters("layers/0000", held)
    layer = ExpertLayer(parameters["experts.gate_up"], parameters["experts.down"])
    rows = SimpleNamespace(is_cuda=True, device=CPU, dtype=torch.float64)
    found = _experts._all_or_some(rows, torch.zeros(pairs, 1), layer)
    kind = {"some": SomePieces, "all": torch.Tensor, "stored": StoredMatrices}[how]
    assert isinstance(found.gate_up, kind) and isinstance(found.down, kind)
    if how == "stored":
        every = range(6)
        assert torch.equal(found.gate_up.plain(torch.float32), layer.gate_up.of(every).float())
        assert torch.equal(found.down.plain(torch.float32), layer.down.of(every).float())


def test_experts_that_arrive_when_they_are_chosen_are_decoded_after_they_came(monkeypatch):
    held, expected = mixture(), mixture()
    monkeypatch.setattr(Decoder, "_whole", lambda decoder, block: True)
    monkeypatch.setattr(_tiles, "fits", lambda rows, layer: True)
    monkeypatch.setattr(_tiles, "refuses_stored", lambda device, dtype, *kind: "not here")
    there, here = (stored(one.buffer, one.block)["experts"] for one in (expected, held))
    here.fill_(7)
    parameters = Decoder(held.block.decoded_nbytes, CPU).parameters("layers/0000", held)
    whole = apart(expected)

    def bring(chosen):
        wanted = chosen.unique()
        here[wanted] = there[wanted]

    rows = SimpleNamespace(is_cuda=True, device=CPU, dtype=torch.float64)
    arriving = [Arriving(parameters[name], bring) for name in ("experts.gate_up", "experts.down")]
    for microbatch in ([0, 1, 2], [3, 4, 5]):
        chosen = torch.tensor(microbatch).repeat(3)[:, None]
        found = _experts._all_or_some(rows, chosen, ExpertLayer(*arriving))
        for matrices, name in ((found.gate_up, "experts.gate_up"), (found.down, "experts.down")):
            its = matrices[microbatch] if isinstance(matrices, torch.Tensor) else matrices.of(microbatch)
            assert torch.equal(its, whole[name][microbatch]), (microbatch, name)


def test_kernels_for_weights_as_they_are_stored_are_for_blocks_that_are_not_decoded_as_they_load():
    tiers = {"layers/0000": "gpu", "layers/0001": "gpu"}, {"layers/0002": "gpu", "layers/0003": "cpu"}
    model = SimpleNamespace(blocks={name: object() for its in tiers for name in its})
    for decoded, names in ((False, [*model.blocks]), (True, ["layers/0003"])):
        plan = SimpleNamespace(decoded=decoded, weight_tiers=tiers)
        plan.decodes_later = partial(Plan.decodes_later, plan)
        assert [*run._held_encoded(plan, model)] == names


def test_gates_and_ups_that_are_cut_in_another_way_are_decoded(monkeypatch):
    monkeypatch.setattr(_tiles, "refuses_stored", lambda device, dtype, *kind: "")
    held, rows = mixture(), torch.zeros(2, 8)
    parameters = Decoder(held.block.decoded_nbytes, CPU).parameters("layers/0000", held)
    gate_up, down = (parameters[f"experts.{name}"] for name in ("gate_up", "down"))
    its, others = gate_up.stored, down.stored
    for parts, of_down, gate, served in (
        (its.parts, others.parts, SWIGLU, True),
        (its.parts[:1], others.parts, Gate(alternating=True), True),
        (its.parts, others.parts, Gate(alternating=True), False),
        ((*its.parts, its.parts[0]), others.parts, SWIGLU, False),
        ((its.parts[0], replace(its.parts[1], codes=its.parts[1].codes[:, :3])), others.parts, SWIGLU, False),
        (its.parts, others.parts * 2, SWIGLU, False),
    ):
        layer = ExpertLayer(Six(replace(its, parts=parts)), Six(replace(others, parts=of_down)), gate)
        assert (_tiles.stored(rows, torch.zeros(2, 1), layer) is not None) == served


class Six:
    """Matrices of which nothing is asked but how they are stored."""

    def __init__(self, stored):
        self.stored = stored

    def __len__(self):
        return 6


def test_a_block_is_decoded_in_the_room_that_its_largest_part_needs_or_in_what_there_is():
    block = mixture().block
    out, piece = (4096 * -(-its // 4096) for its in (16 * 8 * 8, 4096 + 8 * 4 * 8))  # gate_up takes a page, then down
    assert block.decoding_room(0) == max(out, piece) == 8192
    assert block.decoding_room(9000) == 9000
    assert block.decoding_room(1 << 40) == block.decoded_nbytes


@pytest.mark.parametrize("room", [0, 8192, 9000, 12288, 1 << 30])
def test_as_many_pieces_are_decoded_at_once_as_find_room(room):
    held = mixture(pieces=40, inner=16, hidden=16)
    decoder = Decoder(held.block.decoding_room(room), CPU)
    pieces = decoder.parameters("layers/0000", held)["experts.down"]
    experts = held.block.encoded[-1]
    most = pieces.most
    end = experts.decoded(most)[-1]
    assert end.offset + end.nbytes <= len(decoder.buffer)
    more = experts.decoded(most + 1)[-1]
    assert most == 40 or more.offset + more.nbytes > len(decoder.buffer)
    assert pieces.of(range(most)).shape == (most, 16, 16)


def test_what_fails_on_its_way_is_decoded_again(monkeypatch):
    held, decode = mixture(), encodings.decode
    decoder = Decoder(held.block.decoding_room(0), CPU)
    parameters, expected = decoder.parameters("layers/0000", held), apart(held)["out"]
    assert torch.equal(parameters["out"], expected)

    def fails(*arguments):
        decoder.buffer.fill_(7)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(encodings, "decode", fails)
    with pytest.raises(torch.OutOfMemoryError):
        parameters["experts.down"].of([1])
    monkeypatch.setattr(encodings, "decode", decode)
    assert torch.equal(parameters["out"], expected)


def test_a_decoding_has_room_for_all_where_nothing_else_is_said():
    assert Decoding() == Decoding(1 << 62, residents=False)
