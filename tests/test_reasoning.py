"""Thinking apart from the answer, by expectations written by hand, for markers of every kind of tokenizer."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import sampling_worker
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from worker import generate

import world
from noria.checkpoint.convert import convert
from noria.desk.records import generation
from noria.errors import InputError
from noria.launch.mpi import Solo
from noria.masks import ANY
from noria.output.generations import open_generations
from noria.output.parts import Parts
from noria.rows import admission
from noria.rows.admission import Admission
from noria.rows.making import Source
from noria.rows.prompts import Prompt
from noria.rows.reasoning import markers_of
from noria.rows.slots import Capacity
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling
from noria.step import Result, Word

DEMO = Path(__file__).parent.parent / "inputs" / "demo" / "model"
END = 1
CAPACITY = Capacity(1, 200, 64, 64, 1, 300, 2060)


def tokenizer_of(kind):
    """The demo's tokenizer, with the markers as `tokens`, as `special` tokens, or as `text` alone."""
    backend = Backend.from_file(str(DEMO / "tokenizer.json"))
    if kind != "text":
        backend.add_tokens([AddedToken(text, special=kind == "special") for text in ("<think>", "</think>")])
    return Tokenizer({"tokenizer.json": backend.to_str().encode()}, {}, {"eos_token_id": END})


def channels():
    """The demo's tokenizer with the tokens around Gemma 4's thinking, whose first is followed by a word."""
    backend = Backend.from_file(str(DEMO / "tokenizer.json"))
    backend.add_tokens([AddedToken(text, special=True) for text in ("<|channel>", "<channel|>")])
    return Tokenizer({"tokenizer.json": backend.to_str().encode()}, {}, {"eos_token_id": END})


TOKENIZERS = {kind: tokenizer_of(kind) for kind in ("tokens", "special", "text")} | {"channels": channels()}


def ids_of(tokenizer, text):
    """The text's tokens; ^ stands for the end token."""
    parts = [tokenizer.encode(part, add_special_tokens=False) if part else [] for part in text.split("^")]
    return [token_id for part in parts for token_id in [END, *part]][1:]


def run(kind, prompt, said, begun=(), samples=None, **keys):
    """What is written of a row whose model would say `said` (of several samples: a text each); `begun`: of an earlier job.

    What masks force is what comes, and a token that they exclude is passed over.
    """
    tokenizer, finished = TOKENIZERS[kind], []
    said = [said] if isinstance(said, str) else said
    beside = keys.pop("beside", {})
    sampling = Sampling(reasoning_markers=keys.pop("markers", ["<think>", "</think>"]), max_new_tokens=200)
    row = Prompt(0, "0", prompt, None, {"n": len(said)} | keys, "", None, beside=beside)

    def begin(sequence):
        sequence.token_ids = list(begun)

    encode = lambda one: tokenizer.encode(one.prompt, add_special_tokens=False)  # noqa: E731
    source = Source([row], 1, encode, finished.append, tokenizer, begin)
    admission, under_way = Admission(source, sampling, frozenset({END}), CAPACITY), None
    scripts = [ids_of(tokenizer, text)[len(begun) :] for text in said]
    slots = {}
    for round in range(1000):
        if under_way is not None:
            admission.apply(*under_way)
        step = admission.compose(round, 0)
        if step.word is Word.STOP:
            return [generation(one, tokenizer) for one in sorted(finished, key=lambda one: one.sample)]
        masks = admission.masks(0).result() if step.masked else None
        for admitted in step.admitted:
            slots[admitted.slot] = len(slots)
        tokens = [
            next_token(scripts[slots[slot]], place, masks) for place, slot in enumerate(step.sample_slots.tolist())
        ]
        under_way = (step, Result(np.array(tokens, np.int64))) if step.num_tokens else None
    raise AssertionError("the run does not end")


def next_token(script, place, masks):
    found = np.flatnonzero(masks.samples == place) if masks is not None else ()
    if len(found) and masks.forced[found[0]] != ANY:
        return int(masks.forced[found[0]])
    if len(found):
        bits = masks.bits[int((masks.forced[: found[0]] == ANY).sum())]
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        while script and script[0] not in allowed:
            script.pop(0)
        return script.pop(0) if script else int(allowed[0])
    return script.pop(0)


