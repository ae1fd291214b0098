"""What a run's own keys say of constraints and thinking: refused at the start, with the key's name."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

from noria.__main__ import main
from noria.desk.steering import check_constraint, settled
from noria.errors import InputError
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling
from noria.structured import MAX_NBYTES
from small_run import command, write_files
from test_constraints import FILES, TOKENIZER

MODEL = SimpleNamespace(tokenizer=FILES)


def settle(sampling, begun=None, tokenizer=TOKENIZER, model=MODEL):
    return settled(sampling, model, tokenizer, begun or {})


def test_the_keys_of_a_run_become_the_constraint_of_its_rows(tmp_path):
    schema = {"enum": [1, None, "ü"]}
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(schema), encoding="utf-8")
    assert json.loads(settle(Sampling(json_schema=str(tmp_path / "a.json"))).structured_outputs["json"]) == schema
    assert settle(Sampling(regex="a+")).structured_outputs == {"regex": "a+"}
    assert settle(Sampling(choice="yes,no")).structured_outputs == {"choice": ["yes", "no"]}
    assert settle(Sampling(choice=["a,b", "c"])).structured_outputs == {"choice": ["a,b", "c"]}
    assert settle(Sampling(structured_outputs={"regex": "b"})).structured_outputs == {"regex": "b"}
    found = settle(Sampling(json_schema=str(tmp_path / "a.json")))
    assert (found.json_schema, found.regex, found.choice) == (None, None, None)


def nothing(path):
    pass


WRONG = [
    (nothing, "there is no such file"),
    (lambda path: path.mkdir(), "is not a regular file"),
    (os.mkfifo, "is not a regular file"),
    (lambda path: path.write_text("{"), "is not JSON"),
    (lambda path: path.write_text("[" * 100_000), "is not JSON"),
    (lambda path: path.write_bytes(b'"\xff"'), "is not JSON"),
    (lambda path: path.write_text("[1]"), "is not a JSON schema: it must be an object"),
    (lambda path: path.write_text(" " * (MAX_NBYTES + 1)), "has more than 262,144 bytes"),
]


@pytest.mark.parametrize(("make", "said"), WRONG)
def test_a_file_that_holds_no_schema_is_refused_by_its_name(tmp_path, make, said):
    path = tmp_path / "schema.json"
    make(path)
    with pytest.raises(InputError) as refused:
        settle(Sampling(json_schema=str(path)))
    assert f"sampling.json_schema {path}" in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"regex": "(a"}, r"^sampling.regex: llguidance cannot do it: "),
        (
            {"structured_outputs": {"json": {"not": {}}}},
            r"^sampling.structured_outputs.json: llguidance cannot do #/not: ",
        ),
        ({"thinking_token_budget": 4}, r"^sampling.thinking_token_budget: the model has no markers"),
    ],
)
def test_a_constraint_of_the_run_that_cannot_be_done_names_its_key(keys, said):
    given = Sampling(**keys)
    with pytest.raises(InputError, match=said):
        check_constraint(given, settle(given), TOKENIZER, 2048)


def test_without_the_library_the_runs_key_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    given = Sampling(choice="a,b")
    with pytest.raises(InputError, match=r"^sampling.choice: structured output needs llguidance: pip install"):
        check_constraint(given, settle(given), TOKENIZER, 2048)


def test_markers_are_the_models_unless_the_run_or_an_older_output_says_otherwise():
    think = {"chat_template.jinja": b"{{ '<think>' if x else '</think>' }}"}
    model, harmony = (
        SimpleNamespace(tokenizer=think),
        SimpleNamespace(tokenizer={"chat_template.jinja": b"<|channel|></think>"}),
    )
    assert settle(Sampling(), model=model).reasoning_markers == ["<think>", "</think>"]
    assert settle(Sampling(), model=harmony).reasoning_markers is None
    assert settle(Sampling(reasoning_markers="none"), model=model).reasoning_markers is None
    assert settle(Sampling(reasoning_markers="<a>,</a>"), model=model).reasoning_markers == ["<a>", "</a>"]
    assert settle(Sampling(), {"rules": 2}, model=model).reasoning_markers is None
    assert settle(Sampling(), {"sampling.reasoning_markers": None}, model=model).reasoning_markers == [
        "<think>",
        "</think>",
    ]
    backend = json.loads(FILES["tokenizer.json"])
    backend["added_tokens"] += [
        {"id": 2048 + place, "content": text, "special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for place, text in enumerate(("[THINK]", "[/THINK]"))
    ]  # fmt: skip
    own = Tokenizer({"tokenizer.json": json.dumps(backend).encode()}, {}, {})
    assert settle(Sampling(), tokenizer=own).reasoning_markers == ["[THINK]", "[/THINK]"]


def test_a_run_of_a_model_that_cannot_be_constrained_ends_in_one_line(tmp_path, capsys):

    write_files(tmp_path)
    assert main(command(tmp_path, "out.h5", "--choice", "yes,no", "--no-ignore-eos")) == 2
    said = capsys.readouterr().err
    assert "sampling.choice: the checkpoint has no tokenizer to read texts with" in said and "Traceback" not in said
    assert main(command(tmp_path, "out.h5", "--choice", "yes,no")) == 2
    assert "sampling.choice ends a row by the model's end token, which ignore_eos excludes" in capsys.readouterr().err
    assert main(command(tmp_path, "out.h5", "--choice", "a,b", "--regex", "a", "--no-ignore-eos")) == 2
    assert "sampling.regex and sampling.choice are given" in capsys.readouterr().err
    assert not list(tmp_path.glob("out.h5*"))
