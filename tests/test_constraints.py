"""What structured_outputs may be, what llguidance makes of it, and what is said of what it cannot do."""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from noria.errors import InputError
from noria.names import refusal
from noria.rows import constraints as module
from noria.rows.constraints import Constraints
from noria.rows.guides import Guide
from noria.rows.prompts import open_prompts
from noria.rows.schema_errors import place_of
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling
from noria.structured import MAX_NBYTES

DEMO = Path(__file__).parent.parent / "inputs" / "demo" / "model"
FILES = {"tokenizer.json": (DEMO / "tokenizer.json").read_bytes()}
TOKENIZER = Tokenizer(FILES, {}, {"eos_token_id": 1})


@pytest.fixture(scope="module")
def constraints():
    return Constraints(TOKENIZER, 2048)


def row_of(folder, row):
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "p"} | row) + "\n")
    return next(open_prompts(folder / "rows.jsonl"))


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def takes(matcher, text):
    return matcher.consume_tokens(ids(text)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ({"choice": ["a|b", 'é"\\', "x\ny"]}, ["a|b", 'é"\\', "x\ny"], ["a", "a|b ", "", "a|b|x"]),
        (
            {"choice": [f"label {place}" for place in range(15_000)]},
            ["label 0", "label 14999"],
            ["label", "label 15000"],
        ),
        (
            {"choice": ["/.*+?()[]{}^$|#&-~ \t\r", "٣²", "👩‍👧", "\0"]},
            ["/.*+?()[]{}^$|#&-~ \t\r", "٣²", "👩‍👧", "\0"],
            ["/", "3"],
        ),
        ({"regex": "[0-9]{2,3}(st|nd)"}, ["12st", "123nd"], ["1st", "1234st", "12"]),
        ({"grammar": 'root ::= "(" root ")" | "x"'}, ["x", "((x))"], ["((x)", ""]),
        ({"grammar": 'start: "<" NAME ">"\nNAME: /[a-z]+/'}, ["<ab>"], ["<>", "<A>"]),
        ({"json": {"type": "object"}}, ['{"a": [1, null]}', "{}"], ["[]", "1"]),
        ({"json": '{"type": "integer"}'}, ["17", "-3"], ["1.5", '"1"']),
        ({"json": True}, ["[1]", '"x"'], ["x"]),
        ({"json_object": True, "regex": None}, ['{"a": {}}'], ["[]"]),
        ({"json_object": True, "disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}', "{ }"]),
    ],
)
def test_a_constraint_takes_what_it_says_and_nothing_else(constraints, constraint, good, bad):
    Sampling().override({"structured_outputs": constraint})
    assert all(takes(constraints.matcher(constraint), text) for text in good)
    assert not any(takes(constraints.matcher(constraint), text) for text in bad)


def test_json_cannot_go_on_with_blanks_for_ever(constraints):
    matcher, blank = constraints.matcher({"json": {"type": "object"}}), ids(" ")
    assert matcher.consume_tokens(ids("{"))
    assert sum(matcher.try_consume_tokens(blank) for _ in range(100)) == 32


WRONG = [
    ({"regex": "a", "choice": ["b"]}, "has regex and choice: a row has one constraint"),
    ({"json": {}, "json_object": True}, "has json and json_object: a row has one"),
    ({"structural_tag": "x"}, "has 'structural_tag', which is not in Noria"),
    ({"whitespace_pattern": " "}, "has 'whitespace_pattern', which is not in Noria"),
    (
        {"jsn": {}},
        "has 'jsn', which is not one of its keys, json, json_object, regex, choice, grammar, disable_any_whitespace",
    ),
    ({"json": [1]}, "json is '[1]': it must be a JSON schema"),
    ({"json": "{"}, "json is a text that is not JSON"),
    ({"json_object": 3}, "json_object is '3': it must be true"),
    ({"choice": []}, "choice is '[]': it must be a list of texts"),
    ({"choice": ["a", ""]}, "it must be a list of texts, none of them empty"),
    ({"choice": "a,b"}, "it must be a list of texts"),
    ({"regex": ""}, "regex is '': it must be a text that is not empty"),
    ({"grammar": 5}, "grammar is '5': it must be a text"),
    ({"json_object": True, "disable_any_whitespace": 1.5}, "disable_any_whitespace is 1.5: it must be true or false"),
    ({"regex": "a" * (MAX_NBYTES + 1)}, "262,158 bytes as JSON, at most 262,144 are read"),
    ("json", "structured_outputs is 'json': it must be a table"),
]


@pytest.mark.parametrize(("value", "said"), WRONG)
def test_a_wrong_constraint_is_its_rows_error(tmp_path, value, said):
    assert said in row_of(tmp_path, {"structured_outputs": value}).error


def test_what_asks_for_nothing_is_no_constraint(tmp_path):
    for value in ({}, {"json": None}, {"disable_fallback": True, "disable_additional_properties": False}):
        row = row_of(tmp_path, {"structured_outputs": value})
        assert row.error is None and row.sampling == {"structured_outputs": value}
    assert row_of(tmp_path, {"structured_outputs": None}).sampling == {}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "text"}, {}),
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "has no json_schema.schema"),
        ({"type": "xml"}, "response_format.type is 'xml': it is text, json_object or json_schema"),
    ],
)
def test_openais_response_format_is_the_same_in_rows_and_in_batch_lines(tmp_path, value, expected):
    line = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "x"}], "response_format": value}}
    (tmp_path / "batch.jsonl").write_text(json.dumps(line) + "\n")
    for row in (row_of(tmp_path, {"response_format": value}), next(open_prompts(tmp_path / "batch.jsonl"))):
        if isinstance(expected, str):
            assert expected in row.error
        else:
            assert row.error is None and row.sampling == {"structured_outputs": expected}


