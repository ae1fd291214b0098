"""Responses beside what OpenAI documents of them, field by field. The expected lines are written by hand from its API reference
and batch guide (lines of output and error files, chat completion and completion objects) and its cookbook (log-probabilities).
"""

import csv
import json

import numpy as np

from noria.__main__ import main
from noria.output.export import ExportSettings, export
from noria.output.export_openai import NoTexts, responses
from noria.output.merge import merge
from noria.output.parts import Parts
from noria.output.schema import Generation
from noria.rows.pieces import Pieces
from output_rows import fill
from test_pieces import byte_tokenizer, tokenizer_of

CHECKPOINT = "44709d6fcb5e8a1b"
HEADER = {"checkpoint": CHECKPOINT}
START = "2024-03-28T19:33:15Z"  # 1711654395
CHAT = {"model": "gpt-3.5-turbo-0125", "url": "/v1/chat/completions"}
COMPLETION = {"model": "gpt-4-turbo", "url": "/v1/completions"}
INFINITE = float("-inf")
BYTES = byte_tokenizer()
END = 259


def ids(text):
    return BYTES.encode(text, add_special_tokens=False).ids


def row(number, text, tokens, extra, **more):
    values = {"id": f"request-{number}", "sample": 0, "status": "done", "finish_reason": "stop", "prompt": "p"} | more
    prompt = np.arange(values.pop("prompt_length", 22), dtype=np.int32)
    return Generation(
        row=number, text=text, token_ids=np.array(tokens, np.int32), prompt_token_ids=prompt, extra=json.dumps(extra), **values
    )  # fmt: skip


def with_logprobs(one, logprobs, top_ids=None, top=None):
    one.logprobs = np.array(logprobs, np.float32)
    if top_ids is not None:
        one.top_ids, one.top_logprobs = np.array(top_ids, np.int32), np.array(top, np.float32)
    return one


def exported(folder, rows, texts=None, errors=None):
    """The lines of a finished output's responses."""
    output = folder / "run.h5"
    parts = Parts(output, HEADER)
    fill(parts, rows, 9)
    merge(parts, output, max(one.row for one in rows) + 1, {"start": START}, {})
    settings = ExportSettings("openai", errors, texts=lambda origin: texts or Pieces(tokenizer_of(BYTES)))
    export(output, folder / "out.jsonl", settings=settings)
    return lines(folder / "out.jsonl")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_chat_line_is_the_batch_guides(tmp_path):
    (line,) = exported(tmp_path, [row(0, "Hello.", [1, END], CHAT)])
    assert line == {
        "id": "batch_req_0",
        "custom_id": "request-0",
        "response": {
            "status_code": 200,
            "request_id": "req_0",
            "body": {
                "id": "chatcmpl-0",
                "object": "chat.completion",
                "created": 1711654395,
                "model": "gpt-3.5-turbo-0125",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "Hello.", "refusal": None},
                        "logprobs": None,
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 22, "completion_tokens": 2, "total_tokens": 24},
                "system_fingerprint": "fp_44709d6fcb",
            },
        },
        "error": None,
    }
    body = line["response"]["body"]
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert list(body) == ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]


