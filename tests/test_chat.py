"""Chats against transformers' apply_chat_template, in templates of published formats; and templates that mean harm."""

import json
import os
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import test_tokenizer
import tiny_models
from noria.__main__ import main
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.desk import earlier
from noria.errors import InputError
from noria.output.generations import open_generations
from noria.rows import template
from noria.rows.chat import Asked, Chat, Encoder, tells_date
from noria.rows.prompts import Prompt
from noria.rows.template import Template, TemplateError, template_helper
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling
from noria.tools.helper_process import Limits

DATE = datetime(2024, 7, 26, 23, 59)
HELPER = template_helper()  # started by the first test that renders
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate"
    " user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("conversation roles must alternate user and assistant roles") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial system message!") }}
    {%- endif %}
{%- endfor %}
"""
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# What the formats above do not use: Qwen3's reversed loop and namespace, tojson, loop controls, generation marks.
EXTRAS = """{%- set ns = namespace(last=-1) %}{% for message in messages[::-1] %}
{% set index = (messages|length - 1) - loop.index0 %}
{% if message.role == "user" and message.content is string and not message.content.startswith('<tool') %}
{% set ns.last = index %}{% break %}{% endif %}{% endfor %}{{ ns.last ~ ':' ~ 1.5 }}
{% for message in messages %}{% if loop.first %}{% continue %}{% endif %}{% generation %}
{{ message|tojson }}{{ {'b': [1, 'é<>&'], 'a': none}|tojson(indent=2, sort_keys=true) }}{% endgeneration %}
{{ '%s-%d' % (message.role, loop.index) }}{{ message.content.split('t')[-1].lstrip('\\n')|upper|replace('E', '3') }}
{% endfor %}{% macro show(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ show(messages|map(attribute='role')|join(',')) }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ documents is none }}{{ (1, 'a') }}{{ [1.0, true] }}
{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}{% set a %}x{{ 1 + 1 }}{% endset %}{{ a * 2 }}"""
FORMATS = {
    "chatml": CHATML,
    "llama 2": LLAMA2,
    "llama 3": LLAMA3,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "extras": EXTRAS,
}
SYSTEM = {"role": "system", "content": "Answer the cat. "}
TALK = [
    {"role": "user", "content": " the cat sat\non the mat? "},
    {"role": "assistant", "content": "\nthe dog: Größe 東京 🎉 {{ 7 * 7 }} "},
    {"role": "user", "content": "and </s> <s> the \u202bdog\x00 <log> & it's"},
]
CONVERSATIONS = {"one": TALK[:1], "three": TALK, "system": [SYSTEM, *TALK], "system and one": [SYSTEM, TALK[0]]}


@pytest.fixture
def frozen(monkeypatch):
    """transformers' clock, at the date that Noria's templates are given."""
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: DATE))


def chat_of(files, date=DATE):
    return Chat(files, Tokenizer(files, {}, {}).special_tokens, date, HELPER)


def encoder_of(files, sampling=None, warn=lambda message: None):
    tokenizer = Tokenizer(files, {}, {})
    return Encoder(tokenizer, chat_of(files), sampling or Sampling(), 10_000, warn)


def row(prompt="", messages=None, token_ids=None, **sampling):
    return Prompt(0, "0", prompt, token_ids, sampling, "", None, messages)


def files_with(source, kind=test_tokenizer.byte_level_with_bos):
    return test_tokenizer.files_of(kind()) | {"chat_template.jinja": source.encode()}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["byte level with a BOS", "Metaspace with byte fallback"])
def test_a_conversation_is_rendered_and_encoded_as_transformers_does(kind, name, conversation, tmp_path, frozen):
    files, messages = files_with(FORMATS[name], test_tokenizer.KINDS[kind]), CONVERSATIONS[conversation]
    ours, theirs = test_tokenizer.both(tmp_path, files)
    assert isinstance(theirs, PreTrainedTokenizerFast)
    if name == "gemma" and messages[0] == SYSTEM:
        with pytest.raises(TemplateError, match="System role not supported"):
            chat_of(files).render(messages)
        return
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_of(files).render(messages) == rendered
    ids = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert encoder_of(files)(row(messages=messages)) == ids
    assert ours.encode(rendered, add_special_tokens=False) == ids


@pytest.mark.parametrize("name", ["llama 2", "llama 3", "mistral", "gemma"])
def test_a_template_that_writes_the_bos_has_it_once(name):
    files = files_with(FORMATS[name])
    bos = Tokenizer(files, {}, {}).encode("<s>")
    assert len(bos) == 1
    assert encoder_of(files)(row(messages=TALK[:1])).count(bos[0]) == 1
    assert encoder_of(files)(row("<s>the cat")) == encoder_of(files)(row("the cat"))


def test_chat_wraps_a_prompt_as_a_users_message_and_puts_the_system_message_before(frozen):
    files = files_with(CHATML)
    say = Tokenizer(files, {}, {}).encode
    wrapped = encoder_of(files, Sampling(chat=True))(row("the cat"))
    assert wrapped == encoder_of(files)(row(messages=[{"role": "user", "content": "the cat"}]))
    text = "<|im_start|>system\nbe a dog<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert encoder_of(files, Sampling(chat=True, system="be a dog"))(row("the cat")) == say(text, False)


def test_a_row_has_its_own_chat_and_system_and_a_conversation_its_own_system_message():
    files = files_with(CHATML)
    encode = encoder_of(files, Sampling(chat=True, system="be a dog"))
    plain = Tokenizer(files, {}, {}).encode
    assert encode(row("the cat", chat=False)) == plain("the cat")
    assert encode(row("the cat", system="be a cat")) != encode(row("the cat"))
    assert encode(row(messages=[SYSTEM, TALK[0]])) == encoder_of(files)(row(messages=[SYSTEM, TALK[0]]))
    assert encode(row(token_ids=[4, 5])) == [4, 5]
    with pytest.raises(InputError, match="system needs chat"):
        encoder_of(files)(row("the cat", system="be a cat"))


def test_chat_without_a_template_is_refused_before_the_run_and_messages_are_that_rows_error():
    files = test_tokenizer.files_of(test_tokenizer.byte_level())
    with pytest.raises(InputError, match="the model has no chat template.*convert"):
        encoder_of(files, Sampling(chat=True))
    with pytest.raises(InputError, match="no chat template"):
        encoder_of(files)(row(messages=TALK))
    with pytest.raises(InputError, match="sampling.system needs sampling.chat"):
        encoder_of(files_with(CHATML), Sampling(system="x"))


def test_a_model_with_a_template_whose_prompts_are_not_wrapped_is_warned_about_once():
    told = []
    encode = encoder_of(files_with(CHATML), warn=told.append)
    encode(row(messages=TALK))
    encode(row(token_ids=[1]))
    assert told == []
    encode(row("the"))
    encode(row("cat"))
    assert len(told) == 1 and "--chat" in told[0]
    encoder_of(test_tokenizer.files_of(test_tokenizer.byte_level()), warn=pytest.fail)(row("the"))
    encoder_of(files_with(CHATML), Sampling(chat=True), warn=pytest.fail)(row("the"))


def settings_with(template):
    return {"tokenizer_config.json": json.dumps({"chat_template": template, "eos_token": "</s>"}).encode()}


SEVERAL = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "list"}]
PLACES = {
    "settings": (settings_with("config"), "config", "config"),
    "a list in the settings": (settings_with(SEVERAL), "list", "tools"),
    "an object in the settings": (settings_with({"default": "object", "rag": "no"}), "object", "object"),
    "an object with tool_use": (settings_with({"default": "object", "tool_use": "tools"}), "object", "tools"),
    "a file of its own": (settings_with("config") | {"chat_template.jinja": b"jinja"}, "jinja", "jinja"),
    "files of their own": (
        settings_with("config")
        | {"chat_template.jinja": b"jinja", "additional_chat_templates/tool_use.jinja": b"tool file"},
        "jinja",
        "tool file",
    ),
    "settings beside a processor's file": (
        settings_with("config") | {"chat_template.json": b'{"chat_template": "processor"}'},
        "config",
        "config",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_template_is_found_where_transformers_finds_it(place, tmp_path, frozen):
    """By way of a directory that is converted: the files of a checkpoint are not the directory's."""
    more, said, with_tools = PLACES[place]
    config = tiny_models.LLAMA | {"vocab_size": 400}
    tiny_models.write_directory(tmp_path / "hf", config, tiny_models.state(config))
    for name, content in (test_tokenizer.files_of(test_tokenizer.byte_level()) | more).items():
        (tmp_path / "hf" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hf" / name).write_bytes(content)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert theirs.apply_chat_template(TALK, tokenize=False) == said
    assert theirs.apply_chat_template(TALK, tools=[{}], tokenize=False) == with_tools
    convert(tmp_path / "hf", tmp_path / "model.h5")
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        chat = chat_of(checkpoint.tokenizer)
    assert chat.render(TALK) == said and chat.render(TALK, Asked(tools=[{}])) == with_tools


def test_a_processors_file_is_read_where_there_is_nothing_else():
    """transformers reads that one with a processor, not with a tokenizer."""
    files = test_tokenizer.files_of(test_tokenizer.byte_level())
    assert chat_of(files | {"chat_template.json": b'{"chat_template": "json"}'}).render(TALK) == "json"
    several = json.dumps({"chat_template": SEVERAL}).encode()
    assert chat_of(files | {"chat_template.json": several}).render(TALK) == "list"


def test_templates_without_a_default_are_the_error_of_what_needs_one():
    chat = chat_of(settings_with([{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "tools"}]))
    assert chat.error.startswith("the model's chat template cannot be used: the model has chat templates ['rag', 'too")
    with pytest.raises(InputError, match="but no 'default'"):
        chat.render(TALK)
    with pytest.raises(InputError, match="^sampling.chat: .*no 'default'"):
        Encoder(None, chat, Sampling(chat=True), 10, print)
    Encoder(None, chat, Sampling(), 10, print)


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": b"\xff"},
        {"chat_template.json": b"["},
        {"chat_template.json": b'{"chat_template": 3}'},
        {"tokenizer_config.json": b'{"chat_template": {"default": 3}}'},
        {"tokenizer_config.json": b'{"chat_template": [{"name": "default"}]}'},
        {"additional_chat_templates.json": b'{"default": []}'},
    ],
)
def test_a_damaged_template_is_the_users_error(files):
    with pytest.raises(InputError) as caught:
        Chat(files, {}, DATE, HELPER)
    assert "chat" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("source", [b"{% for", b"{{ " + b"(" * 3000 + b" }}", b"x" * (template.MAX_SOURCE + 1)])
