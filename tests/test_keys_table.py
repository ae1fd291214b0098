"""The table of keys that `noria help keys` prints: complete, true of flags and rows, with the names of vLLM."""

import argparse
import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest

from noria.__main__ import main
from noria.commands import flags, keys
from noria.config import Config
from noria.names import SYNONYMS
from noria.rows.prompts import open_prompts

# vLLM's own names: fields of SamplingParams, keys of a chat request, arguments of its engine and of `vllm run-batch`.
SAMPLING_PARAMS = set(
    "n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop stop_token_ids ignore_eos"
    " max_tokens min_tokens logprobs prompt_logprobs skip_special_tokens include_stop_str_in_output truncate_prompt_tokens"
    " logit_bias allowed_token_ids bad_words structured_outputs thinking_token_budget".split()
)
OTHERS = set(
    "chat_template_kwargs model dtype max_model_len max_num_batched_tokens cpu_offload_gb gpu_memory_utilization load_format"
    " generation_config input_file output_file kv_cache_dtype".split()
)
# A value of each key that a row may have, other than its default where that can be seen.
VALUES = {
    "TEXT": "word",
    "INT": 3,
    "NUMBER": 0.5,
    "ID=NUMBER,...": {"7": 1.0},
    "INT,...": [5, 6],
    "true|false": True,
    "JSON": {"enable_thinking": False},
    "auto|none": "none",
}


def leaves(value=Config):
    """Names of all keys of a run file, by section."""
    for field in dataclasses.fields(value):
        if isinstance(field.default_factory, type):
            yield from ((field.name, name) for _, name in leaves(field.default_factory))
        else:
            yield "-", field.name


def test_every_key_of_the_run_file_has_one_line_with_words(capsys):
    assert main(["help", "keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [tuple(line.split()[:2]) for line in lines[1:]]
    assert found == list(leaves()) and lines[0].split() == list(keys.HEADER)
    assert all(re.search(r"\w+ \w+", key.meaning) and len(key.default) <= 24 for key in keys.table())
    assert all(key.meaning in line for key, line in zip(keys.table(), lines[1:], strict=True))


def test_a_terminal_gets_lines_of_its_width():
    assert max(map(len, keys.text(72).splitlines())) == 72 and len(keys.text(72).splitlines()) == len(keys.table()) + 1


def test_the_flag_of_each_key_is_one_that_a_run_takes():
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    known = {flag for action in parser._actions for flag in action.option_strings if not flag.startswith("--no-")}
    assert {key.flag for key in keys.table()} == known - {"-h", "--help"}


def test_a_row_may_have_the_keys_that_the_table_says_and_no_others(tmp_path):
    table = keys.table()
    own = {"structured_outputs": {"choice": ["yes", "no"]}}
    values = [own.get(key.name, VALUES.get(key.type, "word")) for key in table]
    rows = [{"prompt": "a", key.name: value} for key, value in zip(table, values, strict=True)]
    rows[[key.name for key in table].index("prompts")] = {"prompt": "a"}  # a row's own name for its text is another
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for key, value, prompt in zip(table, values, open_prompts(tmp_path / "rows.jsonl"), strict=True):
        taken = prompt.error is None and prompt.sampling == {key.name: value}
        assert taken == (key.row == "yes"), (key, prompt)


def test_names_of_vllm_stand_beside_the_keys_that_have_one():
    of = {key.name: key.vllm for key in keys.table() if key.vllm != "-"}
    assert set(of.values()) == SAMPLING_PARAMS | OTHERS
    assert all(of[name] == name for name in SAMPLING_PARAMS & {key.name for key in keys.table()})
    for other, name in SYNONYMS.items():
        assert of[name] == other or other not in SAMPLING_PARAMS


@pytest.mark.parametrize("key", [key for key in keys.table() if key.section in ("pipeline", "job", "-")], ids=str)
def test_a_default_that_is_a_value_is_that_of_a_run_file_that_says_nothing(key):
    config = Config(model="m", prompts="p", output="o")
    value = getattr(config if key.section == "-" else getattr(config, key.section), key.name)
    if key.default == "required":
        assert value in ("m", "p", "o")
    elif value is not None and not isinstance(value, bool):
        assert str(value) == key.default
    elif isinstance(value, bool) and key.default in ("true", "false"):
        assert tomllib.loads(f"key = {key.default}")["key"] == value


def test_the_readme_shows_the_names_of_vllm_that_differ():
    lines = (Path(__file__).parent.parent / "README.md").read_text().splitlines()
    differ = [key for key in keys.table() if key.vllm not in ("-", key.name)]
    assert not [key for key in differ if not any(f"`{key.name}" in line and f"`{key.vllm}" in line for line in lines)]
