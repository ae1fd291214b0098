"""Where rows have their prompt, conversation and id: in the forms of published data sets, each with at most one flag."""

import argparse
import csv
import json
import shlex

import pytest

from noria.commands.run import add_arguments, load
from noria.desk.inputs import prompts_of
from noria.errors import InputError
from noria.rows.prompt_files import count
from noria.rows.prompts import noted, open_prompts

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
# name: (a row as it is published, the flag that it needs, its prompt, or the messages that it is read as)
SHAPES = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        "--prompt-column instruction,input",
        "Add.\n\n1 2",
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann.", "response": "Ann", "category": "closed_qa"},
        "--prompt-column instruction,context",
        "Who?\n\nAnn.",
    ),
    "GSM8K": ({"question": "1+1?", "answer": "#### 2"}, "--prompt-column question", "1+1?"),
    "MT-bench": (
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."], "reference": []},
        "--prompt-column turns",
        "Write.",
    ),
    "ShareGPT": (
        {"id": "a_0", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        "--messages-column conversations",
        [USER, ASSISTANT],
    ),
    "WildChat": (
        {
            "conversation_hash": "x",
            "model": "gpt-4",
            "timestamp": "2023-04-09",
            "conversation": [USER | {"language": "English", "toxic": False}],
            "turn": 1,
            "language": "English",
            "openai_moderation": [{"flagged": False}],
            "toxic": False,
            "redacted": False,
        },
        "--messages-column conversation",
        [USER | {"language": "English", "toxic": False}],
    ),
    "ultrachat": ({"prompt": "hi", "prompt_id": "ab", "messages": [USER, ASSISTANT]}, "", [USER, ASSISTANT]),
    "TRL": ({"prompt": [USER], "completion": [ASSISTANT]}, "", [USER]),
    "C4": ({"text": "Once", "timestamp": "2019-04-25", "url": "https://x.org"}, "--prompt-column text", "Once"),
    "self-instruct": (
        {"id": "seed_task_0", "name": "n", "instruction": "Add.", "instances": [{"input": "", "output": "3"}]},
        "--prompt-column instruction",
        "Add.",
    ),
    "LLaMA-Factory": (
        {"conversations": [{"from": "human", "value": "hi"}], "system": "", "tools": ""},
        "--messages-column conversations",
        [USER],
    ),
    "lm-eval samples": (
        {"doc_id": 0, "doc": {"q": "1"}, "target": "2", "arguments": [["Q: 1", {"until": ["\n"]}]], "resps": [["2"]]},
        "--prompt-column arguments.0.0",
        "Q: 1",
    ),
    "lm-eval samples, later": (
        {"doc_id": 0, "doc": {"q": "1"}, "arguments": {"gen_args_0": {"arg_0": "Q: 1", "arg_1": {}}}, "acc": 1.0},
        "--prompt-column arguments.gen_args_0.arg_0",
        "Q: 1",
    ),
    "OpenAI fine-tuning": ({"messages": [USER, ASSISTANT]}, "", [USER, ASSISTANT]),
    "HumanEval": (
        {"task_id": "H/0", "prompt": "def f():", "canonical_solution": "1", "test": "t", "entry_point": "f"},
        "",
        "def f():",
    ),
}