def test_a_template_that_cannot_be_read_is_the_error_of_the_rows_and_runs_that_need_it(source):
    chat = Chat({"chat_template.jinja": source}, {}, DATE, HELPER)
    with pytest.raises(
        InputError, match="chat template cannot be used: .*: correct it in the model's directory"
    ) as caught:
        chat.render([{"role": "user", "content": "a"}])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="^sampling.chat: the model's chat template cannot be used"):
        Encoder(None, chat, Sampling(chat=True), 10, print)
    Encoder(None, chat, Sampling(), 10, print)


def test_only_a_template_that_asks_for_the_date_depends_on_it():
    assert tells_date(files_with(LLAMA3)) and not tells_date(files_with(LLAMA2)) and not tells_date({})
    later = chat_of(files_with(LLAMA3), datetime(2025, 1, 1)).render(TALK)
    assert "Today Date: 01 Jan 2025" in later and "Today Date: 26 Jul 2024" in chat_of(files_with(LLAMA3)).render(TALK)


# Templates that mean harm.

DEEP = "{% set ns = namespace(x='ab') %}{% for a in range(200) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x|length }}"
HOSTILE = {
    "loops for ever": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops in a filter": "{% for a in range(99999) %}{{ range(99999)|map('abs')|sum }}{% endfor %}",
    "loops in a condition": "{% for a in range(99999) %}{% for b in range(99999) if b > 9**9 %}{% endfor %}{% endfor %}",
    "doubles by +": DEEP.replace("STEP", "ns.x + ns.x"),
    "doubles by ~": DEEP.replace("STEP", "ns.x ~ ns.x"),
    "doubles by *": DEEP.replace("STEP", "ns.x * 2"),
    "doubles by %": DEEP.replace("STEP", "'%s%s' % (ns.x, ns.x)"),
    "doubles by join": DEEP.replace("STEP", "[ns.x, ns.x]|join"),
    "doubles by replace": DEEP.replace("STEP", "ns.x.replace('b', 'abb')|replace('a', 'bab')"),
    "doubles by a block": DEEP.replace(
        "{% set ns.x = STEP %}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    ),
    "doubles by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DEEP.replace("STEP", "f(ns.x)"),
    "nests lists that share": DEEP.replace("STEP", "[ns.x, ns.x]").replace("|length", ""),
    "nests tuples that share": DEEP.replace("STEP", "(ns.x, ns.x)").replace("|length", ""),
    "nests objects that share": DEEP.replace("STEP", "{'a': ns.x, 'b': ns.x}").replace("|length", ""),
    "nests dict() that share": DEEP.replace("STEP", "dict(a=ns.x, b=ns.x)").replace("|length", ""),
    "squares": DEEP.replace("'ab'", "3").replace("STEP", "ns.x * ns.x").replace("|length", ""),
    "keeps many slices": "{% set a = 'x'.ljust(1000000) %}" + "{% set b = a[1:] %}" * 3000,
    "compares for ever": "{% set a = 'x'.ljust(1000000) %}{% set b = a[1:] ~ ' ' %}"
    + "{% if a == b %}{% endif %}" * 1900,
    "a long text": "{{ 'a' * 10**10 }}",
    "a large power": "{{ 10 ** 100000000 }}",
    "a wide centre": "{{ 'a'|center(10**9) }}",
    "a wide ljust": "{{ 'a'.ljust(10**9) }}",
    "many wide ljusts": "{{ 'a'.ljust(10**6).replace(' ', 'a'.ljust(10**6)) }}",
    "a wide tab": "{{ ('\\t' * 1000).expandtabs(10**6) }}",
    "a wide %": "{{ '%1000000000d' % 1 }}",
    "a wide % of an argument": "{{ '%*d' % (1000000000, 1) }}",
    "a wide format": "{{ '{:1000000000}'.format(1) }}",
    "a wide format by map": "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "a format as a filter": "{{ '%1000000000d'|format(1) }}",
    "a wide date": "{{ strftime_now('%999999999d') }}",
    "wide JSON": "{{ [[[[1]]]]|tojson(indent=1000000) }}",
    "a fine rounding": "{{ 1.5|round(100000000, 'ceil') }}",
    "a wide batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion that branches": "{% macro f(x) %}{{ f(varargs, varargs) }}{{ varargs }}{% endmacro %}{{ f(1, 2) }}",
    "a branching call": "{% macro a0() %}{% endmacro %}"
    + "".join(f"{{% macro a{n + 1}() %}}{{{{ a{n}() }}}}{{{{ a{n}() }}}}{{% endmacro %}}" for n in range(60))
    + "{{ a60() }}",
    "lorem ipsum": "{{ lipsum(n=10000000) }}",
    "imports os": "{% import 'os' as os %}{{ os.system('touch harm') }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "finds os": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "finds os by a filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "finds os by a global": "{{ namespace.__init__.__globals__['os'].system('touch harm') }}",
    "finds os by the context": "{{ self._TemplateReference__context.environment }}",
    "finds os by a function": "{{ raise_exception.__globals__.os.system('touch harm') }}",
    "finds os by strftime": "{{ strftime_now.func.__globals__ }}{{ strftime_now.__closure__[0] }}",
    "finds os by format": "{{ '{0.__class__}'.format(messages) }}",
    "changes the messages": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "clears a message": "{{ messages[0].clear() }}",
}


# A second by the clock is enough for what has an end; the memory is that of any rendering.
TIGHT = Limits(memory_nbytes=2**30, cpu_seconds=20, wall_seconds=1, answer_nbytes=2**22)
# What ends in time, in little memory, and makes a text: nothing has to be stopped.
HARMLESS = {
    *("compares for ever", "keeps many slices", "squares", "a wide date", "a wide batch"),
    *("finds os by strftime", "finds os by a filter", "finds os by format"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped_in_one_line_and_nothing_is_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(template, "LIMITS", TIGHT)
    messages, started, before = json.loads(json.dumps(TALK)), time.monotonic(), _peak_nbytes()
    with template_helper() as helper:
        rendering = Template(HOSTILE[name], DATE, helper)
        try:
            text = rendering.render({"messages": messages})
            assert name in HARMLESS and len(text) < 2**22 and "os" not in text
        except TemplateError as error:
            said = str(error)
            assert said.startswith("the chat template ") and "\n" not in said and len(said) < 500
        assert time.monotonic() - started < 20
        assert _peak_nbytes() - before < 100 * 2**20
        assert os.listdir(tmp_path) == [] and messages == TALK
        assert Template("{{ messages[0].role }}", DATE, helper).render({"messages": messages}) == "user"


def _peak_nbytes():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@pytest.mark.slow
def test_a_template_that_was_stopped_renders_the_next_conversation_and_after_three_none(monkeypatch):
    monkeypatch.setattr(template, "LIMITS", TIGHT)
    source = "{% for m in messages %}{% for b in range(m) %}{% endfor %}{{ m }}{% endfor %}"
    with template_helper() as helper:
        rendering = Template(source, DATE, helper)
        for _ in range(3):
            assert rendering.render({"messages": [3, 4]}) == "34"
            with pytest.raises(TemplateError, match="^the chat template was stopped: it took more than 1 s$"):
                rendering.render({"messages": [99_999] * 99_999})
        words = (
            "^conversations are refused: the chat template was stopped too often: it ended 3 times; it took more than"
        )
        with pytest.raises(TemplateError, match=words):
            rendering.render({"messages": [3, 4]})


def test_two_thousand_short_conversations_a_second_are_rendered():
    rendering, started = Template(CHATML, DATE, HELPER), time.process_time()
    for number in range(500):
        text = rendering.render({"messages": TALK, "add_generation_prompt": True, "number": number})
    assert text.endswith("assistant\n")
    # Of this process, which feeds and waits: on a busy machine the clock would measure the others.
    assert time.process_time() - started < 500 / 2000


@pytest.mark.parametrize("name", FORMATS)
def test_a_conversation_of_a_megabyte_and_one_of_a_thousand_turns_are_within_the_budget(name):
    long = [{"role": "user", "content": "x é" * 2**19}]
    many = [{"role": ("user", "assistant")[turn % 2], "content": f"turn {turn} " * 20} for turn in range(1001)]
    for messages in (long, many):
        text = Template(FORMATS[name], DATE, HELPER).render(
            {
                "messages": messages,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "add_generation_prompt": True,
                "tools": None,
            }
        )
        assert len(text) > 1000 and (name == "extras" or messages[-1]["content"].strip() in text)


def test_a_resumed_run_tells_the_date_of_its_first_start(tmp_path, monkeypatch):
    source = "{{ strftime_now('%Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    files = files_with(source)
    config = tiny_models.LLAMA | {"vocab_size": 400}
    tiny_models.write_directory(tmp_path / "hf", config, tiny_models.state(config))
    for name, content in files.items():
        (tmp_path / "hf" / name).write_bytes(content)
    convert(tmp_path / "hf", tmp_path / "model.h5")
    arguments = ["--model", "model.h5", "--prompts", "p.jsonl", "--output", "out.h5", "--device", "cpu", "--chat"]
    monkeypatch.chdir(tmp_path)
    for year, more in (("2001", []), ("2030", ["--extend"])):
        with open("p.jsonl", "a") as file:
            file.write('{"prompt": "the cat"}\n')
        monkeypatch.setattr(earlier, "local_time", lambda year=year: f"{year}-02-03T04:05:06")
        assert main(["run", *arguments, "--max-new-tokens", "2", *more]) == 0
    with open_generations("out.h5") as file:
        first, second = file.rows()
    expected = Tokenizer(files, {}, {}).encode("2001 the cat", add_special_tokens=False)
    assert first.prompt_token_ids.tolist() == second.prompt_token_ids.tolist() == expected
    monkeypatch.setattr(earlier, "local_time", lambda: "2030-02-03T04:05:06")
    assert main(["run", *arguments[:4], "--output", "two.h5", *arguments[6:], "--max-new-tokens", "2"]) == 0
    with open_generations("two.h5") as file:
        assert next(iter(file.rows())).prompt_token_ids.tolist() != expected


DEVELOPED = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
KNOWN_ROLES = "{% for m in messages %}{% if m.role in roles %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
DEVELOPERS = {
    "one that loses the role": (KNOWN_ROLES.replace("roles", "['system', 'user']"), "<system>Be brief.<user>Why?"),
    "one that refuses the role": (
        "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('roles') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}",
        "<system>Be brief.<user>Why?",
    ),
    "one that knows the role": (KNOWN_ROLES.replace("roles", "['developer', 'user']"), "<developer>Be brief.<user>Why?"),
    "one that prints any role": ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "<developer>Be brief.<user>Why?"),
    "one that reads parts": (
        "{% for m in messages %}{% if m.role != 'developer' %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% endif %}{% endfor %}",
        "<system>Be brief.<user>Why?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEVELOPERS)
def test_what_a_developer_says_is_a_systems_where_the_template_does_not_have_the_role(name):
    source, text = DEVELOPERS[name]
    parts = name == "one that reads parts"
    talk = [one | {"content": [{"type": "text", "text": one["content"]}]} if parts else one for one in DEVELOPED]
    assert chat_of(files_with(source)).render(talk) == text


def test_what_a_template_loses_of_a_developer_and_of_a_system_is_the_rows_error():
    chat = chat_of(files_with("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"))
    with pytest.raises(
        InputError, match="loses messages of role 'developer', and of role 'system' too: give their text"
    ):
        chat.render(DEVELOPED)
    assert chat.render(DEVELOPED[1:]) == "Why?"
    both = [{"role": "system", "content": "First."}, *DEVELOPED]
    first_alone = "{{ messages[0].content }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="loses messages of role 'developer'"):
        chat_of(files_with(first_alone)).render(both)


def test_what_a_template_refuses_beside_the_role_is_said_as_it_says_it():
    source = "{% if messages[1].content != 'Why not?' %}{{ raise_exception('ask why not') }}{% endif %}"
    with pytest.raises(InputError, match="ask why not"):
        chat_of(files_with(source)).render(DEVELOPED)
