"""noria plan, as a user calls it: no ranks, no GPU."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest

import small_run
from noria.__main__ import main
from noria.commands import plan as command
from noria.plan import kept, rates
from noria.plan.rates import Node

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
    assert (
        code == 0 and re.search("\nmemory      0     +memory .*\nmemory      1     +memory ", out) and "\nbinds " in out
    )
    assert "\nstages      2 virtual stages of 1 to 2 layers, one a rank and lap\n" in out and "\nnext best   " in out
    assert "12 of 3 prompt tokens and 24 new ones" in out and "one more    3 ranks: " in out
    assert "#SBATCH --ntasks-per-node=2\n" in out and "#SBATCH --mem=" in out and "gres" not in out
    assert "#PBS -l select=1:ncpus=16:mpiprocs=2:mem=" in out


def test_a_plan_as_json_has_what_its_text_has(planned):
    code, out, err = planned("--json")
    told, (_, text, _) = json.loads(out), planned()
    assert code == 0 and not err and out.count("\n") == 1
    names = {
        "plan",
        "memory",
        "binds",
        "terms",
        "predicted",
        "rivals",
        "what_if",
        "machine",
        "rows",
        "model",
        "job_script",
    }
    assert names <= set(told) and told["plan"]["num_ranks"] == 2 == len(told["memory"])
    assert f"{told['predicted']['tokens_per_second']:,.0f} tok/s overall" in text and told["rows"]["rows"] == 12
    assert f"\nbinds       {told['binds']} in " in text and set(told["terms"]) == {"prefill", "decode"}
    assert all(line in text for line in told["job_script"]) and len(told["what_if"]) == 3
    assert f"next best   {told['rivals'][0]['change']}: " in text and told["rivals"][0]["predicted"]["seconds"] > 0


@pytest.mark.parametrize("prompts", ["", '{"token_ids": []}\n'])
def test_a_plan_without_a_row_that_can_run_says_so(planned, tmp_path, prompts):
    (tmp_path / "none.jsonl").write_text(prompts)
    said = "rows        warning: no row was found that can run: planned as if one filled the context"
    assert said in planned("--prompts", tmp_path / "none.jsonl")[1] and said not in planned()[1]


def test_a_plan_leaves_nothing_behind(planned, folder):
    before = sorted(path.name for path in folder.iterdir())
    planned()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_plan_obeys_the_flags_of_a_run(planned):
    _, out, _ = planned("--weights", "gpu=50,cpu=50", "--cache", "cpu=100", "--schedule", "sequential", "--laps", "1")
    assert "sequential" in out and "  1 of 2  " in out and "cache slots" in out
    code, _, err = planned("--weights", "cpu=100", "--cpu-memory", "10KiB")
    assert code == 2 and "cpu tier needs" in err and "lower placement.weights.cpu (100) or raise" in err


@pytest.fixture
def large(tmp_path, capsys, monkeypatch):
    """noria plan for an OPT-175B shape and 256 rows of 512 + 32 tokens, without rivals, which are a search each: code, output."""
    monkeypatch.setattr(command, "rivals", lambda *problem: [])
    monkeypatch.setattr(command, "bought", lambda *problem: [])
    (tmp_path / "config.json").write_text(json.dumps(OPT | {"torch_dtype": "float16"}))
    (tmp_path / "prompts.jsonl").write_text((json.dumps({"token_ids": [5] * 512}) + "\n") * 256)
    names = {"random-weights": "config.json", "prompts": "prompts.jsonl", "output": "o.h5"}
    files = [word for name, file in names.items() for word in (f"--{name}", str(tmp_path / file))]

    def plan(ranks, *more):
        code = main(["plan", "--ranks", str(ranks), *files, "--max-new-tokens", "32", *more])
        return code, capsys.readouterr().out

    return plan


@pytest.mark.slow
def test_a_model_larger_than_two_gpus_finds_a_plan_in_the_dtype_of_its_config(large):
    code, out = large(2)
    assert code == 0 and "opt, 96 layers, float16" in out


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_do_not_crowd_the_cache_out_of_cpu_memory(large, ranks):
    code, out = large(ranks, "--gpu-memory", "16GiB", "--stage")
    rows = int(re.search(r"(\d+) rows at once", out)[1])
    assert code == 0 and rows >= 30 * ranks, "one row at a time would take weeks"
    assert re.search(r"moved       rank 0: \d+\.\d\d GB of cache from cpu to the GPU a round, \d+\.\d MB back", out)


def test_staging_is_planned_where_it_turns_out_that_nothing_needs_it(large):
    assert large(8, "--stage")[0] == 0


def test_nine_ranks_are_asked_for_as_nine(large):
    _, out = large(9)
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks=9\n#SBATCH --ntasks-per-node=5\n" in out
    found = re.search(r"#PBS -l select=(\d):.*mpiprocs=(\d).*\+(\d):.*mpiprocs=(\d)", out)
    assert [int(one) for one in found.groups()] == [1, 5, 1, 4]


def test_a_tier_given_twice_is_refused(planned):
    code, _, err = planned("--weights", "cpu=20,cpu=100")
    assert code == 2 and "'cpu=20,cpu=100': cpu is given twice" in err


def test_measured_rates_are_taken_and_named(planned, tmp_path):
    path = tmp_path / "machine.toml"
    path.write_text('device = "CPU"\nhost_to_device = 1e9\n')
    _, out, _ = planned("--machine", path)
    assert f"machine     CPU, measured ({path}); assumed, not measured: " in out
    assert "host_to_device" not in out.split("assumed")[1].split("\n")[0]
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


def test_a_plan_for_a_cpu_has_memory_and_one_of_each(planned):
    code, out, _ = planned("--device", "cpu", "--laps", "1", "--groups", "1", ranks=1)
    assert code == 0 and "plan: 1 rank, 1 lap, 1 group, steps of " in out
    assert re.search("\nmemory      0 +memory .* 3 of 3 ", out) and "gpu" not in out and "\ndevice " not in out


def test_a_plan_says_for_which_device_it_is_and_how_to_say_another(large):
    _, out = large(8)
    (line,) = (line for line in out.splitlines() if line.startswith("device "))
    (name,) = (line for line in out.splitlines() if line.startswith("machine "))
    assert line.split("planned for ")[1].startswith(name.split(maxsplit=1)[1].split(";")[0])
    assert "--device cpu" in line and "--machine FILE" in line and "\ndevice " not in large(8, "--device", "cuda")[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder of kept rates: of two H200s, of eight A100s, and a CPU's."""
    monkeypatch.setenv("NORIA_CACHE", str(tmp_path / "kept"))
    now = datetime.now(UTC)
    for device, ranks, more in (("NVIDIA H200", 2, {"hop": 3.3e11}), ("NVIDIA A100 80GB", 8, {}), ("CPU", 1, {})):
        known = replace(rates.assumed(device), device=device, assumed=(), node=Node(ranks, 1), measured=f"{now:%FT%TZ}")
        kept.keep(tmp_path / "kept", replace(known, **more), now)
    return tmp_path / "kept"


