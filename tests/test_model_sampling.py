"""What comes from the model's generation_config.json, and where a seed of a row's own is in force."""

import json

import pytest
from transformers import GenerationConfig

import small_run
import tiny_models
from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.errors import InputError
from noria.output.generations import open_generations
from noria.rows.model_sampling import taken, told
from noria.sampling import Sampling

SAYS = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.5}


def values(rules, **keys):
    return taken(rules, Sampling(**keys))


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ({}, {}),
        (SAYS, {name: value for name, value in SAYS.items() if name != "do_sample"}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "min_p": 0.1, "top_k": None}, {"temperature": 1.0, "min_p": 0.1}),
        ({"do_sample": True, "temperature": 1, "top_k": 20.0}, {"temperature": 1.0, "top_k": 20}),
        ({**SAYS, "do_sample": False}, {}),
        ({**SAYS, "do_sample": None}, {}),
        ({"temperature": 0.6}, {}),
        ({"do_sample": True, "max_new_tokens": 5, "max_length": 7, "min_length": 2}, {"temperature": 1.0}),
    ],
)
def test_a_model_that_samples_says_how_and_no_other_does(says, found):
    assert values(says) == found


def test_it_is_what_transformers_samples_by(tmp_path):
    """transformers writes the file; what its own reader has of it is taken."""
    written = GenerationConfig(do_sample=True, temperature=0.7, top_k=11, top_p=0.8, min_p=0.02, repetition_penalty=1.1)
    written.save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    found = values(json.loads((tmp_path / "generation_config.json").read_text()))
    assert len(found) == 5 and found == {name: getattr(read, name) for name in found}


def test_what_the_run_says_stands_and_none_takes_nothing():
    assert values(SAYS, temperature=0.0, top_k=0) == {"top_p": 0.95, "repetition_penalty": 1.5}
    assert values(SAYS, generation_config="none") == {}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 2}, "top_p is 2"),
        ({"top_k": True}, "top_k is True"),
        ({"repetition_penalty": 1e400}, "repetition_penalty is inf"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
    ],
)
def test_a_wrong_value_is_refused_with_the_way_out(wrong, said):
    with pytest.raises(InputError, match=f"generation_config.json: .*{said}.*--generation-config none"):
        values({"do_sample": True, **wrong})


