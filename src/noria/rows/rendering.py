"""Renders a chat template in Jinja2's immutable sandbox, with the names that transformers gives a template.

Answers requests of noria.tools.helper: runs in a child with limits, which end what the sandbox lets run for ever. Knows no
conversation; imports the standard library and Jinja2 alone, because the child starts with nothing else.
"""

import importlib
import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

# What Python and Jinja2 import when it is first needed: too late in a child that opens no files.
for _name in (
    *("encodings.ascii", "encodings.unicode_escape", "html", "pprint", "textwrap", "unicodedata"),
    *("jinja2.constants", "jinja2.debug"),
):
    importlib.import_module(_name)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """`text`, what the template `source` makes of `variables` (null: it is only read) on the date `now`; or `error`."""
    try:
        template = _compiled(request["source"], request["now"])
        variables = request["variables"]
        return {"text": "" if variables is None else template.render(variables)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f" (line {error.lineno}): {_one_line(error)}"}
    except jinja2.TemplateError as error:
        return {"error": f": {_one_line(error)}"}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a template raises is its own error
        return {"error": f": {type(error).__name__} {_one_line(error)}"}


@lru_cache(maxsize=8)
def _compiled(source: str, now: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "dict": _Dict(),
        "namespace": _PlainNames,
        "raise_exception": _raise_exception,
        "strftime_now": datetime.fromisoformat(now).strftime,
    }
    return environment.from_string(source)


class _PlainNames(Namespace):
    """A namespace whose names are plain."""

    def __init__(*args: object, **kwargs: object):  # `namespace(self=...)` is right
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class _Dict:
    """What a template may do with `dict`: its attributes lead nowhere."""

    def __call__(self, *args: object, **kwargs: object) -> dict[str, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[str, Any]:
        return dict.fromkeys(*args)


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks what a model is trained on: here only what is inside it, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja2 has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], inside).set_lineno(line)

    def _inside(self, caller: Macro) -> str:
        return caller()


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja2's own has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
