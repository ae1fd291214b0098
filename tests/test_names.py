"""What a key that is none of Noria's means: a synonym, another program's key, a misspelt one, or a column of one's own."""

import json

import pytest

from counts import some
from noria.config import Config
from noria.names import ALIASES, BESIDE, FOREIGN, NEAR, REFUSED, SYNONYMS, asks, is_foreign, refusal
from noria.readers._openai import requested_rows
from noria.rows.prompt_files import PromptFiles
from noria.rows.prompts import noted, open_prompts
from noria.sampling import ROW_KEYS, Sampling
from noria.tools.keys import types_of

# Columns of published data sets, as their cards list them.
COMMON = """
abstract action adversarial age all_classes answer answerKey answer_start answers arguments article artist aspects
attributes author authors best_answer body bucket caption categories category choice choices chosen citation city claim
class code code_context columns comment comments completion concept_set confidence content context contexts conversation
conversation_hash conversation_id conversations correct_answer country created_at creator ctx dataset date day description
dialog dialogue difficulty distractor1 doc doc_id document documents domain duration ended_at email emotion endings
entities entry_point evidence example_id examples exp explanation facts feedback filename filtered_resps final_answer
first_name format gender generation genre gold goal ground_truth group hash hashed_ip header headline history hint
hypothesis ids idx image incorrect_answers index input inputs instances instruction intent is_classification item job key
keywords kind label labels lang language last_name length level license likes line link list location main_topic margin
mask math max_score maximum meaning mean meta method metrics min_score model model_name month name narrative neg_tokens
negative new next_sentence noise note notes number num_chars num_tokens num_turns num_words obj object openai_moderation
op option options order original outline output page paragraph parent passage path period persona pertinence place plan
pos position premise preference price problem problem_id program prompt_id proof qid quality query question question_id
question_type rank rate rating rationale reason reasoning redacted ref reference references region rejected relation
reply report response responses resps result review role root rule sample samples scale scene schema score score_chosen
scores season sentence sentence1 sentence2 sentiment service setting sex signature site size snippet solution sort source
sources span speaker split stars start state statement status step steps store story style subject subreddit subset
subtopic success sum summary support_text sys_msg table tags target targets task task_id task_type team template term test
test_list text texts theme thinking thread tier time timestamp title token tokens tone tool topic topic_name total toxic
train translation triple true_label turn turns type uid unit unique_id update uri url user user_id utterance valid value
variables verb verdict verse version views votes weight weekday word words year zip
""".split()


def rows_of(tmp_path, *records, strict=False):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    said = []
    rows = list(noted(open_prompts(PromptFiles((str(path),), strict_keys=strict)), said.append))
    return rows, said


def test_the_keys_that_names_are_near_are_keys_and_the_lists_do_not_overlap():
    assert set(NEAR) <= set(ROW_KEYS)
    assert not set(FOREIGN) & set(ROW_KEYS)
    lists = [set(SYNONYMS), set(REFUSED), set(ALIASES), set(FOREIGN)]
    assert len(set().union(*lists)) == sum(map(len, lists))
    meant = {*SYNONYMS.values(), *ALIASES.values(), *(key for key, _ in REFUSED.values())}
    assert meant <= set(types_of(Sampling))


@pytest.mark.parametrize(("name", "key"), SYNONYMS.items())
def test_an_exact_synonym_is_the_key_and_is_said_once_for_all_rows(tmp_path, name, key):
    rows, said = rows_of(tmp_path, {"prompt": "a", name: 3}, {"prompt": "b", name: 4.0}, {"prompt": "c", name: None})
    assert [row.error for row in rows] == [None] * 3
    assert [row.sampling for row in rows] == [{key: 3}, {key: 4}, {}]
    assert [row.extra for row in rows] == [""] * 3
    assert said == [f"{name} in rows is read as {key}"]


