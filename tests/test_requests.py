"""Lines of OpenAI's batch format in all forms that its reference allows: what each is as a row, and as a response."""

import json

import numpy as np
import pytest

import test_tokenizer
import tiny_models
from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.output.export import ExportSettings, export
from noria.output.generations import open_generations
from noria.readers import BadRow, jsonl
from noria.rows.prompts import open_prompts

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTEXT = 270  # of the models: more than the 256 tokens that a row without a length gets
TALK = [{"role": "user", "content": "hi"}]


def line(id, body, **more):
    url = COMPLETIONS if "prompt" in body else CHAT
    return {"custom_id": id, "method": "POST", "url": url, "body": {"model": "m"} | body} | more


def chat(id="a", **body):
    return line(id, {"messages": TALK} | body)


def prompts_of(tmp_path, *requests):
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in requests))
    found = list(open_prompts(path))
    assert len(found) == jsonl.count(path)
    return found


def test_top_p_zero_is_the_most_likely_token(tmp_path):
    for value in (0, 0.0):
        (prompt,) = prompts_of(tmp_path, chat(top_p=value, temperature=1, top_k=7))
        assert (prompt.error, prompt.sampling) == (None, {"temperature": 1.0, "top_k": 1})
    (prompt,) = prompts_of(tmp_path, chat(top_p=-0.5))
    assert "top_p is -0.5" in prompt.error


def test_the_effort_of_a_request_is_a_key_of_its_template(tmp_path):
    (prompt,) = prompts_of(tmp_path, chat(reasoning_effort="high", chat_template_kwargs={"a": 1}))
    assert (prompt.error, prompt.sampling["chat_template_kwargs"]) == (None, {"a": 1, "reasoning_effort": "high"})
    (prompt,) = prompts_of(tmp_path, chat(reasoning_effort=None))
    assert (prompt.error, prompt.sampling) == (None, {})
    (prompt,) = prompts_of(tmp_path, chat(reasoning_effort=3))
    assert "body.reasoning_effort is 3: it must be a word" in prompt.error
    (prompt,) = prompts_of(tmp_path, chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"}))
    assert "are given, with other values" in prompt.error
    (prompt,) = prompts_of(tmp_path, line("a", {"prompt": "hi", "reasoning_effort": "low"}))
    assert "body.reasoning_effort is for /v1/chat/completions" in prompt.error


def test_every_seed_of_64_bits_is_a_seed_and_nearby_ones_are_different(tmp_path):
    seeds = [-1, -2, -1.0, -(2**63), 0, 2**63 - 1]
    found = [prompt.sampling["seed"] for prompt in prompts_of(tmp_path, *(chat(seed, seed=seed) for seed in seeds[:2]))]
    assert len(set(found)) == 2
    for seed in seeds:
        (prompt,) = prompts_of(tmp_path, chat(seed=seed))
        assert prompt.error is None and 0 <= prompt.sampling["seed"] < 2**63
    for seed in (2**63, -(2**63) - 1):
        assert "seed is" in prompts_of(tmp_path, chat(seed=seed))[0].error


@pytest.mark.parametrize(("key", "url"), [("prompt", COMPLETIONS), ("messages", CHAT)])
def test_a_request_without_anything_to_continue_is_told_what_it_lacks(key, url, tmp_path):
    for body in ({}, {key: None}):
        (prompt,) = prompts_of(tmp_path, {"custom_id": "a", "url": url, "body": body})
        assert (prompt.id, prompt.error) == ("a", f"line 1: body has no {key}, which {url} needs")


@pytest.mark.parametrize("url", ["/chat/completions", CHAT])
def test_azures_url_has_no_version(url, tmp_path):
    (prompt,) = prompts_of(tmp_path, chat() | {"url": url})
    assert (prompt.error, prompt.messages, json.loads(prompt.extra)["url"]) == (None, TALK, url)
    (prompt,) = prompts_of(tmp_path, line("a", {"prompt": "p"}, url="/completions"))
    assert (prompt.error, prompt.prompt) == (None, "p")


def test_a_url_that_is_not_given_goes_by_the_body(tmp_path):
    for url in ({"url": None}, {}):
        requests = [
            {"custom_id": "a", "body": {"messages": TALK}} | url,
            {"custom_id": "b", "body": {"prompt": "p"}} | url,
        ]
        first, second = prompts_of(tmp_path, *requests)
        assert (first.error, first.messages, second.error, second.prompt) == (None, TALK, None, "p")


def test_what_an_assistant_refused_to_say_is_text(tmp_path):
    part = {"type": "refusal", "refusal": "I cannot."}
    said = [{"role": "assistant", "content": [part]}, {"role": "assistant", "content": None, "refusal": "No."}]
    said += [{"role": "assistant", "content": "Yes.", "refusal": None}]
    (prompt,) = prompts_of(tmp_path, line("a", {"messages": TALK + said}))
    assert prompt.error is None
    contents = [
        one["content"] if isinstance(one["content"], str) else one["content"][0]["text"] for one in prompt.messages
    ]
    assert contents == ["hi", "I cannot.", "No.", "Yes."]
    assert all("refusal" not in one for one in prompt.messages)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (chat(top_logprobs=3), "body.top_logprobs is without logprobs: add logprobs: true"),
        (chat(top_logprobs=3, logprobs=False), "body.top_logprobs is without logprobs"),
        (line("a", {"prompt": "p", "top_logprobs": 3}), "body.top_logprobs is a key of /v1/chat/completions"),
        (line("a", {"prompt": "p", "messages": TALK}), "body.messages is a key of /v1/chat/completions"),
        (chat(prompt="p") | {"url": CHAT}, "body.prompt is a key of /v1/completions"),
        (line("a", {"prompt": []}), "body.prompt is empty"),
        (line("a", {"prompt": [[]]}), "body.prompt[0] is empty"),
        (line("a", {"prompt": ["a", 5]}), "body.prompt[1] is 5: it must be a text or a list of token ids"),
        (line("a", {"prompt": [5, "a"]}), "body.prompt[0] is 5: it must be a text or a list of token ids"),
        (line("a", {"prompt": [5, -1]}), "body.prompt[1] is -1: it must be a token id"),
        (line("a", {"prompt": [[5], [6, None]]}), "body.prompt[1][1] is null: it must be a token id"),
        (line("a", {"prompt": [True]}), "body.prompt[0] is true"),
        (line("a", {"prompt": {}}), "prompt is {}: it must be a string"),
        (chat() | {"method": "GET"}, 'method is "GET": it must be POST'),
        (chat(temperature=1) | {"temperature": 0}, "temperature is beside body too, with another value"),
        (chat() | {"url": "/v1/responses"}, 'url is "/v1/responses"'),
    ],
)
def test_a_form_that_is_none_is_named_by_the_words_of_the_request(request_, words, tmp_path):
    (prompt,) = prompts_of(tmp_path, request_)
    assert words in prompt.error and prompt.id == "a" and "token_ids" not in prompt.error


