"""A chat template that nobody trusts: it is rendered by a helper, a process with limits (noria.rows.rendering).

A template without an end, or one that takes all memory, costs the row that it renders. Knows nothing of chats.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from noria.errors import InputError
from noria.tools.helper import Failed, Helper
from noria.tools.helper_process import Limits

MAX_SOURCE = 2**18  # characters; the largest that are published have some 30,000
LIMITS = Limits(memory_nbytes=2**30, cpu_seconds=20, wall_seconds=120, answer_nbytes=2**26)


class TemplateError(InputError):
    """A template that cannot be rendered: the message says why."""


def template_helper() -> Helper:
    """Renders templates. Not started: the first rendering does that."""
    return Helper("noria.rows.rendering", LIMITS, ("jinja2", "markupsafe"))


class TemplateStopped(TemplateError):
    """A rendering that had to be ended, or refused because too many were."""


class Template:
    """A template that `helper` renders. `now` is the date that it is told, always the same."""

    def __init__(self, source: str, now: datetime, helper: Helper | None = None):
        self.source, self._now = source, now.isoformat()
        self._helper = helper or template_helper()

    def check(self) -> None:
        """Raises TemplateError for a template that can render nothing."""
        self._ask(None)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text that the template makes of JSON-like variables. Raises TemplateError."""
        return self._ask(dict(variables))

    def _ask(self, variables: Mapping[str, Any] | None) -> str:
        if len(self.source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(self.source)} characters, at most {MAX_SOURCE} are read")
        refused = bool(self._helper.given_up)
        try:
            said = self._helper.ask({"source": self.source, "now": self._now, "variables": variables})
        except Failed as failure:
            if refused:
                raise TemplateStopped(
                    f"conversations are refused: the chat template was stopped too often: {failure}: correct it in the"
                    " model's directory and convert again"
                ) from None
            raise TemplateStopped(f"the chat template was stopped: {failure}") from None
        if "error" in said:
            raise TemplateError(f"the chat template cannot be rendered{said['error']}")
        return said["text"]
