"""Reads all prompts of a run as the run itself would, without running it: what is wrong with them, how large they are.

Knows no devices, no ranks and no files but the prompts'.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from noria.output.outcome import Reasons
from noria.rows.making import Maker, Source
from noria.rows.prompts import Prompt
from noria.rows.sequence import Sequence
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling

SHOWN = 10  # bad rows that are told one by one
LOOKED_AT = 1000  # rows before a model is loaded: where none of them can run, none is likely to
_ROW_NBYTES = 200  # of a row's columns beside its texts and tokens
_TOKEN_NBYTES = 12  # a token id and its text


@dataclass(frozen=True)
class ModelLimits:
    """What a prompt is held against: the model's. Room in the cache is known only where there are ranks."""

    max_positions: int
    vocab_size: int
    most_pages: int = 2**62
    end_words: str = ""


@dataclass
class Findings:
    """Of the prompts of a run. `wrong` are the first rows that cannot run, `nbytes` what the output will have at most."""

    num_rows: int = 0
    num_wrong: int = 0
    num_tokens: int = 0
    num_new: int = 0
    longest: int = 0
    longest_row: int = 0
    nbytes: int = 0
    wrong: list[tuple[int, str, str]] = field(default_factory=list)  # row, id, what is wrong
    reasons: Reasons = field(default_factory=Reasons)


def findings_of(
    prompts: Iterable[Prompt],
    rows: range,
    encode: Callable[[Prompt], list[int]],
    sampling: Sampling,
    limits: ModelLimits,
    tokenizer: Tokenizer,
    shown: int = SHOWN,
) -> Findings:
    """Holds every prompt of `rows` against the model; keeps the first `shown` wrong ones."""
    found = Findings()

    def wrong(sequence: Sequence) -> None:
        if sequence.sample:
            return
        found.num_wrong += 1
        found.nbytes += _ROW_NBYTES + len(sequence.prompt.prompt.encode(errors="replace"))
        found.reasons.add(sequence.prompt.id, sequence.error)
        if len(found.wrong) < shown:
            found.wrong.append((sequence.prompt.row, sequence.prompt.id, sequence.error))

    mine = (prompt for prompt in prompts if prompt.row in rows)
    maker = Maker(Source(mine, len(rows), encode, wrong, tokenizer), sampling, limits)
    for prompt in mine:
        for sequence in maker.of(prompt)[:1]:
            _add(found, sequence, limits)
    found.num_rows = len(maker.samples)
    return found


def all_wrong(
    prompts: Iterable[Prompt],
    encode: Callable[[Prompt], list[int]],
    sampling: Sampling,
    limits: ModelLimits,
    tokenizer: Tokenizer,
) -> Reasons | None:
    """Why none of the first LOOKED_AT prompts can run; None if one can, or if there is none. Reads up to the first that can."""
    reasons = Reasons()

    def wrong(sequence: Sequence) -> None:
        if not sequence.sample:
            reasons.add(sequence.prompt.id, sequence.error)

    first = islice(prompts, LOOKED_AT)
    maker = Maker(Source(first, LOOKED_AT, encode, wrong, tokenizer), sampling, limits)
    return None if any(map(maker.of, first)) or not reasons.counts else reasons


def _add(found: Findings, sequence: Sequence, limits: ModelLimits) -> None:
    length, sampling = len(sequence.prompt_token_ids), sequence.sampling
    new = min(sampling.most_new_tokens, max(0, limits.max_positions - length))
    found.num_tokens += length
    found.num_new += new * sampling.n
    if length > found.longest:
        found.longest, found.longest_row = length, sequence.prompt.row
    scores = 0 if sampling.logprobs is None else 8 + 12 * sampling.logprobs
    texts = len(sequence.prompt.prompt.encode(errors="replace")) + len(sequence.prompt.extra)
    prompt = texts + length * (12 if sampling.scores_prompt else 4)
    found.nbytes += sampling.n * (_ROW_NBYTES + prompt + new * (_TOKEN_NBYTES + scores))
