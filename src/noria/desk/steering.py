"""What a run's keys say of its rows' thinking and of what their texts must be: the file of a schema, the model's markers.

Reads that one file, at rank 0. Knows no rows.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from noria.errors import InputError, require
from noria.model import OpenModel
from noria.rows import harmony
from noria.rows.chat import template_sources
from noria.rows.guides import Guides
from noria.rows.reasoning import markers_of
from noria.rows.tokenizer import Tokenizer
from noria.sampling import CONSTRAINTS, Sampling
from noria.structured import MAX_NBYTES, check_structured, from_run
from noria.tools.text import printable

MARKERS = "sampling.reasoning_markers"


def settled(sampling: Sampling, checkpoint: OpenModel, tokenizer: Tokenizer, begun: Mapping[str, Any]) -> Sampling:
    """The run's sampling with its constraint as structured_outputs, and with the markers of its model where it says none.

    `begun`: the header of the output that it goes on with; one that lacks the markers was begun when texts had the
    thinking in them. Raises InputError for a file that holds no schema.
    """
    text = None if sampling.json_schema is None else _schema(Path(sampling.json_schema))
    constraint = from_run(text, sampling.regex, sampling.choice) or sampling.structured_outputs
    markers = sampling.markers
    if sampling.reasoning_markers is None and (not begun or MARKERS in begun):
        sources = template_sources(checkpoint.tokenizer).values()
        markers = markers_of(sources, tokenizer.added_ids)
        if any(harmony.CHANNEL in source for source in sources):
            markers = harmony.MARKERS if harmony.is_spoken(tokenizer.added_ids) else []
    return replace(
        sampling,
        structured_outputs=constraint,
        json_schema=None,
        regex=None,
        choice=None,
        reasoning_markers=markers or None,
    )


def check_constraint(given: Sampling, settled: Sampling, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises InputError, naming the key of the run that was `given`, for a constraint or a budget that no row can have."""
    try:
        Guides(tokenizer, vocab_size, settled).check(settled)
    except InputError as error:
        name = next((one for one in CONSTRAINTS if getattr(given, one) is not None), "thinking_token_budget")
        said = str(error)
        if said.startswith(name):
            raise InputError(f"sampling.{said}") from error
        said = said.partition(": ")[2] if said.startswith("structured_outputs") else said
        raise InputError(f"sampling.{name}: {said}") from error


def _schema(path: Path) -> str:
    """The text of a schema's file."""
    name = f"sampling.json_schema {printable(str(path))}"
    require(path.is_file(), f"{name}: there is no such file" if not path.exists() else f"{name} is not a regular file")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_NBYTES + 1).decode("utf-8-sig")
        require(len(text.encode()) <= MAX_NBYTES, f"{name} has more than {MAX_NBYTES:,} bytes: is it the right file?")
        schema = json.loads(text)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is not JSON: {str(error)[:200]}") from error
    require(isinstance(schema, dict | bool), f"{name} is not a JSON schema: it must be an object")
    check_structured({"json": schema})
    return text
