"""What noria plan says of weights in fewer bits."""

import json

import pytest

import small_run
from noria.__main__ import main
from noria.checkpoint.quantization import SIZES, forms_of
from noria.checkpoint.random_weights import random_checkpoint
from noria.config import load
from noria.errors import InputError
from noria.plan import planner, rates
from noria.plan.costs import Workload
from noria.plan.problem import Machine, Problem
from noria.plan.stored import stored_as

GiB = 1024**3
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 20, "num_attention_heads": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
H200 = rates.assumed("H200")


def problem_of(config, device_nbytes, host_nbytes):
    checkpoint = random_checkpoint(config, "bfloat16")
    keys = load(None, {"random_weights": "c.json", "prompts": "p.jsonl", "output": "o.h5"})
    machine, rows = Machine("cuda", device_nbytes, host_nbytes, scratch_nbytes=0), Workload(256, 512, 32, 256 * 34)
    return Problem(keys, checkpoint.shape, checkpoint.blocks, "bfloat16", 1, machine, 256, rows)


def test_each_form_has_its_bits_and_a_streamed_model_gains_what_its_bytes_say():
    problem = problem_of(LLAMA, 16 * GiB, 60 * GiB)
    plan = planner.make(problem, H200)
    found = {one.word: one for one in stored_as(problem, H200, plan, forms_of(problem.blocks, "bfloat16"))}
    assert list(found) == list(SIZES)
    for word, bits in (("fp8", 8), ("int8", 8.25), ("int4", 4.375)):
        assert bits < found[word].bits < bits + 1.5, word  # embedding and head stay in bfloat16
        # beside bfloat16 whose streamed blocks are coded without loss, in 11.3 bits
        assert found[word].plan is not None and 0.8 * 11.3 / bits < found[word].as_dict()["times"]
        assert f"{word}: " in found[word].words() and " x" in found[word].words()
    assert found["int4"].plan.decoded is False  # what is resident stays as it is stored


def test_a_model_that_does_not_fit_may_fit_in_fewer_bits():
    problem = problem_of(LLAMA, 10 * GiB, 8 * GiB)
    with pytest.raises(InputError, match="weights do not fit"):
        planner.make(problem, H200)
    found = {one.word: one for one in stored_as(problem, H200, None, forms_of(problem.blocks, "bfloat16"))}
    assert found["fp8"].plan is None and "does not fit: weights do not fit" in found["fp8"].words()
    assert found["int4"].plan is not None and "tok/s overall, fits" in found["int4"].words()
    assert "refused" in found["fp8"].as_dict() and found["int4"].as_dict()["predicted"]["tokens_per_second"] > 0


def test_a_plan_lists_the_forms_and_a_model_that_is_encoded_has_none(tmp_path, capsys):
    folder = small_run.write_files(tmp_path)
    command = ["plan", "--ranks", "1", *small_run.command(folder, "out.h5")[1:]]
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("converted ")]
    assert [line.split()[1] for line in lines] == [f"{word}:" for word in SIZES]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["converted"]
    assert [one["change"] for one in told] == list(SIZES) and all(one["times"] > 0 for one in told)


def test_what_is_encoded_already_is_not_converted_again():
    said = {"quant_method": "int4", "group_size": 64}
    checkpoint = random_checkpoint(LLAMA | {"num_hidden_layers": 2, "quantization_config": said}, "bfloat16")
    assert forms_of(checkpoint.blocks, "bfloat16") == {}
