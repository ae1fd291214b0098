"""An output that an earlier version began: whether its other rows may be rendered by today's rules, and its texts anew.

What else the old rules are stands in output/agreement.py. Knows no ranks and no devices.
"""

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from noria.config import Config
from noria.desk.earlier import beside, chat_date, sealed_rows
from noria.desk.identity import Identity
from noria.desk.records import text_again
from noria.errors import InputError
from noria.output.agreement import differing
from noria.output.schema import Generation
from noria.output.target import begun_with
from noria.rows.making import of_row
from noria.rows.prompt_files import PromptFiles, extends
from noria.rows.prompts import Prompt, open_prompts
from noria.rows.tokenizer import Tokenizer
from noria.sampling import OLD_RULES, Sampling
from noria.tools.values import shard_rows

Encode = Callable[[Prompt], list[int]]


def check_rendering(
    config: Config, files: PromptFiles, own: Identity, num_rows: int, encoder: Callable[[datetime], Encode]
) -> list[str]:
    """Lines for the user of an output of the old rules; none of another.

    `encoder` renders rows as today's rules have it, at a date. Raises InputError if rows are not begun and any of those
    that are would get other tokens today: one output would hold rows of two kinds.
    """
    begun = None if config.job.overwrite else begun_with(config.output)
    if own.rules > OLD_RULES or begun is None or not _same_run(config, files, begun, own.header):
        return []
    rows, encode = shard_rows(config.job.shard, num_rows), encoder(chat_date(begun))
    prompts = (prompt for prompt in open_prompts(files) if prompt.row in rows)
    other, num_new = None, 0
    for prompt, sealed in beside(prompts, sealed_rows(config, errors=not config.job.retry_errors)):
        num_new += not sealed
        other = other or _other_tokens(prompt, sealed, encode)
        if other and num_new:
            raise InputError(
                f"{config.output} was begun by an earlier version, which tokenized its prompts differently ({other}), and"
                " new rows would not match the old ones: finish it with that version, or --overwrite moves it"
                " aside and starts again"
            )
    return [
        f"{config.output} was begun by an earlier version: rows keep their tokens, their random draws and a seed of"
        f" {own.sampling.seed}, nothing is taken from the model's generation_config.json, texts are decoded again"
    ]


def texts_again(
    prompts: Iterable[Prompt], sampling: Sampling, tokenizer: Tokenizer
) -> Callable[[Generation], Generation]:
    """What gives finished rows, asked in the order of `prompts`, the texts that today's rules make of their tokens."""
    remaining = iter(prompts)
    current: Prompt | None = None

    def again(row: Generation) -> Generation:
        nonlocal current
        prompt = current
        while prompt is None or prompt.row < row.row:
            prompt = current = next(remaining)
        if row.status == "done":
            try:
                its = of_row(prompt.sampling, False, sampling, OLD_RULES)
                row.text = text_again(
                    tokenizer, row.prompt_token_ids.tolist(), row.token_ids.tolist(), its, row.finish_reason
                )
            except InputError:
                pass  # the text that there is stays: a finished row is never lost
        return row

    return again


def _same_run(config: Config, files: PromptFiles, begun: dict[str, Any], header: dict[str, Any]) -> bool:
    """Whether the run is that of the output, perhaps with longer prompts; another is refused elsewhere, with its reasons."""
    other = differing(begun, header, but=("chat.date", "sampling.seed"))
    longer = config.job.extend and other == ["prompts"] and extends(files, begun["prompts"])
    return not other or longer


def _other_tokens(prompt: Prompt, sealed: list[Generation], encode: Encode) -> str:
    """In words, how today's prompt differs from the one that is sealed, in its id or its tokens; "" if it does not."""
    # The error of a line that is several rows today has no tokens, and moves the rows behind it.
    for one in sealed:
        if one.id not in (prompt.id, str(prompt.row)):
            return f"row {prompt.row}: {one.id} there, {prompt.id} now"
    stored = next((one.prompt_token_ids.tolist() for one in sealed if len(one.prompt_token_ids)), None)
    if stored is None:
        return ""
    try:
        found = encode(prompt) if prompt.error is None else prompt.error
    except InputError as error:
        found = str(error)
    if found == stored:
        return ""
    today = found if isinstance(found, str) else f"{len(found)} tokens"
    return f"row {prompt.row}, {prompt.id}: {len(stored)} tokens there, {today} now"
