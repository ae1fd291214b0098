"""Blocks that stream from CPU memory, coded without loss while they load: the numbers, every bit, in fewer bytes over the link."""

import json
from dataclasses import replace

import pytest
import torch

import tiny_models
from late_streams import LateStreams
from noria import blocks, config, encodings
from noria.blocks import lay_out, layer_name
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.encodings import exponent
from noria.engine import coding, loading
from noria.engine.assembly import weights_of
from noria.engine.decoding import Decoder, Decoding, SomePieces
from noria.engine.loading import Loader
from noria.engine.parameters import Undecoded, views
from noria.engine.timing import Traffic
from noria.errors import InputError
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.pieces import Matrix, Wanted
from noria.plan import search
from noria.plan.problem import Problem
from noria.run import run
from noria.tiers.cpu import Cpu
from noria.tools.direct import DirectFile

CPU = torch.device("cpu")
CONFIG = tiny_models.LLAMA | {"hidden_size": 128, "intermediate_size": 200}
NAMES = [layer_name(layer) for layer in range(CONFIG["num_hidden_layers"])] + ["head"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(blocks, "CODED_NUMBERS", 1000)
    monkeypatch.setattr(coding, "LONGER", 1e9)  # however slow this machine is


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coding")
    tensors = tiny_models.state(CONFIG, torch.bfloat16)
    tensors["model.layers.1.self_attn.o_proj.weight"].view(torch.int16).random_()  # too many escapes
    tensors["model.layers.2.mlp.down_proj.weight"].view(torch.int16)[0, :8] = torch.arange(
        0x7F80, 0x7F88
    ).short()  # inf, nans
    return convert_of(folder, tensors)


def convert_of(folder, tensors):
    convert(tiny_models.write_directory(folder / "hf", CONFIG, tensors), folder / "model.h5")
    return folder / "model.h5"


def streamed(path, decoding, dtype="bfloat16", tiers=None, say=lambda line: None, scratch=None):
    """Bits of all that two rounds compute with, layouts of the streamed blocks, and the bytes that passed the link."""
    found, traffic, streams = {}, Traffic(), LateStreams(CPU)
    with open_checkpoint(path) as checkpoint:
        tiers = dict.fromkeys(NAMES, "cpu") | {"embed": "cpu"} | (tiers or {})
        placed = Loader(checkpoint, tiers, dtype, streams, scratch, decoding, say).load()
        weights = weights_of(placed, [range(len(NAMES) - 1)], 1, 2, streams, traffic)
        for round in range(2):
            weights.begin(round, 0, 0)
            for name in NAMES:
                its = {f"{round}/{name}/{key}": value.clone() for key, value in weights.wait(name).items()}
                found |= {key: value.view(torch.int16) if dtype == "bfloat16" else value for key, value in its.items()}
                weights.done(name)
        traffic.end_round(prefill=False)
        found |= {f"embed/{key}": value.clone() for key, value in weights.wait("embed").items()}
        weights.close()
    return found, {name: home.block for name, home in placed.homes.items()}, traffic.decode["host_to_gpu"]


def same(found, wanted):
    assert found.keys() == wanted.keys()
    return all(torch.equal(value, wanted[key]) for key, value in found.items())


def test_coded_blocks_are_the_same_numbers_in_fewer_bytes(model):
    plain, layouts, moved = streamed(model, Decoding())
    found, coded, less = streamed(model, Decoding(coded=True))
    assert same(found, plain)
    names = {name: [one.name for one in block.encoded] for name, block in coded.items()}
    assert names["layers/0000"] == ["qkv", "out", "gate_up", "down"] and names["head"] == ["lm_head"]
    assert names["layers/0001"] == ["qkv", "gate_up", "down"] and names["layers/0002"] == names["layers/0000"]
    assert all(coded[name].nbytes < layouts[name].nbytes for name in NAMES)
    assert 0.68 < less / moved < 0.85
    for block in coded.values():
        assert all(one.encoding == "exponent" for one in block.encoded)


def test_parameters_are_decoded_one_by_one_where_a_block_finds_no_room(model):
    plain, _, _ = streamed(model, Decoding())
    found, _, _ = streamed(model, Decoding(room=1, coded=True))
    assert same(found, plain)


def test_only_what_streams_from_cpu_memory_in_bfloat16_is_coded(model):
    tiers = {"layers/0000": "gpu", "layers/0001": "disk"}
    found, layouts, _ = streamed(model, Decoding(coded=True), tiers=tiers)
    assert same(found, streamed(model, Decoding(), tiers=tiers)[0])
    assert not layouts["layers/0001"].encoded and layouts["layers/0002"].encoded and layouts.keys() == set(NAMES[1:])
    wide, layouts, _ = streamed(model, Decoding(coded=True), dtype="float32")
    assert not any(block.encoded for block in layouts.values())
    assert torch.equal(wide["0/head/lm_head"].bfloat16().view(torch.int16), found["0/head/lm_head"])


@pytest.mark.parametrize("tiers", [dict.fromkeys(NAMES, "disk"), {"layers/0001": "disk", "head": "disk"}])
def test_what_goes_to_scratch_is_coded_too_and_takes_no_more_of_the_disk_than_it_needs(
    model, tiers, tmp_path, monkeypatch
):
    sizes, close = [], DirectFile.close

    def closed(file):
        sizes.extend([file.look()[0]] * (file.path != model and file._buffered is not None))
        close(file)

    monkeypatch.setattr(DirectFile, "close", closed)
    plain, layouts, moved = streamed(model, Decoding(), tiers=tiers, scratch=tmp_path)
    found, coded, less = streamed(model, Decoding(coded=True), tiers=tiers, scratch=tmp_path)
    assert same(found, plain) and all(coded[name].nbytes < layouts[name].nbytes for name in NAMES)
    assert 0.68 < less / moved < 0.85
    wanted = [sum(its[name].nbytes for name in tiers) for its in (layouts, coded)]
    assert sizes == wanted and not any(tmp_path.iterdir())


@pytest.mark.parametrize("room", [1 << 30, 1])
def test_experts_are_coded_too_and_lie_as_plain_ones_do(room):
    """Their down projections lie [inputs, outputs]."""
    matrices = (Matrix("up", (96, 64)), Matrix("up", (96, 64)), Matrix("down", (64, 80), transposed=True))
    experts, other = Wanted((3, 272, 64), matrices=matrices), Wanted((3, 96, 64))
    block = lay_out("layers/0000", {"qkv": (128, 64), "experts": experts, "others": other}, "bfloat16")
    content = (torch.randn(block.nbytes // 2, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    layout, made = coding.coded(block, content.view(torch.uint8))
    assert [one.name for one in layout.encoded] == ["qkv", "experts", "others"] and layout.nbytes < 0.8 * block.nbytes
    plain = views(content.view(torch.uint8), block)
    found = Decoder(layout.decoding_room(room), torch.device("cpu")).parameters("it", Undecoded(layout, made))
    assert found.keys() == plain.keys() == {"qkv", "experts.up", "experts.down", "others"}
    for name, wanted in plain.items():
        its = found[name]
        for piece in range(3) if isinstance(its, SomePieces) else []:
            one = its.of([piece])
            assert torch.equal(one[0], wanted[piece]) and one[0].stride() == wanted[piece].stride(), name
        if isinstance(its, torch.Tensor):
            assert torch.equal(its, wanted) and its.stride()[-2:] == wanted.stride()[-2:], name


def test_what_is_cast_while_it_loads_is_not_coded(tmp_path):
    path = convert_of(tmp_path, tiny_models.state(CONFIG, torch.float32))
    found, layouts, _ = streamed(path, Decoding(coded=True))
    assert same(found, streamed(path, Decoding())[0]) and not any(block.encoded for block in layouts.values())


def test_a_block_that_takes_no_less_is_left_as_it_is(model):
    with open_checkpoint(model) as checkpoint:
        block = checkpoint.blocks["layers/0000"]
    content = torch.randint(0, 256, (block.nbytes,), dtype=torch.uint8)
    assert coding.coded(block, content) is None


def test_what_does_not_come_back_stays_plain(model, monkeypatch):
    def wrong(fields, settings, into):
        right(fields, settings, into)
        into.view(-1)[-1] = 1.0

    right = exponent.decode
    plain, _, moved = streamed(model, Decoding())
    monkeypatch.setattr(exponent, "decode", wrong)
    found, layouts, all_of_it = streamed(model, Decoding(coded=True))
    assert same(found, plain) and moved == all_of_it and not any(block.encoded for block in layouts.values())


def test_coding_that_fails_leaves_the_rest_plain_with_one_line(model, monkeypatch):
    def failing(encoding, matrices, numbers, settings):
        calls.append(encoding)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("no memory\nat all")
        return right(encoding, matrices, numbers, settings)

    calls, said, right = [], [], encodings.encode_pieces
    monkeypatch.setattr(encodings, "encode_pieces", failing)
    found, layouts, _ = streamed(model, Decoding(coded=True), say=said.append)
    assert same(found, streamed(model, Decoding())[0])
    assert layouts["layers/0000"].encoded and not layouts["layers/0001"].encoded and not layouts["head"].encoded
    assert "failed (no memory); noria convert --compress-weights exponent does it once" in said[0]
    assert len(said) == 2 and "weights that stream were coded without loss: 0.0 GB to 0.0 GB" in said[1]


@pytest.mark.parametrize(("seconds", "rate", "stops"), [(0.5, 2.0, False), (1.05, 1.0, False), (1.2, 0.8, True)])
def test_coding_that_takes_longer_than_reading_stops_with_one_line(monkeypatch, seconds, rate, stops):
    monkeypatch.setattr(coding, "LONGER", 1.1)
    said = []
    coder = coding.Coder(LateStreams(CPU), said.append)
    coder.was_read(10**9, 1.0)
    coder._count(10**9, 7 * 10**8, 99.0)  # the device's memory is new
    coder._count(10**9, 7 * 10**8, seconds)
    assert coder._stopped == stops and len(said) == stops
    if stops:
        assert "takes longer (0.8 GB/s) than reading (1.0 GB/s); noria convert" in said[0]
    coder.close()
    assert said[-1] == f"weights that stream were coded without loss: 2.0 GB to 1.4 GB, {rate} GB/s (read at 1.0 GB/s)"
    coder.close()
    assert said[-1] == f"weights that stream were coded without loss: 2.0 GB to 1.4 GB, {rate} GB/s (read at 1.0 GB/s)"


@pytest.mark.slow
@pytest.mark.parametrize("where", [{"weights": {"cpu": 100}}, {"weights": {"disk": 100}, "stage": True}])
def test_a_run_whose_plan_is_so_gives_the_tokens_of_one_that_is_not(model, tmp_path, monkeypatch, capsys, where):
    """As a GPU would be planned: here on the CPU, which no plan has so."""
    monkeypatch.setattr(Problem, "may_code", property(lambda its: its.config.placement.compress_weights != "off"))
    monkeypatch.setattr(search, "_coded_best", lambda tried, here: replace(here, coded=True))
    tensors = {name: its * 0.1 for name, its in tiny_models.state(CONFIG, torch.bfloat16).items()}
    path = convert_of(tmp_path, tensors)
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"token_ids": [5 + row, 9, 17]}) for row in range(3)))
    found, right, calls = [], coding.coded, []
    monkeypatch.setattr(coding, "coded", lambda block, *its: calls.append(block.name) or right(block, *its))
    for asked in ("off", "auto"):
        keys = {"model": path, "prompts": tmp_path / "p.jsonl", "output": tmp_path / f"{asked}.h5"}
        flags = {"device": "cpu", "dtype": "bfloat16", "max_new_tokens": 6, "scratch": str(tmp_path)}
        flags |= where | {"compress_weights": asked}
        run(config.load(None, {key: str(its) for key, its in keys.items()} | flags), Solo())
        with open_generations(keys["output"]) as file:
            tokens = [row.token_ids.tolist() for row in file.rows()]
        said = "coded without loss while they load" in capsys.readouterr().err
        found.append((said, tokens))
        assert calls == (NAMES if asked == "auto" else [])
    assert [said for said, _ in found] == [False, True] and found[0][1] == found[1][1]
    assert [len(row) for row in found[0][1]] == [6, 6, 6]


def test_expected_layouts_are_near_those_that_are_made(model):
    _, layouts, _ = streamed(model, Decoding(coded=True))
    with open_checkpoint(model) as checkpoint:
        expected = checkpoint.blocks["layers/0000"].coded
    made = layouts["layers/0000"]
    assert [one.name for one in expected.encoded] == [one.name for one in made.encoded]
    assert made.nbytes <= expected.nbytes <= 1.05 * made.nbytes and expected.decoded == made.decoded


def test_a_load_that_fails_lets_go_of_its_memory(model, monkeypatch):
    def fails(*_, **__):
        raise InputError("block 'head' is damaged")

    closed, right = [], Cpu.close
    monkeypatch.setattr(loading, "read_ahead", fails)
    monkeypatch.setattr(Cpu, "close", lambda memory: closed.append(memory.nbytes) or right(memory))
    with pytest.raises(InputError, match="is damaged"):
        streamed(model, Decoding(coded=True))
    assert len(closed) == 1 and closed[0] > 0
