"""The rows of a file of prompts: what each key does, and that a bad row is that row's error alone."""

import gzip
import itertools
import json
import random
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noria.errors import InputError
from noria.names import _WORDS, NEAR, edit_distance, misspelt
from noria.rows.prompt_files import content_hash, count, extends
from noria.rows.prompts import open_prompts
from noria.sampling import ROW_KEYS, Sampling


def rows_of(tmp_path, *records):
    """The prompts of records, given as objects or as the text of a line."""
    path = tmp_path / "prompts.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = list(open_prompts(path))
    assert len(found) == count(path)
    assert [prompt.row for prompt in found] == list(range(len(records)))
    return found


def row_of(tmp_path, record):
    return rows_of(tmp_path, record)[0]


def test_a_row_has_its_prompt_id_sampling_keys_and_own_columns(tmp_path):
    own = {"label": [1, {"x": None}], "score": 0.1}
    prompt = row_of(tmp_path, {"id": "a", "prompt": "text", "temperature": 1, "max_new_tokens": 3} | own)
    assert (prompt.id, prompt.prompt, prompt.token_ids, prompt.error) == ("a", "text", None, None)
    assert prompt.sampling == {"temperature": 1.0, "max_new_tokens": 3}
    assert type(prompt.sampling["temperature"]) is float
    assert json.loads(prompt.extra) == own


def test_a_row_without_own_columns_has_no_extra_and_without_sampling_keys_overrides_nothing(tmp_path):
    prompt = row_of(tmp_path, {"prompt": "text"})
    assert (prompt.extra, prompt.sampling) == ("", {})


def test_token_ids_are_taken_as_they_are(tmp_path):
    prompt = row_of(tmp_path, {"token_ids": [0, 5, 5, 2**31 - 1]})
    assert (prompt.token_ids, prompt.prompt, prompt.error) == ([0, 5, 5, 2**31 - 1], "", None)


def test_every_sampling_key_may_stand_in_a_row(tmp_path):
    values = {
        "max_new_tokens": 4,
        "min_new_tokens": 1,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"5": 1.5},
        "seed": 2**63 - 1,
        "n": 2,
        "stop": ["x"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "bad_words": ["x"],
        "allowed_token_ids": [4, 5],
        "truncate_prompt_tokens": -1,
        "chat": True,
        "system": "be a cat",
        "chat_template_kwargs": {"enable_thinking": False},
        "logprobs": 2,
        "prompt_logprobs": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "structured_outputs": {"choice": ["yes", "no"]},
        "thinking_token_budget": 9,
    }
    assert set(values) == set(ROW_KEYS)
    prompt = row_of(tmp_path, {"prompt": "p"} | values)
    assert prompt.error is None and prompt.sampling == values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", -1),
        ("chat", "yes"),
        ("system", 5),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("max_new_tokens", "8"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", [0.5]),
        ("temperature", {}),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 1e300),
        ("seed", 2.0**60),
        ("n", float("inf")),
        ("stop_token_ids", [1.5]),
        ("seed", -1),
        ("seed", 2**63),
        ("ignore_eos", 1),
        ("ignore_eos", "x" * 10**6),
    ],
)
def test_a_sampling_key_of_the_wrong_type_or_range_is_that_rows_error(key, value, tmp_path):
    before, bad, after = rows_of(tmp_path, {"prompt": "p"}, {"prompt": "p", key: value}, {"prompt": "p"})
    assert before.error is None and after.error is None
    assert key in bad.error and len(bad.error) <= 500
    assert bad.sampling == {} and bad.prompt == "p"


def test_a_value_is_checked_by_its_type_even_after_an_equal_one_of_another_type(tmp_path):
    values = [1, True, 1.5, 1]
    found = rows_of(tmp_path, *({"prompt": "p", "top_k": value} for value in values))
    assert [prompt.error is None for prompt in found] == [True, False, False, True]


