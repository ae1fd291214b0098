"""What chat_template_kwargs may hold: JSON of bounded size and depth, and no name of the rendering's own. Knows no template."""

import json
from collections.abc import Mapping
from typing import Any

from noria.errors import InputError, require

MAX_KWARGS_LENGTH, MAX_KWARGS_DEPTH = 2**16, 32
# Names of what a rendering is asked for, which transformers' apply_chat_template does not hand on as a template's own.
OWN_OF_TEMPLATES = frozenset(
    "conversation conversations messages tools documents chat_template tokenize add_generation_prompt"
    " continue_final_message padding truncation max_length tokenizer_kwargs sanitize_control_tokens".split()
)


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raises InputError for a key that is the rendering's own, and for what is no JSON of bounded size and depth."""
    for name in kwargs:
        own = name in OWN_OF_TEMPLATES or str(name).startswith("return_")
        require(
            not own,
            f"sampling.chat_template_kwargs has {str(name)[:40]!r}, which no template gets by this key: take it"
            " out; tools, documents and the like are given beside a row's messages",
        )
    require(
        _depth(kwargs) <= MAX_KWARGS_DEPTH,
        f"sampling.chat_template_kwargs is nested deeper than {MAX_KWARGS_DEPTH} levels: make it flatter",
    )
    try:
        size = len(json.dumps(kwargs, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"sampling.chat_template_kwargs is not JSON: {str(error)[:100]}") from error
    require(
        size <= MAX_KWARGS_LENGTH,
        f"sampling.chat_template_kwargs has {size} characters as JSON, at most {MAX_KWARGS_LENGTH} are handed on: make it"
        " smaller",
    )


def _depth(value: object) -> int:
    """How deeply lists and tables are nested, counted no further than it matters."""
    depth, level = 0, [value]
    while level and depth <= MAX_KWARGS_DEPTH:
        inner = [one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, Mapping | list)]
        depth, level = depth + bool(inner), [one for values in inner for one in values]
    return depth