EVERY = ("tokens", "special", "text")
CASES = {
    "the prompt has opened it": (EVERY, "1 + 1?\n<think>\n", "I add 1 and 1.\n</think>\n\n2^", "I add 1 and 1.", "2", "stop"),
    "the model opens it": (EVERY, "1 + 1?", "<think>\nI add.\n</think>\n\n2 it is^", "I add.", "2 it is", "stop"),
    "after a blank": (EVERY, "1 + 1?", "\n<think>I add.</think>2^", "I add.", "2", "stop"),
    "not closed": (EVERY, "1 + 1?", "<think>I add 1 and", "I add 1 and", "", "length"),
    "not closed, opened by the prompt": (EVERY, "1?<think>", " I add 1 and", "I add 1 and", "", "length"),
    "ended inside": (EVERY, "1?<think>", "I add 1 and^", "I add 1 and", "", "stop"),
    "none": (EVERY, "1 + 1?", " It is 2.^", "", " It is 2.", "stop"),
    "quoted in the answer": (("tokens", "text"), "?", "Use <think>x</think> so^", "", "Use <think>x</think> so", "stop"),
    "an end alone is quoted": (("tokens", "text"), "?", "Use </think> so^", "", "Use </think> so", "stop"),
    "quoted after thinking": (("tokens", "text"), "?<think>", "a</think>b <think>c</think>^", "a", "b <think>c</think>", "stop"),
    "the prompt has closed it": (("tokens", "text"), "?<think>\n\n</think>\n\n", "<think>x</think>y^", "", "<think>x</think>y", "stop"),
    "quoted in the prompt": (EVERY, "What is <think> for?", "It is^", "", "It is", "stop"),
    "nothing thought": (EVERY, "?<think>", "</think>2^", "", "2", "stop"),
    "nothing answered": (EVERY, "?<think>", "a</think>^", "a", "", "stop"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for case, (kinds, *_) in CASES.items() for kind in kinds])
def test_thinking_is_kept_apart_from_the_text(kind, case):
    _, prompt, said, reasoning, text, reason = CASES[case]
    length = len(ids_of(TOKENIZERS[kind], said))
    (row,) = run(kind, prompt, said, max_new_tokens=length)
    assert (row.reasoning, row.text, row.finish_reason) == (reasoning, text, reason), row.error
    assert row.token_ids.tolist() == ids_of(TOKENIZERS[kind], said)


CHANNEL = ["<|channel>thought", "<channel|>"]
IN_CHANNELS = {
    "thought": ("?", "<|channel>thought\nI add.\n<channel|>2 it is^", "I add.", "2 it is", "stop"),
    "closed by the prompt": ("?<|channel>thought\n<channel|>", "2 it is^", "", "2 it is", "stop"),
    "opened by the prompt": ("?<|channel>thought\n", "I add.<channel|>2^", "I add.", "2", "stop"),
    "nothing thought": ("?", "<|channel>thought\n<channel|>2^", "", "2", "stop"),
    "not closed": ("?", "<|channel>thought\nI add", "I add", "", "length"),
    "none": ("?", " It is 2^", "", " It is 2", "stop"),
}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("case", IN_CHANNELS)
def test_a_marker_may_be_a_token_and_a_word(case, skip):
    prompt, said, reasoning, text, reason = IN_CHANNELS[case]
    length = len(ids_of(TOKENIZERS["channels"], said))
    (row,) = run("channels", prompt, said, markers=CHANNEL, skip_special_tokens=skip, max_new_tokens=length)
    assert (row.reasoning, row.text.removesuffix("</s>"), row.finish_reason) == (reasoning, text, reason), row.error


def test_the_markers_of_gemma_4_and_hy3_are_found_by_their_templates_and_tokens():
    template = "{{ '<|turn>model\n' }}{% if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{% endif %}"
    assert markers_of([template], {}) == CHANNEL
    assert markers_of(["<|start|>assistant<|channel|>final<|message|>"], {}) == []
    tokens = ["<think:opensource>", "</think:opensource>"]
    assert markers_of(["{{ '<think{}>'.format(own) }}"], dict.fromkeys(tokens, 7)) == tokens