def test_floats_that_are_integers_are_integers_where_a_key_wants_one(tmp_path):
    given = {"max_new_tokens": 3.0, "top_k": -0.0, "seed": 2.0**53, "n": 2.0, "logprobs": 1.0, "stop_token_ids": [4.0]}
    prompt = row_of(tmp_path, {"id": 7.0, "token_ids": [5.0, 6], "own": 3.0, "temperature": 1.0} | given)
    assert prompt.error is None and (prompt.id, prompt.token_ids) == ("7", [5, 6])
    assert prompt.sampling == given | {"temperature": 1.0} and prompt.extra == '{"own": 3.0}'
    integers = [*prompt.token_ids, *prompt.sampling["stop_token_ids"], *(prompt.sampling[name] for name in given)]
    assert {type(value) for value in integers} == {int, list}
    assert type(prompt.sampling["temperature"]) is float
    assert "token_ids[1] is 6.5" in row_of(tmp_path, {"token_ids": [5, 6.5]}).error
    assert "token_ids[0] is nan" in row_of(tmp_path, {"token_ids": [float("nan")]}).error


def test_a_table_of_pandas_with_a_missing_integer_runs(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": [1, 2], "prompt": ["a", "b"], "max_new_tokens": [3, None], "top_k": [None, 5]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        first, second = open_prompts(tmp_path / name)
        assert (first.error, second.error) == (None, None)
        assert (first.sampling, second.sampling) == ({"max_new_tokens": 3}, {"top_k": 5})


def test_a_row_that_could_not_be_read_has_the_id_that_it_gave_itself(tmp_path):
    body = {"messages": [{"role": "user", "content": "hi"}]}
    requests = [{"custom_id": "a", "body": body | {"stream": True}}, {"custom_id": "b", "body": body}]
    bad, good, twice, odd = rows_of(tmp_path, *requests, requests[0], {"custom_id": ["x"], "body": []})
    assert (bad.id, good.id, twice.id, odd.id) == ("a", "b", "a", "3")
    assert "body.stream" in bad.error and good.error is None
    assert "id 'a' is that of an earlier row" in twice.error and "id is ['x']" in odd.error


def test_null_is_a_key_that_is_not_given(tmp_path):
    nulls = dict.fromkeys(["id", "token_ids", "messages", *ROW_KEYS])
    prompt = row_of(tmp_path, nulls | {"prompt": "p", "own": None})
    assert (prompt.id, prompt.error, prompt.sampling, prompt.extra) == ("0", None, {}, '{"own": null}')


def test_messages_are_a_conversation_and_their_prompt_is_their_json(tmp_path):
    messages = [
        {"role": "user", "content": "größer", "name": "x"},
        {"role": "assistant", "content": "", "tool_calls": []},
    ]
    prompt = row_of(tmp_path, {"messages": messages})
    assert (prompt.error, prompt.messages, prompt.token_ids) == (None, messages, None)
    assert prompt.prompt == json.dumps(messages, ensure_ascii=False)


def test_null_keys_of_a_message_and_of_a_part_are_not_given_and_parts_stay_parts(tmp_path):
    part = {"type": "text", "text": "a"}
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"n": None}}}]}
    given = [
        {"role": "user", "content": [part | {"image": None}, part], "name": None, "tool_calls": None},
        called | {"content": None, "reasoning": None},
    ]
    prompt = row_of(tmp_path, {"messages": given})
    assert (prompt.error, prompt.messages) == (None, [{"role": "user", "content": [part, part]}, called])