def test_wishes_for_nothing_are_none(tmp_path):
    quiet = {"top_logprobs": None, "logprobs": False, "stop": None, "n": None, "seed": None, "logit_bias": {}}
    for more in (quiet, quiet | {"top_logprobs": 0}, {"suffix": None, "best_of": 1, "logit_bias": {"5": None}}):
        (prompt,) = prompts_of(tmp_path, chat(**more))
        assert prompt.error is None and prompt.sampling in ({}, {"logit_bias": {}})


def test_several_prompts_of_a_request_are_rows_of_their_own(tmp_path):
    requests = [
        line("a", {"prompt": ["x", "y", ""]}),
        line("b", {"prompt": ["only"]}),
        line("c", {"prompt": [[5, 6.0]]}),
    ]
    requests += [
        line("d", {"prompt": [7, 8]}),
        line("e", {"prompt": [[1], [2, 3]], "n": 2}),
        line("a", {"prompt": "z"}),
    ]
    found = prompts_of(tmp_path, *requests)
    assert [one.id for one in found] == ["a", "a[1]", "a[2]", "b", "c", "d", "e", "e[1]", "a"]
    assert [one.token_ids or one.prompt for one in found] == ["x", "y", "", "only", [5, 6], [7, 8], [1], [2, 3], "z"]
    assert [one.error for one in found[:-1]] == [None] * 8 and "id 'a' is that of an earlier row" in found[-1].error
    assert [json.loads(one.extra).get("prompt_index") for one in found] == [0, 1, 2, None, None, None, 0, 1, None]
    assert {one.sampling.get("n") for one in found[6:8]} == {2}


def test_requests_with_letters_written_as_escapes_are_counted_as_they_are_read(tmp_path):
    text = json.dumps(line("a", {"prompt": ["x", "y"]}))
    for escaped in (text.replace('"prompt"', '"\\u0070rompt"'), text.replace("custom_id", "custom\\u005fid")):
        (tmp_path / "a.jsonl").write_text(escaped + "\n" + json.dumps({"prompt": "é"}))
        assert len(list(open_prompts(tmp_path / "a.jsonl"))) == jsonl.count(tmp_path / "a.jsonl") == 3


def test_columns_beside_the_body_never_take_the_place_of_the_requests_own(tmp_path):
    own = {"id": 5, "prompt": "mine", "model": "mine", "chat": "mine", "label": 1, "custom": None}
    (row,) = jsonl.parse(json.dumps(chat(model="m") | own).encode(), "line 1")
    assert (row["id"], row["model"], row["messages"]) == ("a", "m", TALK) and "chat" not in row
    assert {name: row.get(f"input_{name}", row.get(name)) for name in own} == own
    (prompt,) = prompts_of(tmp_path, chat(model="m") | own)
    assert prompt.error is None and prompt.id == "a"


# Runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, whose tokenizers put a token before each text, and not."""
    folder = tmp_path_factory.mktemp("requests")
    config = tiny_models.LLAMA | {"vocab_size": 400, "max_position_embeddings": CONTEXT}
    for name, backend in (("bos", test_tokenizer.byte_level_with_bos()), ("plain", test_tokenizer.byte_level())):
        tiny_models.write_directory(folder / name, config, tiny_models.state(config))
        files = test_tokenizer.files_of(backend) | {"chat_template.jinja": b"{{ messages[0].content }}"}
        for file, content in files.items():
            (folder / name / file).write_bytes(content)
        convert(folder / name, folder / f"{name}.h5")
    return folder