@pytest.mark.parametrize("kind", ["tokens", "text"])
def test_where_markers_are_tokens_a_row_that_thinks_is_looked_at_when_they_come(kind, monkeypatch):
    looked, take = [], admission.take_sample
    monkeypatch.setattr(admission, "take_sample", lambda one, *more: looked.append(one) or take(one, *more))
    (row,) = run(kind, "1?<think>", "I add 1 and 1" * 12 + "</think>2 it is, I think^")
    assert row.reasoning == "I add 1 and 1" * 12 and row.text == "2 it is, I think"
    assert len(looked) == 2 if kind == "tokens" else len(looked) > 20


@pytest.mark.parametrize("kind", EVERY)
def test_each_sample_thinks_for_itself(kind):
    rows = run(kind, "?", ["<think>a</think>b^", "c^", "<think>d and^"])
    assert [(row.reasoning, row.text) for row in rows] == [("a", "b"), ("", "c"), ("d and", "")]


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("prompt", ["?", "?<think>"])
def test_a_row_that_was_stopped_goes_on_wherever_it_was(kind, prompt):
    said = "and I add</think>two it is^"
    said = said if prompt.endswith(">") else "<think>" + said
    ids = ids_of(TOKENIZERS[kind], said)
    for cut in range(1, len(ids)):
        (row,) = run(kind, prompt, said, begun=ids[:cut], stop="dd", thinking_token_budget=100)
        assert (row.reasoning, row.text, row.finish_reason) == ("and I add", "two it is", "stop"), cut
        assert row.token_ids.tolist() == ids


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(("budget", "reasoning"), [(0, ""), (1, "and"), (2, "and I"), (100, "and I add and add")])
def test_a_budget_closes_the_thinking_with_the_models_own_marker(kind, budget, reasoning):
    tokenizer, marker = TOKENIZERS[kind], ids_of(TOKENIZERS[kind], "</think>")
    said = "and I add and add"
    words = ids_of(tokenizer, said)
    limit = len(words) + len(marker)
    script = said + "</think>" * (budget > len(words))
    (row,) = run(kind, "?<think>", script, thinking_token_budget=budget, max_new_tokens=limit)
    used = min(budget, len(words))
    assert row.token_ids.tolist() == words[:used] + marker + words[used:]
    assert row.reasoning == reasoning and row.reasoning_tokens == (used if kind != "text" else used + len(marker))
    assert row.text == tokenizer.decode(words[used:]).lstrip() and row.finish_reason == "length"


def test_a_budget_counts_from_the_models_own_beginning_and_forces_nothing_in_an_answer():
    (row,) = run("tokens", "?", "<think>and I add</think>two and two and two^", thinking_token_budget=2)
    assert (row.reasoning, row.text) == ("and I", "add</think>two and two and two")  # what the script still had to say
    (row,) = run("tokens", "?", "and I add two^", thinking_token_budget=1)
    assert (row.reasoning, row.text) == ("", "and I add two")


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("budget", [0, 1, 2])
def test_a_budget_that_the_models_own_marker_uses_up_closes_the_thinking_at_once(kind, budget):
    start, end = (ids_of(TOKENIZERS[kind], text) for text in ("<think>", "</think>"))
    said = ids_of(TOKENIZERS[kind], "and I add and add")
    limit = len(start) + len(said) + len(end)
    (row,) = run(kind, "?", "<think>and I add and add", thinking_token_budget=budget, max_new_tokens=limit)
    used = budget if len(start) == 1 else max(0, budget - len(start))
    assert row.token_ids.tolist() == start + said[:used] + end + said[used:]


def test_a_budget_without_markers_is_the_rows_error():
    (row,) = run("tokens", "?", "a^", thinking_token_budget=3, markers=[])
    assert "thinking_token_budget: the model has no markers of its thinking" in row.error and row.reasoning is None


