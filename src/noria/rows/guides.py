"""What steers a row beside its settings: its thinking, the constraint of its answer, and the masks that come of both.

Masks are made on the CPU of rank 0, which alone knows rows, by a thread beside the step that needs them (masks.py): from the
tokens that the row has when its step is composed. So a row that is taken up again is told its tokens, and goes on the same.
"""

import _thread
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from noria.errors import InputError
from noria.masks import ANY, Masks
from noria.rows import harmony
from noria.rows.constraints import Constraints
from noria.rows.harmony import Channels
from noria.rows.reasoning import Markers, Phase, Reasoning
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling
from noria.structured import kind_of
from noria.tools.text import one_line


@dataclass(frozen=True)
class Want:
    """What a row's next token may be: `forced`, or what its matcher allows (all, without one) and `added` tokens, without
    those `excluded`."""

    forced: int = ANY
    matcher: Any = None
    added: tuple[int, ...] = ()
    excluded: Sequence[int] = ()


class Guide:
    """Steers one row. `matcher`: of its answer, a copy of a compiled one (`copy_of`); `ends`: tokens that end a row.

    untold: tokens of the answer that the matcher has not been told: it is, together with those of other rows, before it makes
    its next mask (`made`).
    """

    def __init__(self, reasoning: Reasoning | Channels | None, matcher: Any, ends: Sequence[int], copy_of: int = 0):
        self.reasoning, self.matcher, self._ends, self.copy_of = reasoning, matcher, ends, copy_of
        self.untold: list[int] = []
        self.turned = False  # whether what it must be told of has changed
        self.error = ""

    @property
    def awaits(self) -> tuple[int, ...] | None:
        """The token ids that it must be told of when they come; None: all."""
        if self.matcher is not None or not isinstance(self.reasoning, Reasoning):
            return None
        return self.reasoning.awaits

    def want(self, num_tokens: int) -> Want | None:
        """For the token after so many; None: it is free."""
        thinking = self.reasoning
        if thinking is not None and thinking.phase is Phase.INSIDE:
            token = thinking.forced(num_tokens)
            if token is not None:
                return Want(token)
            # A row that ended here would not be what it must be.
            return None if self.matcher is None else Want(excluded=self._ends)
        if self.matcher is None:
            return None
        start = thinking.start_token if thinking is not None and thinking.phase is Phase.BEFORE else None
        return Want(matcher=self.matcher, added=() if start is None else (start,))

    def add(self, token_ids: Sequence[int]) -> None:
        """To be told after every new token: all of the row's."""
        thinking = self.reasoning
        if thinking is None or thinking.phase is Phase.AFTER:
            self._consume(token_ids[-1])
            return
        phase = thinking.phase
        before = phase is Phase.BEFORE
        if before and self.matcher is not None and token_ids[-1] != thinking.start_token:
            thinking.decline()
            self._consume(token_ids[-1])
        else:
            thinking.add(token_ids)
        self.turned |= thinking.phase is not phase

    def told(self, token_ids: Sequence[int]) -> bool:
        """Whether it takes these tokens, which an earlier job generated, one after another."""
        so_far: list[int] = []
        try:
            for token_id in token_ids:
                so_far.append(token_id)
                self.add(so_far)
                self._tell()
        except InputError as error:  # of the tokenizer
            self.error = str(error)
        return not self.error

    def _consume(self, token_id: int) -> None:
        if self.matcher is not None:
            self.untold.append(token_id)

    def _tell(self) -> None:
        """Tells the matcher what it has not been told."""
        while self.untold and not self.error:
            if not self.matcher.consume_token(self.untold.pop(0)):
                self.fail()

    def fail(self) -> None:
        """The matcher has given up: it says why."""
        said = one_line(self.matcher.get_error()).partition(" <")[0][:300]
        said = "no token can come next, as where a $ref leads to itself alone" if said == "NoExtensionBias" else said
        self.error = f"structured_outputs: llguidance gave up, because no text fits or its limits are reached: {said}"


