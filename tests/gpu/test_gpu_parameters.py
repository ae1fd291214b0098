"""Parameters with a dtype of their own and encoded ones on a GPU: the CPU's bits, and the dense model's tokens."""

# ruff: noqa: F811 -- the folder of test_parameters is a fixture here
import pytest
import torch

from extra_kinds import extra_kinds
from noria import encodings
from noria.checkpoint.checkpoint import open_checkpoint
from noria.engine.parameters import stored
from noria.plan import building, search
from test_parameters import alone, compare, folder  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pieces_are_decoded_to_the_cpu_s_bits(folder, dtype):
    with extra_kinds(), open_checkpoint(folder / "encoded.h5") as checkpoint:
        block = checkpoint.blocks["layers/0001"].cast(dtype)
        content = torch.empty(block.nbytes, dtype=torch.uint8)
        checkpoint.read_block("layers/0001", content.numpy())
        for parameter in block.encoded:
            found = []
            for device in ("cpu", "cuda"):
                shapes = parameter.computed.items()
                into = {name: torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for name, shape in shapes}
                encodings.decode(parameter, stored(content.to(device), block)[parameter.name], into)
                found.append({name: value.cpu() for name, value in into.items()})
            for name, value in found[0].items():
                assert value.any() and torch.equal(value, found[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("weights", [{"gpu": 100}, {"cpu": 100}, {"gpu": 30, "cpu": 30, "disk": 40}])
@pytest.mark.parametrize("model", ["wide", "wide-encoded"])
def test_a_run_on_the_gpu_gives_the_dense_model_s_tokens(folder, model, weights):
    name = f"{model}-{'-'.join(weights)}"
    compare(folder, model, alone(folder, model, name, weights=weights, laps=2, groups=2, device="cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [{"gpu": 100}, {"cpu": 100}])
def test_a_run_that_decodes_in_parts_gives_the_dense_model_s_tokens(folder, weights, monkeypatch):
    monkeypatch.setattr(building, "DECODING_SHARE", 1 << 60)
    monkeypatch.setattr(search, "_coded_best", lambda tried, here: here)  # not decoded while it is loaded
    compare(
        folder,
        "wide-encoded",
        alone(folder, "wide-encoded", f"parts-{'-'.join(weights)}", weights=weights, device="cuda"),
    )
