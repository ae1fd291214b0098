"""How long the rest of a run takes: the tokens left of prompts and of answers, each by the time that one of its kind takes.

Knows counts and times, nothing of the rows themselves.
"""

from dataclasses import dataclass

ENOUGH = 3.0  # seconds of a kind's work, from which on what was seen counts and not what was predicted


@dataclass(frozen=True)
class Expected:
    """What a row is likely to take, in tokens of its prompt and new ones, and seconds a token of each where they are known.

    The seconds of steps in which rows decode beside chunks of prompts count as the prompts'. `groups`: steps that are
    under way at once.
    """

    prompt_tokens: float
    new_tokens: float
    prompt_seconds: float | None = None
    new_seconds: float | None = None
    groups: int = 1


@dataclass(frozen=True)
class DoneSoFar:
    """What of a run is done: rows that ended and their new tokens; tokens of all rows, of prompts and new ones."""

    rows: int
    finished_tokens: int
    prompt_tokens: int
    new_tokens: int


class Kind:
    """The seconds and tokens of one kind of work. The longest wait is left out: in the first one kernels were loaded."""

    def __init__(self, predicted: float | None):
        self._predicted, self._seconds, self._tokens = predicted, 0.0, 0.0
        self._longest = 0.0, 0.0

    def took(self, seconds: float, tokens: float) -> None:
        self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
        self._longest = max(self._longest, (seconds, tokens))

    @property
    def seconds(self) -> float | None:
        """Of a token: as seen, until enough was seen as predicted; None: neither is known."""
        seconds, tokens = (
            all - longest for all, longest in zip((self._seconds, self._tokens), self._longest, strict=True)
        )
        return seconds / tokens if seconds >= ENOUGH and tokens > 0 else self._predicted


class WorkLeft:
    """Takes in what each step counted and when, and says how long what is left takes."""

    def __init__(self, expected: Expected):
        self._expected = expected
        self._prompt, self._new = Kind(expected.prompt_seconds), Kind(expected.new_seconds)
        self._filling = expected.groups  # steps that are counted before the first of them is back
        self._last = 0.0

    def step(self, now: float, prompt_tokens: int, new_tokens: int) -> None:
        """A step has set out, with tokens of prompts that it computes or shares, and new ones that came since the one before."""
        if not prompt_tokens and not new_tokens:
            return
        seconds, self._last = now - self._last, now
        if self._filling:
            self._filling -= 1
            return
        # Of a step with both each has the part that it is predicted to have, or by their number.
        prompt, new = float(prompt_tokens), float(new_tokens)
        costs = prompt * (self._expected.prompt_seconds or 0.0), new * (self._expected.new_seconds or 0.0)
        prompt_share, new_share = costs if sum(costs) else (prompt, new)
        part = seconds / (prompt_share + new_share)
        self._prompt.took(prompt_share * part, prompt)
        self._new.took(new_share * part, new)

    def seconds(self, done: DoneSoFar, rows_left: int) -> float | None:
        """What the rows left take, those in flight among them; None while nothing is known of a kind that is left."""
        prompt, new = self._expected.prompt_tokens, self._expected.new_tokens
        if done.finished_tokens:
            # The first rows to finish are the shortest: what all have generated, by the rows that ended, counts those in
            # flight too, as the mean of exponential times does where some are cut off.
            new = max(done.finished_tokens, min(done.new_tokens, done.rows * new)) / done.rows
        prompts = max(rows_left * prompt - max(done.prompt_tokens - done.rows * prompt, 0.0), 0.0)
        answers = max(rows_left * new - max(done.new_tokens - done.rows * new, 0.0), float(rows_left))
        total = 0.0
        for tokens, kind in ((prompts, self._prompt), (answers, self._new)):
            if tokens:
                if kind.seconds is None:
                    return None
                total += tokens * kind.seconds
        return total
