"""The keys of sampling as flags, in run files and in rows: what they take and what they refuse."""

import argparse
import tomllib

import pytest

from noria import config
from noria.commands import run as command
from noria.errors import InputError
from noria.sampling import Sampling

NEEDED = {"model": "m.h5", "prompts": "p.jsonl", "output": "o.h5"}


def from_flags(*flags):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = vars(parser.parse_args(["--model", "m", "--prompts", "p", "--output", "o", *flags]))
    return config.load(None, {name: value for name, value in given.items() if name != "run_file" and value is not None})


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--n", "3"], "n", 3),
        (["--min-p", "0.1"], "min_p", 0.1),
        (["--min-new-tokens", "4"], "min_new_tokens", 4),
        (["--repetition-penalty", "1.2"], "repetition_penalty", 1.2),
        (["--presence-penalty=-0.5"], "presence_penalty", -0.5),
        (["--frequency-penalty", "2"], "frequency_penalty", 2.0),
        (["--logit-bias", "50=-100,7=2.5"], "logit_bias", {"50": -100.0, "7": 2.5}),
        (["--stop", "\n\n"], "stop_texts", ["\n\n"]),
        (["--stop", "1,2"], "stop_texts", ["1,2"]),
        (["--stop-token-ids", "5,6"], "stop_token_ids", [5, 6]),
        (["--stop-token-ids", "5"], "stop_token_ids", [5]),
        (["--logprobs", "0"], "logprobs", 0),
        (["--prompt-logprobs"], "prompt_logprobs", True),
        (["--max-new-tokens", "0", "--prompt-logprobs"], "scores_prompt", True),
    ],
)
def test_a_flag_sets_its_key(flags, name, value):
    assert getattr(from_flags(*flags).sampling, name) == value


def test_a_flag_that_is_no_list_of_numbers_is_refused(capsys):
    with pytest.raises(SystemExit):
        from_flags("--logit-bias", "50")
    assert "it must be numbers by name, such as 50=-100,7=2.5" in capsys.readouterr().err


def test_the_run_file_that_is_stored_gives_the_run_again():
    keys = {"stop": ['a\n"', "😀"], "logit_bias": {"5": -3.0}, "n": 3, "logprobs": 5, "stop_token_ids": [4]}
    run = config.load(None, NEEDED | keys)
    again = tomllib.loads(run.to_toml())
    assert (
        config.load(None, {**{k: v for k, v in again.items() if not isinstance(v, dict)}, **again["sampling"]}) == run
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"n": 0}, "n is 0: it must be in 1 .. 4096"),
        ({"n": 5000}, "n is 5000: it must be in 1 .. 4096"),
        ({"n": True}, "n is True: it must be an integer"),
        ({"min_p": 2}, "min_p is 2.0: it must be in 0 .. 1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"temperature": float("inf")}, "temperature is inf: it must be finite"),
        ({"logprobs": 101}, "logprobs is 101: it must be in 0 .. 100"),
        ({"stop": ""}, "stop has ''"),
        ({"stop": [5]}, "stop has '5': it must be texts of 1 to 1000 characters"),
        ({"stop": ["x"] * 65}, "stop has 65 texts: it must be at most 64"),
        ({"stop": {}}, "stop is {}: it must be a text or a list"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids has '1.5': it must be token ids, integers from 0"),
        ({"stop_token_ids": [True]}, "stop_token_ids has 'True'"),
        ({"logit_bias": {"x": 1}}, "logit_bias has 'x': it must be token ids"),
        ({"logit_bias": {"05": 1}}, "logit_bias has '05'"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias has nan for 5: it must be a number in -1000 .. 1000"),
        ({"logit_bias": [5]}, "logit_bias is [5]: it must be a table"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0: it must be above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": 1e9}, "presence_penalty is 1000000000.0: it must be in -100 .. 100"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1: it must be 0 or more"),
        ({"min_new_tokens": "4"}, "min_new_tokens is '4': it must be an integer"),
    ],
)
def test_a_value_that_means_nothing_is_named_with_what_it_must_be(keys, said):
    with pytest.raises(InputError) as caught:
        Sampling().override(keys)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_new_tokens": 0}, "say so with prompt_logprobs = true"),
        ({"max_new_tokens": 0, "logprobs": 0, "n": 2}, "n is 2, but with max_new_tokens 0 there is nothing to sample"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens is 5, more than max_new_tokens (4): lower it"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_for_the_run_and_not_before_the_row_has_the_runs(keys, said):
    with pytest.raises(InputError) as caught:
        config.load(None, NEEDED | keys)
    assert said in str(caught.value)
    Sampling().override(keys)
