"""What stands beside the messages of a row, of a batch line or in the run, up to the token ids of the prompt."""

import json
import os
import re
import sys
from datetime import datetime
from types import SimpleNamespace

import pytest

import test_tokenizer
from mpirun import describe, mpirun
from noria import __main__ as program
from noria import config as configuration
from noria.commands import run as run_command
from noria.errors import InputError
from noria.output.generations import open_generations
from noria.rows.chat import Chat, Encoder
from noria.rows.prompts import open_prompts
from noria.rows.template import template_helper
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling
from test_hostile_prompts import model_of

SOURCE = (
    "{{ style }}{{ enable_thinking }}{{ tools | tojson if tools else '' }}{{ documents | length if documents else '' }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ '<assistant>' if add_generation_prompt else '' }}"
)
PARTS_ALONE = "{% for m in messages %}{% for c in m.content %}{{ c.text }};{% endfor %}{% endfor %}"
TALK = [{"role": "user", "content": "the cat"}]
KWARGS = {"enable_thinking": False}


@pytest.fixture(scope="module")
def files():
    return test_tokenizer.files_of(test_tokenizer.byte_level())


@pytest.fixture(scope="module")
def helper():
    with template_helper() as helper:
        yield helper


def encoder(files, helper, source=SOURCE, warn=pytest.fail, **sampling):
    files = files if source is None else files | {"chat_template.jinja": source.encode()}
    tokenizer = Tokenizer(files, {}, {})
    chat = Chat(files, tokenizer.special_tokens, datetime(2024, 1, 1), helper)
    return Encoder(tokenizer, chat, Sampling(**sampling), 10_000, warn)