@pytest.mark.parametrize(
    ("says", "named"),
    [
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size 3"),
        ({"num_beams": 4, "suppress_tokens": [1, 2]}, "num_beams 4, suppress_tokens [1, 2]"),
        ({"repetition_penalty": 1.2}, "repetition_penalty 1.2"),
        ({"do_sample": True, "typical_p": 0.9}, "typical_p 0.9"),
        ({"num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "max_length": 20, "pad_token_id": 0}, None),
        ({"suppress_tokens": [], "guidance_scale": None, "sequence_bias": None, "token_healing": False}, None),
        ({"repetition_penalty": 1.0, "temperature": 0.5}, None),
    ],
)
def test_other_keys_that_change_what_is_generated_are_named_in_a_line(says, named):
    lines = [line for line in told(says, Sampling(), {}) if "asks for" in line]
    assert lines == (
        [] if named is None else [f"the model's generation_config.json asks for {named} too, which is not taken"]
    )
    assert told(says, Sampling(generation_config="none"), {}) == []


def test_no_default_of_transformers_is_named():
    assert told(GenerationConfig().to_dict(), Sampling(), {}) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that samples by its own file, and one like it that does not."""
    folder = small_run.write_files(tmp_path_factory.mktemp("model_sampling"))
    directory = folder / "hf"
    tiny_models.write_directory(directory, tiny_models.LLAMA, tiny_models.state(tiny_models.LLAMA))
    (directory / "generation_config.json").write_text(json.dumps({**SAYS, "no_repeat_ngram_size": 2}))
    convert(directory, folder / "sampler.h5")
    return folder


def command(folder, output, model, *more):
    files = ["--model", folder / model, "--prompts", folder / "prompts.jsonl", "--output", folder / output]
    return ["run", *map(str, files), "--device", "cpu", "--max-new-tokens", "6", "--ignore-eos", *map(str, more)]


SAME = ["--temperature", "0.6", "--top-k", "20", "--top-p", "0.95", "--repetition-penalty", "1.5", "--seed", "0"]


def test_a_run_takes_it_says_so_stores_it_and_knows_itself_by_it(folder, capsys):
    assert main(command(folder, "own.h5", "sampler.h5")) == 0
    said = capsys.readouterr().err
    assert "generation_config.json: temperature 0.6, top_k 20, top_p 0.95, repetition_penalty 1.5\n" in said
    assert "asks for no_repeat_ngram_size 2 too, which is not taken" in said
    assert main(command(folder, "said.h5", "model.h5", *SAME)) == 0
    assert small_run.rows_of(folder / "own.h5") == small_run.rows_of(folder / "said.h5")
    with open_generations(folder / "own.h5") as file:
        assert json.loads(file.attrs["model_sampling"])["top_k"] == 20
        assert json.loads(file.attrs["header"])["sampling.temperature"] == 0.6
    assert main(command(folder, "own.h5", "sampler.h5", *SAME)) == 0, "the same run, said in full"
    capsys.readouterr()
    assert main(command(folder, "own.h5", "sampler.h5", "--generation-config", "none")) == 2
    assert "sampling.temperature: 0.6 there, null now" in capsys.readouterr().err


def test_none_is_greedy_and_validate_says_what_is_taken(folder, capsys):
    assert main(command(folder, "none.h5", "sampler.h5", "--generation-config", "none")) == 0
    assert "generation_config" not in capsys.readouterr().err
    assert main(command(folder, "greedy.h5", "model.h5", "--temperature", "0")) == 0
    assert small_run.rows_of(folder / "none.h5") == small_run.rows_of(folder / "greedy.h5")
    assert main(["validate", *command(folder, "v.h5", "sampler.h5")[1:]]) == 0
    assert "note        sampling by the model's generation_config.json: temperature 0.6" in capsys.readouterr().out


def test_a_key_of_the_run_is_no_key_of_a_row(folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5], "generation_config": "none"}\n')
    assert main(command(folder, tmp_path / "o.h5", "sampler.h5", "--prompts", tmp_path / "p.jsonl")) in (0, 2, 65)
    if (tmp_path / "o.h5").exists():
        with open_generations(tmp_path / "o.h5") as file:
            (row,) = file.rows()
        assert row.error == "generation_config is a key of the run: it is the same for all rows"


def line(ids, **body):
    return {"custom_id": f"{ids}{body}", "url": "/v1/completions", "body": {"prompt": ids, "max_tokens": 6, **body}}


@pytest.mark.parametrize(
    ("model", "more", "temperature"),
    [("model.h5", [], 1.0), ("model.h5", ["--temperature", "0"], 0.0), ("sampler.h5", [], 0.6)],
)
def test_a_batch_line_is_sampled_as_openai_does_where_neither_line_nor_run_nor_model_says(
    folder, tmp_path, model, more, temperature
):
    ids = [[5 + row, 6, 7] for row in range(4)]
    rows = [line(one) for one in ids] + [line(ids[0], temperature=0)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [{"token_ids": one, "temperature": temperature} for one in ids] + [{"token_ids": ids[0], "temperature": 0}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    found = []
    for name in ("lines", "rows"):
        prompts = ["--prompts", tmp_path / f"{name}.jsonl"]
        assert main(command(folder, tmp_path / f"{name}.h5", model, *prompts, *more)) == 0
        found.append([tokens for _, _, tokens in small_run.rows_of(tmp_path / f"{name}.h5")])
    assert found[0] == found[1] and len(found[0]) == 5


def test_a_row_with_a_seed_of_its_own_gives_the_same_tokens_wherever_it_stands(folder, tmp_path):
    row = {"token_ids": [5, 6, 7], "seed": 42, "temperature": 1.5, "n": 2}
    other = {"token_ids": [8, 9], "temperature": 1.5}
    found = []
    for number, rows in enumerate([[row], [other, row], [row, other, other, row], [{**other, "seed": 1}, row]]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        assert main(command(folder, tmp_path / f"{number}.h5", "model.h5", "--prompts", path)) == 0
        with open_generations(tmp_path / f"{number}.h5") as file:
            tokens = [(one.sample, tuple(one.token_ids)) for one in file.rows() if len(one.prompt_token_ids) == 3]
            found.append(set(tokens))
    assert found == [found[0]] * 4 and len(found[0]) == 2 and len({tokens for _, tokens in found[0]}) == 2


def test_rows_without_a_seed_of_their_own_draw_by_their_number_with_seed_0_unless_told(folder, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"token_ids": [5, 6, 7], "temperature": 1.5}\n' * 3)
    for name, more in (("a", []), ("b", []), ("c", ["--seed", 0]), ("d", ["--seed", 1])):
        assert main(command(folder, tmp_path / f"{name}.h5", "model.h5", "--prompts", path, *more)) == 0
    a, b, c, d = (small_run.rows_of(tmp_path / f"{name}.h5") for name in "abcd")
    assert a == b == c != d and len({tuple(tokens) for _, _, tokens in a}) == 3