def test_absent_keys_of_parquets_structs_are_not_given(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [
        {"role": "user", "content": "hi", "name": "x"},
        {"role": "assistant", "content": "a", "tool_calls": ["y"]},
    ]
    parquet.write_table(pyarrow.table({"messages": [messages]}), tmp_path / "p.parquet")
    (prompt,) = open_prompts(tmp_path / "p.parquet")
    assert prompt.messages == messages


TALK = [{"role": "user", "content": "hi"}]


def test_what_a_template_reads_beside_messages_is_read_and_stays_a_column(tmp_path):
    beside = {"tools": [{"a": 1}], "documents": [{"title": "t"}], "continue_final_message": "reasoning"}
    prompt = row_of(tmp_path, {"messages": TALK} | beside | {"add_generation_prompt": False, "own": 1})
    assert prompt.error is None and prompt.beside == beside | {"add_generation_prompt": False}
    assert json.loads(prompt.extra) == beside | {"add_generation_prompt": False, "own": 1}
    kwargs = {"enable_thinking": False, "deep": [{"a": None}]}
    assert row_of(tmp_path, {"messages": TALK, "chat_template_kwargs": kwargs}).sampling == {
        "chat_template_kwargs": kwargs
    }


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "tools": [{"a": 1}], "documents": ["a"], "continue_final_message": True},
        {"messages": TALK, "tools": "hammer", "documents": 3},
        {"messages": TALK, "tools": None, "documents": {"a": 1}},
    ],
)
def test_columns_of_these_names_that_no_template_could_read_are_the_users_own(tmp_path, row):
    prompt = row_of(tmp_path, row)
    assert prompt.error is None and prompt.beside == {}
    assert json.loads(prompt.extra) == {name: row[name] for name in row if name not in ("prompt", "messages")}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tools": ["hammer"]}, "tools[0] is 'hammer': it must be an object"),
        ({"documents": [{"title": "a"}, 3]}, "documents[1] is 3: it must be an object"),
        ({"continue_final_message": 1}, "continue_final_message is 1: it must be true, false or the key"),
        ({"add_generation_prompt": "no"}, "add_generation_prompt is 'no': it must be true or false"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message and add_generation_prompt contradict each other",
        ),
        ({"chat_template": "{{ x }}"}, "chat_template: a row cannot have its own template"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs is 'x': it must be a table"),
        *(
            ({"chat_template_kwargs": {name: 1}}, f"chat_template_kwargs has {name!r}, which no template gets")
            for name in ("messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
                         "continue_final_message", "return_tensors", "return_x", "padding", "truncation", "max_length")
        ),
        ({"chat_template_kwargs": {"a": "x" * 2**16}}, "characters as JSON, at most 65536 are handed on"),
        ({"chat_template_kwargs": {"a": json.loads("[" * 40 + "]" * 40)}}, "is nested deeper than 32"),
        ({"chat_template_kwargs": {"a": float("nan")}}, "chat_template_kwargs is not JSON"),
    ],
)  # fmt: skip
def test_what_no_template_can_be_given_is_that_rows_error(tmp_path, keys, words):
    prompt = row_of(tmp_path, {"messages": TALK} | keys)
    assert words in prompt.error and len(prompt.error) <= 500


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hi", "messages is 'hi': it must be a list"),
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is 'hi'"),
        ([{"content": "hi"}], r"messages\[0\].role is None"),
        ([{"role": "", "content": "hi"}], r"messages\[0\].role is ''"),
        ([{"role": "user"}], r"messages\[0\].content is None"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is 5"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only parts of type 'text'"),
        ([{"role": "user", "content": ["hi"]}], "only parts of type 'text'"),
        ([{"role": "user", "content": [{"type": "text", "value": "hi"}]}], "its 'text' must be a string"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "its 'text' must be a string"),
    ],
)
def test_messages_of_another_shape_are_that_rows_error(messages, words, tmp_path):
    prompt = row_of(tmp_path, {"messages": messages})
    assert re.search(words, prompt.error) and prompt.messages is None
    assert re.search(words, row_of(tmp_path, {"prompt": "p", "messages": messages}).error)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("max_new_token", "max_new_tokens"),
        ("max_newtoken", "max_new_tokens"),
        ("topk", "top_k"),
        ("top-p", "top_p"),
        ("sede", "seed"),
        ("ignore_eso", "ignore_eos"),
        ("repetition_penality", "repetition_penalty"),
        ("stop_token_id", "stop_token_ids"),
    ],
)
def test_a_key_that_is_nearly_a_sampling_key_is_that_rows_error_and_names_the_right_one(key, meant, tmp_path):
    prompt = row_of(tmp_path, {"prompt": "p", key: 1})
    assert repr(key) in prompt.error and f"did you mean {meant!r}" in prompt.error


