"""Blocks read ahead, staged in a scratch folder and made in place: always the checkpoint's own bytes."""

import json
import os

import numpy as np
import pytest
import torch

import tiny_models
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.random_weights import PERIOD, random_checkpoint
from noria.checkpoint.read_ahead import read_ahead
from noria.checkpoint.scratch import checkpoint_regions, copied_regions, scratch_region
from noria.errors import InputError
from noria.streams import CpuStreams
from noria.tiers.disk import Disk
from noria.tools import direct
from noria.tools.pinned import HostMemory

STREAMS = CpuStreams(torch.device("cpu"))


@pytest.fixture(params=["file", "random"])
def checkpoint(request, tmp_path):
    if request.param == "random":
        yield random_checkpoint(tiny_models.LLAMA, "float32")
        return
    source = tiny_models.write_directory(tmp_path / "hf", tiny_models.LLAMA, tiny_models.state(tiny_models.LLAMA))
    convert(source, tmp_path / "model.h5")
    with open_checkpoint(tmp_path / "model.h5") as opened:
        yield opened


def block(checkpoint, name):
    content = bytearray(checkpoint.blocks[name].nbytes)
    checkpoint.read_block(name, content)
    return bytes(content)


def damage(checkpoint, name):
    extent = checkpoint.extent(name)
    with extent.path.open("r+b") as file:
        file.seek(extent.offset)
        byte = file.read(1)
        file.seek(extent.offset)
        file.write(bytes([byte[0] ^ 1]))


def test_blocks_come_in_order_whole_and_each_valid_until_the_next(checkpoint):
    names = list(checkpoint.blocks)[::-1]
    found = [(name, bytes(memory.numpy())) for name, memory in read_ahead(checkpoint, names)]
    assert found == [(name, block(checkpoint, name)) for name in names]


def test_a_block_with_a_place_of_its_own_is_read_into_it(checkpoint):
    names = list(checkpoint.blocks)
    own = {name: HostMemory(checkpoint.blocks[name].nbytes).memory for name in names[1:3]}
    for name, memory in read_ahead(checkpoint, names, into=own):
        assert name not in own or memory is own[name]
    assert all(bytes(own[name].numpy()) == block(checkpoint, name) for name in own)


def test_memory_that_is_not_aligned_is_filled_too(checkpoint):
    name = "layers/0001"
    memory = HostMemory(checkpoint.blocks[name].nbytes + 4096).memory[64 : 64 + checkpoint.blocks[name].nbytes]
    assert [bytes(found.numpy()) for _, found in read_ahead(checkpoint, [name], into={name: memory})] == [
        block(checkpoint, name)
    ]


def test_a_caller_may_stop_early(checkpoint):
    blocks = read_ahead(checkpoint, checkpoint.blocks)
    next(blocks)
    blocks.close()


@pytest.mark.parametrize("checkpoint", ["file"], indirect=True)
def test_a_damaged_block_is_named_when_its_turn_comes(checkpoint):
    damage(checkpoint, "layers/0001")
    blocks = read_ahead(checkpoint, ["embed", "layers/0001", "head"])
    assert next(blocks)[0] == "embed"
    with pytest.raises(InputError, match="'layers/0001' is damaged"):
        next(blocks)


@pytest.mark.parametrize("checkpoint", ["file"], indirect=True)
def test_a_file_that_shrinks_while_it_is_read_is_named(checkpoint):
    os.truncate(checkpoint.path, checkpoint.extent("head").offset + 10)
    with pytest.raises(InputError, match=r"model.h5 is truncated: \d+ bytes were to be read at byte \d+"):
        list(read_ahead(checkpoint, ["head"]))


@pytest.mark.parametrize("staged", [True, False])
def test_a_disk_tier_holds_the_blocks_one_after_another(checkpoint, tmp_path, staged):
    names = ["head", "layers/0000", "layers/0002"]
    if not staged and not hasattr(checkpoint, "extent"):
        with pytest.raises(InputError, match="set placement.stage"):
            checkpoint_regions(checkpoint, names)
        return
    before = sorted(tmp_path.iterdir())
    regions = copied_regions(checkpoint, names, tmp_path) if staged else checkpoint_regions(checkpoint, names)
    assert sorted(tmp_path.iterdir()) == before
    tier, offset = Disk(regions, STREAMS, 8192, 2), 0
    for name in names:
        data = torch.zeros(checkpoint.blocks[name].nbytes, dtype=torch.uint8)
        tier.load([(offset, data)]).event()
        assert bytes(data.numpy()) == block(checkpoint, name)
        offset += len(data)
    assert tier.nbytes == offset
    tier.close()


@pytest.mark.parametrize("checkpoint", ["file"], indirect=True)
def test_a_disk_tier_checks_a_block_when_it_is_first_loaded(checkpoint):
    damage(checkpoint, "layers/0001")
    tier = Disk(checkpoint_regions(checkpoint, ["layers/0000", "layers/0001"]), STREAMS, 8192, 2)
    first, second = (
        torch.zeros(checkpoint.blocks[name].nbytes, dtype=torch.uint8) for name in ("layers/0000", "layers/0001")
    )
    tier.load([(0, first)]).event()
    with pytest.raises(InputError, match="'layers/0001' is damaged"):
        tier.load([(len(first), second)]).event()
    tier.close()


@pytest.mark.parametrize("checkpoint", ["file"], indirect=True)
def test_a_damaged_block_is_not_staged_and_leaves_nothing(checkpoint, tmp_path):
    damage(checkpoint, "head")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="'head' is damaged"):
        copied_regions(checkpoint, ["layers/0000", "head"], tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_scratch_disk_that_fails_while_it_is_staged_is_named(checkpoint, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(direct.os, "pwritev", fail)
    with pytest.raises(OSError, match=r"scratch file: input/output error, [\d,]+ more bytes were to be written"):
        copied_regions(checkpoint, ["head"], tmp_path)


def test_a_disk_that_is_full_refuses_to_stage_and_to_hold_a_cache(checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(direct.os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"GiB are free.*lower placement.weights.disk .* \(No space"):
        copied_regions(checkpoint, ["head"], tmp_path)
    with pytest.raises(InputError, match=r"lower placement.cache.disk"):
        scratch_region(tmp_path, 4096)


@pytest.mark.slow
def test_random_weights_repeat_with_their_period_in_any_number_of_threads(monkeypatch):
    config = json.loads(json.dumps(tiny_models.OPT)) | {"vocab_size": 40 * PERIOD // 32, "hidden_size": 32}
    made = random_checkpoint(config, "float16")
    several = np.frombuffer(block(made, "embed"), np.float16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert np.array_equal(several, np.frombuffer(block(made, "embed"), np.float16))
    size = config["vocab_size"] * 32
    assert np.array_equal(several[:size], np.resize(several[:PERIOD], size))
    assert len(np.unique(several[:PERIOD])) > 1000
