"""Products that keep their bits: torch's settings, which products a model has, and the check of them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from noria import config
from noria.blocks import lay_out
from noria.launch import exact
from noria.launch.here import ThisRank
from noria.launch.launcher import Location
from noria.launch.mpi import Solo
from noria.limits import LOGITS_ROWS, padded_rows
from noria.model import ModelShape
from noria.streams import streams_of
from test_launcher import RUN

CPU = torch.device("cpu")
SHAPE = ModelShape("llama", 1, 64, 4, 2, 16, 100, 100, False)
LAYER = {"norm": (64,), "qkv": (128, 64), "qkv_bias": (128,), "out": (64, 64), "experts": (8, 96, 64)}


class Opened:
    """A model of two equal layers."""

    shape = SHAPE
    blocks = {f"layers/{number:04}": lay_out("layer", LAYER, "bfloat16") for number in range(2)} | {
        "embed": lay_out("embed", {"tokens": (100, 64)}, "bfloat16"),
        "head": lay_out("head", {"norm": (64,), "lm_head": (100, 64)}, "bfloat16"),
    }


def test_the_products_of_a_model_are_its_matrices_each_shape_once_with_its_bias():
    assert exact.products(Opened.blocks) == [(128, 64, True, 2048), (64, 64, False, 2048), (100, 64, False, 512)]


def test_the_norms_of_a_model_are_compared_too(monkeypatch):
    assert exact.norms(Opened.blocks) == [("rms_norm", 64)]
    its = [("layer_norm", 32), ("rms_norm", 64)]
    assert exact.norms_differing(its, CPU, torch.float16) == ""
    norm = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda hidden, *given: norm(hidden, *given) * (1 + 0.01 * (len(hidden) == 1)))
    said = "torch's rms_norm of 64 depends on the number of rows"
    assert exact.norms_differing(its, CPU, torch.float16) == said


def test_logits_of_each_number_of_rows_that_a_run_may_have_are_computed_before_it():
    seen = []
    linear = lambda hidden, weight, bias: seen.append((len(hidden), *weight.shape))  # noqa: E731
    exact.compute_logits(exact.products(Opened.blocks), CPU, torch.bfloat16, linear)
    assert seen == sorted({(padded_rows(rows), 100, 64) for rows in range(1, LOGITS_ROWS + 1)})


@pytest.fixture
def library(monkeypatch):
    """The preferred library, as a torch with CUDA lets one choose it."""
    chosen = ["default"]

    def preferred(name=None):
        if name is not None:
            chosen[0] = name
        return chosen[0]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    return preferred


@pytest.mark.usefixtures("library")
def test_products_are_not_split_inside_and_are_as_before_outside():
    matmul, setting = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    before = (
        getattr(matmul, setting),
        getattr(matmul, f"{setting}_split_k"),
        torch.backends.cuda.preferred_blas_library(),
    )
    with exact.products_in_one_order(torch.bfloat16) as can:
        assert can and not getattr(matmul, setting) and not getattr(matmul, f"{setting}_split_k")
        assert matmul.allow_fp16_reduced_precision_reduction
        assert torch.backends.cuda.preferred_blas_library() == "cublaslt"
    after = (
        getattr(matmul, setting),
        getattr(matmul, f"{setting}_split_k"),
        torch.backends.cuda.preferred_blas_library(),
    )
    assert before == after


def without(monkeypatch):
    """A torch whose settings know no split."""

    class Matmul:
        allow_bf16_reduced_precision_reduction = True

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())


def test_an_older_torch_cannot_and_nothing_is_changed(monkeypatch):
    without(monkeypatch)
    with exact.products_in_one_order(torch.bfloat16) as can:
        assert not can and torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is True


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without cuBLASLt")
def test_a_torch_without_the_library_cannot():
    with exact.products_in_one_order(torch.bfloat16) as can:
        assert not can and torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction_split_k


def split(hidden, weight, bias):
    """A product whose inputs are added in two halves where rows are few."""
    if len(hidden) > 64:
        return F.linear(hidden.double(), weight.double()).to(hidden.dtype)
    halves = (F.linear(part, its) for part, its in zip(hidden.chunk(2, 1), weight.chunk(2, 1), strict=True))
    return sum(halves)


def in_order(hidden, weight, bias):
    return F.linear(hidden.double(), weight.double(), None if bias is None else bias.double()).to(hidden.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_that_depends_on_the_number_of_rows_is_named(dtype):
    its = [(128, 64, True, 300), (100, 64, False, 128)]
    assert exact.differing(its, CPU, dtype, in_order) == ""
    assert exact.differing(its[1:], CPU, dtype, split) == "the product of 100 x 64 depends on the number of rows"
    assert "of 128 x 64 with its bias depends" in exact.differing(its, CPU, dtype, split)


def test_a_check_without_memory_is_no_proof():
    def fails(*given):
        raise torch.OutOfMemoryError

    assert (
        exact.differing([(128, 64, True, 300)], CPU, torch.bfloat16, fails)
        == "no memory to check the product of 128 x 64"
    )


HELD = {"layers/0000": Opened.blocks["layers/0000"]}  # as it is stored while the run computes


@pytest.fixture
def on_cuda(monkeypatch, library):
    """exact_bits as on a GPU whose attention goes by this kind and whose products are these; returns (attributes, said)."""

    def call(
        capsys, attention="items", found="", dtype="bfloat16", undrawn="", refused="", inside=lambda: None, **keys
    ):
        monkeypatch.setattr(exact, "build_attention", lambda *given: attention)
        monkeypatch.setattr(exact, "build_sampling", lambda *given: undrawn)
        monkeypatch.setattr(exact, "build_products", lambda *given: refused)
        monkeypatch.setattr(exact, "chosen_products", lambda *given: {})
        monkeypatch.setattr(exact._tiles, "refuses", lambda *given: refused)
        monkeypatch.setattr(exact, "differing", lambda *given: found)
        monkeypatch.setattr(exact, "norms_differing", lambda *given: "")
        monkeypatch.setattr(exact, "compute_logits", lambda *given: None)
        streams = streams_of(CPU)
        streams.device = torch.device("cuda", 0)
        here = ThisRank(Solo(), Location("host", 0, 1), streams)
        with exact.exact_bits(config.load(None, RUN | keys), here, Opened, dtype, HELD) as attributes:
            split_k = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction_split_k
            inside()
        return attributes, split_k, capsys.readouterr().err

    return call


def test_a_run_says_whether_bits_may_differ_and_why_and_so_do_its_attributes(on_cuda, capsys, monkeypatch):
    attributes, split_k, said = on_cuda(capsys)
    assert attributes == {"exact_bits": "yes"} and not split_k and not said
    attributes, split_k, said = on_cuda(capsys, found="the product of 5 x 5 differs")
    assert attributes == {"exact_bits": "no: the product of 5 x 5 differs"} and not split_k
    assert (
        "tokens of a row may depend on the rows beside it, by rounding (rank 0: the product of 5 x 5 differs)" in said
    )
    attributes, split_k, said = on_cuda(capsys, exact_bits=False)
    assert attributes == {"exact_bits": "no: --no-exact-bits"} and split_k and not said
    attributes, split_k, said = on_cuda(capsys, attention="sdpa")
    assert attributes == {"exact_bits": "no: attention sdpa"} and "rank 0: attention sdpa" in said
    assert on_cuda(capsys, undrawn="it cannot be built")[0] == {"exact_bits": "no: tokens are drawn by torch"}
    assert on_cuda(capsys, dtype="float32")[0] == {}
    monkeypatch.setattr(Opened, "shape", replace(SHAPE, mixture_size=5))
    assert on_cuda(capsys)[0] == {"exact_bits": "yes"}
    assert on_cuda(capsys, refused="it cannot")[0] == {"exact_bits": "no: the products of a mixture's experts"}


def test_weights_as_they_are_stored_must_have_the_bits_of_the_products_that_the_run_computes(
    on_cuda, capsys, monkeypatch
):
    asked, seen = [], []

    def build_stored(here, blocks, dtype, linear):
        assert blocks is HELD
        asked.append(linear)
        return "these"

    monkeypatch.setattr(exact, "build_stored", build_stored)
    on_cuda(capsys, inside=lambda: seen.append(exact.as_stored._CHOSEN.get()))
    assert asked == [exact.multiply] and seen == ["these"]
    on_cuda(capsys, exact_bits=False)
    on_cuda(capsys, attention="sdpa")
    assert asked[1:] == [exact.in_order.product] * 2


def test_a_torch_that_cannot_is_named(on_cuda, capsys, monkeypatch):
    without(monkeypatch)
    monkeypatch.setattr(
        exact.torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction_split_k", None, raising=False
    )
    attributes, _, said = on_cuda(capsys)
    assert (
        attributes["exact_bits"]
        == f"no: torch {torch.__version__} cannot keep products from being split"
        in said.replace("rank 0: ", "no: ")
    )
