"""Which rows an export takes: by status, by finish reason, by a list of ids.

Knows one row after another, nothing of the files that they come from.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noria.errors import InputError, require
from noria.output.schema import Generation
from noria.tools.text import plural, storable

_TOLD = 3  # ids that are told


@dataclass(frozen=True)
class WantedRows:
    """Rows of this status, this finish reason and these ids; None: of any. `ids`: whether each has been met."""

    status: str | None = None
    finish_reason: str | None = None
    ids: dict[str, bool] | None = field(default=None, compare=False)

    def takes(self, row: Generation) -> bool:
        """Whether the row is one of them."""
        return (
            self._has_id(row) and self.status in (None, row.status) and self.finish_reason in (None, row.finish_reason)
        )

    def _has_id(self, row: Generation) -> bool:
        if self.ids is None:
            return True
        # a request of several prompts is meant as a whole: its rows are ID, ID[1], ...
        found = [one for one in (row.id, _request(row)) if one in self.ids]
        self.ids.update(dict.fromkeys(found, True))
        return bool(found)

    @property
    def found_any(self) -> bool:
        """Whether a row had one of the ids."""
        return any((self.ids or {}).values())

    def missing(self) -> str | None:
        """Words for the ids that no row had."""
        left = [id for id, met in (self.ids or {}).items() if not met]
        if not left:
            return None
        shown = ", ".join(map(repr, left[:_TOLD])) + (", ..." if len(left) > _TOLD else "")
        return f"{plural(len(left), 'id')} of {len(self.ids or {}):,} not found: {shown}"


def _request(row: Generation) -> str | None:
    """The request's own id, where the row is one of its prompts."""
    if not row.id.endswith("]") or not row.extra:
        return None
    own = json.loads(row.extra)
    return storable(str(own["custom_id"])) if isinstance(own, dict) and "custom_id" in own else None


def read_ids(path: Path) -> dict[str, bool]:
    """The ids that a file lists, a line each; of a `.jsonl` file the `id` of each object, or the `custom_id`
    of a line of OpenAI's batch.

    Raises InputError for a file that cannot be read, and for a line that has no id.
    """
    try:
        lines = path.read_text("utf-8").split("\n") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"ids {path}: {error}") from error
    if lines is None:
        raise InputError(f"ids {path}: " + ("it is not a regular file" if path.exists() else "there is no such file"))
    listed = ((number, line.removesuffix("\r")) for number, line in enumerate(lines, 1))
    find = _id_of_object if path.suffix == ".jsonl" else lambda _, line: line
    ids = {storable(find(f"{path}, line {number}", line)): False for number, line in listed if line}
    require(ids, f"ids {path}: it lists no id, so no row would be exported: leave --ids out for all rows")
    return ids


def _id_of_object(where: str, line: str) -> str:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    name = "custom_id" if isinstance(found, dict) and ("body" in found or "response" in found) else "id"
    id = found.get(name) if isinstance(found, dict) else None
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise InputError(f"ids {where}: it must be an object with an id, such as a line of noria export: {line[:60]!r}")
    return str(id)
