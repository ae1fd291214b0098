"""Runs with --products fp8: tokens of the dense model whose activations numpy rounds alike, wherever weights are; what a run says
and refuses. test_products_fp8.py has the kernels."""

import json
import re
from unittest.mock import patch

import fp8_products_worker
import h5py
import numpy as np
import pytest
import torch

import counts
import quantized
import reference
import world
from noria import config
from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.kernels import fp8
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.run import run
from rounded import E4M3

SIZES = {"hidden_size": 160, "num_hidden_layers": 4}  # of 160: a block of 128 and a part of one
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
FORMS = {
    "blocks": ("llama", BLOCKS, quantized.fp8_block()),
    "powers": ("qwen3", BLOCKS, quantized.fp8_block(dtype=torch.float8_e8m0fnu)),
    "channels": (
        "llama",
        quantized.compressed("float-quantized", strategy="channel", type="float"),
        quantized.fp8_channel(),
    ),
    "experts": ("qwen3_moe", BLOCKS, quantized.fp8_block()),
}
RUN = """
dtype = "float64"
device = "cpu"
[sampling]
max_new_tokens = 3
seed = 11
logprobs = 1
"""


def rounded(x, columns):
    """Each row as e4m3 gives it back under a scale for so many columns: the nearest number, of two as near the even one.

    Quotients are of float32: those of numbers of few bits are often as near to two, and do not depend on the last bit of 64.
    """
    most = np.maximum.reduceat(np.abs(x), range(0, x.shape[1], columns), axis=1)
    scales = quantized.spread(most / 448, x.shape, 1, columns)
    wanted = np.abs((x / scales).astype(np.float32))
    above = np.clip(np.searchsorted(E4M3, wanted), 1, 126)
    down, up = wanted - E4M3[above - 1], E4M3[above] - wanted
    codes = np.where((down < up) | ((down == up) & (above % 2 == 1)), above - 1, above)
    return np.sign(x) * E4M3[codes] * scales


