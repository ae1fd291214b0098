import pytest

from noria import config
from noria.errors import InputError

NEEDED = {"model": "m.h5", "prompts": "p.jsonl", "output": "o.h5"}


def refusal(flags=None, text=None, tmp_path=None):
    path = None
    if text is not None:
        path = tmp_path / "run.toml"
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        config.load(path, {**NEEDED, **(flags or {})})
    return str(caught.value)


def test_a_run_needs_only_model_prompts_and_output():
    run = config.load(None, NEEDED)
    settled = run.sampling.override({})
    assert (settled.max_new_tokens, settled.temperature, settled.seed, run.dtype) == (256, 0.0, 0, "auto")


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_need_is_named_with_its_flag(name):
    with pytest.raises(InputError, match=f"--{name}"):
        config.load(None, {key: value for key, value in NEEDED.items() if key != name})


def test_flags_go_over_the_run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "a"\nprompts = "b"\noutput = "c"\n[sampling]\nmax_new_tokens = 3\ntop_k = 4\n')
    run = config.load(path, {"max_new_tokens": 9})
    assert (run.model, run.sampling.max_new_tokens, run.sampling.top_k) == ("a", 9, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle = 1", "unknown key modle; did you mean 'model'?"),
        ("[sampling]\nmax_tokens = 1", "unknown key sampling.max_tokens; did you mean 'max_new_tokens'?"),
        ("[pipline]\nlaps = 1", "unknown key pipline; did you mean 'pipeline'?"),
        ("laps = 1", "unknown key laps: it belongs in [pipeline]"),
        ("[job]\nmodel = 'x'", "unknown key job.model: it belongs in the top of the file"),
        ("[placement]\nweights = {gpu = 50}", "the shares sum to 50 %, they must sum to 100"),
        ("[placement]\nweights = {gpu = '4GiB', cpu = 50}", "give shares in % or sizes"),
        ("[placement]\ncache = {ram = 100}", "unknown tier 'ram' in placement.cache"),
        ("[placement]\ncache = {gpu = '4 parsecs'}", "placement.cache.gpu is '4 parsecs': it must be a size"),
        ("[placement]\nweights = {gpu = 120, cpu = -20}", "placement.weights.gpu is 120: a share must be 0 .. 100 %"),
        ("[placement]\nweights = {}", "placement.weights is empty"),
        ("[placement]\ncpu_memory = 'lots'", "placement.cpu_memory is 'lots': it must be a size"),
        ("[pipeline]\nschedule = 'multibatch'", "did you mean 'multi_batch'?"),
        ("sampling = 3", "sampling is a section of the run file: write [sampling]"),
        ("[sampling]\ntemperature = '1'", "sampling.temperature is '1': it must be a number"),
        ("[sampling]\nmax_new_tokens = true", "sampling.max_new_tokens is True: it must be an integer"),
        (
            "[sampling]\nmax_new_tokens = 0",
            "sampling.max_new_tokens is 0, which scores the prompt: say so with prompt_logprobs = true",
        ),
        (
            "[sampling]\nmin_new_tokens = 300",
            "sampling.min_new_tokens is 300, more than max_new_tokens (256): lower it",
        ),
        ("[sampling]\ntop_p = 1.5", "sampling.top_p is 1.5: it must be above 0 and at most 1"),
        ("[pipeline]\ngroups = 0", "pipeline.groups is 0: it must be at least 1"),
        ("[pipeline]\npartition = [3, 0]", "every virtual stage needs at least 1 layer"),
        ("dtype = 'bf16'", "dtype is 'bf16'"),
        ("[job]\nrandom_weights = 'config.json'", "contradict each other"),
        ("model = ", "is not TOML"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_remedy(text, said, tmp_path):
    flags = {} if "random_weights" in text else None
    assert said in refusal(flags, text, tmp_path)


def test_a_run_written_as_its_file_is_the_same_run_whatever_letters_it_has(tmp_path):
    letters = "".join(map(chr, (*range(1, 0x100), 0x2028, 0xD7FF, 0xFEFF, 0x1F600, 0x10FFFF)))
    schema = {"json": {"properties": {letters: {"const": letters}}}}
    run = config.load(None, {**NEEDED, "stop": [letters], "structured_outputs": schema})
    path = tmp_path / "run.toml"
    path.write_text(run.to_toml(), encoding="utf-8", newline="")
    assert config.load(path) == run


def test_a_name_and_a_path_that_no_file_system_takes_are_told_apart():
    for letter, nbytes in (("x", 1), ("é", 2)):
        name = letter * (300 // nbytes)
        said = f"model has the name {name[:40]!r}... of 300 bytes, a name in a path has at most 255: shorten it"
        assert refusal({"model": f"folder/{name}"}) == said
    assert "of 400 bytes" in refusal({"model": "x" * 210 + "/" + "é" * 200}), "it has fewer letters than the folder"
    path = "folder/" * 600 + "model.h5"
    said = f"model begins with {path[:40]!r} and has 4208 bytes, a path has at most 4095: shorten it"
    assert refusal({"model": path}) == said


def test_a_run_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.toml: No such file"):
        config.load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "nbytes"), [("16GiB", 16 * 2**30), ("1.5 MB", 1_500_000), ("4096", 4096), ("2KiB", 2048), ("7B", 7)]
)
def test_a_size_is_read_in_binary_and_decimal_units(text, nbytes):
    assert config.parse_nbytes(text, "x") == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "1e999GiB", "16gib"])
def test_a_size_that_is_none_is_refused_with_an_example(text):
    with pytest.raises(InputError, match="such as 16GiB"):
        config.parse_nbytes(text, "placement.gpu_memory")


def test_a_rows_own_keys_override_the_runs():
    row = config.Sampling(top_k=3).override({"temperature": 1, "max_new_tokens": 2})
    assert (row.top_k, row.temperature, row.max_new_tokens) == (3, 1.0, 2)
    with pytest.raises(InputError, match="top_k is 'x': it must be an integer"):
        config.Sampling().override({"top_k": "x"})