def test_a_prompt_whose_end_the_tokenizer_cannot_write_is_its_rows_error(monkeypatch):
    def decode(ids, skip_special_tokens=True):
        raise InputError("the tokenizer cannot write these tokens")

    monkeypatch.setattr(TOKENIZERS["tokens"], "decode", decode)
    (row,) = run("tokens", "?", "a^")
    assert (row.status, row.error) == ("error", "the tokenizer cannot write these tokens")


@pytest.mark.parametrize("kind", EVERY)
def test_stop_texts_begin_after_the_thinking(kind):
    (row,) = run(kind, "?<think>", "I stop. No.</think>Yes. No. Never^", stop=["No", "stop"])
    assert (row.reasoning, row.text, row.finish_reason) == ("I stop. No.", "Yes. ", "stop")
    (row,) = run(kind, "?", "Yes. No. Never^", stop=["No", "stop"])
    assert (row.reasoning, row.text, row.finish_reason) == ("", "Yes. ", "stop")


@pytest.mark.parametrize("kind", EVERY)
def test_structured_output_begins_after_the_thinking_which_no_end_token_ends(kind):
    keys = {"structured_outputs": {"choice": ["yes", "no"]}}
    (row,) = run(kind, "?<think>", "I say{}" + "</think>no^", **keys)
    assert (row.reasoning, row.text, row.finish_reason) == ("I say{}", "no", "stop")
    tokenizer = TOKENIZERS[kind]
    opened = ids_of(tokenizer, "I ")
    (row,) = run(kind, "?<think>", "I say</think>yes^", begun=opened, **keys)
    assert (row.text, row.finish_reason) == ("yes", "stop")


def test_a_constrained_row_may_think_first_or_answer_at_once():
    keys = {"structured_outputs": {"choice": ["yes", "no"]}}
    (row,) = run("special", "?", "<think>I ^say</think>no^", **keys)  # the end token inside is passed over
    assert (row.reasoning, row.text, row.finish_reason) == ("I say", "no", "stop")
    (row,) = run("tokens", "?<think>", "I ^say</think>^no^", **keys)
    assert (row.reasoning, row.text, row.finish_reason) == ("I say", "no", "stop")
    (row,) = run("special", "?", "no^", **keys)
    assert (row.reasoning, row.text, row.finish_reason) == ("", "no", "stop")


def test_special_tokens_of_the_thinking_are_left_out_unless_they_are_asked_for():
    said = "a<s>b</think>c<s>d^"
    (row,) = run("special", "?<think>", said)
    assert (row.reasoning, row.text) == ("ab", "cd")
    (row,) = run("special", "?<think>", said, skip_special_tokens=False, include_stop_str_in_output=True)
    assert (row.reasoning, row.text) == ("a<s>b", "c<s>d</s>")


@pytest.mark.parametrize("kind", EVERY)
def test_a_final_message_that_goes_on_may_be_inside_its_thinking(kind):
    going_on = {"continue_final_message": True}
    (row,) = run(kind, "user: ? assistant: <think>I add", " one</think>2^", beside=going_on)
    assert (row.reasoning, row.text) == ("one", "2")
    (row,) = run(kind, "user: ? assistant: <think>I</think> so", " it is^", beside=going_on)
    assert (row.reasoning, row.text) == ("", " it is")


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
TEMPLATE += "{{ '' if true else m.content.split('</think>')[-1] }}"


def test_markers_are_those_that_a_models_template_or_tokenizer_has():
    assert markers_of([TEMPLATE], {}) == ["<think>", "</think>"]
    assert markers_of(["{{ x }}"], {"[THINK]": 5, "[/THINK]": 6}) == ["[THINK]", "[/THINK]"]
    assert markers_of(["{{ x }}"], {"<think>": 5}) == [] and markers_of([], {}) == []