def said(tmp_path, encode, *rows):
    """The texts that rows of a file feed the model."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = []
    for prompt in open_prompts(path):
        assert prompt.error is None, prompt.error
        texts.append(encode._tokenizer.decode(encode(prompt)))
    return texts if len(texts) > 1 else texts[0]


def batch_line(**body):
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": TALK} | body}


def test_keys_of_a_row_and_of_a_batch_line_reach_the_template(files, helper, tmp_path):
    beside = {"tools": [{"a": 1}], "documents": [{"title": "t"}, {"title": "u"}], "chat_template_kwargs": KWARGS}
    row, line = said(tmp_path, encoder(files, helper), {"messages": TALK} | beside, batch_line(**beside))
    assert row == line == 'False[{"a": 1}]2<user>the cat</><assistant>'


def test_a_final_message_goes_on_in_a_row_and_in_a_batch_line(files, helper, tmp_path):
    messages = [*TALK, {"role": "assistant", "content": "sat on "}]
    continued = {"messages": messages, "continue_final_message": True}
    row, line, opened = said(
        tmp_path,
        encoder(files, helper),
        continued,
        batch_line(**continued, add_generation_prompt=False),
        {"messages": messages, "continue_final_message": False},
    )
    assert row == line == "<user>the cat</><assistant>sat on "
    assert opened == "<user>the cat</><assistant>sat on </><assistant>"


def test_the_runs_kwargs_are_for_all_rows_and_a_rows_own_go_over_them_key_by_key(files, helper, tmp_path):
    encode = encoder(files, helper, chat=True, chat_template_kwargs={"style": "calm ", "enable_thinking": True})
    texts = said(
        tmp_path,
        encode,
        {"prompt": "the cat"},
        {"messages": TALK, "chat_template_kwargs": {"style": "loud "}},
        batch_line(chat_template_kwargs=KWARGS),
        {"prompt": "the cat", "chat_template_kwargs": None},
    )
    rest = "<user>the cat</><assistant>"
    assert texts == ["calm True" + rest, "loud True" + rest, "calm False" + rest, "calm True" + rest]


def test_kwargs_that_no_template_could_read_are_refused(files, helper, tmp_path):
    with pytest.raises(InputError, match="^sampling.chat_template_kwargs: the model has no chat template"):
        encoder(files, helper, None, chat_template_kwargs=KWARGS)
    with pytest.raises(InputError, match="^chat_template_kwargs needs chat: the run is without --chat"):
        said(tmp_path, encoder(files, helper), {"prompt": "the cat", "chat_template_kwargs": KWARGS})


def test_what_the_template_does_not_read_is_said_once(files, helper, tmp_path):
    told = []
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    encode = encoder(files, helper, source, told.append, chat_template_kwargs={"enable_thinkin": True})
    row = {"messages": TALK, "tools": [{"a": 1}], "documents": [{"a": 1}], "chat_template_kwargs": {"style": 1}}
    assert said(tmp_path, encode, row, row) == ["the cat"] * 2
    names = [re.search("does not read '(.*)': it changes nothing", line)[1] for line in told]
    assert names == ["enable_thinkin", "tools", "documents", "style"]


def test_a_template_that_reads_parts_alone_gets_norias_own_messages_as_parts_and_says_that_it_loses_texts(
    files, helper, tmp_path
):
    told = []
    encode = encoder(files, helper, PARTS_ALONE, told.append, chat=True, system="be kind")
    parts = {"role": "user", "content": [{"type": "text", "text": "the cat"}, {"type": "text", "text": "sat"}]}
    assert said(tmp_path, encode, {"prompt": "the cat"}, {"messages": [parts]}) == [
        "be kind;the cat;",
        "be kind;the cat;sat;",
    ]
    assert told == []
    said(tmp_path, encode, {"messages": TALK}, {"messages": TALK})
    assert len(told) == 1 and "reads only content parts" in told[0]


def test_the_flag_takes_a_json_object_and_the_run_file_a_table(tmp_path):
    parser = program.Parser()
    run_command.add_arguments(parser)
    for text in ("enable_thinking=false", "[1]", "{", "{'a': 1}"):
        with pytest.raises(InputError, match="--chat-template-kwargs.*must be a JSON object, such as"):
            parser.parse_args(["--chat-template-kwargs", text])
    given = {"enable_thinking": False, "deep": [{"a": 1.5, "b": ["é"]}, []], "text": 'a "b"\n'}
    flags = vars(parser.parse_args(["--chat-template-kwargs", json.dumps(given)]))
    base = {"model": "m", "prompts": "p", "output": "o"}
    config = configuration.load(None, base | {"chat_template_kwargs": flags["chat_template_kwargs"]})
    assert config.sampling.chat_template_kwargs == given
    (tmp_path / "run.toml").write_text(config.to_toml())
    assert configuration.load(tmp_path / "run.toml") == config
    with pytest.raises(InputError, match="has null, which no run file can hold"):
        configuration.load(None, base | {"chat_template_kwargs": {"a": [{"b": None}]}})
    with pytest.raises(InputError, match="chat_template_kwargs has 'tools', which no template gets by this key"):
        configuration.load(None, base | {"chat_template_kwargs": {"tools": []}})


@pytest.mark.parametrize(
    ("environment", "starts"),
    [
        ({"OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"OMPI_COMM_WORLD_RANK": "1", "SLURM_PROCID": "0"}, False),
        ({"PMI_RANK": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({}, False),
    ],
)
def test_rank_0_by_its_launcher_starts_the_helper_before_anything_else_and_no_other_rank_does(
    environment, starts, monkeypatch
):
    for name in [name for name in os.environ if name.startswith(("OMPI_", "PMI", "PALS_", "SLURM_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = SimpleNamespace(pid=None)

    def start(name, argv, signals, helper):
        found.pid = helper.pid
        return 7

    monkeypatch.setattr(program, "_start", start)
    assert program.main(["run"]) == 7
    assert (found.pid is not None) == starts


def test_other_commands_start_no_helper(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr("noria.tools.helper.Helper.start", lambda self: pytest.fail("started"))
    monkeypatch.setattr(program, "_start", lambda name, argv: 7)
    assert program.main(["validate"]) == 7


BAD = "{% for m in messages %}{{ m.content * (30000000 if m.content == 'bad' else 1) }}{% endfor %}"


@pytest.mark.mpi
@pytest.mark.slow
def test_ranks_of_a_launcher_render_conversations_and_lose_one_row_where_the_helper_ends(tmp_path):
    model_of(tmp_path, test_tokenizer.files_of(test_tokenizer.byte_level()) | {"chat_template.jinja": BAD.encode()})
    texts = ["the cat", "bad", "the dog", "the log"]
    rows = [{"messages": [{"role": "user", "content": text}], "max_new_tokens": 2} for text in texts]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "noria", "run", "--model", "model.h5", "--prompts", "p.jsonl", "--device", "cpu"]
    done = mpirun(2, [*command, "--output", "o.h5"], cwd=tmp_path, fresh=True)
    assert done.returncode == 0, describe(done)
    with open_generations(tmp_path / "o.h5") as file:
        found = list(file.rows())
    assert [row.status for row in found] == ["done", "error", "done", "done"]
    assert "the chat template was stopped: its answer has more than" in found[1].error
    say = Tokenizer(test_tokenizer.files_of(test_tokenizer.byte_level()), {}, {}).encode
    assert [row.prompt_token_ids.tolist() for row in found if row.status == "done"] == [
        say(text, False) for text in texts if text != "bad"
    ]
    assert done.orphans == [] and "Traceback" not in done.stderr