def source(path, *flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    files = ["--model", "m.h5", "--prompts", str(path), "--output", "o.h5"]
    return prompts_of(load(parser.parse_args([*files, *flags])))


def rows_of(tmp_path, record, *flags):
    """The rows of a file of this row, and what is said of them."""
    path, said = tmp_path / "prompts.jsonl", []
    path.write_text(json.dumps(record) + "\n")
    return list(noted(open_prompts(source(path, *flags)), said.append)), said


@pytest.mark.parametrize("name", SHAPES)
def test_a_published_shape_runs_with_at_most_one_flag(tmp_path, name):
    record, flag, meant = SHAPES[name]
    flags = shlex.split(flag)
    assert len(flags) <= 2
    (row,), _ = rows_of(tmp_path, record, *flags)
    assert row.error is None
    assert (row.messages if isinstance(meant, list) else row.prompt) == meant
    talk = "prompt" if isinstance(record.get("prompt"), list) else "messages"
    taken = {"id", "system", *flags[1:], talk if row.messages else "prompt"}
    carried = json.loads(row.extra or "{}")
    assert all(carried[name] == value for name, value in record.items() if name not in taken)


@pytest.mark.parametrize("name", [name for name, (_, flag, _) in SHAPES.items() if flag])
def test_the_error_of_such_a_row_names_the_flag_that_reads_it(tmp_path, name):
    record, flag, _ = SHAPES[name]
    (row,), _ = rows_of(tmp_path, record)
    expected = "--prompt-column instruction" if name == "self-instruct" else flag
    assert f"; {expected} reads it" in row.error


def test_an_instruction_without_input_is_the_prompt_alone(tmp_path):
    for empty in ("", None):
        (row,), _ = rows_of(tmp_path, {"instruction": "Go.", "input": empty}, "--prompt-column", "instruction,input")
        assert row.prompt == "Go." and row.error is None


@pytest.mark.parametrize("other", [["x", "y"], [USER], {"a": 1}, 5])
def test_what_is_no_text_is_not_joined_and_takes_the_place_of_no_text(tmp_path, other):
    record = {"instruction": "Go.", "input": other}
    (row,), _ = rows_of(tmp_path, record, "--prompt-column", "instruction,input")
    assert row.error == f"instruction,input is {other!r}: it must be a string"
    assert json.loads(row.extra) == record and (row.prompt, row.messages) == ("", None)


def test_no_row_is_told_to_use_the_flag_that_it_was_read_with(tmp_path):
    flag = ["--prompt-column", "instruction,input"]
    (row,), _ = rows_of(tmp_path, {"instruction": None, "input": ""}, *flag)
    assert row.error == "no prompt column 'instruction,input': this row has 'instruction', 'input'"
    (row,), _ = rows_of(tmp_path, {"question": "1+1?"}, *flag)
    assert row.error.endswith("this row has 'question'; --prompt-column question reads it")


def test_the_pieces_of_a_prompt_are_carried_and_a_plain_column_is_not_twice_there(tmp_path):
    record = {"instruction": "Go.", "input": "x", "label": 1}
    (row,), _ = rows_of(tmp_path, record, "--prompt-column", "instruction,input")
    assert json.loads(row.extra) == record
    (row,), _ = rows_of(tmp_path, record, "--prompt-column", "instruction")
    assert json.loads(row.extra) == {"input": "x", "label": 1}


def test_a_column_that_the_run_names_goes_before_norias_own(tmp_path):
    record = {"question": "q", "prompt": "p", "messages": [USER], "token_ids": [5]}
    (row,), said = rows_of(tmp_path, record, "--prompt-column", "question")
    assert (row.prompt, row.messages, row.token_ids, row.error) == ("q", None, None, None)
    assert json.loads(row.extra) == {name: record[name] for name in ("prompt", "messages", "token_ids")}
    assert len(said) == 2 and all("is carried as a column of your own" in line for line in said)


def test_a_prompt_is_the_first_of_several_turns_wherever_they_stand(tmp_path):
    for record, name in (({"turns": ["a", "b"]}, "turns"), ({"doc": {"turns": ["a", "b"]}}, "doc.turns")):
        (row,), said = rows_of(tmp_path, record, "--prompt-column", name)
        assert row.prompt == "a" and json.loads(row.extra) == record
        assert said == [f"{name} has several texts: the first is the prompt, all are carried"]
    (row,), said = rows_of(tmp_path, {"turns": ["a"]}, "--prompt-column", "turns")
    assert (row.prompt, row.extra, said) == ("a", "", [])


def test_a_name_with_a_dot_or_a_comma_that_is_a_column_is_that_column(tmp_path):
    (row,), _ = rows_of(tmp_path, {"a,b": "one", "a": "x", "b": "y"}, "--prompt-column", "a,b")
    assert row.prompt == "one"
    (row,), _ = rows_of(tmp_path, {"a.b": "two", "a": {"b": "y"}}, "--prompt-column", "a.b")
    assert row.prompt == "two"


@pytest.mark.parametrize(
    ("record", "flags", "words"),
    [
        ({"a": 5}, ["--prompt-column", "a"], "a is 5: it must be a string"),
        ({"a": "x", "b": 5}, ["--prompt-column", "a,b"], "a,b is 5: it must be a string"),
        ({"a": {"b": 1}}, ["--prompt-column", "a.c"], "no prompt column 'a.c': this row has 'a'"),
        ({"a": "x"}, ["--prompt-column", "a.b"], "no prompt column 'a.b'"),
        ({"a": ["x"]}, ["--prompt-column", "a.7"], "no prompt column 'a.7'"),
        ({"a": ["x"]}, ["--prompt-column", "a.99999999999999999999"], "no prompt column"),
        ({"prompt": "p"}, ["--prompt-column", "question"], "no prompt column 'question'"),
        ({"a": []}, ["--prompt-column", "a"], "a is []: it must be a string"),
        ({"a": ""}, ["--prompt-column", "a"], "a is empty"),
        ({"x": 1}, ["--messages-column", "talk"], "no messages column 'talk': this row has 'x'"),
        (
            {"talk": [{"from": "narrator", "value": "x"}]},
            ["--messages-column", "talk"],
            "messages[0].from is 'narrator'",
        ),
        ({"talk": [{"from": "human", "value": 5}]}, ["--messages-column", "talk"], "messages[0].content is 5"),
        ({"talk": "[1"}, ["--messages-column", "talk"], "it must be a list of objects"),
        ({"prompt": [{"x": 1}]}, [], "messages[0].role is None"),
        ({"prompt": [1, 2]}, [], "prompt is [1, 2]: it must be a string"),
        ({"prompt": "p", "id": "x", "key": 5.5}, ["--id-column", "key"], "id is 5.5"),
    ],
)
def test_what_is_wrong_with_a_named_column_is_that_rows_error(tmp_path, record, flags, words):
    (row,), _ = rows_of(tmp_path, record, *flags)
    assert words in row.error


def test_messages_go_before_the_prompt_which_is_carried_with_one_line(tmp_path):
    (row,), said = rows_of(tmp_path, {"prompt": "p", "messages": [USER]})
    assert row.messages == [USER] and json.loads(row.extra) == {"prompt": "p"}
    assert said == ["rows with messages and prompt are read by messages; prompt is carried as a column of your own"]


def test_a_conversation_may_be_json_text(tmp_path):
    (row,), _ = rows_of(tmp_path, {"messages": json.dumps([USER])})
    assert row.messages == [USER] and row.error is None
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["conversations"], [json.dumps([{"from": "human", "value": "hi"}])]])
    (row,) = open_prompts(source(tmp_path / "a.csv", "--messages-column", "conversations"))
    assert row.messages == [USER] and row.error is None


