"""The channels of gpt-oss: thinking, answer, commentary and calls, by expectations written by hand."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

import test_reasoning
from noria.desk.steering import settled
from noria.rows.chat import Asked, Chat
from noria.rows.harmony import MARKERS
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling
from test_reasoning import DEMO, END, ids_of

SPECIAL = ("<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|return|>")
ASK = "<|start|>user<|message|>1 + 1?<|end|><|start|>assistant"
THINK, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"
NOTE = "<|channel|>commentary<|message|>"
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'


def tokenizer_of():
    backend = Backend.from_file(str(DEMO / "tokenizer.json"))
    backend.add_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return Tokenizer({"tokenizer.json": backend.to_str().encode()}, {}, {"eos_token_id": END})


TOKENIZER = tokenizer_of()


@pytest.fixture(autouse=True)
def harmony(monkeypatch):
    monkeypatch.setitem(test_reasoning.TOKENIZERS, "harmony", TOKENIZER)


def run(prompt, said, **keys):
    return test_reasoning.run("harmony", prompt, said, markers=MARKERS, **keys)


CASES = {
    "thought and answered": (THINK + "I add." + NEXT + FINAL + "It is 2.^", "I add.", "It is 2.", "stop"),
    "answered at once": (FINAL + "2^", "", "2", "stop"),
    "two thoughts": (THINK + "One." + NEXT + THINK + "Two." + NEXT + FINAL + "2^", "One.\nTwo.", "2", "stop"),
    "commentary before": (THINK + "a" + NEXT + NOTE + "I look." + NEXT + FINAL + "2^", "a", "I look.\n2", "stop"),
    "a call": (THINK + "a" + NEXT + CALL + "<|call|>", "a", CALL, "stop"),
    "a call, named beside the role": (" to=functions.f<|channel|>commentary<|message|>{}<|call|>", "", " to=functions.f<|channel|>commentary<|message|>{}".lstrip(), "stop"),
    "a call in the thinking's channel": (THINK.replace("<|m", " to=python<|m") + "1+1<|call|>", "", THINK.replace("<|m", " to=python<|m") + "1+1", "stop"),
    "cut while it thinks": (THINK + "I add and", "I add and", "", "length"),
    "cut in a header": (THINK + "I add" + NEXT + "<|channel|>fin", "I add", "", "length"),
    "cut in the first header": ("<|channel|>analysis", "", "", "length"),
    "ended while it thinks": (THINK + "I add^", "I add", "", "stop"),
    "no channels": (" It is 2.^", "", " It is 2.", "stop"),
    "markers quoted in the answer": (FINAL + "see" + NEXT + THINK + "x^", "", "seeassistantanalysisx", "stop"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_thinking_is_the_analysis_and_text_the_rest(case):
    said, reasoning, text, reason = CASES[case]
    ids = ids_of(TOKENIZER, said)
    stops = [TOKENIZER.added_ids["<|call|>"]]
    (row,) = run(ASK, said, max_new_tokens=len(ids), stop_token_ids=stops)
    assert (row.reasoning, row.text, row.finish_reason) == (reasoning, text, reason), row.error
    assert row.token_ids.tolist() == ids
    expected = sum(len(ids_of(TOKENIZER, part)) for part in reasoning.split("\n") if part)
    assert row.reasoning_tokens == expected


def test_a_row_that_was_stopped_goes_on_wherever_it_was():
    said = THINK + "and I add" + NEXT + NOTE + "I look" + NEXT + FINAL + "two it is^"
    ids = ids_of(TOKENIZER, said)
    for cut in range(1, len(ids)):
        (row,) = run(ASK, said, begun=ids[:cut], stop="dd", thinking_token_budget=100)
        assert (row.reasoning, row.text, row.finish_reason) == ("and I add", "I look\ntwo it is", "stop"), cut


@pytest.mark.parametrize(("budget", "thought"), [(0, ""), (1, "and"), (2, "and I"), (100, "and I add and add")])
def test_a_budget_ends_the_analysis_and_begins_the_answer(budget, thought):
    words, closing = ids_of(TOKENIZER, "and I add and add"), ids_of(TOKENIZER, NEXT + FINAL)
    begun, used = ids_of(TOKENIZER, THINK), min(budget, len(ids_of(TOKENIZER, "and I add and add")))
    said = THINK + "and I add and add" + (NEXT + FINAL if budget == 100 else "")
    (row,) = run(ASK, said, thinking_token_budget=budget, max_new_tokens=len(begun) + len(words) + len(closing))
    assert row.token_ids.tolist() == begun + words[:used] + closing + words[used:]
    assert (row.reasoning, row.reasoning_tokens) == (thought, used)
    assert row.text == TOKENIZER.decode(words[used:]).lstrip()


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_budget_that_was_closing_goes_on_closing(cut):
    closing, begun = ids_of(TOKENIZER, NEXT + FINAL), ids_of(TOKENIZER, THINK + "and I")
    ids = [*begun, *closing, *ids_of(TOKENIZER, "two it is and more^")]
    (row,) = run(
        ASK, "x" * 50 + "^", begun=ids[:cut], thinking_token_budget=2, max_new_tokens=len(begun) + len(closing)
    )
    found = row.token_ids.tolist()
    assert found[:cut] == ids[:cut]
    if cut >= len(begun):
        assert found[len(begun) : len(begun) + len(closing)] == closing


def test_a_budget_that_ends_in_a_header_closes_the_message_behind_it():
    begun, closing = ids_of(TOKENIZER, THINK + "and" + NEXT + THINK), ids_of(TOKENIZER, NEXT + FINAL)
    budget = len(ids_of(TOKENIZER, "and")) + 2
    said = THINK + "and" + NEXT + THINK + "two it is^"
    (row,) = run(ASK, said, thinking_token_budget=budget)
    assert row.token_ids.tolist() == [*begun, *closing, *ids_of(TOKENIZER, "two it is^")]
    assert (row.reasoning, row.text) == ("and", "two it is")


def test_stop_texts_and_structure_begin_with_the_answer():
    said = THINK + "No. I stop." + NEXT + FINAL + "Yes. No. Never^"
    (row,) = run(ASK, said, stop=["No", "stop"])
    assert (row.reasoning, row.text, row.finish_reason) == ("No. I stop.", "Yes. ", "stop")
    said = THINK + "I ^say{}" + NEXT + FINAL + "maybe no^"
    (row,) = run(ASK, THINK + "I ^say{}" + NEXT + FINAL + "no^", structured_outputs={"choice": ["yes", "no"]})
    assert (row.reasoning, row.text, row.finish_reason) == ("I say{}", "no", "stop")
    (row,) = run(ASK, "no^", structured_outputs={"choice": ["yes", "no"]})
    assert (row.reasoning, row.text) == ("", "no")


def test_an_answer_that_goes_on_is_text_and_a_thought_that_goes_on_is_thought():
    (row,) = run(ASK + FINAL + "It is", " 2^", beside={"continue_final_message": True})
    assert (row.reasoning, row.text) == ("", " 2")
    (row,) = run(ASK + THINK + "I add", " one" + NEXT + FINAL + "2^", beside={"continue_final_message": True})
    assert (row.reasoning, row.text) == ("one", "2")


def test_special_tokens_are_in_texts_that_ask_for_them():
    said = THINK + "a<s>b" + NEXT + FINAL + "c<s>d^"
    (row,) = run(ASK, said, skip_special_tokens=False, include_stop_str_in_output=True)
    assert (row.reasoning, row.text) == ("a<s>b", "c<s>d</s>")


# What OpenAI's template does, in short: the system's text is the format's own, the user's is the developer's.
TEMPLATE = """
{%- set effort = reasoning_effort | default("medium") -%}
<|start|>system<|message|>Date: {{ strftime_now("%Y-%m-%d") }} Reasoning: {{ effort }}<|end|>
{%- if messages[0].role in ("system", "developer") -%}
{%- set told = messages[0].content %}{% set messages = messages[1:] -%}
<|start|>developer<|message|># Instructions {{ told }}<|end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{%- if message.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- else -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}
"""


def test_a_template_of_this_format_gets_developers_effort_and_thoughts():
    chat = Chat({"chat_template.jinja": TEMPLATE.encode()}, {}, datetime(2026, 11, 29, tzinfo=UTC))
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning": "I add."},
        {"role": "user", "content": "2 + 2?"},
    ]
    assert chat.render(messages, Asked(kwargs={"reasoning_effort": "high"})) == (
        "<|start|>system<|message|>Date: 2026-11-29 Reasoning: high<|end|>"
        "<|start|>developer<|message|># Instructions Be short.<|end|>"
        "<|start|>user<|message|>1 + 1?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>I add.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>2<|end|>"
        "<|start|>user<|message|>2 + 2?<|end|><|start|>assistant"
    )


def test_a_model_of_this_format_has_its_markers_by_default():
    model = SimpleNamespace(tokenizer={"chat_template.jinja": TEMPLATE.encode()})
    assert settled(Sampling(), model, TOKENIZER, {}).reasoning_markers == MARKERS
    plain = Tokenizer({"tokenizer.json": (DEMO / "tokenizer.json").read_bytes()}, {}, {})
    assert settled(Sampling(), model, plain, {}).reasoning_markers is None
