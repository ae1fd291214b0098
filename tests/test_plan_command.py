"""noria plan, as a user calls it: no ranks, no GPU."""

import json

import pytest

import small_run
from noria.__main__ import main

OPT = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "num_hidden_layers": 96, "hidden_size": 12288,
    "num_attention_heads": 96, "ffn_dim": 49152, "vocab_size": 50272, "max_position_embeddings": 2048,
    "word_embed_proj_dim": 12288, "do_layer_norm_before": True, "activation_function": "relu",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.write_files(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def planned(folder, capsys):
    def plan(*more, ranks=2):
        code = main(["plan", "--ranks", str(ranks), *small_run.command(folder, "out.h5", *more)[1:]])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return plan


def test_a_plan_names_every_rank_and_what_binds_and_gives_lines_for_both_schedulers(planned):
    code, out, _ = planned()
    assert code == 0 and "plan: rank 0: " in out and "plan: rank 1: " in out and "binds" in out
    assert "12 of 3 prompt tokens and 24 new ones" in out and "one more    3 ranks: " in out
    assert "#SBATCH --ntasks-per-node=2\n" in out and "#SBATCH --mem=" in out and "gres" not in out
    assert "#PBS -l select=1:ncpus=16:mpiprocs=2:mem=" in out


def test_a_plan_leaves_nothing_behind(planned, folder):
    before = sorted(path.name for path in folder.iterdir())
    planned()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_plan_obeys_the_flags_of_a_run(planned):
    _, out, _ = planned("--weights", "gpu=50,cpu=50", "--cache", "cpu=100", "--schedule", "sequential", "--laps", "1")
    assert "sequential" in out and "(1 of 2 layers)" in out and "cache slots" in out
    code, _, err = planned("--weights", "cpu=100", "--cpu-memory", "10KiB")
    assert code == 2 and "cpu tier needs" in err and "lower placement.weights.cpu (100) or raise" in err


def test_a_model_larger_than_two_gpus_finds_a_plan(folder, tmp_path, planned):
    (tmp_path / "config.json").write_text(json.dumps(OPT))
    (tmp_path / "prompts.jsonl").write_text((json.dumps({"token_ids": [5] * 512}) + "\n") * 128)
    arguments = [
        "--random-weights",
        tmp_path / "config.json",
        "--dtype",
        "float16",
        "--prompts",
        tmp_path / "prompts.jsonl",
    ]
    arguments += ["--output", tmp_path / "o.h5", "--max-new-tokens", "32"]
    assert main(["plan", "--ranks", "2", *map(str, arguments)]) == 0


def test_measured_rates_are_taken_and_named(planned, tmp_path):
    path = tmp_path / "machine.toml"
    path.write_text('device = "CPU"\nhost_to_device = 1e9\n')
    _, out, _ = planned("--machine", path)
    assert "CPU; assumed, not measured: " in out and "host_to_device" not in out.split("assumed")[1].split("\n")[0]
    path.write_text("host_to_device = 0\n")
    code, _, err = planned("--machine", path)
    assert code == 2 and "host_to_device is 0: it must be a number above 0" in err


@pytest.mark.parametrize(
    ("ranks", "said"), [(0, "--ranks is 0: it must be at least 1"), (4, "4 virtual stages (ranks x laps) for 3 layers")]
)
def test_a_number_of_ranks_that_cannot_be_is_refused(planned, ranks, said):
    code, _, err = planned(ranks=ranks)
    assert code == 2 and said in err


def test_one_rank_more_than_there_are_layers_buys_nothing_and_says_so(planned):
    _, out, _ = planned(ranks=3)
    assert "one more    4 ranks: 4 virtual stages" in out