def test_the_speakers_of_sharegpt_are_roles(tmp_path):
    talk = [("system", "s"), ("human", "q"), ("gpt", "a"), ("observation", "o"), ("chatgpt", "b"), ("user", "c")]
    record = {"messages": [{"from": who, "value": text, "weight": 1} for who, text in talk]}
    (row,), _ = rows_of(tmp_path, record)
    roles = ["system", "user", "assistant", "tool", "assistant", "user"]
    expected = zip(roles, talk, strict=True)
    assert row.messages == [{"role": role, "content": text, "weight": 1} for role, (_, text) in expected]


def test_the_id_may_be_another_column_and_norias_own_is_then_a_column(tmp_path):
    (row,), _ = rows_of(tmp_path, {"prompt": "p", "id": 7, "key": "k"}, "--id-column", "key")
    assert row.id == "k" and json.loads(row.extra) == {"id": 7}
    (row,), _ = rows_of(tmp_path, {"prompt": "p", "doc": {"id": 3}}, "--id-column", "doc.id")
    assert row.id == "3" and json.loads(row.extra) == {"doc": {"id": 3}}
    (row,), _ = rows_of(tmp_path, {"prompt": "p", "key": ""}, "--id-column", "key")
    assert row.id == "0" and row.error is None


@pytest.mark.parametrize(
    ("header", "flag"),
    [
        ("ID,Prompt", "--prompt-column Prompt"),
        ("id, prompt", "--prompt-column ' prompt'"),
        ("id,Question ", "--prompt-column 'Question '"),
        ("id,Messages", "--messages-column Messages"),
        ("instruction,input,output", "--prompt-column instruction,input"),
    ],
)
def test_a_table_without_a_prompt_is_refused_with_the_flag_that_reads_it(tmp_path, header, flag):
    path = tmp_path / "a.csv"
    path.write_text(header + "\n" + ",".join("x" * len(header.split(","))) + "\n")
    for read in (count, lambda one: list(open_prompts(one))):
        with pytest.raises(InputError) as refused:
            read(source(path))
        assert str(refused.value).endswith(f"; {flag} reads it") and "\n" not in str(refused.value)
    flags = shlex.split(flag)
    if "messages" not in flag:
        (row,) = open_prompts(source(path, *flags))
        assert row.error is None and row.prompt


def test_a_column_that_is_one_of_norias_but_for_capitals_or_spaces_is_said(tmp_path):
    (row,), said = rows_of(tmp_path, {"prompt": "p", "ID": "x", " id": "y"})
    assert row.id == "0" and json.loads(row.extra) == {"ID": "x", " id": "y"}
    assert [line.split(" is not ")[0] for line in said] == ["column 'ID'", "column ' id'"]
    assert "--id-column ID reads it" in said[0]
    (row,), said = rows_of(tmp_path, {"prompt": "p", "id": 1, "ID": "x", "Prompt": "y"})
    assert row.id == "1" and not said


@pytest.mark.parametrize("suffix", ["parquet", "h5"])
def test_binary_tables_have_named_columns_too(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "h5":
        import h5py

        with h5py.File(path, "w") as file:
            file["question"], file["label"] = ["one", "two"], [1, 2]
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"question": ["one", "two"], "label": [1, 2]}), path)
    with pytest.raises(InputError, match="--prompt-column question reads it"):
        count(source(path))
    named = source(path, "--prompt-column", "question")
    assert count(named) == 2
    rows = list(open_prompts(named))
    assert [(row.prompt, row.extra, row.error) for row in rows] == [
        ("one", '{"label": 1}', None),
        ("two", '{"label": 2}', None),
    ]
