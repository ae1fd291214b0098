"""The table of all keys of a run: what `noria help keys` prints. It is made from the fields of the run file."""

import re
import shutil
import sys
from dataclasses import Field, fields
from typing import Any, NamedTuple

from noria.commands.flags import flag_of, metavar
from noria.config import SECTIONS, Config
from noria.sampling import ROW_KEYS
from noria.tools.keys import types_of

# What vLLM calls the same setting, where its name is another one.
_OTHER_NAMES = {
    "prompts": "input_file",
    "output": "output_file",
    "max_context": "max_model_len",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "step_tokens": "max_num_batched_tokens",
    "weights": "cpu_offload_gb",
    "gpu_memory": "gpu_memory_utilization",
    "random_weights": "load_format",
}
# What vLLM has by the same name.
_SAME_NAMES = frozenset(
    "model dtype generation_config temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty"
    " logit_bias seed n stop stop_token_ids include_stop_str_in_output skip_special_tokens bad_words allowed_token_ids"
    " truncate_prompt_tokens ignore_eos chat_template_kwargs logprobs prompt_logprobs"
    " structured_outputs thinking_token_budget kv_cache_dtype".split()
)
VLLM = {**{name: name for name in _SAME_NAMES}, **_OTHER_NAMES}

HEADER = ("section", "key", "flag", "type", "row", "vLLM", "default", "meaning")
_WIDTHS = (9, 26, 28, 16, 3, 26, 20)  # of the columns before the last one; a longer text moves what follows it


class Key(NamedTuple):
    """A line of the table, as texts."""

    section: str  # of the run file; "-" for its top
    name: str
    flag: str
    type: str
    row: str  # "yes" if a row of the prompts may have it
    vllm: str
    default: str
    meaning: str


def table() -> list[Key]:
    """Every key of a run, in the order of the run file's sections."""
    groups = {"": Config, **SECTIONS}
    return [
        _line(section, kind, key) for section, kind in groups.items() for key in fields(kind) if key.name not in groups
    ]


def text(width: int | None = None) -> str:
    """The table, a line a key. `width`: of a terminal, at which lines are cut."""
    lines = ["  ".join([*map(str.ljust, line[:-1], _WIDTHS), line[-1]]) for line in [HEADER, *table()]]
    return "".join(f"{line[:width].rstrip()}\n" for line in lines)


def write() -> None:
    """Writes the table to stdout: cut at the width of a terminal, whole to a pipe or a file."""
    sys.stdout.write(text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))


def _line(section: str, kind: type, key: Field[Any]) -> Key:
    value = types_of(kind)[key.name]
    choices = "|".join(key.metadata["choices"])
    words, default = _split(key)
    return Key(
        section=section or "-",
        name=key.name,
        flag=flag_of(key.name),
        type="true|false" if value is bool else choices or metavar(key, value),
        row="yes" if section == "sampling" and key.name in ROW_KEYS else "no",
        vllm=VLLM.get(key.name, "-"),
        default=default,
        meaning=words,
    )


def _split(key: Field[Any]) -> tuple[str, str]:
    """A key's words, and the first words on its default."""
    words, _, said = key.metadata["help"].partition(" (default: ")
    if said:
        return words, re.split(r"[;:)]", said)[0]
    if key.name in ("model", "prompts", "output"):
        return words, "required"
    return words, "-" if key.default is None else str(key.default).lower()