def test_a_batch_line_whose_response_format_is_no_object_is_refused(tmp_path):
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": "json_object"}
    (tmp_path / "batch.jsonl").write_text(json.dumps({"custom_id": "a", "body": body}) + "\n")
    row = next(open_prompts(tmp_path / "batch.jsonl"))
    assert 'body.response_format is "json_object": it must be an object with a type' in row.error


def test_two_constraints_of_a_row_are_refused_and_a_column_of_that_name_is_none(tmp_path):
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    assert "response_format and structured_outputs are two constraints" in row_of(tmp_path, both).error
    row = row_of(tmp_path, {"response_format": "essay", "choice": "A", "regex": "x+"})
    assert row.error is None and json.loads(row.extra) == {"response_format": "essay", "choice": "A", "regex": "x+"}


def test_the_old_names_of_vllm_are_refused_with_the_new_one():
    for name in ("json", "regex", "choice", "grammar"):
        assert f"it is {{\"{name}\": ...}} there; did you mean 'structured_outputs'?" in refusal(f"guided_{name}", "x")


def test_contradictions_are_refused():
    with pytest.raises(
        InputError, match=r"sampling.json_schema and sampling.regex are given: a row has one constraint"
    ):
        Sampling(json_schema="a.json", regex="a").check()
    with pytest.raises(
        InputError, match="structured_outputs ends a row by the model's end token, which ignore_eos excludes"
    ):
        Sampling(structured_outputs={"regex": "a"}, ignore_eos=True).check()


