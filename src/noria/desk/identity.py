"""Which run this is: what rows generated now must have in common with those that are there already.

Reads prompts and finished outputs; generates nothing.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from noria.config import Config
from noria.desk.steering import settled
from noria.errors import InputError, require
from noria.model import OpenModel
from noria.output.agreement import difference, differing
from noria.output.generations import open_generations
from noria.output.schema import STATUS
from noria.output.target import begun_with
from noria.rows.model_sampling import taken
from noria.rows.prompt_files import PromptFiles, content_hash, content_key, extends
from noria.rows.tokenizer import Tokenizer
from noria.sampling import OLD_RULES, OPEN, OPEN_IN_REQUESTS, ROW_KEYS, RULES, Sampling
from noria.tools.values import WHOLE, parse_shard

COLUMNS = ("prompt_column", "id_column", "messages_column")  # they say what a row is


@dataclass(frozen=True)
class Identity:
    """What rows generated now must have in common with those that are there already.

    `sampling`: the run's, with what the model says where the run leaves a key open; `taken`: what that is; `rules`: by
    which the output was begun (output/agreement.py); `header`: all that is compared.
    """

    sampling: Sampling
    taken: dict[str, Any]
    rules: int
    header: dict[str, Any]


def identity(config: Config, files: PromptFiles, checkpoint: OpenModel, dtype: str, tokenizer: Tokenizer) -> Identity:
    """That of a run, beside what lies at its output's place. Raises InputError for sampling keys of the model that are wrong.

    An output of the old rules was begun without the model's keys and with a seed that was drawn: what the run leaves open
    is what that output says.
    """
    there = None if config.job.overwrite else begun_with(config.output)
    begun = there or {"rules": RULES}
    rules = int(begun.get("rules", OLD_RULES))
    if rules > OLD_RULES:
        found = taken(checkpoint.generation_config, config.sampling)
        # What stays open has another default in OpenAI's batch lines than in rows.
        said = {name: value for name, value in OPEN.items() if name not in OPEN_IN_REQUESTS} | found
    else:
        found, said = {}, {name: begun.get(f"sampling.{name}", value) for name, value in OPEN.items()}
    sampling = replace(config.sampling, **{name: said[name] for name in config.sampling.left_open if name in said})
    sampling = settled(sampling, checkpoint, tokenizer, there or {})
    return Identity(sampling, found, rules, _header(config, files, sampling, rules, checkpoint.header_hash, dtype))


def _header(
    config: Config, files: PromptFiles, sampling: Sampling, rules: int, checkpoint_hash: str, dtype: str
) -> dict[str, Any]:
    keys = {f"sampling.{name}": getattr(sampling, name) for name in (*ROW_KEYS, "reasoning_markers")}
    shard = "{}/{}".format(*parse_shard(config.job.shard or WHOLE))
    prompts = content_key(files, content_hash(files))
    keys = {name: getattr(config, name) for name in (*COLUMNS, "max_context", "kv_cache_dtype", "products")} | keys
    return {"rules": rules, "prompts": prompts, "checkpoint": checkpoint_hash, "dtype": dtype, "shard": shard, **keys}


def check_finished(
    config: Config, files: PromptFiles, header: Mapping[str, Any], num_rows: int, mended: bool = False
) -> bool:
    """Whether the finished output has rows to generate still: new ones of longer prompts, those that a limit left out, or
    errors to be tried again. `num_rows`: of the prompts, as many as this run reads; `mended`: they are accepted as they are.

    Raises InputError if it is that of another run.
    """
    with open_generations(config.output) as output:
        theirs = json.loads(output.attrs.get("header", "{}"))
        limited = output.attrs.get("prompt_rows", num_rows) < num_rows
        added = limited and mended and not config.job.extend and "limit" not in tomllib.loads(output.attrs["run_file"])
        require(not added, f"prompts {files} have more rows than {config.output} was made of: add --extend")
        errors = bool((output.column("status") == STATUS.index("error")).any())
    extended = config.job.extend and theirs.get("prompts") != header["prompts"] and extends(files, theirs["prompts"])
    if extended or mended:
        theirs["prompts"] = header["prompts"]
    either = () if None not in (theirs.get("sampling.seed"), header["sampling.seed"]) else ("sampling.seed",)
    names = differing(theirs, header, but=("chat.date", *either))
    if names:
        different = [difference(name, theirs, "there", header) for name in names]
        raise another_run(config.output, different)
    return extended or mended or limited or (errors and config.job.retry_errors)


def another_run(place: str | Path, different: list[str]) -> InputError:
    """The refusal to mix rows of two runs, with a line of each difference."""
    return InputError(
        f"{place} holds rows of another run: {'; '.join(different)};"
        " give another output, or --overwrite to move that one aside"
    )
