"""How long the rows of a run are, from a look at the first of them: what the planner must know of the prompts."""

from itertools import islice

from noria.config import Config
from noria.errors import InputError
from noria.plan.rounds import Workload
from noria.rows.beginnings import BLOCK_TOKENS, Beginnings, PromptBlock
from noria.rows.chat import Encoder
from noria.rows.making import kept_tokens, of_row
from noria.rows.prompt_files import PromptFiles
from noria.rows.prompts import open_prompts
from noria.step import pages_for
from noria.tools.values import shard_rows

LOOKED_AT = 256  # rows: enough for a mean, and read at once
MARGIN = 1.1  # times the pages of the rows looked at are kept for the others


def look(config: Config, files: PromptFiles, max_positions: int, num_rows: int, encode: Encoder) -> Workload:
    """Rows to generate, their mean lengths, and the pages that they reserve; `num_rows` are the prompts of the file.

    Rows that cannot run are left out; without any, the longest that the model takes is assumed.
    """
    rows = shard_rows(config.job.shard, num_rows)
    prompts, new, pages, samples, looked, longest, shared = 0, 0, 0, 0, 0, 0, 0
    beginnings = Beginnings()
    for prompt in islice((one for one in open_prompts(files) if one.row in rows), LOOKED_AT):
        looked += 1
        try:
            ids = encode(prompt) if prompt.error is None else []
            sampling = of_row(prompt.sampling, prompt.request, config.sampling)
            keep = kept_tokens(sampling, max_positions)
        except InputError:
            continue
        ids = ids if keep is None else ids[-keep:]
        length = len(ids)
        if not 0 < length <= max_positions:
            continue
        added = min(sampling.most_new_tokens, max_positions - length)
        if config.pipeline.prefix_sharing and not sampling.scores_prompt:
            shared += _shared(beginnings.enter(ids, prompt.row, sampling.n), sampling.n)
        samples += sampling.n
        prompts, new = prompts + length * sampling.n, new + added * sampling.n
        its_pages = pages_for(length + added)
        pages, longest = pages + sampling.n * its_pages, max(longest, its_pages)
    if not samples:
        return Workload(max(len(rows), 1) * config.sampling.n, max_positions / 2, max_positions / 2)
    whole = looked == len(rows)
    num_samples = samples if whole else max(round(len(rows) * samples / looked), 1)
    total = pages if whole else round(pages / samples * num_samples * MARGIN)
    return Workload(num_samples, prompts / samples, max(new / samples, 1.0), total, longest, shared / samples, whole)


def _shared(blocks: list[PromptBlock], samples: int) -> int:
    """Tokens that the samples of a prompt need not compute: what rows before it have, and what its first sample has."""
    before = sum(block.waiting > samples for block in blocks)
    return BLOCK_TOKENS * (before + (samples - 1) * len(blocks))