def test_a_completion_is_the_references_completion_object(tmp_path):
    one = row(0, "\n\nThis is indeed a test", range(7), COMPLETION, finish_reason="length", prompt_length=5)
    (line,) = exported(tmp_path, [one])
    assert line["response"]["body"] == {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 1711654395,
        "model": "gpt-4-turbo",
        "choices": [{"text": "\n\nThis is indeed a test", "index": 0, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
        "system_fingerprint": "fp_44709d6fcb",
    }


def test_an_error_is_the_batch_guides_error_line_and_goes_to_the_file_of_errors_alone(tmp_path):
    rows = [row(0, "a", [1], CHAT), row(1, "", [], CHAT, status="error", finish_reason="error", error="too long")]
    expected = {
        "id": "batch_req_1",
        "custom_id": "request-1",
        "response": None,
        "error": {"code": "invalid_request", "message": "too long"},
    }
    assert exported(tmp_path, rows)[1] == expected
    export(tmp_path / "run.h5", tmp_path / "a.jsonl", settings=ExportSettings("openai", tmp_path / "e.jsonl"))
    assert [one["custom_id"] for one in lines(tmp_path / "a.jsonl")] == ["request-0"]
    assert lines(tmp_path / "e.jsonl") == [expected]


def test_log_probabilities_of_a_message_have_texts_and_bytes_which_joined_are_the_message(tmp_path):
    tokens = [*ids("N"), 256, *ids("💙"), END]
    chances = np.array([-0.5, -0.25, -0.0625, 0, 0, INFINITE, -1], np.float32)
    top_ids = [[tokens[0], END], [256, ids("é")[0]], *([one, -1] for one in tokens[2:])]
    top = [[-0.5, -2.5], [-0.25, INFINITE], *([value, np.nan] for value in chances[2:])]
    (line,) = exported(tmp_path, [with_logprobs(row(0, "N the💙", tokens, CHAT), chances, top_ids, top)])
    choice = line["response"]["body"]["choices"][0]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "N",
                "logprob": -0.5,
                "bytes": [78],
                "top_logprobs": [
                    {"token": "N", "logprob": -0.5, "bytes": [78]},
                    {"token": "</s>", "logprob": -2.5, "bytes": [60, 47, 115, 62]},
                ],
            },
            {
                "token": " the",
                "logprob": -0.25,
                "bytes": [32, 116, 104, 101],
                "top_logprobs": [
                    {"token": " the", "logprob": -0.25, "bytes": [32, 116, 104, 101]},
                    {"token": "\\xc3", "logprob": -9999.0, "bytes": [195]},
                ],
            },
            *(
                {"token": text, "logprob": value, "bytes": [byte],
                 "top_logprobs": [{"token": text, "logprob": value, "bytes": [byte]}]}
                for text, byte, value in (("\\xf0", 240, -0.0625), ("\\x9f", 159, 0.0), ("\\x92", 146, 0.0),
                                          ("\\x99", 153, -9999.0))
            ),
        ],
        "refusal": None,
    }  # fmt: skip
    joined = [byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"]]
    assert bytes(joined).decode("utf-8") == choice["message"]["content"]


def test_log_probabilities_of_a_completion_are_lists_with_the_places_of_the_tokens(tmp_path):
    tokens = [*ids("N"), *ids("é"), 256]
    one = row(0, "Né the", tokens, COMPLETION, finish_reason="length")
    top_ids = [[tokens[0]], [256], [tokens[2]], [256]]
    (line,) = exported(
        tmp_path, [with_logprobs(one, [-0.5, -3, -0.25, -1], top_ids, [[-0.5], [-0.125], [-0.25], [-1]])]
    )
    choice = line["response"]["body"]["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["N", "bytes:\\xc3", "bytes:\\xa9", " the"],
        "token_logprobs": [-0.5, -3, -0.25, -1],
        # the token that was chosen is always there, beside as many of the likeliest as were asked for
        "top_logprobs": [{"N": -0.5}, {" the": -0.125, "bytes:\\xc3": -3}, {"bytes:\\xa9": -0.25}, {" the": -1}],
        "text_offset": [0, 1, 1, 2],
    }
    assert choice["text"][2:] == " the"


def test_without_a_tokenizer_tokens_are_their_ids(tmp_path):
    rows = [with_logprobs(row(0, "ab", [5, 6], CHAT), [-1, -2], [[5], [7]], [[-1], [-0.5]])]
    rows.append(with_logprobs(row(1, "ab", [5, 6], COMPLETION), [-1, -2]))
    chat, completion = (one["response"]["body"]["choices"][0] for one in exported(tmp_path, rows, NoTexts()))
    assert chat["logprobs"]["content"] == [
        {"token": "token_id:5", "logprob": -1, "bytes": None,
         "top_logprobs": [{"token": "token_id:5", "logprob": -1, "bytes": None}]},
        {"token": "token_id:6", "logprob": -2, "bytes": None,
         "top_logprobs": [{"token": "token_id:7", "logprob": -0.5, "bytes": None}]},
    ]  # fmt: skip
    assert completion["logprobs"] == {
        "tokens": ["token_id:5", "token_id:6"],
        "token_logprobs": [-1, -2],
        "top_logprobs": [{"token_id:5": -1}, {"token_id:6": -2}],
        "text_offset": [],
    }


def test_usage_counts_a_prompt_once_for_all_its_samples_and_has_details_where_they_are_known():
    def sample(number, row=0, **more):
        known = {
            "row": row,
            "sample": number,
            "token_ids": [1, 2],
            "prompt_token_ids": [1, 2, 3],
            "text": "",
            "id": "a",
        }
        none = dict.fromkeys(("reasoning", "num_reasoning_tokens", "num_cached_tokens"))
        return known | {"status": "done", "finish_reason": "stop"} | none | more

    def usage(*samples):
        (line,) = responses(samples, START, CHECKPOINT, NoTexts())
        return line["response"]["body"]["usage"]

    assert usage(sample(0), sample(1)) == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    known = [sample(number, num_cached_tokens=2, num_reasoning_tokens=number) for number in (0, 1)]
    assert usage(*known) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    (line,) = responses([sample(0, reasoning="hm")], START, CHECKPOINT, NoTexts())
    message = line["response"]["body"]["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": "",
        "refusal": None,
        "reasoning": "hm",
        "reasoning_content": "hm",
    }


def test_a_users_column_of_a_name_that_a_response_needs_changes_nothing(tmp_path):
    own = dict.fromkeys(("row", "prompt_token_ids", "reasoning", "num_reasoning_tokens", "num_cached_tokens"), 7)
    (line,) = exported(tmp_path, [row(0, "Hello.", [1, END], CHAT | own)])
    (plain,) = exported(tmp_path, [row(0, "Hello.", [1, END], CHAT)])
    assert line == plain


def test_files_of_errors_that_cannot_be_are_refused(tmp_path, capsys):
    exported(tmp_path, [row(0, "a", [1], CHAT)])
    output, target = str(tmp_path / "run.h5"), str(tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    for arguments, words in (
        (["--errors", target], "is the file of the responses too"),
        (["--errors", str(tmp_path / "e.csv")], "export --format openai writes .jsonl"),
        (["--errors", str(tmp_path / "no" / "e.jsonl")], "there is no folder"),
    ):
        assert main(["export", output, target, "--format", "openai", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["export", output, target, "--errors", str(tmp_path / "e.jsonl")]) == 2
    assert "--errors is for --format openai" in capsys.readouterr().err
    assert main(["export", output, target, "--follow", "--errors", str(tmp_path / "e.jsonl")]) == 2
    assert "--errors is for --format openai" in capsys.readouterr().err
    assert main(["export", output, target, "--model", "none"]) == 2
    assert "--model is for --format openai" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_the_name_of_a_runs_own_export_is_told_from_a_file(tmp_path, capsys, monkeypatch):
    exported(tmp_path, [row(0, "a", [1], CHAT)])
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run.h5", "openai:new.jsonl"]) == 2
    assert "give --format openai and the file new.jsonl" in capsys.readouterr().err
    assert not list(tmp_path.glob("openai*"))


def test_an_output_with_log_probabilities_needs_its_checkpoint_or_is_told_to_do_without(tmp_path, capsys):
    exported(tmp_path, [with_logprobs(row(0, "ab", [5, 6], CHAT), [-1, -2])])
    command = ["export", str(tmp_path / "run.h5"), str(tmp_path / "out.jsonl"), "--format", "openai"]
    assert main(command) == 2
    assert "in its checkpoint (it is not named): name it with --model FILE.h5" in capsys.readouterr().err
    assert main([*command, "--model", str(tmp_path / "no.h5")]) == 2
    assert "no.h5 is not there" in capsys.readouterr().err
    assert main([*command, "--model", "none"]) == 0
    content = lines(tmp_path / "out.jsonl")[0]["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == "token_id:5"


def test_reasoning_stands_apart_from_the_content_and_its_tokens_are_not_among_those_of_the_content(tmp_path):
    tokens = [*ids("hm"), *ids("/"), *ids("a"), END]
    one = with_logprobs(row(0, "a", tokens, CHAT), [-1, -2, -3, -4, -5])
    one.reasoning, one.reasoning_tokens = "hm", 2
    silent = row(1, "b", [*ids("b"), END], CHAT)
    silent.reasoning = ""
    first, second = exported(tmp_path, [one, silent])
    body = first["response"]["body"]
    assert body["choices"][0]["message"] == {
        "role": "assistant", "content": "a", "refusal": None, "reasoning": "hm", "reasoning_content": "hm",
    }  # fmt: skip
    assert body["choices"][0]["logprobs"]["content"] == [
        {"token": "a", "logprob": -4, "bytes": [97], "top_logprobs": []}
    ]
    assert body["usage"]["completion_tokens"] == 5
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    message = second["response"]["body"]["choices"][0]["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("b", None, None)
    for name in ("rows.jsonl", "rows.csv"):
        export(tmp_path / "run.h5", tmp_path / name)
    assert [line["reasoning"] for line in lines(tmp_path / "rows.jsonl")] == ["hm", ""]
    with open(tmp_path / "rows.csv", newline="") as file:
        assert [line["reasoning"] for line in csv.DictReader(file)] == ["hm", ""]


def test_a_users_column_reasoning_keeps_its_name_unless_the_output_has_one_itself(tmp_path):
    own = {"reasoning": 7}
    exported(tmp_path, [row(0, "a", [1], own)])
    export(tmp_path / "run.h5", tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["reasoning"] == "7" and "input_reasoning" not in line
    one = row(0, "a", [1], own)
    one.reasoning = "hm"
    exported(tmp_path, [one])
    export(tmp_path / "run.h5", tmp_path / "rows.jsonl")
    (line,) = lines(tmp_path / "rows.jsonl")
    assert (line["reasoning"], line["input_reasoning"]) == ("hm", 7)
