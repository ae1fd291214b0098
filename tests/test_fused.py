"""The kernels of a layer in Triton's interpreter, which runs them on the CPU, against their formulas in float64.

Needs triton, which a CPU's torch does not bring, and a numpy that its interpreter knows (below 2.4 for triton 3.6). Where
there is a GPU, gpu/test_fused.py runs what is compiled. The interpreter cuts bfloat16 off where a GPU rounds.
"""

import importlib
import importlib.util
import inspect

import numpy as np
import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available() or np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

with pytest.MonkeyPatch.context() as patch:  # what is imported now is interpreted
    patch.setenv("TRITON_INTERPRET", "1")
    for name in ("norm", "rotary", "gated"):
        importlib.import_module(f"noria.kernels.{name}")

import fused_checks
import mixtures
from families import CONFIGS
from noria import models
from noria.models import _fused
from noria.models._fused import Norming

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16]
# Of each way in which a first layer without experts makes its heads.
LAYERS = {name: CONFIGS[name] for name in ("llama", "llama with biases", "qwen3", "phi3 partly rotated", "gpt2")}
LAYERS |= {
    config["model_type"]: config
    for config in (
        mixtures.GLM4_MOE,
        mixtures.ERNIE4_5_MOE,
        mixtures.EXAONE_MOE,
        mixtures.MIMO_V2_FLASH,
        mixtures.LAGUNA,
    )
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_fused, "refuses", lambda device, dtype: "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", fused_checks.NORMS)
@pytest.mark.parametrize("width", [1, 44, 512, 1000])
def test_a_row_is_summed_and_normed(width, kind, dtype):
    fused_checks.sum_and_norm(3, width, dtype, CPU, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", fused_checks.ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 44, 2048, 2100])
def test_gates_multiply_ups(width, activation, dtype):
    fused_checks.gates(3, width, dtype, CPU, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", fused_checks.CASES, ids=str)
def test_heads_are_normed_turned_and_written(case, dtype):
    fused_checks.heads_written(case, dtype, CPU)


def test_tables_may_be_wider_than_heads():
    fused_checks.heads_written(fused_checks.CASES[3], torch.float16, CPU, table=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone(dtype):
    hidden, how = fused_checks.draw(4, 300, dtype=dtype, device=CPU), Norming(torch.ones(300, dtype=dtype), 1e-6)
    assert fused_checks.rows_alone(lambda rows: _fused.norm(rows, how), hidden)
    assert fused_checks.rows_alone(lambda rows, branch: _fused.add_norm(branch.clone(), rows, how)[1], hidden, hidden)
    assert fused_checks.rows_alone(_fused.gated, hidden)
    case = fused_checks.Case(4, 2, 16, 16, 16, normed=True)
    whole, alone = (fused_checks.made(case, dtype, CPU, 5, only) for only in (None, 3))
    assert all(torch.equal(one[3:4], other) for one, other in zip(whole, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_by_kernels_is_as_right_as_by_torch(name, dtype, monkeypatch):
    found, plain = fused_checks.errors(LAYERS[name], dtype, CPU, monkeypatch)
    assert all(ours < 1.2 * theirs + 1e-9 for ours, theirs in zip(found, plain, strict=True)), (found, plain)


def test_kernels_that_are_tried_are_found_right(monkeypatch):
    for dtype in DTYPES:
        assert _fused._largest_error(CPU, dtype) < 0.01
    found = _fused._kernel("gated").gated
    monkeypatch.setattr(_fused._kernel("gated"), "gated", lambda gate_up, name: 1.2 * found(gate_up, name))
    assert _fused._largest_error(CPU, torch.float16) > _fused.LARGEST_ERROR


@pytest.mark.parametrize("name", ["llama", "qwen3", "glm4_moe", "laguna"])
def test_what_layers_launch_is_built_ahead(name, monkeypatch):
    """What a layer is launched with later was launched before: the same constants of the compiler."""
    shape = models.for_config(LAYERS[name]).shape(LAYERS[name])
    launched = []
    for kernel, function in (("rotary", "make_and_write"), ("norm", "norm_rows"), ("gated", "gate_rows")):
        module = _fused._kernel(kernel)
        monkeypatch.setattr(module, function, Recorded(getattr(module, function), launched))
    _fused.build(shape, CPU, torch.float32)
    before = {*launched}
    fused_checks.layer_after(LAYERS[name], torch.float32, CPU, 3)
    assert {*launched} == before
    assert any(one[0] == "make_and_write" for one in before)


class Recorded:
    """A kernel whose launches are written down: its name and its constants."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        def launch(*given, **options):
            numbers = tuple(one for one in given if type(one) in (bool, int, str))
            constants = [name for name in inspect.signature(self.kernel.fn).parameters if name.isupper()]
            self.launched.append((self.kernel.fn.__name__, *numbers[-len(constants) :]))
            return self.kernel[grid](*given, **options)

        return launch
