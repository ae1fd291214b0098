"""Conversations as the token ids that a model was trained on: its chat template around messages and prompts.

A rendering is that of transformers' apply_chat_template with add_generation_prompt. Knows no rows and no schedule.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime

from noria.config import InputError, Sampling, require
from noria.rows.prompts import Prompt
from noria.rows.template import Template
from noria.rows.tokenizer import Tokenizer, checked_ids, prompt_token_ids

_REMEDY = "give `prompt` without sampling.chat, or convert the model from a directory with a chat_template"
_UNWRAPPED = (
    "the model has a chat template, and prompts are fed to it as they are: with --chat each becomes a user's message"
)


class Chat:
    """The chat template of a checkpoint's tokenizer files; `source` is None if they have none.

    `date` is what the template is told the date is: that of the job's first start, whenever a row is rendered. `error`
    says why a template cannot be read ("" for one that can): rows that need none still run.
    """

    def __init__(self, files: Mapping[str, bytes], special_tokens: Mapping[str, str], date: datetime):
        self.source = template_source(files)
        self._special_tokens = dict(special_tokens)
        self._template, self.error = None, ""
        try:
            self._template = None if self.source is None else Template(self.source, date)
        except InputError as error:
            self.error = (
                f"the model's chat template cannot be used: {error}: mend it in the model's directory and convert again"
            )

    def render(self, messages: list[dict]) -> str:
        """The text of a conversation, up to where the model's answer begins. Raises InputError."""
        require(not self.error, self.error)
        if self._template is None:
            raise InputError(f"the model has no chat template: {_REMEDY}")
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        return self._template.render(self._special_tokens | variables)


class Encoder:
    """What a row feeds the model, with the run's settings and the row's own.

    `warn` is told once if prompts are not wrapped although the model has a chat template. Raises InputError for
    settings that the model cannot honour.
    """

    def __init__(
        self, tokenizer: Tokenizer, chat: Chat, sampling: Sampling, vocab_size: int, warn: Callable[[str], None]
    ):
        self._tokenizer, self._chat, self._vocab_size = tokenizer, chat, vocab_size
        self._settings = {"chat": sampling.chat, "system": sampling.system}
        self._warn: Callable[[str], None] | None = warn if chat.source else None
        require(not sampling.chat or chat.source, f"sampling.chat: the model has no chat template: {_REMEDY}")
        require(not sampling.chat or not chat.error, f"sampling.chat: {chat.error}")
        require(sampling.chat or sampling.system is None, "sampling.system needs sampling.chat: add --chat")

    def __call__(self, prompt: Prompt) -> list[int]:
        """The row's token ids. Raises InputError, which is that row's error."""
        settings = self._settings | prompt.sampling
        if prompt.messages is None and (not settings["chat"] or prompt.token_ids is not None):
            own_system = prompt.sampling.get("system") is not None and prompt.token_ids is None
            require(not own_system, "system needs chat: the run is without --chat")
            if self._warn and prompt.token_ids is None:
                self._warn(_UNWRAPPED)
                self._warn = None
            return prompt_token_ids(self._tokenizer, prompt.prompt, prompt.token_ids, self._vocab_size)
        text = self._chat.render(conversation(prompt, settings["system"]))
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return checked_ids(ids, self._vocab_size, "the tokenizer's ids")


def encoder_of(checkpoint, tokenizer: Tokenizer, sampling: Sampling, date: datetime, warn: Callable) -> Encoder:
    """A checkpoint's way from rows to token ids. Raises InputError for what its tokenizer or template cannot honour."""
    chat = Chat(checkpoint.tokenizer, tokenizer.special_tokens, date)
    return Encoder(tokenizer, chat, sampling, checkpoint.shape.vocab_size, warn)


def conversation(prompt: Prompt, system: str | None) -> list[dict]:
    """The row's messages, or its prompt as a user's; `system` goes before those that begin with none of their own."""
    messages = prompt.messages or [{"role": "user", "content": prompt.prompt}]
    begins = messages[0].get("role") in ("system", "developer")
    return messages if system is None or begins else [{"role": "system", "content": system}, *messages]


def tells_date(files: Mapping[str, bytes]) -> bool:
    """Whether what the template makes depends on the date."""
    return "strftime_now" in (template_source(files) or "")


def template_source(files: Mapping[str, bytes]) -> str | None:
    """The chat template among a tokenizer's files, as transformers finds it. Raises InputError for a damaged one."""
    if "chat_template.jinja" in files:
        return _decoded(files, "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            settings = json.loads(_decoded(files, name)) if name in files else {}
        except (ValueError, RecursionError) as error:
            raise InputError(f"the checkpoint's {name} is not JSON: {str(error)[:200]}") from error
        found = settings.get("chat_template") if isinstance(settings, dict) else None
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            require("default" in named, f"the checkpoint's {name} has chat templates {list(named)}, but no 'default'")
            found = named["default"]
        if found is not None:
            require(isinstance(found, str), f"the checkpoint's {name}: its chat_template is no text")
            return found
    return None


def _decoded(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the checkpoint's {name} is not UTF-8: {error}") from error
