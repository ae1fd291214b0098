"""Which run this is: what rows generated now must have in common with those that are there already.

Reads prompts and finished outputs; generates nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict

from noria.config import WHOLE, Config, InputError, parse_shard
from noria.files.agreement import difference, differing
from noria.files.generations import open_generations
from noria.files.schema import STATUS
from noria.rows.prompts import open_prompts
from noria.rows.source import Source, content_key, extends

COLUMNS = ("prompt_column", "id_column", "messages_column")  # they say what a row is


def header(config: Config, prompts_hash: str, checkpoint_hash: str, dtype: str) -> dict:
    """What rows generated now must have in common with those that are there already."""
    sampling = {f"sampling.{name}": value for name, value in asdict(config.sampling).items()}
    source = Source.of(config)
    shard = "{}/{}".format(*parse_shard(config.job.shard or WHOLE))
    prompts = content_key(source, prompts_hash)
    named = {name: getattr(config, name) for name in COLUMNS}
    return {"prompts": prompts, "checkpoint": checkpoint_hash, "dtype": dtype, "shard": shard, **named, **sampling}


def check_shard(config: Config) -> None:
    """Raises InputError if a row is sampled by its own keys and no seed says how: each shard would draw its own."""
    if config.job.shard is None or config.sampling.seed is not None:
        return
    for prompt in open_prompts(Source.of(config)):
        if prompt.sampling.get("temperature", 0) > 0 and prompt.sampling.get("seed") is None:
            raise InputError(
                f"job.shard is {config.job.shard} and row {prompt.row} of {config.prompts} is sampled (its temperature"
                f" is {prompt.sampling['temperature']:g}) without a seed: give all shards the same sampling.seed (--seed 1)"
            )


def check_finished(config: Config, header: Mapping) -> bool:
    """Whether the finished output has rows to generate still: new ones of longer prompts, or errors to be tried again.

    Raises InputError if it is that of another run (a run without a seed takes any).
    """
    with open_generations(config.output) as output:
        theirs = json.loads(output.attrs.get("header", "{}"))
        errors = bool((output.column("status") == STATUS.index("error")).any())
    extended = (
        config.job.extend
        and theirs.get("prompts") != header["prompts"]
        and extends(Source.of(config), theirs["prompts"])
    )
    if extended:
        theirs["prompts"] = header["prompts"]
    either = () if None not in (theirs.get("sampling.seed"), header["sampling.seed"]) else ("sampling.seed",)
    names = differing(theirs, header, but=("chat.date", *either))
    if names:
        different = [difference(name, theirs, "there", header) for name in names]
        raise another_run(config.output, different)
    return extended or (errors and config.job.retry_errors)


def another_run(place, different: list[str]) -> InputError:
    """The refusal to mix rows of two runs, with a line of each difference."""
    return InputError(
        f"{place} holds rows of another run: {'; '.join(different)};"
        " give another output, or --overwrite to move that one aside"
    )
