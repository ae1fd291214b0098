"""What a template makes of a conversation, against transformers' apply_chat_template: own minimal templates for each
construct of Jinja2 and each form of a conversation. Equal, or both refuse."""

import contextlib
import json
import random
from datetime import datetime
from types import SimpleNamespace

import jinja2.defaults
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from counts import count, some
from noria.errors import InputError
from noria.rows.chat import Asked, Chat, conversation
from noria.rows.prompts import open_prompts
from noria.rows.template import Template, TemplateError, template_helper

DATE = datetime(2024, 7, 26, 23, 59)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
REFUSED = "refused"
EACH = "{% for m in messages %}<{{ m.role }}>BODY</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def each(body):
    return EACH.replace("BODY", body)


TEXT = "{{ m.content }}"
CALLS = "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} ARGUMENTS]{% endfor %}"
# Templates that print texts, by construct.
TEXTS = {
    "prints": each(TEXT),
    "adds": each("{{ '(' + m['content'] + ')' }}"),
    "joins": each("{{ '(' ~ m.content ~ ')' }}"),
    "trims": each("{{ m.content | trim }}"),
    "tokens": "{{ bos_token }}" + each(TEXT + "{{ eos_token }}{{ pad_token }}"),
    "whitespace": "\n  {%- for m in messages %}\n    {{- m.role }}:\n    {% if true %}\n  {{ m.content -}}\n  {% endif %}\n{% endfor %}\n",
    "comments and raw": "{# no #}{% raw %}{{ yes }}{% endraw %}" + each(TEXT),
    "loop variables": each(
        "{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
        "{{ loop.cycle('a', 'b') }}{{ loop.previtem.role }}{{ loop.nextitem.role }}{{ loop.changed(m.role) }}" + TEXT
    ),
    "loop with a filter": "{% for m in messages if m.role != 'system' %}" + TEXT + "{% else %}none{% endfor %}",
    "nested and recursive loops": each("{% for w in (m.content ~ '').split() recursive %}{{ w }}{{ loop.depth }};{% endfor %}"),
    "break and continue": "{% for m in messages[::-1] %}{% if loop.index == 3 %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}" + TEXT + "{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, self='x') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.self }}" + each(TEXT),
    "namespace of a hidden name": "{% set ns = namespace(_n=0) %}" + each(TEXT),
    "set in a hidden name": "{% set ns = namespace(n=0) %}{% set ns._n = 1 %}" + each(TEXT),
    "set in a loop": each("{% set c = m.content %}{% if c is string and c.replace('cat', 'concatenation') %}{{ c }}{% endif %}"),
    "set a block": "{% set all %}" + each(TEXT) + "{% endset %}{{ all | upper }}{{ all | length }}",
    "macro": "{% macro show(m, mark='*', more=none) %}{{ mark }}{{ m.content }}{{ varargs }}{{ kwargs }}{{ caller() if caller else '' }}{% endmacro %}"
    + each("{{ show(m) }}{{ show(m, '-', 1, 2, x=3) }}{% call show(m, mark='+') %}called{% endcall %}"),
    "filter block and with": "{% filter lower %}" + each("{% with c = m.content, d = 1 %}{{ c }}{{ d }}{% endwith %}") + "{% endfilter %}",
    "inline if": each("{{ m.content if m.role == 'user' else '-' }}{{ 'x' if false }}"),
    "generation": each("{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ loop.index }}{% set inner = 1 %}{% endgeneration %}{{ inner }}{% else %}{{ m.content }}{% endif %}"),
    "operators": each("{{ (m.content ~ '') * 2 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 7 / 2 }}{{ -1 }}{{ not true }}{{ 1 < 2 <= 2 }}{{ 'a' in 'cat' }}{{ 1 not in [2] }}"),
    "literals": each("{{ [1, 'a', none, true, 1.5] }}{{ {'a': (1, 2)} }}{{ 'é\\n\\u00e9' }}" + TEXT),
    "methods of texts": each("{% set c = m.content ~ '' %}{{ c.split(' ')[-1] }}{{ c.strip().title() }}{{ c.startswith('the') }}{{ c.replace('a', 'o') }}{{ c.partition(' ') }}{{ c.rstrip('?')[:4] }}{{ c.find('cat') }}{{ c.center(20) }}{{ c.zfill(9) }}"),
    "methods of lists and objects": each("{{ m.items() | list }}{{ m.keys() | list }}{{ m.get('content') }}{{ m.get('x', 'y') }}{{ [1, 2].index(2) }}"),
    "formats": each("{{ '%s-%d' % (m.role, loop.index) }}{{ '{}: {!r:>20}'.format(m.role, m.content) }}{{ '{r}'.format(r=m.role) }}{{ '%5s' | format(m.role) }}"),
    "format of what is hidden": each("{{ '{0.__class__}'.format(m) }}"),
    "format_map": each("{{ '{role}'.format_map(m) }}"),
    "tojson": each("{{ m | tojson }}{{ m | tojson(indent=2) }}{{ m | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}"),
    "keys in a message": each("{{ 'name' in m }}{{ 'tool_calls' in m }}{{ m.name is defined }}{{ m.name }}{{ 'content' in m }}"),
    "reasoning": each("{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}" + TEXT),
    "thinking": each("{% if m.thinking is defined %}({{ m.thinking }}){% endif %}" + TEXT),
    "every key in order": each("{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}"),
    "tools": "{% if tools %}{{ tools | tojson }}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}{{ tools is none }}{{ documents is none }}" + each(TEXT),
    "documents": "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}{% endfor %}" + each(TEXT),
    "kwargs": "{{ enable_thinking }}{{ enable_thinking is defined and enable_thinking is false }}{{ style.tone }}{{ bos_token }}" + each(TEXT),
    "arguments as JSON": each(CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")),
    "arguments by items": each(CALLS.replace("ARGUMENTS", "{% for k, v in c.function.arguments.items() %}{{ k }}:{{ v }}{% endfor %}")),
    "arguments either way": each(CALLS.replace("ARGUMENTS", "{% set a = c.function.arguments %}{{ a if a is string else a | tojson }}")),
    "arguments as text": each(CALLS.replace("ARGUMENTS", "{{ '(' + c.function.arguments + ')' }}")),
    "arguments as printed": each(CALLS.replace("ARGUMENTS", "{{ c.function.arguments }}")),
    "only if it is a text": each("{% if m.content is string %}{{ m.content }}{% endif %}"),
    "raises for a system message": "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}" + each(TEXT),
    "date": "{{ strftime_now('%d %b %Y') }}{{ strftime_now is defined }}" + each(TEXT),
    "dict and joiner and cycler": "{% set j = joiner('|') %}{% set c = cycler(1, 2) %}{{ dict(a=1).a }}{{ dict.fromkeys([1, 2], 3) }}" + each("{{ j() }}{{ c.next() }}{{ c.current }}" + TEXT),
    "unknown filter that is not reached": "{% if false %}{{ 1 | nothing }}{% endif %}" + each(TEXT),
    "unknown filter in a branch": each("{% if m.role == 'system' %}{{ m.content | nothing }}{% else %}{{ m.content }}{% endif %}"),
    "unknown filter": each("{{ m.content | nothing }}"),
    "unknown test in a branch": each("{% if m.role == 'system' and m is nothing %}x{% endif %}" + TEXT),
    "unknown function": each("{% if m.role == 'system' %}{{ nothing() }}{% endif %}" + TEXT),
    "unknown name": each("{{ nothing }}{{ m.nothing }}{{ nothing is defined }}" + TEXT),
    "attribute of an unknown name": each("{{ nothing.more }}"),
    "changes the messages": "{% set _ = messages.append(messages[0]) %}" + each(TEXT),
    "pops a message": "{% set first = messages.pop(0) %}" + each(TEXT),
    "sets a key": each("{% set _ = m.update({'content': 'x'}) %}" + TEXT),
    "hidden attributes": each("{{ m.__class__ }}"),
    "hidden attributes by a filter": each("{{ m | attr('__class__') }}"),
    "includes": "{% include 'x' %}" + each(TEXT),
    "autoescape": "{% autoescape true %}" + each(TEXT) + "{% endautoescape %}",
    "escapes": each("{{ m.content | escape }}{{ (m.content | safe) ~ '<' }}"),
    "long range": "{% for n in range(100001) %}{% endfor %}" + each(TEXT),
    "syntax error": "{% for m in messages %}",
    "empty": "",
}  # fmt: skip
# Templates that read content parts.
PARTS = {
    "parts alone": each("{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"),
    "text or parts": each("{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{{ c['text'] }}|{% endfor %}{% endif %}"),
    "parts through a macro": "{% macro body(c) %}{% if c is string %}{{ c }}{% elif c is iterable and c is not mapping %}{% for p in c %}{% if 'image' in p %}IMAGE{% elif 'text' in p %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}" + each("{{ body(m.content) | trim }}"),
    "the first part": each("{{ m.content if m.content is string else m.content[0].text }}"),
    "parts as JSON": each("{{ m.content if m.content is string else m.content | tojson }}"),
    "texts of parts by map": each("{{ m.content if m.content is string else m.content | map(attribute='text') | join('+') }}"),
}  # fmt: skip
ALL = TEXTS | PARTS
PRINT_ARGUMENTS = ("arguments as text", "arguments as printed", "every key in order", "methods of lists and objects")

SYSTEM = {"role": "system", "content": "Answer the cat. "}
TALK = [
    {"role": "user", "content": " the cat sat\non the mat? "},
    {"role": "assistant", "content": "\nthe dog: Größe 東京 🎉 {{ 7 * 7 }} "},
    {"role": "user", "content": "and </s> <s> the \u202bdog\x00 & it's <b>"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def calls(*arguments):
    found = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": one}} for one in arguments]
    return {"role": "assistant", "content": None, "tool_calls": found}


def parts(*texts, role="user"):
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


CONVERSATIONS = {
    "one": {"messages": TALK[:1]},
    "three": {"messages": TALK},
    "system": {"messages": [SYSTEM, *TALK]},
    "null keys": {"messages": [TALK[0] | {"name": None, "tool_calls": None}, TALK[1] | {"tool_calls": None}, TALK[2]]},
    "a name": {"messages": [TALK[0] | {"name": "x", "weight": 1.0}]},
    "parts": {"messages": [parts("One.", "Two. ")]},
    "parts and texts": {"messages": [SYSTEM, parts("One.", "é"), TALK[1], parts("Three")]},
    "parts of all": {"messages": [parts("Be", "kind", role="system"), parts("One"), parts("x ", role="assistant"), TALK[2]]},
    "null keys in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "One.", "image": None}]}]},
    "reasoning": {"messages": [*TALK[:2], TALK[0], TALK[1] | {"reasoning": "Let me see"}]},
    "thinking": {"messages": [TALK[0], TALK[1] | {"thinking": "Let me see", "reasoning": "no"}]},
    "reasoning content": {"messages": [TALK[0], TALK[1] | {"reasoning_content": "Let me see"}]},
    "null reasoning": {"messages": [TALK[0], TALK[1] | {"reasoning_content": None, "reasoning": "yes"}]},
    "calls by objects": {"messages": [TALK[0], calls({"city": "Rome", "n": 1.5}), {"role": "tool", "content": "sun"}]},
    "calls by text": {"messages": [TALK[0], calls('{"city": "Rome", "n": [1, null]}', "{}"), {"role": "tool", "content": "sun"}]},
    "calls by broken text": {"messages": [TALK[0], calls('{"city": '), {"role": "tool", "content": "sun"}]},
    "tools": {"messages": TALK[:1], "tools": TOOLS},
    "no tools": {"messages": TALK[:1], "tools": []},
    "documents": {"messages": TALK[:1], "documents": [{"title": "a", "text": "b"}]},
    "kwargs": {"messages": TALK[:1], "chat_template_kwargs": {"enable_thinking": False, "style": {"tone": "é"}}},
    "kwargs over a token": {"messages": TALK[:1], "chat_template_kwargs": {"bos_token": "<b>", "style": None}},
    "no generation prompt": {"messages": TALK, "add_generation_prompt": False},
    "continued": {"messages": TALK[:2], "continue_final_message": True},
    "continued without a prompt": {"messages": TALK[:2], "continue_final_message": True, "add_generation_prompt": False},
    "continued parts": {"messages": [TALK[0], parts("The ", "colour is ", role="assistant")], "continue_final_message": True},
    "continued reasoning": {"messages": [TALK[0], TALK[1] | {"reasoning": "so far "}], "continue_final_message": "reasoning"},
    "continued nothing": {"messages": [TALK[0], calls({})], "continue_final_message": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def helper():
    with template_helper() as helper:
        yield helper


@pytest.fixture(scope="module")
def theirs():
    return PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()), **SPECIAL)


@pytest.fixture(autouse=True)
def frozen(monkeypatch):
    """transformers' clock, at the date that Noria's templates are given."""
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: DATE))


def prompt_of(tmp_path, row):
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (prompt,) = open_prompts(path)
    return prompt


def ours(tmp_path, helper, source, row):
    """What a row of a file is rendered to."""
    prompt = prompt_of(tmp_path, row)
    if prompt.error:
        return REFUSED
    chat = Chat({"chat_template.jinja": source.encode()}, SPECIAL, DATE, helper)
    asked = Asked(**prompt.beside, kwargs=prompt.sampling.get("chat_template_kwargs"))
    try:
        return chat.render(conversation(prompt, None), asked)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return REFUSED


def in_form(message, as_parts, as_object):
    """A message in the form that a template wants: what a user of transformers would write."""
    message = json.loads(json.dumps(message))
    if isinstance(message.get("content"), list):
        content = [{name: value for name, value in part.items() if value is not None} for part in message["content"]]
        message["content"] = content if as_parts else " ".join(part["text"] for part in content)
    for call in message.get("tool_calls") or []:
        if as_object and isinstance(call["function"]["arguments"], str):
            with contextlib.suppress(ValueError):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message


def reference(theirs, name, source, row):
    """What transformers makes of the row, with its messages in the form that this template reads."""
    messages = [
        in_form(message, name in PARTS or name == "tojson", name not in PRINT_ARGUMENTS) for message in row["messages"]
    ]
    beside = {key: row[key] for key in ("tools", "documents", "continue_final_message") if key in row}
    begins = row.get("add_generation_prompt", not row.get("continue_final_message"))
    try:
        said = theirs.apply_chat_template(
            messages,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=begins,
            **beside,
            **row.get("chat_template_kwargs", {}),
        )
    except Exception:  # noqa: BLE001 - templates raise what they like
        return REFUSED
    # Where a template writes the final message twice transformers leaves its own tag in the text.
    return REFUSED if "CONTINUE_FINAL_MESSAGE_TAG" in said else said


@pytest.mark.parametrize("name", ALL)
def test_every_construct_renders_every_conversation_as_transformers_does(name, tmp_path, helper, theirs):
    rendered = 0
    offset = list(ALL).index(name)
    cases = list(CONVERSATIONS.items())
    for said, row in some(cases[offset % len(cases) :] + cases[: offset % len(cases)]):
        expected = reference(theirs, name, ALL[name], row)
        assert ours(tmp_path, helper, ALL[name], row) == expected, (name, said)
        rendered += expected != REFUSED
    assert helper.pid


DECIDED = (
    "adds",
    "trims",
    "prints",
    "tojson",
    "reasoning",
    "thinking",
    "keys in a message",
    *PARTS,
    *(n for n in TEXTS if "argum" in n),
)
FORMS = (
    "continued",
    "continued parts",
    "continued reasoning",
    "null keys",
    "parts and texts",
    "parts of all",
    "reasoning",
    "null reasoning",
    "calls by text",
    "calls by objects",
)


def test_each_template_gets_the_form_that_it_reads_of_each_conversation_with_forms(tmp_path, helper, theirs):
    """Of all templates that choose, all of them: the others are drawn from."""
    for name in DECIDED:
        for said in FORMS:
            expected = reference(theirs, name, ALL[name], CONVERSATIONS[said])
            assert ours(tmp_path, helper, ALL[name], CONVERSATIONS[said]) == expected, (name, said)


def random_row(draw):
    """A conversation of everything at once."""

    def text():
        return draw.choice(["", " ", "a", "the cat\n", "é 🎉", "{{ x }}", "\"q\" 's'", "<b>&", "1"])

    def message(place):
        role = draw.choice(["user", "assistant", "system", "tool"])
        content = (
            text() if draw.random() < 0.7 else [{"type": "text", "text": text()} for _ in range(draw.randint(1, 3))]
        )
        found = {"role": role, "content": content}
        for key in ("name", "reasoning", "thinking", "reasoning_content", "tool_calls"):
            if draw.random() < 0.15:
                found[key] = draw.choice([None, text()]) if key != "tool_calls" else None
        if role == "assistant" and draw.random() < 0.4:
            arguments = draw.choice([{"a": text()}, json.dumps({"a": text(), "b": [1.5, None]}), "{}"])
            found["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        return found

    row = {"messages": [message(place) for place in range(draw.randint(1, 5))]}
    for key, value in (("tools", TOOLS), ("documents", [{"title": "t", "text": text()}]), ("add_generation_prompt", False),
                       ("chat_template_kwargs", {"enable_thinking": draw.random() < 0.5})):  # fmt: skip
        if draw.random() < 0.2:
            row[key] = value
    return row


# Of those in which some text decides whether a template takes an object, the reference has no form of its own.
STEADY = [name for name in ALL if "arguments" not in name]


def test_random_conversations_render_as_transformers_renders_them(tmp_path, helper, theirs):
    draw, rendered = random.Random(3), 0
    for number in range(count(2500)):
        name, row = draw.choice(STEADY), random_row(draw)
        expected = reference(theirs, name, ALL[name], row)
        assert ours(tmp_path, helper, ALL[name], row) == expected, (number, name, row)
        rendered += expected != REFUSED
    assert rendered > count(2500) / 2


NUMBERS = "[3, 1, 2]"
WORDS = "['b', 'A', 'b']"
ROWS = "[{'k': 1, 'v': 'x'}, {'k': 2, 'v': 'y'}]"
FILTERS = {
    "abs": "-1 | abs", "attr": "messages | attr('append') is defined", "batch": f"{NUMBERS} | batch(2, 0) | list", "capitalize": "'aB' | capitalize",
    "center": "'a' | center(5)", "count": f"{NUMBERS} | count", "d": "x | d('y')", "default": "'' | default('y', true)",
    "dictsort": "{'b': 1, 'a': 2} | dictsort", "e": "'<' | e", "escape": "'<' | escape", "filesizeformat": "1234567 | filesizeformat",
    "first": f"{NUMBERS} | first", "float": "'1.5' | float", "forceescape": "'<' | safe | forceescape", "format": "'%s %03d' | format('a', 7)",
    "groupby": f"{ROWS} | groupby('k') | map('first') | list", "indent": "'a\nb' | indent(3, first=true)", "int": "'7x' | int(9)", "items": "{'a': 1} | items | list",
    "join": f"{WORDS} | join('-')", "last": f"{NUMBERS} | last", "length": f"{NUMBERS} | length", "list": "'ab' | list",
    "lower": "'AB' | lower", "map": f"{ROWS} | map(attribute='v') | list", "max": f"{NUMBERS} | max", "min": f"{NUMBERS} | min",
    "pprint": "messages | pprint", "random": "[7] | random", "reject": f"{NUMBERS} | reject('odd') | list", "rejectattr": f"{ROWS} | rejectattr('k', 'eq', 1) | list",
    "replace": "'aaa' | replace('a', 'b', 2)", "reverse": "'abc' | reverse", "round": "2.567 | round(1, 'floor')", "safe": "'<' | safe",
    "select": f"{NUMBERS} | select('gt', 1) | list", "selectattr": f"{ROWS} | selectattr('v') | list", "slice": f"{NUMBERS} | slice(2) | list",
    "sort": f"{WORDS} | sort(reverse=true)", "string": "1 | string", "striptags": "'<b>a</b> c' | striptags", "sum": f"{ROWS} | sum(attribute='k')",
    "title": "'a bc' | title", "tojson": "{'a': '<é>'} | tojson", "trim": "' a ' | trim", "truncate": "'a b c d e f' | truncate(7)",
    "unique": f"{WORDS} | unique | list", "upper": "'a' | upper", "urlencode": "{'a b': 'é/'} | urlencode", "urlize": "'see https://a.example now' | urlize(10)",
    "wordcount": "'a b c' | wordcount", "wordwrap": "'aa bb cc' | wordwrap(4)", "xmlattr": "{'a': 'b<'} | xmlattr",
}  # fmt: skip
TESTS = {
    "boolean": "true", "callable": "range", "defined": "messages", "divisibleby": "(9, 3)", "eq": "1", "equalto": "1", "escaped": "('a' | safe)",
    "even": "2", "false": "false", "filter": "'upper'", "float": "1.5", "ge": "2", "greaterthan": "2", "gt": "2", "in": "1", "integer": "1",
    "iterable": "[1]", "le": "0", "lessthan": "0", "lower": "'a'", "lt": "0", "mapping": "{}", "ne": "3", "none": "none", "number": "1",
    "odd": "3", "sameas": "1", "sequence": "[]", "string": "'a'", "test": "'odd'", "true": "true", "undefined": "nothing", "upper": "'A'",
    "!=": "3", "<": "0", "<=": "0", "==": "1", ">": "2", ">=": "2",
}  # fmt: skip
OF_TWO = {"divisibleby": "(3)", "eq": "(1)", "equalto": "(1)", "in": "([1])", "sameas": "(1)", **dict.fromkeys(
    ("ge", "greaterthan", "gt", "le", "lessthan", "lt", "ne"), "(1)")}  # fmt: skip


def test_every_filter_and_test_of_jinja_is_there_and_does_what_it_does_in_transformers(helper, theirs, tmp_path):
    assert set(FILTERS) == set(jinja2.defaults.DEFAULT_FILTERS) and set(TESTS) == set(jinja2.defaults.DEFAULT_TESTS)
    sources = [f"{{{{ {expression} }}}}" for expression in FILTERS.values()]
    for name, value in TESTS.items():
        value = "9" if name == "divisibleby" else value
        listed = f"{{{{ [{value}] | select('{name}'{', 1' if name in '!= <= >= ==' else ''}) | list }}}}"
        sources.append(listed if not name.isalpha() else f"{{{{ {value} is {name}{OF_TWO.get(name, '')} }}}}")
        assert "True" in sources[-1] or reference(theirs, "", sources[-1], CONVERSATIONS["one"]) not in ("", REFUSED)
    for source in sources:
        expected = reference(theirs, "", source, CONVERSATIONS["one"])
        assert expected != REFUSED, source
        assert ours(tmp_path, helper, source, CONVERSATIONS["one"]) == expected, source


def test_the_names_that_a_template_finds_are_those_of_transformers(helper, theirs, tmp_path):
    names = [*jinja2.defaults.DEFAULT_NAMESPACE, "raise_exception", "strftime_now", "messages", "tools", "documents",
             "add_generation_prompt", "bos_token", "pad_token", "self", "loop", "caller", "os", "open", "_"]  # fmt: skip
    source = "".join(f"{{{{ {name} is defined }}}} {{{{ {name} is callable }}}};" for name in names)
    expected = reference(theirs, "", source, CONVERSATIONS["one"])
    assert expected.count("True") > len(jinja2.defaults.DEFAULT_NAMESPACE)
    assert ours(tmp_path, helper, source, CONVERSATIONS["one"]) == expected


@pytest.mark.parametrize("line", [1, 3])
def test_a_syntax_error_says_its_line_and_an_exception_its_words(helper, line):
    with pytest.raises(TemplateError, match=rf"cannot be rendered \(line {line}\): "):
        Template("\n" * (line - 1) + "{{ 1 | nothing }}", DATE, helper).check()
    with pytest.raises(TemplateError, match="cannot be rendered: No way, no how$"):
        Template("{{ raise_exception('No way,\n no how') }}", DATE, helper).render({})


def test_where_no_process_can_be_made_the_sandbox_renders_the_same(tmp_path, theirs, monkeypatch):
    def refuse(*arguments, **settings):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.posix_spawn", refuse)
    with template_helper() as helper:
        for name in some(ALL):
            for row in some(CONVERSATIONS.values()):
                assert ours(tmp_path, helper, ALL[name], row) == reference(theirs, name, ALL[name], row), name
        assert helper.pid is None