@pytest.mark.parametrize(
    "key", ["label", "category", "answer", "source", "url", "x", "k", "text", "maximum", "", "k" * 10**6, "größe"]
)
def test_other_keys_are_the_users_own(key, tmp_path):
    prompt = row_of(tmp_path, {"prompt": "p", key: 1})
    assert prompt.error is None and json.loads(prompt.extra) == {key: 1}


letters = st.text("abn_", max_size=5)


@given(letters, letters)
def test_the_edit_distance_is_that_of_its_definition(a, b):
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    assert edit_distance(a, b) == distance(a, b)


VALUES = dict.fromkeys(ROW_KEYS, 1) | {"stop": "x", "system": "x", "stop_token_ids": [1]}
VALUES |= {"logit_bias": {}} | dict.fromkeys(("ignore_eos", "chat", "prompt_logprobs"), True)


@pytest.mark.slow
def test_every_key_one_or_two_edits_from_a_sampling_key_is_found():
    """All edits of one letter, and a sample of those of two: deletions, insertions and replacements."""

    def edits(word):
        for place in range(len(word) + 1):
            for letter in "xe_":
                yield word[:place] + letter + word[place:]
                yield word[:place] + letter + word[place + 1 :]
            yield word[:place] + word[place + 1 :]

    known, choose = {*NEAR} - {"n"}, random.Random(3)
    for key in sorted(known):
        once = sorted(set(edits(key)))
        twice = [choose.choice(sorted(set(edits(word)))) for word in choose.choices(once, k=20)]
        for word in {*once, *twice} - known - _WORDS:
            assert misspelt(word, VALUES[key]) is not None, (word, key)


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("topP", "x", "top_p"),
        ("Top-K", None, "top_k"),
        ("SEED", [], "seed"),
        ("maxNewTokens", {}, "max_new_tokens"),
        ("max_tokns", 5, "max_new_tokens"),
        ("max_gen_toks", 5, "max_new_tokens"),
        ("max_gen_toks", "5", "max_new_tokens"),
        ("Max Tokens", 5, "max_new_tokens"),
        ("max_length", 5.0, "max_new_tokens"),
        ("best_of", 3, "n"),
        ("eos_token_id", 65, "stop_token_ids"),
        ("eos_token_id", [65, 66.0], "stop_token_ids"),
        ("eos_token_id", "65", "stop_token_ids"),
        ("stop_sequences", ["x"], "stop"),
        ("random_seed", 5, "seed"),
        ("top_logprobs", 5, "logprobs"),
        ("temp", 0.5, "temperature"),
        ("stops", ["x"], "stop"),
        ("stpo", "x", "stop"),
        ("cht", "True", "chat"),
        ("sede", "5", "seed"),
        ("temprature", "hot", "temperature"),
    ],
)
def test_names_of_other_programs_and_misspelt_ones_are_known_by_the_value_too(key, value, meant, tmp_path):
    assert f"did you mean {meant!r}" in row_of(tmp_path, {"prompt": "p", key: value}).error


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("topic", "physics"),
        ("topic", 3),
        ("store", "north"),
        ("step", 4),
        ("shop", "x"),
        ("speed", 30),
        ("minor", 0.5),
        ("top_1", "cat"),
        ("spam", {"x": 1}),
        ("sede", "Roma"),
        ("max_length", "long"),
        ("best_of", 1),
        ("eos_token_id", "the end"),
        ("stop_words", 17),
        ("temp", "cold"),
        ("char", True),
        ("Step", 5),
        ("num_tokens", 5),
        ("min_l", None),
    ],
)
def test_words_near_a_short_key_and_values_that_it_cannot_have_are_the_users_own(key, value, tmp_path):
    prompt = row_of(tmp_path, {"prompt": "p", key: value})
    assert prompt.error is None and json.loads(prompt.extra) == {key: value}