def linear(columns, dense=reference._linear):
    def its(weights, name, x):
        plain = "experts" in name or name.endswith(".gate")
        return dense(weights, name, x if plain else rounded(x, columns))

    return its


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model a form, prompts and a run file; and the dense weights of each."""
    folder, weights = tmp_path_factory.mktemp("fp8-products"), {}
    for form, (model, settings, pack) in FORMS.items():
        weights[form] = quantized.write(folder / form, quantized.MODELS[model] | SIZES, settings, pack)
        convert(folder / form, folder / f"{form}.h5")
    convert(folder / "blocks", folder / "model.h5", dtype="float64")  # a disk has the run's dtype
    random = np.random.default_rng(5)
    rows = [{"token_ids": random.integers(4, 90, size).tolist()} for size in (1, 9, 30)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(RUN)
    return folder, weights


def flags_of(folder, model, name):
    files = {"model": f"{model}.h5", "prompts": "prompts.jsonl", "output": f"{name}.h5", "scratch": "."}
    return {key: str(folder / file) for key, file in files.items()}


def alone(folder, model, name, **keys):
    assert run(config.load(folder / "run.toml", flags_of(folder, model, name) | keys), Solo()) == 0
    return rows_of(folder, name)


def rows_of(folder, name):
    with open_generations(folder / f"{name}.h5") as output:
        return list(output.rows())


@pytest.fixture(scope="module")
def expected(made):
    """Rows of the dense model by form: tokens and log-probabilities of numpy alone."""
    folder, weights = made
    found = {}
    for form, (model, *_) in FORMS.items():
        columns = 10**6 if form == "channels" else 128
        with patch.object(reference, "_linear", linear(columns)):
            found[form] = []
            for row in map(json.loads, (folder / "prompts.jsonl").read_text().splitlines()):
                ids = row["token_ids"]
                its = quantized.MODELS[model] | SIZES, weights[form]
                tokens = reference.generate(*its, ids, 3)
                logits = reference.logits(*its, [*ids, *tokens])[len(ids) - 1 : -1]
                logprobs = logits - logits.max(-1, keepdims=True)
                logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
                found[form].append((tokens, logprobs[range(3), tokens]))
    return found


def compare(found, expected):
    for row, (tokens, logprobs) in zip(found, expected, strict=True):
        assert row.token_ids.tolist() == tokens
        np.testing.assert_allclose(row.logprobs, logprobs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_those_of_the_dense_model_that_rounds_activations_alike(made, expected, form):
    compare(alone(made[0], form, f"{form}-fp8", products="fp8"), expected[form])
    plain = alone(made[0], form, f"{form}-auto")
    assert max(abs(row.logprobs[0] - its[1][0]) for row, its in zip(plain, expected[form], strict=True)) > 1e-6


@pytest.mark.slow
@pytest.mark.world
def test_tokens_do_not_depend_on_ranks_laps_chunks_or_tiers(made, expected):
    names = [name for ranks in (1, 2, 3, 4) for name, _ in fp8_products_worker.cases(ranks)]
    names = names if counts.full() else names[2::9]
    world.call(4, fp8_products_worker.work, made[0], names, timeout=500)
    for name in names:
        compare(rows_of(made[0], name), expected["blocks"])


def test_weights_that_are_decoded_when_they_are_loaded_are_not_where_they_are_multiplied(made, expected, monkeypatch):
    """No number of a product in fp8 is decoded: its codes are what is on the device, and what products read."""
    seen = []
    product = fp8.product

    def spied(hidden, weight, bias=None):
        seen.append({its.codes.dtype for its in weight.matrices})
        return product(hidden, weight, bias)

    monkeypatch.setattr(fp8, "product", spied)
    compare(alone(made[0], "blocks", "spied", products="fp8", weights={"gpu": 100}), expected["blocks"])
    assert len(seen) % (4 * 4) == 0 and seen and all(its == {torch.uint8} for its in seen)
    with h5py.File(made[0] / "spied.h5") as file:
        plan = json.loads(file.attrs["plan"])
    assert not plan["decoded"] and not plan["memory"][0]["gpu"].get("decoded weights")


def test_output_plan_and_log_say_it(made, capsys):
    alone(made[0], "channels", "said", products="fp8")
    log = capsys.readouterr().err
    assert "float64 with products in fp8" in log and "note: products in fp8" in log
    with h5py.File(made[0] / "said.h5") as file:
        assert file.attrs["products"] == "fp8" and json.loads(file.attrs["plan"])["products"] == "fp8"
    assert main(["report", str(made[0] / "said.h5")]) == 0
    assert re.search("^ +products +fp8$", capsys.readouterr().out, re.MULTILINE)
    its = flags_of(made[0], "channels", "planned")
    keys = [word for name in ("model", "prompts", "output") for word in (f"--{name}", its[name])]
    assert main(["plan", *keys, "--ranks", "1", "--device", "cpu", "--dtype", "float32", "--products", "fp8"]) == 0
    assert "products in fp8" in capsys.readouterr().out


def test_a_run_goes_on_with_the_same_products_alone(made, capsys):
    alone(made[0], "channels", "resumed", products="fp8")
    keys = [word for key, value in flags_of(made[0], "channels", "resumed").items() for word in (f"--{key}", value)]
    assert main(["run", str(made[0] / "run.toml"), *keys]) == 2
    error = capsys.readouterr().err
    assert 'products: "fp8" there, "auto" now' in error and "holds rows of another run" in error


def test_it_is_refused_with_the_reason_where_it_cannot_be(made, capsys, tmp_path):
    folder, _ = made

    def refused(model, *more):
        keys = [word for key, value in flags_of(folder, model, "refused").items() for word in (f"--{key}", value)]
        assert main(["run", str(folder / "run.toml"), *keys, "--products", *more]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "a CPU computes them in runs in float32 or float64, this one's dtype is bfloat16" in refused(
        "blocks", "fp8", "--dtype", "bfloat16"
    )
    assert "it is one of auto, fp8" in refused("blocks", "fp9")
    quantized.write(
        tmp_path / "plain", quantized.MODELS["llama"], {}, None, plain=quantized.dense(quantized.MODELS["llama"])[1]
    )
    convert(tmp_path / "plain", folder / "plain.h5")
    assert "no matrix of" in (said := refused("plain", "fp8")) and "it has plain numbers alone" in said
    assert "--quantization fp8" in said and not (folder / "refused.h5").exists()


@pytest.mark.parametrize("columns", [128, 160])
def test_activations_are_rounded_as_numpy_does_it(columns):
    x = np.random.default_rng(0).standard_normal((7, 160)) * 10.0 ** np.arange(-5, 2)[:, None]
    x[3], x[2, :130] = 0, 0
    with np.errstate(invalid="ignore"):
        wanted = np.nan_to_num(rounded(x, columns))
    np.testing.assert_allclose(fp8.rounded(torch.from_numpy(x), columns).numpy(), wanted, rtol=1e-15)


def test_a_gpu_needs_what_its_instructions_take(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert "bfloat16 or float16, not float32" in fp8.refuses(cuda, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "capability 8.9, this one has 8.0" in fp8.refuses(cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 1))
    assert "a scale for 48 inputs" in fp8.refuses(cuda, torch.bfloat16, ((128, 128), (32, 48)))