class Guides:
    """Makes the guides of a run's rows. `sampling`: the run's, whose reasoning_markers are those of all rows."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, sampling: Sampling):
        self.constraints = Constraints(tokenizer, vocab_size)
        self._tokenizer = tokenizer if tokenizer and tokenizer.vocab_size else None
        self.steering = False  # whether any row so far may be masked
        self._markers = self._marked(sampling.markers)

    def _marked(self, texts: Sequence[str]) -> Markers | harmony.Words | None:
        if not texts or self._tokenizer is None:
            return None
        if [*texts] == harmony.MARKERS and harmony.is_spoken(self._tokenizer.added_ids):
            return harmony.Words(self._tokenizer)
        return Markers(texts, self._tokenizer)

    def check(self, sampling: Sampling, prompt_token_ids: Sequence[int] = ()) -> None:
        """Raises InputError for settings that cannot be honoured, and for a prompt that cannot be read for its markers."""
        if sampling.thinking_token_budget is not None and self._markers is None:
            raise InputError(
                "thinking_token_budget: the model has no markers of its thinking that Noria knows: give reasoning_markers"
            )
        if _asks(sampling):
            self.constraints.matcher(sampling.structured_outputs or {})
        self.reasoning(sampling, prompt_token_ids, False)

    def reasoning(
        self, sampling: Sampling, prompt_token_ids: Sequence[int], continued: bool
    ) -> Reasoning | Channels | None:
        """That of a row; None where nothing is kept apart."""
        if self._markers is None:
            return None
        if isinstance(self._markers, harmony.Words):
            return Channels(self._markers, sampling, prompt_token_ids)
        return Reasoning(self._markers, sampling, prompt_token_ids, self._markers.opened(prompt_token_ids, continued))

    def guide(self, sampling: Sampling, reasoning: Reasoning | Channels | None) -> Guide | None:
        """What steers a row; None where nothing does. Raises InputError."""
        if reasoning is None and not _asks(sampling):
            return None
        self.steering |= steers(sampling)
        matcher, copy_of = self.constraints.copy(sampling.structured_outputs or {}) if _asks(sampling) else (None, 0)
        ends: Iterable[int] = self._tokenizer.end_token_ids if self._tokenizer else ()
        return Guide(reasoning, matcher, sorted({*ends, *sampling.stop_ids}), copy_of)


def _asks(sampling: Sampling) -> bool:
    return bool(sampling.structured_outputs) and kind_of(sampling.structured_outputs or {}) is not None


def steers(sampling: Sampling) -> bool:
    """Whether the tokens of such a row may be masked."""
    return _asks(sampling) or sampling.thinking_token_budget is not None


class MaskMemory:
    """Where the masks of a group's steps lie, one step's after another's: to write to fresh megabytes, page after page, takes
    longer than to make masks."""

    def __init__(self) -> None:
        self._words = np.empty(0, np.int32)

    def of(self, rows: int, words: int) -> np.ndarray:
        """[rows, words] int32, with anything in it; what was given before is lost."""
        if rows * words > len(self._words):
            self._words = np.empty(rows * words * 5 // 4, np.int32)
        return self._words[: rows * words].reshape(rows, words)


class Making:
    """Masks that a thread of its own makes, of samples of a step by their places in it. They are good until `memory` is used
    again, when the step's result is there."""

    def __init__(
        self,
        wants: dict[int, tuple[Guide, Want]],
        constraints: Constraints,
        vocab_size: int,
        memory: MaskMemory | None = None,
    ):
        self._wants, self._constraints, self._vocab_size, self._memory = wants, constraints, vocab_size, memory
        self._masks: Masks | None = None
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        _thread.start_new_thread(self._make, ())  # threading.Thread would wait until it runs

    def done(self) -> bool:
        return self._ended.is_set()

    def result(self) -> Masks:
        """Waits for them. A row whose matcher gave up has no token left; its guide says why."""
        self._ended.wait()
        if self._masks is None:
            raise RuntimeError("masks could not be made") from self._failure
        return self._masks

    def _make(self) -> None:
        try:
            self._masks = made(self._wants, self._constraints, self._vocab_size, self._memory)
        except BaseException as error:  # noqa: BLE001 - whoever waits for them raises it
            self._failure = error
        finally:
            self._ended.set()


def made(
    wants: dict[int, tuple[Guide, Want]], constraints: Constraints, vocab_size: int, memory: MaskMemory | None = None
) -> Masks:
    """The masks of these samples; their bits lie in `memory`."""
    samples = sorted(wants)
    forced = np.array([wants[sample][1].forced for sample in samples], np.int32)
    masked = [wants[sample] for sample in samples if wants[sample][1].forced == ANY]
    # Threads take those that follow one another.
    order = sorted(range(len(masked)), key=lambda row: masked[row][0].copy_of)
    by_matcher = [(masked[row][1].matcher, row) for row in order if masked[row][1].matcher is not None]
    words = constraints.mask_width if by_matcher else -(-vocab_size // 32)
    bits = (memory or MaskMemory()).of(len(masked), words)
    if by_matcher:
        _tell([masked[row][0] for _, row in by_matcher], constraints)
        constraints.executor.unsafe_compute_mask_ptr(by_matcher, bits.ctypes.data, 4 * words, len(masked))
    packed = bits.view(np.uint8)
    for row, (guide, want) in enumerate(masked):
        if want.matcher is None:
            packed[row] = 255
        elif guide.error or want.matcher.is_error():
            guide.fail()
            packed[row] = 0
            continue
        for token_id in want.added:
            packed[row, token_id // 8] |= 1 << token_id % 8
        for token_id in want.excluded:
            packed[row, token_id // 8] &= ~(1 << token_id % 8) & 255
    return Masks(np.array(samples, np.int32), forced, packed)


def _tell(guides: list[Guide], constraints: Constraints) -> None:
    """Tells the matchers of these what they have not been told, beside one another."""
    while behind := [(guide.matcher, guide.untold.pop(0)) for guide in guides if guide.untold]:
        constraints.executor.consume_token_par(behind)  # one that fails stays in error