def test_a_missing_id_is_the_row_number_and_integers_are_ids_too(tmp_path):
    found = rows_of(tmp_path, {"prompt": "p"}, {"prompt": "p", "id": 17}, {"prompt": "p", "id": "x"}, "[]")
    assert [prompt.id for prompt in found] == ["0", "17", "x", "3"]
    assert [prompt.error for prompt in found[:3]] == [None] * 3


def test_a_duplicate_id_is_the_later_rows_error(tmp_path):
    first, second, other, third = rows_of(tmp_path, *({"prompt": "p", "id": id} for id in ["a", "a", "A", "a"]))
    assert first.error is None and other.error is None
    for prompt in (second, third):
        assert "id 'a'" in prompt.error and prompt.id == "a"


def test_a_row_without_an_id_takes_no_other_rows_id_from_it(tmp_path):
    found = rows_of(tmp_path, {"id": "1", "prompt": "p"}, {"prompt": "q"}, "no json", {"id": 2, "prompt": "r"})
    assert [prompt.id for prompt in found] == ["1", "1", "2", "2"]
    assert [prompt.error is None for prompt in found] == [True, True, False, True]


def test_ids_that_a_file_cannot_tell_apart_are_one_id(tmp_path):
    first, second = rows_of(tmp_path, {"id": "a\0", "prompt": "p"}, {"id": "a\ufffd", "prompt": "p"})
    assert first.id == second.id == "a\ufffd" and first.error is None and "earlier" in second.error


def test_duplicates_are_found_among_many_ids(tmp_path):
    numbers = [*range(150_000), 149_999, 3, 70_000, 150_001]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(f'{{"id": "row {number}", "prompt": "p"}}\n' for number in numbers))
    wrong = [prompt.row for prompt in open_prompts(path) if prompt.error]
    assert wrong == [150_000, 150_001, 150_002]


@pytest.mark.parametrize("value", [True, 1.5, [], {}, ["a"]])
def test_an_id_of_the_wrong_type_is_that_rows_error_and_its_id_is_its_number(value, tmp_path):
    first, second = rows_of(tmp_path, {"prompt": "p"}, {"prompt": "p", "id": value})
    assert first.error is None and "id is" in second.error and second.id == "1"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "neither prompt nor messages nor token_ids"),
        ({"text": "p"}, "neither prompt nor messages nor token_ids: this row has 'text'"),
        ({"prompt": None}, "neither"),
        ({"prompt": "p", "token_ids": [1]}, "both"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": ["p"]}, "prompt is"),
        ({"token_ids": []}, "token_ids is empty"),
        ({"token_ids": "12"}, "must be a list"),
        ({"token_ids": [1, -1]}, r"token_ids\[1\] is -1"),
        ({"token_ids": [1.5]}, r"token_ids\[0\] is 1.5"),
        ({"token_ids": [True]}, r"token_ids\[0\] is True"),
        ({"token_ids": [2**31]}, r"token_ids\[0\] is 2147483648"),
        ({"token_ids": [[1]]}, r"token_ids\[0\]"),
        ("{", "line 2 is not JSON"),
        ("plain text", "line 2 is not JSON"),
        ('["p"]', "line 2 is a list"),
    ],
)
def test_a_row_that_cannot_run_says_why_and_its_neighbours_run(record, words, tmp_path):
    before, bad, after = rows_of(tmp_path, {"prompt": "a"}, record, {"prompt": "b"})
    assert (before.prompt, before.error, after.prompt, after.error) == ("a", None, "b", None)
    assert re.search(words, bad.error)
    assert bad.token_ids is None


def test_all_that_is_wrong_with_a_row_is_said_at_once(tmp_path):
    error = row_of(tmp_path, {"id": 1.5, "temprature": 1, "top_k": -1, "n": 2}).error
    for words in ("id is 1.5", "temprature", "top_k", "neither prompt"):
        assert words in error