def test_two_names_of_one_key_must_agree(tmp_path):
    same = {"prompt": "a", "max_tokens": 3, "max_new_tokens": 3.0, "max_completion_tokens": 3}
    other = {"prompt": "b", "max_tokens": 3, "max_new_tokens": 4}
    third = {"prompt": "c", "max_tokens": 3, "max_completion_tokens": 4}
    null = {"prompt": "d", "max_tokens": 3, "max_new_tokens": None}
    (one, two, three, four), _ = rows_of(tmp_path, same, other, third, null)
    assert one.error is None and one.sampling == {"max_new_tokens": 3}
    assert "max_new_tokens is 4 and max_tokens is 3, two names of one key" in two.error
    assert "max_tokens is 3 and max_completion_tokens is 4, two names of one key" in three.error
    assert four.error is None and four.sampling == {"max_new_tokens": 3}


def test_a_synonym_with_a_wrong_value_is_that_rows_error(tmp_path):
    (row,), _ = rows_of(tmp_path, {"prompt": "a", "max_tokens": "many"})
    assert "max_new_tokens is 'many': it must be an integer" in row.error


def test_a_synonym_is_a_column_of_a_table_too(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,max_tokens,num_return_sequences\na,5,\nb,,2\n")
    first, second = open_prompts(path)
    assert (first.error, first.sampling) == (None, {"max_new_tokens": 5})
    assert (second.error, second.sampling) == (None, {"n": 2})


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_means_something_else_stays_refused(tmp_path, name):
    (row,), _ = rows_of(tmp_path, {"prompt": "a", name: 7})
    meant, why = REFUSED[name]
    assert why in row.error and f"did you mean {meant!r}" in row.error


def asking(name):
    """A value of a key of another program that asks for something."""
    return next(value for value in (True, False, 0.5, "x", ["x"]) if asks(name, value))


def test_a_key_of_another_program_is_named_once_and_carried(tmp_path):
    for name in some(FOREIGN):
        rows, said = rows_of(tmp_path, *({"prompt": "a", name: asking(name)} for _ in range(3)))
        assert [row.error for row in rows] == [None] * 3
        assert [json.loads(row.extra) for row in rows] == [{name: asking(name)}] * 3
        (line,) = said
        assert line.startswith(f"{name} is another program's key") and "\n" not in line


def test_with_strict_keys_a_key_of_another_program_is_that_rows_error(tmp_path):
    for name in some(FOREIGN):
        (bad, good), said = rows_of(tmp_path, {"prompt": "a", name: asking(name)}, {"prompt": "b"}, strict=True)
        assert bad.error.startswith(f"{name} is another program's key") and good.error is None and not said


def test_the_same_keys_are_refused_in_batch_lines():
    for name in some(sorted(set(FOREIGN) - set(BESIDE))):  # which the template of a conversation reads
        body = {"messages": [{"role": "user", "content": "x"}], name: asking(name)}
        assert requested_rows({"custom_id": "a", "body": body})[0].error.startswith(f"body.{name} is")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_beams", 1), ("echo", False), ("typical_p", 1.0), ("grammar", None), ("suppress_tokens", []), ("best_of", 1)],
)
def test_a_value_that_asks_for_nothing_is_quiet(tmp_path, name, value):
    (row,), said = rows_of(tmp_path, {"prompt": "a", name: value}, strict=True)
    assert row.error is None and not said
    body = {"messages": [{"role": "user", "content": "x"}], name: value}
    assert isinstance(requested_rows({"custom_id": "a", "body": body})[0], dict)


def test_true_is_not_one_and_false_not_zero():
    assert is_foreign("num_beams", True) and is_foreign("early_stopping", 0) and not is_foreign("num_beams", 1.0)


def test_columns_of_published_data_sets_are_never_taken_for_a_misspelt_key():
    values = ["text", 3, 0.5, True, ["a"], {"a": 1}, None]
    taken = {(name, value) for name in COMMON for value in map(repr, values) if refusal(name, eval(value))}
    assert not taken


def test_a_request_may_use_the_names_of_vllm():
    body = {"messages": [{"role": "user", "content": "x"}], "min_tokens": 2, "num_return_sequences": 3}
    (row,) = requested_rows({"custom_id": "a", "body": body})
    assert (row["min_new_tokens"], row["n"]) == (2, 3)
    (row,) = requested_rows({"custom_id": "a", "body": body | {"n": 4}})
    assert "two names of one key" in row.error


def test_strict_keys_is_a_key_of_the_job():
    assert not Config(model="m", prompts="p", output="o").job.strict_keys
