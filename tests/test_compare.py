"""jobs/local/compare.py: it agrees with a model that is right and says where one that is wrong first differs."""

import importlib.util
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import families
from forks import forked
from noria.checkpoint.convert import convert

SCRIPT = Path(__file__).parent.parent / "jobs" / "local" / "compare.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "hf"
    families.save(families.MISTRAL | {"eos_token_id": 3}, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_the_users_own_agrees_with_transformers(source, dtype):
    command = [sys.executable, SCRIPT, source, "--device", "cpu", "--max-new-tokens", "6", "--dtype", dtype]
    done = subprocess.run(forked(command), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("logits differ by at most") == 4 and done.stdout.endswith("agree\n")
    assert "tokens/s transformers" in done.stdout


@pytest.mark.slow
def test_a_folder_that_is_not_there_is_refused_in_one_line(tmp_path):
    done = subprocess.run(
        forked([sys.executable, SCRIPT, tmp_path / "none"]), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr == f"compare: {tmp_path}/none does not exist\n", done.stderr


@pytest.mark.slow
def test_the_first_logit_that_differs_is_named(script, source, tmp_path, capsys):
    convert(source, tmp_path / "model.h5")
    model, prompt = families.random_model(families.MISTRAL), list(range(5, 25))
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].double()
        wrong = expected.clone()
        wrong[7, 40] += 0.5
        wrong[9, 2] += 1.0
        arguments = Namespace(tolerance=None, dtype="float32", device="cpu")
        assert script.compare_logits(arguments, tmp_path / "model.h5", [prompt], [expected])[0]
        agree, largest = script.compare_logits(arguments, tmp_path / "model.h5", [prompt], [wrong])
    assert not agree and abs(largest - 1.0) < 1e-3
    assert "first beyond 0.0001 at position 7, token 40" in capsys.readouterr().out


def test_tokens_that_differ_are_a_failure_unless_their_logits_tie(script, capsys):
    assert script.compare_tokens([[1, 2, 3]], [[1, 2, 3]], [[1.0] * 3], 1e-6, True)
    assert not script.compare_tokens([[1, 2, 3]], [[1, 5, 3]], [[1.0] * 3], 1e-6, True)
    assert "differ from new token 1 on: [2, 3] transformers, [5, 3] noria" in capsys.readouterr().out
    assert script.compare_tokens([[1, 2, 3]], [[1, 5, 3]], [[1.0, 1e-7, 1.0]], 1e-6, True)
    assert not script.compare_tokens([[1, 2, 3]], [[1, 5, 3]], [[1.0, 1e-7, 1.0]], 1e-6, False)
    assert not script.compare_tokens([[1, 2, 3]], [[1, 2]], [[1.0] * 3], 1e-6, True)


@pytest.mark.slow
def test_a_mixture_of_experts_is_compared_in_float64_and_no_file_is_named_that_is_gone(tmp_path):
    families.save(families.MIXTRAL, tmp_path / "hf")
    command = [
        sys.executable,
        SCRIPT,
        tmp_path / "hf",
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
        "--dtype",
        "float64",
    ]
    done = subprocess.run(forked(command), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("agree\n"), done.stdout + done.stderr
    assert "noria-compare-" not in done.stdout + done.stderr
    speeds = [float(rate) for rate in re.findall(r"([\d.]+) (?:tokens/s transformers|noria)", done.stdout)]
    assert len(speeds) == 2 and speeds[1] > 50, "16 tokens without the seconds of the start"
