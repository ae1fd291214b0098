"""Conversations as the token ids that a model was trained on: its chat template around messages and prompts.

A rendering is that of transformers' apply_chat_template with add_generation_prompt. Knows no rows and no schedule.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from noria.errors import InputError, require
from noria.model import MORE_TEMPLATES, OpenModel
from noria.rows.continuing import FIELDS, Continued
from noria.rows.forms import formed, heard, reads_parts_alone
from noria.rows.prompts import Prompt
from noria.rows.template import Template, template_helper
from noria.rows.tokenizer import Tokenizer, checked_ids, prompt_token_ids
from noria.sampling import Sampling
from noria.tools.helper import Helper

_REMEDY = "give `prompt` without sampling.chat, or convert the model from a directory with a chat_template"
_UNWRAPPED = (
    "the model has a chat template, but prompts are given to the model without it; with --chat each becomes a user's"
    " message"
)
_TEXT_LOST = (
    "the model's chat template reads only content parts, in transformers too: a message whose content is a"
    ' text loses it; give content as [{"type": "text", "text": ...}]'
)

_MOST_WARNINGS = 20


@dataclass(frozen=True)
class Asked:
    """What a rendering is asked for beside its messages, by transformers' names; `kwargs` are the template's own keys."""

    tools: list[Any] | None = None
    documents: list[Any] | None = None
    continue_final_message: bool | str = False
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    kwargs: Mapping[str, Any] | None = None

    def variables(self) -> dict[str, Any]:
        """What the template sees."""
        begins = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        beside = {"tools": self.tools, "documents": self.documents, "add_generation_prompt": begins}
        return {**(self.kwargs or {}), **beside}


class Chat:
    """The chat templates of a checkpoint's tokenizer files; `sources` by name, empty if they have none.

    `date` is what a template is told the date is: that of the job's first start, whenever a row is rendered. `error`
    says why the template cannot be used ("" for one that can): rows that need none still run. `helper` renders.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        special_tokens: Mapping[str, str],
        date: datetime,
        helper: Helper | None = None,
    ):
        self.sources = template_sources(files)
        self._special_tokens = dict(special_tokens)
        helper = helper or template_helper()
        self._templates = {name: Template(source, date, helper) for name, source in self.sources.items()}

    @cached_property
    def error(self) -> str:
        try:
            if self.sources:
                self._template(None).check()
        except InputError as error:
            return _unusable(error)
        return ""

    @cached_property
    def parts_alone(self) -> bool:
        """Whether texts have to be given as parts, because the template loses them else."""
        usable = bool(self.sources) and not self.error
        return usable and reads_parts_alone(lambda messages: self._rendered(messages, Asked()))

    def render(self, messages: list[dict[str, Any]], asked: Asked | None = None) -> str:
        """The text of a conversation, up to where the model's answer begins. Raises InputError."""
        asked = asked or Asked()
        if not self.sources:
            raise InputError(f"the model has no chat template: {_REMEDY}")
        require(not self.error, self.error)

        def rendered(tried: list[dict[str, Any]]) -> str:
            return self._rendered(tried, asked)

        messages = [_with_reasoning(message) for message in messages]
        messages = formed(heard(messages, lambda tried: rendered(formed(tried, rendered))), rendered)
        if not asked.continue_final_message:
            return self._rendered(messages, asked)
        end = Continued(messages, asked.continue_final_message, self._template(asked.tools).source)
        return end.cut(self._rendered(end.messages, asked))

    def reads(self, name: str) -> bool:
        """Whether a template has this word, without which it cannot read a key of this name."""
        return any(name in source for source in self.sources.values())

    def _rendered(self, messages: list[dict[str, Any]], asked: Asked) -> str:
        variables = self._special_tokens | asked.variables() | {"messages": messages}
        return self._template(asked.tools).render(variables)

    def _template(self, tools: list[Any] | None) -> Template:
        """The one that transformers takes: `tool_use` for tools where there is one, else `default`."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        found = self._templates.get(name)
        if found is None:
            raise InputError(f"the model has chat templates {sorted(self._templates)}, but no 'default'")
        return found


def _unusable(error: InputError) -> str:
    return f"the model's chat template cannot be used: {error}: correct it in the model's directory and convert again"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under every name that templates read it by, as transformers hands it on."""
    found = next((message[name] for name in FIELDS if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


class Encoder:
    """What a row feeds the model, with the run's settings and the row's own.

    `warn` is told once of each thing that is probably not as it was meant: prompts that are not wrapped although the
    model has a chat template, keys that it does not read. Raises InputError for settings that the model cannot honour.
    """

    def __init__(
        self, tokenizer: Tokenizer, chat: Chat, sampling: Sampling, vocab_size: int, warn: Callable[[str], None]
    ):
        self._tokenizer, self._chat, self._vocab_size = tokenizer, chat, vocab_size
        self._settings = {"chat": sampling.chat, "system": sampling.system}
        self._kwargs = sampling.chat_template_kwargs or {}
        self._warn, self._warned = warn, set[str]()
        require(not sampling.chat or chat.sources, f"sampling.chat: the model has no chat template: {_REMEDY}")
        require(not sampling.chat or not chat.error, f"sampling.chat: {chat.error}")
        require(sampling.chat or sampling.system is None, "sampling.system needs sampling.chat: add --chat")
        require(not self._kwargs or chat.sources, "sampling.chat_template_kwargs: the model has no chat template")
        self._say_unread(self._kwargs)

    def __call__(self, prompt: Prompt) -> list[int]:
        """The row's token ids. Raises InputError, which is that row's error."""
        settings = self._settings | prompt.sampling
        if prompt.messages is None and (not settings["chat"] or prompt.token_ids is not None):
            self._check_plain(prompt)
            return prompt_token_ids(self._tokenizer, prompt.prompt, prompt.token_ids, self._vocab_size)
        asked = Asked(**prompt.beside, kwargs=self._kwargs | (prompt.sampling.get("chat_template_kwargs") or {}))
        messages = conversation(prompt, settings["system"], self._chat.parts_alone)
        self._say_what_is_lost(prompt, asked)
        ids = self._tokenizer.encode(self._chat.render(messages, asked), add_special_tokens=False)
        return checked_ids(ids, self._vocab_size, "the tokenizer's ids")

    def _check_plain(self, prompt: Prompt) -> None:
        """Of a row that goes to the model without a template."""
        for name in ("system", "chat_template_kwargs"):
            asked = prompt.sampling.get(name) is not None and prompt.token_ids is None
            require(not asked, f"{name} needs chat: the run is without --chat")
        if self._chat.sources and prompt.token_ids is None:
            self._say(_UNWRAPPED)

    def _say_what_is_lost(self, prompt: Prompt, asked: Asked) -> None:
        self._say_unread([name for name in ("tools", "documents") if getattr(asked, name)] + list(asked.kwargs or {}))
        if self._chat.parts_alone and any(isinstance(one.get("content"), str) for one in prompt.messages or ()):
            self._say(_TEXT_LOST)

    def _say_unread(self, names: Iterable[str]) -> None:
        for name in names:
            if self._chat.sources and not self._chat.reads(name):
                self._say(f"the model's chat template does not read {name!r}: it changes nothing")

    def _say(self, message: str) -> None:
        if message not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(message)
            self._warn(message)


def encoder_of(
    checkpoint: OpenModel,
    tokenizer: Tokenizer,
    sampling: Sampling,
    date: datetime,
    warn: Callable[[str], None],
    helper: Helper | None = None,
) -> Encoder:
    """A checkpoint's way from rows to token ids. Raises InputError for what its tokenizer or template cannot honour."""
    chat = Chat(checkpoint.tokenizer, tokenizer.special_tokens, date, helper)
    return Encoder(tokenizer, chat, sampling, checkpoint.shape.vocab_size, warn)


def conversation(prompt: Prompt, system: str | None, as_parts: bool = False) -> list[dict[str, Any]]:
    """The row's messages, or its prompt as a user's; `system` goes before those that begin with none of their own.

    `as_parts`: what is put into a message here is a content part.
    """

    def said(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}

    messages = prompt.messages or [said("user", prompt.prompt)]
    begins = messages[0].get("role") in ("system", "developer")
    return messages if system is None or begins else [said("system", system), *messages]


def tells_date(files: Mapping[str, bytes]) -> bool:
    """Whether what a template makes depends on the date."""
    return any("strftime_now" in source for source in template_sources(files).values())


def template_sources(files: Mapping[str, bytes]) -> dict[str, str]:
    """The chat templates among a tokenizer's files by name, as transformers finds them. Raises InputError for damaged ones.

    Those in files of their own stand before that of tokenizer_config.json, and chat_template.json, which transformers
    reads with processors alone, comes last.
    """
    if "chat_template.jinja" in files or MORE_TEMPLATES in files:
        more: Any = _json_file(files, MORE_TEMPLATES)
        default = {"default": _decoded(files, "chat_template.jinja")} if "chat_template.jinja" in files else {}
        return _checked_sources(default | more, MORE_TEMPLATES)
    for name in ("tokenizer_config.json", "chat_template.json"):
        settings = _json_file(files, name)
        found = settings.get("chat_template") if isinstance(settings, dict) else None
        if isinstance(found, list):
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        if found is not None:
            return _checked_sources(found if isinstance(found, dict) else {"default": found}, name)
    return {}


def _checked_sources(found: dict[str, Any], file: str) -> dict[str, str]:
    for name, source in found.items():
        texts = isinstance(name, str) and isinstance(source, str)
        require(texts, f"the checkpoint's {file}: its chat_template {str(name)[:40]!r} is not a text")
    return found


def _json_file(files: Mapping[str, bytes], name: str) -> object:
    try:
        return json.loads(_decoded(files, name)) if name in files else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"the checkpoint's {name} is not JSON: {str(error)[:200]}") from error


def _decoded(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the checkpoint's {name} is not UTF-8: {error}") from error