def run(folder, requests, *flags, model="bos.h5", again=False):
    """The rows of a run over these requests, and its responses."""
    path, output = folder / "batch.jsonl", folder / "out.h5"
    path.write_text("".join(json.dumps(one) + "\n" for one in requests))
    files = ["--model", folder / model, "--prompts", path, "--output", output, "--device", "cpu"]
    assert main(["run", *map(str, files), *flags]) in (0, 65)
    export(output, folder / "out.jsonl", settings=ExportSettings("openai"))
    with open_generations(output) as file:
        rows = list(file.rows())
    output.unlink()
    return rows, [json.loads(one) for one in (folder / "out.jsonl").read_text().split("\n")[:-1]]


def test_an_empty_prompt_begins_where_the_tokenizer_has_a_token_for_the_beginning(folder):
    requests = [line("a", {"prompt": "", "max_tokens": 2}), line("b", {"prompt": "the", "max_tokens": 2})]
    (empty, text), _ = run(folder, requests)
    assert (empty.status, text.status) == ("done", "done") and len(empty.prompt_token_ids) == 1
    assert empty.prompt_token_ids[0] == text.prompt_token_ids[0]
    (empty, text), responses = run(folder, requests, model="plain.h5")
    assert (empty.status, text.status) == ("error", "done")
    assert "the prompt has no tokens" in responses[0]["error"]["message"]


def test_a_request_without_a_length_gets_what_the_context_leaves_unless_the_run_says_a_length(folder):
    plain = {"id": "row", "token_ids": [5, 6]}
    requests = [line("a", {"prompt": [5, 6], "ignore_eos": True}), plain | {"ignore_eos": True}]
    (asked, row), _ = run(folder, requests)
    assert len(asked.token_ids) == CONTEXT - 2 and asked.finish_reason == "length"
    assert len(row.token_ids) == 256
    (asked, row), _ = run(folder, requests, "--max-new-tokens", "3")
    assert len(asked.token_ids) == len(row.token_ids) == 3
    (asked,), _ = run(folder, [line("a", {"prompt": [5, 6], "max_tokens": 4, "ignore_eos": True})])
    assert len(asked.token_ids) == 4


def test_prompts_of_a_request_are_choices_of_one_response(folder):
    more = {"max_tokens": 3, "temperature": 1, "n": 2, "seed": 7, "ignore_eos": True}
    requests = [line("a", {"prompt": ["the", [5, 6], ""]} | more), line("b", {"prompt": "the"} | more)]
    requests += [line("c", {"prompt": ["the", [399, 5000]]} | more), line("d", {"prompt": ["the"]} | more)]
    rows, responses = run(folder, requests)
    assert [one["custom_id"] for one in responses] == ["a", "b", "c", "d"]
    first, second, wrong, last = (one["response"] for one in responses)
    texts = [row.text for row in rows if row.id in ("a", "a[1]", "a[2]")]
    assert [(one["index"], one["text"]) for one in first["body"]["choices"]] == list(enumerate(texts))
    assert len(texts) == 6 and len(second["body"]["choices"]) == len(last["body"]["choices"]) == 2
    num_prompt_tokens = [len(row.prompt_token_ids) for row in rows[:6:2]]
    assert first["body"]["usage"] == {
        "prompt_tokens": sum(num_prompt_tokens), "completion_tokens": 18, "total_tokens": sum(num_prompt_tokens) + 18,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert first["body"]["choices"][0]["text"] == second["body"]["choices"][0]["text"]
    assert wrong is None and "5000" in responses[2]["error"]["message"]


def test_a_completion_of_azure_is_a_text_completion(folder):
    requests = [line("a", {"prompt": "the", "max_tokens": 1}, url="/completions"), chat("b", max_tokens=1)]
    _, responses = run(folder, [*requests, chat("c", max_tokens=1) | {"url": "/chat/completions"}])
    kinds = [one["response"]["body"]["object"] for one in responses]
    assert kinds == ["text_completion", "chat.completion", "chat.completion"]


def test_a_row_with_columns_called_as_those_of_a_request_is_a_response_of_its_own(folder):
    own = {"custom_id": "x", "prompt_index": 1, "token_ids": [5]}
    rows, responses = run(
        folder, [{"id": "a", **own}, {"id": "b", **own | {"prompt_index": 2}}], "--max-new-tokens", "1"
    )
    assert [one["custom_id"] for one in responses] == ["a", "b"] and np.array_equal(
        rows[0].token_ids, rows[1].token_ids
    )


def test_an_error_is_the_error_of_its_line_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join(json.dumps(one) for one in (chat("a"), chat("b", n="x"), line("c", {"prompt": ["p", 5]})))
    )
    first, second, third = jsonl.read(path)
    assert isinstance(first, dict) and isinstance(second, dict) and isinstance(third, BadRow)
    assert third.error.startswith("line 3: body.prompt[1]") and third.id == "c"