UNDOABLE = [
    ({"properties": {"a": {"not": {"type": "string"}}}}, "#/properties/a/not"),
    ({"properties": {"x/y~": {"items": {"contains": {"const": 1}}}}}, "#/properties/x~1y~0/items/contains"),
    (
        {"properties": {"not": {"type": "string"}, "b": {"anyOf": [{"type": "null"}, {"if": {}}]}}},
        "#/properties/b/anyOf/1/if",
    ),
    (
        {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"uniqueItems": True, "type": "array"}}}},
        "#/$defs/a/items/uniqueItems",
    ),
    ({"properties": {"a": {"$ref": "http://a.b/c.json"}}}, "#/properties/a/$ref"),
    ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "#/properties/a/$ref"),
    ({"properties": {"a": {"$ref": "#/$defs/none"}}, "$defs": {}}, "#/properties/a/$ref"),
    ({"items": {"type": "string", "format": "no-such"}}, "#/items/format"),
    ({"type": "string", "pattern": "(?=a)b"}, "#/pattern"),
    ({"allOf": [{"type": "strange"}]}, "#/allOf/0/type"),
    ({"type": "object", "properties": {"a": {}}, "maxProperties": 1}, "#/maxProperties"),
    ({"properties": {f"p{place}": {} for place in range(1000)}, "maxProperties": 5}, "#/maxProperties"),
    (False, "#"),
]


@pytest.mark.parametrize(("schema", "place"), UNDOABLE)
def test_a_schema_that_cannot_be_done_is_refused_with_the_place_of_the_keyword(constraints, schema, place):
    with pytest.raises(InputError) as refused:
        constraints.matcher({"json": schema})
    assert str(refused.value).startswith(f"structured_outputs.json: llguidance cannot do {place}: ")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


BESIDE = {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"n": {"$ref": "#/$defs/a", "type": "object"}}}}}
INSIDE = {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (BESIDE, "#/$defs/a/properties/n/$ref: it leads back to where it stands, beside other keys or in allOf"),
        (INSIDE, "#/$defs/a/allOf/0/$ref: it leads back to where it stands, beside other keys or in allOf"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "a/$ref: it leads to a place that is not in the schema"),
        ({"items": {"$ref": "https://a.b/c"}}, "it leads out of the schema, and nothing is fetched: put what it names"),
    ],
)
def test_references_that_cannot_be_followed_are_told_in_words_of_their_own(constraints, schema, said):
    with pytest.raises(InputError, match=re.escape(said)):
        constraints.matcher({"json": schema})


