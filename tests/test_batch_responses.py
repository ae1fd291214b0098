"""A batch file in, responses out: a whole run with `--export openai:FILE`, its lines field by field.

The model says `q🧬x` after `p`, a token a byte. What OpenAI documents of each field is written down here by hand.
"""

import itertools
import json

import pytest
import torch

import tiny_models
import tiny_tokenizers
from noria.__main__ import main
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from test_pieces import byte_tokenizer

pytestmark = pytest.mark.slow
SAID = "q🧬x"
END = 259


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    size = 264
    config = tiny_models.LLAMA | {"vocab_size": 260, "hidden_size": size, "eos_token_id": END, "num_hidden_layers": 1}
    state = {name: torch.zeros_like(tensor) for name, tensor in tiny_models.state(config).items()}
    state["model.norm.weight"].fill_(1)
    chain = [*byte_tokenizer().encode("p" + SAID, add_special_tokens=False).ids, END]
    for token, following in itertools.pairwise(chain):
        state["model.embed_tokens.weight"][token, token] = 1
        state["lm_head.weight"][following, token] = 1
    tiny_models.write_directory(folder / "hf", config, state)
    files = tiny_tokenizers.files_of(byte_tokenizer()) | {"chat_template.jinja": b"{{ messages[0].content }}"}
    for name, content in files.items():
        (folder / "hf" / name).write_bytes(content)
    convert(folder / "hf", folder / "model.h5")
    return folder


def request(id, url, **body):
    return {"custom_id": id, "method": "POST", "url": f"/v1/{url}", "body": {"model": "gpt-x", "temperature": 0} | body}


REQUESTS = [
    request("chat", "chat/completions", messages=[{"role": "user", "content": "p"}], logprobs=True, top_logprobs=1),
    request("plain", "chat/completions", messages=[{"role": "user", "content": "p"}], max_completion_tokens=2, n=2, temperature=1, top_k=1),
    request("text", "completions", prompt="p", logprobs=1),
    request("two", "completions", prompt=["p", "q"], stop="x"),
    request("wrong", "completions", prompt=[]),
]  # fmt: skip


@pytest.fixture(scope="module")
def lines(folder):
    (folder / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in REQUESTS))
    files = ["--model", folder / "model.h5", "--prompts", folder / "in.jsonl", "--output", folder / "run.h5"]
    export = ["--export", f"openai:{folder / 'out.jsonl'}", "--device", "cpu"]
    assert main(["run", *map(str, files), *export]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def without_numbers(value):
    """The same with `number` in the place of what a model computes, and of the time."""
    if isinstance(value, dict):
        return {
            name: "number" if name in ("logprob", "created") and isinstance(one, int | float) else without_numbers(one)
            for name, one in value.items()
        }
    return [without_numbers(one) for one in value] if isinstance(value, list) else value


def answer(row, id, kind, choices, usage, fingerprint):
    return {
        "id": f"batch_req_{row}",
        "custom_id": id,
        "response": {
            "status_code": 200,
            "request_id": f"req_{row}",
            "body": {
                "id": f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{row}",
                "object": kind,
                "created": "number",
                "model": "gpt-x",
                "choices": choices,
                "usage": dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), usage, strict=True))
                | {"prompt_tokens_details": {"cached_tokens": 0}},
                "system_fingerprint": fingerprint,
            },
        },
        "error": None,
    }


def test_every_line_has_every_field_that_is_documented_and_no_other(folder, lines):
    with_header = open_checkpoint(folder / "model.h5")
    fingerprint = f"fp_{with_header.header_hash[:10]}"
    with_header.close()
    names = ["q", "\\xf0", "\\x9f", "\\xa7", "\\xac", "x"]
    entries = [
        {"token": name, "logprob": "number", "bytes": [byte],
         "top_logprobs": [{"token": name, "logprob": "number", "bytes": [byte]}]}
        for name, byte in zip(names, SAID.encode(), strict=True)
    ]  # fmt: skip
    chat = {
        "index": 0,
        "message": {"role": "assistant", "content": SAID, "refusal": None},
        "logprobs": {"content": entries, "refusal": None},
        "finish_reason": "stop",
    }
    found = [without_numbers(line) for line in lines]
    assert found[0] == answer(0, "chat", "chat.completion", [chat], (1, 7, 8), fingerprint)
    plain = [
        {"index": index, "message": {"role": "assistant", "content": "q\ufffd", "refusal": None}, "logprobs": None,
         "finish_reason": "length"}
        for index in range(2)
    ]  # fmt: skip
    assert found[1] == answer(1, "plain", "chat.completion", plain, (1, 4, 5), fingerprint)
    logprobs = found[2]["response"]["body"]["choices"][0].pop("logprobs")
    text = {"text": SAID, "index": 0, "finish_reason": "stop"}
    assert found[2] == answer(2, "text", "text_completion", [text], (1, 7, 8), fingerprint)
    names = ["q", *(f"bytes:{name}" for name in names[1:5]), "x"]
    assert list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert logprobs["tokens"] == names and logprobs["text_offset"] == [0, 1, 1, 1, 1, 2]
    assert [list(one) for one in logprobs["top_logprobs"]] == [[name] for name in names]
    assert [one[name] for one, name in zip(logprobs["top_logprobs"], names, strict=True)] == logprobs["token_logprobs"]
    two = [
        {"text": said, "index": index, "logprobs": None, "finish_reason": "stop"} for index, said in enumerate(("q🧬", "🧬"))
    ]  # fmt: skip
    assert found[3] == answer(3, "two", "text_completion", two, (2, 11, 13), fingerprint)
    error = found[4].pop("error")
    assert found[4] == {"id": "batch_req_5", "custom_id": "wrong", "response": None}
    assert list(error) == ["code", "message"] and error["code"] == "invalid_request"


def test_bytes_joined_are_the_message_and_log_probabilities_those_of_the_rows(folder, lines):
    assert main(["export", str(folder / "run.h5"), str(folder / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    choice = lines[0]["response"]["body"]["choices"][0]
    content = choice["logprobs"]["content"]
    assert bytes(byte for one in content for byte in one["bytes"]).decode() == choice["message"]["content"]
    assert [one["logprob"] for one in content] == rows[0]["logprobs"][:-1], "but for the end token's"
    completion = lines[2]["response"]["body"]["choices"][0]
    assert completion["logprobs"]["token_logprobs"] == rows[3]["logprobs"][:-1]


def test_errors_can_be_exported_apart_with_the_same_lines(folder, lines):
    command = ["export", str(folder / "run.h5"), str(folder / "right.jsonl"), "--format", "openai", "--errors"]
    assert main([*command, str(folder / "wrong.jsonl")]) == 0
    right, wrong = ((folder / f"{name}.jsonl").read_text().splitlines() for name in ("right", "wrong"))
    assert [json.loads(line) for line in right] == lines[:4] and [json.loads(line) for line in wrong] == lines[4:]