def test_text_of_any_characters_comes_through(tmp_path):
    for text in ("nul \0 here", "🎉👩‍👩‍👧", "\u2028\u2029\x0b\x85", "x" * 2**20, "\ufeff", "a\r\nb"):
        assert row_of(tmp_path, {"prompt": text, "own": text}).prompt == text
        assert json.loads(row_of(tmp_path, {"prompt": text, "own": text}).extra) == {"own": text}


def test_lone_surrogates_of_a_row_neither_end_the_run_nor_change_its_own_columns(tmp_path):
    prompt = row_of(tmp_path, '{"id": "\\udc00", "prompt": "a\\ud83d", "own\\ud800": "\\udfff é"}')
    assert prompt.error is None and prompt.prompt == "a\ud83d"
    prompt.extra.encode()  # it can be written
    assert json.loads(prompt.extra) == {"own\ud800": "\udfff é"}


def test_own_columns_are_written_as_people_read_them(tmp_path):
    assert row_of(tmp_path, {"prompt": "p", "ort": "東京"}).extra == '{"ort": "東京"}'


def test_plain_text_is_a_prompt_a_line_and_an_empty_one_is_that_rows_error(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b'one\n\n{"prompt": "three"}\n')
    first, second, third = open_prompts(path)
    assert (first.prompt, first.error, first.id) == ("one", None, "0")
    assert second.error == "prompt is empty"
    assert (third.prompt, third.id) == ('{"prompt": "three"}', "2")
    assert count(path) == 3


def test_a_missing_file_and_an_unknown_suffix_are_refused_before_the_first_row(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_prompts(tmp_path / "none.jsonl")
    (tmp_path / "a.docx").write_bytes(b"PK")
    for look in (open_prompts, count):
        with pytest.raises(InputError, match=r"\.jsonl"):
            look(tmp_path / "a.docx")


def test_the_content_hash_is_that_of_the_bytes_on_disk(tmp_path):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n')
    other.write_bytes(b'{"prompt": "b"}\n')
    first = content_hash(path)
    assert len(first) == 32 and int(first, 16) >= 0
    assert content_hash(other) != first
    other.write_bytes(path.read_bytes())
    assert content_hash(other) == first
    path.write_bytes(b"")
    assert content_hash(path) == "99aa06d3014798d86001c324468d497f"  # XXH3 128 of nothing, from its specification
    with pytest.raises(InputError, match="No such file"):
        content_hash(tmp_path / "none.jsonl")


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(num_rows):
        path = tmp_path / "many.jsonl.gz"
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(f'{{"id": "row {row}", "prompt": "{"text " * 4000}"}}\n' for row in range(num_rows))
        tracemalloc.start()
        rows = sum(prompt.error is None for prompt in open_prompts(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == num_rows == count(path)
        return peak

    assert peak(2000) - peak(200) < 500_000  # 36 MB of text more


def test_a_run_can_begin_at_any_row(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "p{row}"}}\n' for row in range(10)))
    later = itertools.islice(open_prompts(path), 7, None)
    assert [(prompt.row, prompt.prompt) for prompt in later] == [(7, "p7"), (8, "p8"), (9, "p9")]


def test_the_rows_own_keys_are_ready_for_the_runs_settings(tmp_path):
    prompt = row_of(tmp_path, {"prompt": "p", "top_k": 3, "seed": 0})
    merged = Sampling(temperature=0.7, top_k=9).override(prompt.sampling)
    assert (merged.temperature, merged.top_k, merged.seed) == (0.7, 3, 0)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv"])
def test_a_format_in_which_more_bytes_may_change_an_old_row_is_not_extended(tmp_path, name):
    path, write = tmp_path / name, gzip.compress if name.endswith(".gz") else bytes
    path.write_bytes(write(b'{"prompt": "a"}'))
    key = f"{content_hash(path)} of {path.stat().st_size} bytes"
    assert extends(path, key)
    path.write_bytes(path.read_bytes() + write(b'{"prompt": "b"}\n'))
    with pytest.raises(InputError, match="job.extend needs a format whose rows are lines"):
        extends(path, key)
