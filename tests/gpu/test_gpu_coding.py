"""Weights that are coded without loss on a CUDA device while they load: every bit, in fewer bytes, and the same tokens."""

import json
from dataclasses import replace

import pytest
import torch

import tiny_models
from noria import blocks, config
from noria.blocks import lay_out
from noria.checkpoint.convert import convert
from noria.encodings import exponent
from noria.engine import coding
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.plan import search
from noria.run import run
from noria.streams import CudaStreams
from noria.tiers.cpu import Cpu
from noria.tools.pinned import Fixed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def numbers(shape, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def test_fields_made_on_the_device_are_decoded_to_every_bit_by_the_cpu():
    its = numbers((300, 4097))
    its.view(torch.int16)[:4].random_()
    fields = exponent.encode(its.cuda(), {})
    assert len(fields["escapes"]) == len(exponent.encode(its, {})["escapes"])
    held, into = (
        {name: one.cpu()[None] for name, one in fields.items()},
        torch.zeros(1, *its.shape, dtype=torch.bfloat16),
    )
    exponent.check(held, tuple(its.shape), {})
    exponent.decode(held, {}, into)
    assert torch.equal(into[0].view(torch.int16), its.view(torch.int16))


def test_a_block_is_coded_on_the_device():
    shapes = {"qkv": (1536, 1024), "norm": (1024,), "experts": (8, 512, 1024)}
    block = lay_out("layers/0000", shapes, "bfloat16")
    content = numbers((block.nbytes // 2,)).view(torch.uint8)
    layout, made = coding.coded(block, content.cuda())
    assert [one.name for one in layout.encoded] == ["qkv", "experts"] and made.is_cuda
    assert 0.69 < layout.nbytes / block.nbytes < 0.73
    its_layout, its = coding.coded(block, content)
    assert its_layout == layout and torch.equal(its, made.cpu())


def test_blocks_that_follow_one_another_come_to_their_places_in_locked_memory():
    block = lay_out("layers/0000", {"qkv": (1536, 1024), "norm": (1024,), "experts": (8, 512, 1024)}, "bfloat16")
    streams, said = CudaStreams(torch.device("cuda", 0)), []
    coder, memory = coding.Coder(streams, said.append), Cpu(5 * block.nbytes, streams, piece_nbytes=1 << 22)
    host = Fixed((block.nbytes,), torch.uint8, streams.device, in_host=True)
    memory.register_ahead()
    made = []
    for number in range(5):
        host.tensor.copy_(numbers((block.nbytes // 2,), number).view(torch.uint8))
        made.append(coding.coded(block, host.tensor.clone()))
        offset = number * block.nbytes
        layout = coder.put(block, host.tensor, lambda its, after, at=offset: memory.store([(at, its)], [after]).event())
        assert layout == made[-1][0]
    coder.close()
    memory.register()
    for number, (layout, content) in enumerate(made):
        assert torch.equal(memory.memory[number * block.nbytes :][: layout.nbytes], content), number
    assert said[-1].startswith("weights that stream were coded without loss"), said
    host.close()
    assert memory.close() == 5 * block.nbytes


def test_streamed_runs_in_bfloat16_give_the_same_tokens_coded_or_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(blocks, "CODED_NUMBERS", 1000)
    monkeypatch.setattr(coding, "LONGER", 1e9)
    monkeypatch.setattr(search, "_coded_best", lambda tried, here: replace(here, coded=True))
    model = tiny_models.LLAMA | {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 128}
    tensors = {name: its * 0.05 for name, its in tiny_models.state(model, torch.bfloat16).items()}
    convert(tiny_models.write_directory(tmp_path / "hf", model, tensors), tmp_path / "m.h5")
    rows = [{"token_ids": [5 + row, 9, 17]} for row in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = []
    for asked in ("off", "auto"):
        keys = {"model": tmp_path / "m.h5", "prompts": tmp_path / "p.jsonl", "output": tmp_path / f"{asked}.h5"}
        flags = {"device": "cuda", "max_new_tokens": 16, "weights": {"cpu": 100}, "compress_weights": asked}
        run(config.load(None, {key: str(path) for key, path in keys.items()} | flags), Solo())
        with open_generations(keys["output"]) as file:
            found.append([row.token_ids.tolist() for row in file.rows()])
        assert ("coded without loss while they load" in capsys.readouterr().err) == (asked == "auto")
    assert found[0] == found[1]