def test_a_plan_takes_rates_that_runs_have_kept_and_says_which_and_which_not(planned, cache):
    _, out, _ = planned("--device", "auto")
    (line,) = (
        line for line in out.splitlines() if line.startswith("machine     NVIDIA H200, 2 ranks a host, measured on ")
    )
    assert str(cache / "noria-rates-nvidia-h200-x2-") in line and "assumed" not in out
    assert "machine     kept too: NVIDIA A100 80GB in " in out and "predicted from measured rates" in out
    _, out, _ = planned("--device", "cpu", ranks=1)
    assert "machine     CPU, 1 rank a host, measured on " in out and "assumed" not in out and "kept too" not in out


def test_a_machine_file_of_another_kind_of_device_is_refused(planned, cache):
    (path,) = cache.glob("*a100*")
    code, _, err = planned("--device", "cpu", "--machine", path)
    assert code == 2 and f"--machine {path} is of NVIDIA A100 80GB, but device is 'cpu': leave one of them out" in err
    (path,) = cache.glob("*cpu*")
    assert planned("--device", "cuda", "--machine", path)[0] == 2


def test_a_plan_for_other_ranks_than_were_measured_says_so(planned, cache):
    _, out, _ = planned("--device", "cuda", ranks=1)
    assert "machine     warning: measured with " in out and ", planned for 1: what ranks share is another" in out


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"standing": rates.DOUBTED}, "a run was not as they let expect"),
        ({"measured": "2020-01-01T00:00:00Z"}, "they are not of the last month"),
    ],
)
def test_rates_that_the_next_run_measures_again_are_named(planned, cache, changed, why):
    (path,) = cache.glob("*h200*")
    path.write_text(replace(rates.read(path), **changed).to_toml())
    for other in cache.glob("*a100*"):
        other.unlink()
    words = f"machine     warning: {why}: the next run measures them again"
    assert words in planned("--device", "cuda")[1]
    assert words not in planned("--device", "cuda", "--machine", path)[1], "a run takes them as they are"


def _by_terms(told):
    """Tokens/s of a plan that was rehearsed, without that."""
    rounds = told["rounds"]
    whole = sum(rounds[phase] * told["rehearsed"][phase] for phase in rounds)
    return told["tokens_per_second"] * told["seconds"] / whole


def test_a_plan_for_other_ranks_than_were_measured_is_predicted_by_a_dry_run_of_messages(planned, cache):
    (path,) = cache.glob("*a100*")
    _, out, _ = planned("--device", "cuda", "--machine", path)
    assert "\nring        predicted by a dry run of the messages of 2 ranks, with measured terms: prefill " in out
    _, out, _ = planned("--device", "cuda", "--machine", path, "--json")
    whole = json.loads(out)
    told = whole["predicted"]
    assert set(told["rehearsed"]) == {"prefill", "decode"} and told["rehearsed"]["decode"] > 0
    for other in (*whole["converted"], *whole["rivals"]):  # they are compared by the terms alone
        assert other["times"] * _by_terms(told) == pytest.approx(other["predicted"]["tokens_per_second"])
    (path,) = cache.glob("*h200*")
    assert "dry run" not in planned("--device", "cuda", "--machine", path)[1]


def test_where_nothing_was_measured_the_rates_of_a_card_are_assumed(planned, tmp_path, monkeypatch):
    monkeypatch.setenv("NORIA_CACHE", str(tmp_path))
    _, out, _ = planned("--machine", "L40S", "--device", "auto")
    assert "machine     NVIDIA L40S; assumed, not measured: all rates" in out and "assumed rates of NVIDIA L40S" in out
    _, out, _ = planned("--device", "auto")
    assert "machine     NVIDIA H200; assumed, not measured: all rates" in out


def test_a_gpu_of_which_no_data_sheet_is_known_is_said_to_be_planned_as_an_h200(planned, tmp_path, monkeypatch):
    monkeypatch.setenv("NORIA_CACHE", str(tmp_path))
    machine = tmp_path / "machine.toml"
    said = "of its own no data sheet is known here, so these are an NVIDIA H200's"
    for device, unknown in (("AMD Instinct MI300X", True), ("NVIDIA L40S", False)):
        machine.write_text(f'device = "{device}"\n')
        _, out, _ = planned("--device", "auto", "--dtype", "float32", "--machine", str(machine))
        assert f"\nmachine     {device}; assumed, not measured: all rates" in out and (said in out) == unknown
