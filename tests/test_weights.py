import random

import numpy as np
import pytest
import torch

import tiny_models
from late_streams import LateStreams
from noria.blocks import lay_out, layer_name
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.engine.assembly import weights_of
from noria.engine.cycle import Cycle
from noria.engine.loading import Loader
from noria.engine.parameters import views
from noria.engine.timing import Traffic
from noria.engine.weights import Home, Placed, Weights
from noria.limits import loaded_once
from noria.streams import CpuStreams, Done
from noria.tiers import Transfer

CPU = torch.device("cpu")


def resident(checkpoint, names, dtype):
    """All of these blocks on the device."""
    return held(Loader(checkpoint, dict.fromkeys(names, "gpu"), dtype, CpuStreams(CPU)), [[]], 1, 0)


def held(loader, stages, groups, num_slots, streams=CpuStreams(CPU), traffic=None, ahead=True):
    """The weights that the loader places."""
    return weights_of(loader.load(), stages, groups, num_slots, streams, traffic or Traffic(), ahead)


@pytest.fixture(params=["llama", "opt", "tied llama"])
def model(request, tmp_path):
    """(open checkpoint, its parameters by path, written out by hand)."""
    config = tiny_models.OPT if request.param == "opt" else tiny_models.LLAMA
    config = config | {"tie_word_embeddings": request.param != "llama"}
    tensors = tiny_models.state(config)
    convert(tiny_models.write_directory(tmp_path / "hf", config, tensors), tmp_path / "model.h5")
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        yield checkpoint, tiny_models.fused(config, tensors)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_parameter_is_the_checkpoints_in_the_runs_dtype(model, dtype):
    checkpoint, expected = model
    weights = resident(checkpoint, checkpoint.blocks, dtype)
    found = {f"{name}/{key}": value for name in checkpoint.blocks for key, value in weights.wait(name).items()}
    assert found.keys() == expected.keys()
    for path, value in found.items():
        assert value.dtype == getattr(torch, dtype)
        assert torch.equal(value, expected[path].to(value.dtype)), path


def test_a_rank_reads_its_own_blocks_alone(model):
    checkpoint, _ = model
    read, checking = [], checkpoint.checking
    checkpoint.checking = lambda name: (read.append(name), checking(name))[1]
    weights = resident(checkpoint, ["layers/0001"], "float32")
    assert read == ["layers/0001"]
    assert weights.nbytes == checkpoint.blocks["layers/0001"].nbytes
    with pytest.raises(KeyError):
        weights.wait("layers/0000")


def test_a_tied_embedding_is_held_once_by_a_rank_that_has_both_ends(model):
    checkpoint, _ = model
    weights = resident(checkpoint, ["embed", "head"], "float32")
    shared = weights.wait("embed")["tokens"].data_ptr() == weights.wait("head")["lm_head"].data_ptr()
    assert shared == checkpoint.shape.tied
    both = checkpoint.blocks["embed"].nbytes + checkpoint.blocks["head"].nbytes
    matrix = checkpoint.shape.vocab_size * checkpoint.shape.hidden_size * 4
    assert weights.nbytes <= both - matrix * shared


def test_views_share_the_blocks_bytes(model):
    block = model[0].blocks["layers/0000"].cast("float64")
    buffer = torch.zeros(block.nbytes, dtype=torch.uint8)
    for value in views(buffer, block).values():
        value.fill_(1.0)
    ones = int(sum(np.prod(parameter.shape) for parameter in block.parameters))
    assert (buffer.view(torch.float64) == 1.0).sum() == ones


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_streamed_blocks_are_the_checkpoints_whenever_they_are_used_although_every_copy_is_late(model, tier, slots):
    checkpoint, expected = model
    layers = range(checkpoint.shape.num_layers)
    names = [layer_name(layer) for layer in layers] + ["head"]
    traffic, streams = Traffic(), LateStreams(CPU)
    loader = Loader(checkpoint, dict.fromkeys(names, tier), "float32", streams)
    weights = held(loader, [layers], 2, slots, streams, traffic, ahead=slots > 1)
    for round in range(3):
        for group in range(2):
            empty = (round, group) == (1, 0)
            weights.begin(round, 0, group, tokens=int(not empty))
            for name in [] if empty else names:
                for key, value in weights.wait(name).items():
                    assert torch.equal(value, expected[f"{name}/{key}"]), (round, group, name, key)
                weights.done(name)
    traffic.end_round(prefill=False)
    used = 5 * sum(checkpoint.blocks[name].nbytes for name in names)
    assert traffic.decode["host_to_gpu"] == used and traffic.decode["disk_to_host"] == used * (tier == "disk")
    weights.close()
    assert traffic.weights_unused <= (slots > 1) * slots * max(checkpoint.blocks[name].nbytes for name in names)


