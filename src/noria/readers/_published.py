"""Columns in which published data sets have their prompts, and the flag of a run that reads them. Knows no format."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

OWN = ("id", "prompt", "messages", "token_ids")  # Noria's own columns
# The likeliest first.
_CONVERSATIONS = ("conversations", "conversation", "dialogue", "dialog")
_PROMPTS = ("question", "turns", "text", "query", "problem", "input", "content", "sentence", "goal")
_CONTEXTS = ("input", "context")  # beside an instruction


def flag_for(row: Mapping[str, Any] | Iterable[str]) -> str:
    """The flag by which rows with these columns would have a prompt, as it is typed; "" where none is known."""
    names = {folded(name): name for name in row if isinstance(name, str) and name not in OWN}
    for kind in ("prompt", "messages"):
        if kind in names:
            return f"--{kind}-column {shlex.quote(names[kind])}"
    talk = next((names[name] for name in _CONVERSATIONS if name in names), None)
    if talk is not None:
        return f"--messages-column {shlex.quote(talk)}"
    found = names.get("instruction")
    if found is not None:
        found = ",".join([found, *(names[name] for name in _CONTEXTS if name in names)][:2])
    found = found or next((names[name] for name in _PROMPTS if name in names), None)
    if found is None and "arguments" in names:  # samples of lm-evaluation-harness, of two versions
        value = row["arguments"] if isinstance(row, Mapping) else None
        found = "arguments.0.0" if isinstance(value, list) else "arguments.gen_args_0.arg_0"
    return "" if found is None else f"--prompt-column {shlex.quote(found)}"


def table_without(names: Iterable[str], has: Iterable[str]) -> str:
    """What is said of a table with none of the columns `names`: those that it has, and the flag that would read it."""
    has = list(has)
    flag = flag_for(has)
    shown = ", ".join(name if name == folded(name) else repr(name) for name in has)[:100] or "none"
    return f"no column {' or '.join(names)}; it has: {shown}" + (f"; {flag} reads it" if flag else "")


def folded(name: str) -> str:
    """A name without its capitals and the spaces around it."""
    return name.strip().lower() if len(name) < 100 else name