def test_wrong_markers_are_refused():
    for wrong in ("<think>", "a,a", ["a", " b"], ["a", ""], "a,b,c"):
        with pytest.raises(
            InputError, match="reasoning_markers is .*: it must be two different texts without blanks around"
        ):
            Sampling(reasoning_markers=wrong)
    assert Sampling(reasoning_markers="none").markers == [] and Sampling(reasoning_markers="<a>,</a>").markers == [
        "<a>",
        "</a>",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reasoning")
    (folder / "hf").mkdir()
    for file in DEMO.iterdir():
        (folder / "hf" / file.name).write_bytes(file.read_bytes())
    (folder / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    convert(folder / "hf", folder / "model.h5")
    rows = [
        {"messages": [{"role": "user", "content": "The LORD is my"}], "thinking_token_budget": 4},
        {"messages": [{"role": "user", "content": "In the"}], "structured_outputs": {"choice": ["yes", "no"]}, "thinking_token_budget": 2, "n": 2},
        {"prompt": "In the beginning"},
    ]  # fmt: skip
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(
        'dtype = "float64"\ndevice = "cpu"\n[sampling]\nmax_new_tokens = 16\ntemperature = 1\n'
    )
    return folder


@pytest.mark.slow
def test_a_run_of_a_thinking_model_has_a_column_of_its_own_by_the_template(folder):
    assert generate(folder, "run", {"groups": 1}, Solo()) == 0
    marker = TOKENIZERS["text"].encode("</think>", add_special_tokens=False)
    with open_generations(folder / "run.h5") as file:
        rows = list(file.rows())
    for row, budget in zip(rows, (4, 2, 2, None), strict=True):
        ids = row.token_ids.tolist()
        if budget is None:
            assert (row.reasoning, row.reasoning_tokens) == ("", 0) and len(row.text) > 10
            continue
        assert ids[budget : budget + len(marker)] == marker
        assert row.reasoning == TOKENIZERS["text"].decode(ids[:budget]).strip()
        if row.row:
            assert row.text in ("yes", "no") and row.finish_reason == "stop"
    with h5py.File(folder / "run.h5") as file:
        assert file["reasoning"].asstr()[0] == rows[0].reasoning and file["reasoning_tokens"].dtype == "int32"


@pytest.mark.slow
@pytest.mark.world
def test_rings_think_and_answer_as_one_rank_does(folder):
    assert generate(folder, "alone", {"groups": 1}, Solo()) == 0
    world.call(3, sampling_worker.work, folder, timeout=240)
    said = lambda row: (row.token_ids.tolist(), row.reasoning, row.reasoning_tokens, row.text, row.finish_reason)  # noqa: E731
    with open_generations(folder / "alone.h5") as file:
        expected = [said(row) for row in file.rows()]
    for name in sampling_worker.CASES:
        with open_generations(folder / f"{name}.h5") as file:
            assert [said(row) for row in file.rows()] == expected, name


@pytest.mark.slow
def test_none_keeps_the_thinking_in_the_text_and_is_another_run(folder):
    assert generate(folder, "none", {"groups": 1, "reasoning_markers": "none"}, Solo(), prompts="prompts.jsonl") == 0
    with open_generations(folder / "none.h5") as file:
        rows = list(file.rows())
    assert all(row.reasoning is None for row in rows) and rows[0].status == "error" and rows[-1].text
    with pytest.raises(InputError, match="another run: sampling.reasoning_markers: null there"):
        generate(folder, "none", {"groups": 1}, Solo())


@pytest.mark.slow
def test_an_output_that_was_begun_before_there_were_markers_goes_on_without(folder):
    (folder / "plain.jsonl").write_text('{"prompt": "In the beginning <think>"}\n{"prompt": "The LORD <think>"}\n')
    assert generate(folder, "new", {"groups": 1}, Solo(), prompts="plain.jsonl") == 0
    with open_generations(folder / "new.h5") as file:
        rows, header = list(file.rows()), json.loads(file.attrs["header"])
    assert all(row.reasoning and not row.text for row in rows)
    old = {name: value for name, value in header.items() if name != "sampling.reasoning_markers"}
    parts = Parts(folder / "old.h5", old)
    rows[0].reasoning, rows[0].text = None, "as it was"
    parts.add(rows[0])
    parts.seal()
    assert generate(folder, "old", {"groups": 1}, Solo(), prompts="plain.jsonl") == 0
    with open_generations(folder / "old.h5") as file:
        found = list(file.rows())
    assert [row.reasoning for row in found] == [None, None]
    assert found[0].text == "as it was" and found[1].text.strip() == rows[1].reasoning