def test_a_recursive_reference_that_stands_alone_is_followed(constraints):
    tree = {"properties": {"n": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "required": ["n"]}
    closed = {"type": "object", "additionalProperties": False}
    matcher = constraints.matcher({"json": {"$ref": "#/$defs/a", "$defs": {"a": tree | closed}}})
    assert takes(matcher, '{"n": {"n": null}}')


def test_a_reference_that_leads_to_itself_alone_is_told_when_no_token_can_come(constraints):
    matcher = constraints.matcher({"json": {"$ref": "#"}})
    guide = Guide(None, matcher, [1])
    matcher.compute_bitmask()
    guide.fail()
    assert guide.error.endswith("no token can come next, as where a $ref leads to itself alone")


def test_the_search_for_a_keyword_is_bounded_by_what_it_compiles():
    large = {
        "properties": {f"p{place}": {} for place in range(2000)},
        "not": {},
        "$defs": {"a": {"const": "y" * 50_000}},
    }
    compiled = []

    def error_of(part):
        compiled.append(len(json.dumps(part)))
        return "wrong: not" if '"not"' in json.dumps(part) else ""

    assert place_of({"items": {"properties": {"a": {"not": {}}}}}, error_of) == "#/items/properties/a/not"
    compiled.clear()
    place_of(large, error_of)
    assert 10 < len(compiled) and sum(compiled) <= 2**22


@pytest.mark.parametrize(
    "constraint", [{"regex": "(a"}, {"regex": "(?=x)"}, {"grammar": "nonsense"}, {"grammar": "%import a.b\nstart: b"}]
)
def test_a_wrong_expression_or_grammar_is_refused_in_one_line(constraints, constraint):
    (kind,) = constraint
    with pytest.raises(InputError, match=rf"^structured_outputs.{kind}: llguidance cannot do it: .+") as refused:
        constraints.matcher(constraint)
    assert "\n" not in str(refused.value)


def test_a_constraint_is_compiled_once_and_the_last_are_kept(monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    constraints, compiled = Constraints(TOKENIZER, 2048), []
    compile = constraints._compile
    constraints._compile = lambda one: compiled.append(one["regex"]) or compile(one)
    for text in "abcabcdab(":
        try:
            constraints.matcher({"regex": text})
        except InputError:
            assert text == "("
    assert "".join(compiled) == "abcdab("
    with pytest.raises(InputError):
        constraints.matcher({"regex": "("})
    assert "".join(compiled) == "abcdab("


@pytest.mark.parametrize(("worth", "expected"), [(10.0, 3), (0.0, 1)])
def test_many_rows_of_a_constraint_are_copies_of_several(monkeypatch, worth, expected):
    for name, value in {"COPIES": 2, "MOST_COMPILED": 3, "WORTH_SECONDS": worth}.items():
        monkeypatch.setattr(module, name, value)
    constraints, compiled = Constraints(TOKENIZER, 2048), []
    compile = constraints._compile
    constraints._compile = lambda one: compiled.append(one) or compile(one)
    matchers = [constraints.matcher({"choice": ["abc", "xyz"]}) for _ in range(9)]
    assert len(compiled) == expected, "copies of one wait for one another; compiling takes longer than waiting"
    for place, matcher in enumerate(matchers):
        word = "abc" if place % 2 else "xyz"
        assert matcher.consume_tokens(ids(word[0])) and takes(matcher, word[1:])


def test_a_tokenizer_that_is_slow_to_read_does_not_make_constraints_slow_to_compile(monkeypatch):
    library = module.llguidance()
    read = library.LLTokenizer

    def slowly(*given, **named):
        time.sleep(2 * module.WORTH_SECONDS)
        return read(*given, **named)

    monkeypatch.setattr(library, "LLTokenizer", slowly)
    constraints = Constraints(TOKENIZER, 2048)
    places = {constraints.copy({"choice": ["abc", "xyz"]})[1] for _ in range(2 * module.COPIES)}
    assert places == {0, 1}


def test_rows_of_one_constraint_do_not_share_their_place_in_it(constraints):
    one, other = (constraints.matcher({"choice": ["abc", "xyz"]}) for _ in range(2))
    assert one.consume_tokens(ids("a")) and other.consume_tokens(ids("x"))
    assert takes(one, "bc") and takes(other, "yz")


def test_without_the_library_the_row_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"structured output needs llguidance: pip install 'llguidance>="):
        Constraints(TOKENIZER, 2048).matcher({"regex": "a"})


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "said"),
    [
        (None, 2048, "the checkpoint has no tokenizer"),
        (Tokenizer({}, {}, {"eos_token_id": 1}), 2048, "the checkpoint has no tokenizer"),
        (Tokenizer(FILES, {}, {}), 2048, "the model has no end token"),
        (Tokenizer(FILES, {}, {"eos_token_id": 3000}), 2048, "the model has no end token"),
    ],
)
def test_a_model_that_cannot_be_constrained_says_why(tokenizer, vocab_size, said):
    with pytest.raises(InputError, match=said):
        Constraints(tokenizer, vocab_size).matcher({"regex": "a"})


@pytest.mark.parametrize("vocab_size", [1500, 2048, 2100])
def test_a_vocabulary_of_another_size_than_the_tokenizers_has_masks_by_id(vocab_size):
    constraints = Constraints(TOKENIZER, vocab_size)
    bits = np.frombuffer(constraints.matcher({"choice": ["a", "b"]}).compute_bitmask(), np.uint8)
    found = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
    assert found == sorted(ids(one)[0] for one in "ab")
    assert constraints.mask_width == -(-max(vocab_size, 2048) // 32)
