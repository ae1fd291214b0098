import numpy as np
import pytest
import torch

import tiny_models
from noria.engine.weights import Weights, cast_block, views
from noria.files.checkpoint import open_checkpoint
from noria.files.convert import convert

CPU = torch.device("cpu")


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
    weights = Weights(checkpoint, checkpoint.blocks, dtype, CPU)
    found = {f"{name}/{key}": value for name in checkpoint.blocks for key, value in weights.wait(name).items()}
    assert found.keys() == expected.keys()
    for path, value in found.items():
        assert value.dtype == getattr(torch, dtype)
        assert torch.equal(value, expected[path].to(value.dtype)), path


def test_a_rank_reads_its_own_blocks_alone(model):
    checkpoint, _ = model
    read = []
    original, checkpoint.read_block = (
        checkpoint.read_block,
        lambda name, into: (read.append(name), original(name, into)),
    )
    weights = Weights(checkpoint, ["layers/0001"], "float32", CPU)
    assert read == ["layers/0001"]
    assert weights.nbytes == checkpoint.blocks["layers/0001"].nbytes
    with pytest.raises(KeyError):
        weights.wait("layers/0000")


def test_a_tied_embedding_is_held_once_by_a_rank_that_has_both_ends(model):
    checkpoint, _ = model
    weights = Weights(checkpoint, ["embed", "head"], "float32", CPU)
    shared = weights.wait("embed")["tokens"].data_ptr() == weights.wait("head")["lm_head"].data_ptr()
    assert shared == checkpoint.shape.tied
    both = checkpoint.blocks["embed"].nbytes + checkpoint.blocks["head"].nbytes
    matrix = checkpoint.shape.vocab_size * checkpoint.shape.hidden_size * 4
    assert weights.nbytes <= both - matrix * shared


def test_views_share_the_blocks_bytes(model):
    block = cast_block(model[0].blocks["layers/0000"], "float64")
    buffer = torch.zeros(block.nbytes, dtype=torch.uint8)
    for value in views(buffer, block).values():
        value.fill_(1.0)
    ones = int(sum(np.prod(parameter.shape) for parameter in block.parameters))
    assert (buffer.view(torch.float64) == 1.0).sum() == ones
