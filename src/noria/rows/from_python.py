"""Prompts as Python programs have them (lists, columns and tables of other libraries), written as JSON lines.

Other libraries are known by what their objects do; none is imported.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from noria.errors import InputError
from noria.tools.writing import open_new

_MISSING = ("<NA>", "NaT")  # of pandas
_KINDS = "texts, rows (dicts), conversations (lists of messages) or lists of token ids"


def write_prompts(prompts: Any, path: Path) -> int:
    """Writes a line for each prompt: an item of a list or of a column (Series, Dataset["text"], an array of Arrow), or a
    row of a table (DataFrame of pandas or polars, Dataset, Table). Returns their number.

    A text becomes `prompt`, a list of dicts `messages`, a list of numbers `token_ids`, a dict the row itself. An item that
    is none of them is written as it is: the run makes it a row in error. Raises InputError for what cannot be written.
    """
    count = 0
    with open_new(path) as file:
        for count, item in enumerate(_items(prompts), 1):
            try:
                line = json.dumps(_row(item), allow_nan=False)  # lone surrogates as escapes
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(f"prompts[{count - 1}] cannot be written as JSON: {str(error)[:200]}") from error
            file.write(line.encode() + b"\n")
    return count


def _items(prompts: Any) -> Iterator[Any]:
    if isinstance(prompts, str | bytes):
        raise InputError(
            f"prompts is {prompts[:40]!r}, one text: give a list of {_KINDS}, or pathlib.Path(...) for a file of prompts"
        )
    if isinstance(prompts, Mapping):
        keys = ", ".join(map(repr, list(prompts)[:4]))
        raise InputError(f"prompts is a dict (of {keys}): give a list of rows, or one split of a data set")
    if hasattr(prompts, "iter_rows"):  # a table of polars
        return iter(prompts.iter_rows(named=True))
    if hasattr(prompts, "to_batches"):  # a table of Arrow
        return chain.from_iterable(batch.to_pylist() for batch in prompts.to_batches())
    if hasattr(prompts, "itertuples"):  # a table of pandas
        names = [str(name) for name in prompts.columns]
        return (dict(zip(names, row, strict=True)) for row in prompts.itertuples(index=False, name=None))
    if not isinstance(prompts, Iterable):
        raise InputError(f"prompts is of type {type(prompts).__name__}: give a list of {_KINDS}")
    return iter(prompts)


def _row(item: Any) -> dict[str, Any]:
    value = plain(item)
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return {"messages": value}
    return {"token_ids" if isinstance(value, list) else "prompt": value}


def plain(value: Any) -> Any:
    """The value as JSON has it: arrays and tensors as lists, times as texts; null where a table has nothing."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if type(value).__name__ in ("NAType", "NaTType") and str(value) in _MISSING:
        return None
    for convert in ("as_py", "tolist", "to_list", "isoformat"):  # scalars of Arrow; arrays; columns of polars; times
        if hasattr(value, convert):
            return plain(getattr(value, convert)())
    raise TypeError(f"a value is of type {type(value).__name__}")