def test_an_embedding_in_host_memory_is_never_streamed(model):
    checkpoint, expected = model
    tiers = {"embed": "cpu", "layers/0000": "cpu", "head": "gpu"}
    weights = held(Loader(checkpoint, tiers, "float32", CpuStreams(CPU)), [range(1)], 1, 2)
    for key, value in weights.wait("embed").items():
        assert torch.equal(value, expected[f"embed/{key}"])


class Tier:
    """Loads nothing. `slow`: its transfers are never settled before somebody waits for them."""

    def __init__(self, slow):
        self.slow, self.nbytes = slow, 0

    def load(self, pieces, after):
        self.nbytes += sum(data.numel() for _, data in pieces)
        transfer = Transfer(Done())
        if self.slow:
            transfer = type("Slow", (Transfer,), {"settled": False})(Done())
        return transfer

    def close(self):
        return 0


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(50))
def test_loads_in_vain_are_at_most_the_slots_at_the_end_and_where_a_last_group_is_passed_over(seed, ahead, slow):
    draw = random.Random(seed)
    visits = [[f"{lap}.{layer}" for layer in range(draw.randint(1, 6))] for lap in range(draw.randint(1, 3))]
    streamed = [[name for name in names if draw.random() < 0.8] for names in visits[:-1]] + [visits[-1][:]]
    groups, slots, rounds, tier = draw.randint(1, 5), draw.randint(1, 4), 30, Tier(slow)
    block, shares = lay_out("any", {"weight": (9999,)}, "float32"), draw.choice([[None], [0.3, 0.0, 0.3, 0.4]])
    homes = {name: Home(block, tier, 0, ("host_to_gpu",)) for names in streamed for name in names}
    resident = {name: {} for names in visits for name in names if name not in homes}
    traffic = Traffic()
    cycle = Cycle(streamed, groups, slots) if homes else None
    weights = Weights(Placed(resident, homes), cycle, CpuStreams(CPU), traffic, ahead)
    empty_share, used, passed_over = draw.choice([0.0, 0.1, 0.5, 0.9]), 0, 0
    for round in range(rounds):
        empty = [round == rounds - 1 or draw.random() < empty_share for _ in range(groups)]
        computing = groups - sum(empty)
        each_group = [not loaded_once(len(names), groups, slots) for names in streamed]
        used += sum(
            len(names) * (computing if each else min(computing, 1))
            for names, each in zip(streamed, each_group, strict=True)
        )
        passed_over += empty[-1] and computing > 0 and each_group[0] and any(streamed[1:])
        for lap, names in enumerate(visits):
            for group in range(groups):
                weights.begin(round, lap, group, tokens=int(not empty[group]))
                for name in [] if empty[group] else names:
                    if not ahead:
                        weights.load(name)
                    before = tier.nbytes
                    weights.wait(name)
                    assert slow or len(shares) > 1 or tier.nbytes == before  # it was on its way
                    weights.done(name)
                    for share in shares:
                        weights.load(share=share)
    weights.close()
    traffic.end_round(prefill=False)
    assert traffic.decode["host_to_gpu"] == used * block.nbytes
    assert traffic.weights_unused == tier.nbytes - used * block.nbytes
    assert traffic.weights_unused <= ahead * slots * (1 + passed_over) * block.nbytes
