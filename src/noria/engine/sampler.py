"""From logits to token ids and log-probabilities. Each row is sampled by its own settings and its own random number,
whatever rides beside it.

Legend: S samples, V vocab, C rows of a chunk. Knows nothing of groups, ranks or text.
"""

from dataclasses import replace

import numpy as np
import torch

from noria.engine.masking import masking
from noria.engine.row_settings import RowSettings, SlotColumns, edits_of
from noria.kernels import drawing
from noria.limits import DRAW_ELEMENTS, DRAW_NBYTES
from noria.masks import Masks
from noria.step import NO_TOKEN, NONE_LEFT, Result, Step

EDITED_ELEMENTS = DRAW_NBYTES // 8  # logits in float32 that settings edit at a time, beside their own


class Sampler:
    """The settings of the rows in flight, by slot, and the draw. Nothing here waits for the device.

    Rows that take the most likely token and ask for nothing else are not kept: they cost one maximum. by_kernels: tokens of
    half precisions are drawn by kernels that compute a row in an order of its own; see kernels/drawing.py: refuses.
    """

    def __init__(self, device: torch.device, by_kernels: bool = False):
        self._device, self._by_kernels, self._columns = device, by_kernels, SlotColumns()
        exact = torch.empty(0, dtype=torch.float64, device=device)
        ids = torch.empty(0, dtype=torch.int64, device=device)
        self.nothing = Result(ids, exact, ids.view(0, 0), exact.view(0, 0), exact)  # of no samples
        self._settings: dict[int, RowSettings] = {}
        self._following: dict[int, RowSettings] = {}  # those whose tokens must be known: for penalties, bad words

    def apply(self, step: Step) -> None:
        """Takes over the changes of slots that a header carries."""
        for slot in step.released:
            self._columns.drop(slot)
            self._settings.pop(slot, None)
            self._following.pop(slot, None)
        for admitted in step.admitted:
            settings = RowSettings.from_header(admitted.sampling)
            self._columns.put(admitted.slot, settings)
            if not settings.greedy or settings.logprobs >= 0:
                self._settings[admitted.slot] = settings
            if settings.follows:
                self._following[admitted.slot] = settings

    def count(self, step: Step) -> None:
        """Takes the tokens of a step, prompt and generated, where a row's logits depend on them. Before its samples."""
        if not self._following:
            return
        ends = np.cumsum(step.counts).tolist()
        for slot, end, count, position in zip(
            step.slots.tolist(), ends, step.counts.tolist(), step.positions.tolist(), strict=True
        ):
            if settings := self._following.get(slot):
                settings.add(step.token_ids[end - count : end].tolist(), position)

    def top(self, slots: np.ndarray) -> int:
        """The most of the likely ids that any of these rows asks for; -1 if none asks for log-probabilities."""
        if not self._settings:
            return -1
        return max((self._settings[slot].logprobs for slot in slots.tolist() if slot in self._settings), default=-1)

    def sample(
        self,
        logits: torch.Tensor,
        slots: np.ndarray,
        uniforms: np.ndarray,
        positions: np.ndarray,
        top: int = -1,
        masks: Masks | None = None,
    ) -> Result:
        """A result of tensors, for logits [S, V] of these rows, whose next token is generated as number `positions` [S] of the
        sequence; `top`: as `self.top` says for all rows of the step; `masks`: what some of these samples may be."""
        settings = {row: self._settings[slot] for row, slot in enumerate(slots.tolist()) if slot in self._settings}
        if self._draws_by_kernels(logits):
            columns = np.column_stack([self._columns.of(slots), uniforms])
            ids = self._by_kernels_drawn(logits, columns, settings, positions, masks)
        else:
            ids = self._plainly_drawn(logits, settings, uniforms, positions, masks)
        if top < 0:
            return replace(self.nothing, token_ids=ids)
        rows = [row for row, one in settings.items() if one.logprobs >= 0]
        return self._with_logprobs(logits, ids, rows, min(top, logits.shape[1]))

    def _plainly_drawn(
        self,
        logits: torch.Tensor,
        settings: dict[int, RowSettings],
        uniforms: np.ndarray,
        positions: np.ndarray,
        masks: Masks | None,
    ) -> torch.Tensor:
        """[S] ids by logits [S, V], of which these rows have settings."""
        ids = greedy(logits)
        for chunk in self._chunks([row for row, one in settings.items() if not one.greedy], logits.shape[1]):
            index = self._put(np.array(chunk))
            chosen = [settings[row] for row in chunk]
            scores = logits[index].double()
            self._edit(scores, chunk, chosen, positions[chunk], masks)
            found = self._choose(scores, chosen, uniforms[chunk])
            found = torch.where(found == NO_TOKEN, NONE_LEFT, found)
            ids[index] = torch.where(ids[index] == NO_TOKEN, NO_TOKEN, found)
        return ids

    def _draws_by_kernels(self, logits: torch.Tensor) -> bool:
        return self._by_kernels and logits.dtype in drawing.SHIFTS

    def _by_kernels_drawn(
        self,
        logits: torch.Tensor,
        columns: np.ndarray,
        settings: dict[int, RowSettings],
        positions: np.ndarray,
        masks: Masks | None,
    ) -> torch.Tensor:
        """The same by kernels, of which columns [S, drawing.COLUMNS] are the arguments; what is edited is float32."""
        ids = torch.empty(len(logits), dtype=torch.int64, device=self._device)
        edited = [row for row, one in settings.items() if one.edited]
        raw = columns.copy()
        raw[edited, 0] = 0  # at first the most likely one, which tells whether logits are finite
        drawing.draw(logits, self._put(raw), ids)
        for chunk in self._chunks(edited, logits.shape[1], EDITED_ELEMENTS):
            scores = logits[self._put(np.array(chunk))].float()
            self._edit(scores, chunk, [settings[row] for row in chunk], positions[chunk], masks)
            drawing.draw(scores, self._put(columns[chunk]), ids, self._put(np.array(chunk, np.int32)))
        return ids

    def score(self, logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """[P] float64 log-probabilities of token_ids [P] by logits [P, V]."""
        if self._draws_by_kernels(logits):
            rows = torch.arange(len(logits), dtype=torch.int32, device=self._device)
            scores = self.nothing.logprobs.new_empty(len(logits))
            drawing.log_probabilities(logits, rows, token_ids, scores, self.nothing.top_ids, self.nothing.top_logprobs)
            return scores
        size = max(1, DRAW_ELEMENTS // logits.shape[1])
        chunks = zip(logits.split(size), token_ids.split(size), strict=True)
        return torch.cat([_pick(torch.log_softmax(part.double(), dim=-1), ids) for part, ids in chunks])

    def _edit(
        self,
        scores: torch.Tensor,
        rows: list[int],
        settings: list[RowSettings],
        positions: np.ndarray,
        masks: Masks | None,
    ) -> None:
        """Changes scores [C, V] of these rows of the samples as their settings and then their masks say."""
        for edit in edits_of(settings, positions, scores.shape[1]):
            edit(scores.view(-1), self._put)
        for edit in masking(masks, rows, scores.shape[1]) if masks is not None else ():
            edit(scores.view(-1), self._put)

    def _choose(self, scores: torch.Tensor, settings: list[RowSettings], uniforms: np.ndarray) -> torch.Tensor:
        """[C] ids by scores [C, V] float64, which are written over."""
        ids = greedy(scores)
        rows = [row for row, one in enumerate(settings) if one.temperature > 0]
        if not rows:
            return ids
        index = self._put(np.array(rows))

        def column(key: str, dtype: type) -> torch.Tensor:
            return self._put(np.array([getattr(settings[row], key) for row in rows], dtype))

        excluding = np.flatnonzero([_excludes(settings[row]) for row in rows])
        drawn = draw(
            scores if len(rows) == len(settings) else scores[index],
            column("temperature", np.float64),
            column("top_k", np.int64),
            column("top_p", np.float64),
            column("min_p", np.float64),
            self._put(uniforms[rows]),
            None if len(excluding) == len(rows) else self._put(excluding),
        )
        ids[index] = torch.where(ids[index] == NO_TOKEN, NO_TOKEN, drawn)
        return ids

    def _with_logprobs(self, logits: torch.Tensor, ids: torch.Tensor, rows: list[int], top: int) -> Result:
        """ids [S] with logprobs [S], top_ids and top_logprobs [S, top] (none without any): of the raw distribution,
        before penalties, temperature and truncation."""
        count, none = len(ids), self.nothing
        found = replace(none, token_ids=ids, logprobs=none.logprobs.new_full((count,), torch.nan))
        if top:
            top_logprobs = none.top_logprobs.new_full((count, top), torch.nan)
            found = replace(found, top_ids=none.top_ids.new_full((count, top), NO_TOKEN), top_logprobs=top_logprobs)
        if self._draws_by_kernels(logits):
            of_rows = self._put(np.array(rows, np.int32))
            drawing.log_probabilities(logits, of_rows, ids, found.logprobs, found.top_ids, found.top_logprobs)
            return found
        for chunk in self._chunks(rows, logits.shape[1]):
            index = self._put(np.array(chunk))
            raw = torch.log_softmax(logits[index].double(), dim=-1)
            found.logprobs[index] = _pick(raw, ids[index].clamp(min=0))
            if top:
                found.top_logprobs[index], found.top_ids[index] = raw.topk(top, dim=-1)
        return found

    def _chunks(self, rows: list[int], vocab_size: int, elements: int = DRAW_ELEMENTS) -> list[list[int]]:
        size = max(1, elements // vocab_size)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _put(self, array: np.ndarray) -> torch.Tensor:
        """The array on the device, in a copy that the host does not wait for."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """[S] the most likely id of each row of logits [S, V]; NO_TOKEN where a logit is NaN or all are infinite."""
    best, ids = logits.max(dim=-1)
    return torch.where(torch.isfinite(best), ids, NO_TOKEN)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniforms: torch.Tensor,
    excluding: torch.Tensor | None = None,
) -> torch.Tensor:
    """[S] ids drawn by the inverse of the cumulative distribution, in order of ids, summed in float64.

    Temperature first, then top_k (0: all), then top_p on what top_k left, then min_p, as in transformers. All arguments
    are [S], but for `excluding`: the rows whose top_k, top_p or min_p may exclude an id, which alone are sorted (None: all).
    """
    # The largest becomes 0, which no temperature, however small, turns into infinity.
    scaled = (logits.double() - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    if excluding is None:
        scaled = truncate(scaled, top_k, top_p, min_p)
    elif len(excluding):
        limits = (limit[excluding] for limit in (top_k, top_p, min_p))
        scaled.index_copy_(0, excluding, truncate(scaled[excluding], *limits))
    probabilities = torch.softmax(scaled, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).to(torch.uint8).argmax(dim=-1)
    return torch.minimum(ids, last)


def truncate(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """[S, V] scaled logits with -inf where top_k, top_p or min_p exclude an id.

    top_p keeps the smallest set of most likely ids whose probability reaches it, never none (nucleus sampling,
    Holtzman et al. 2019). min_p keeps ids at least that times as likely as the most likely one (Nguyen et al. 2024).
    """
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    excluded = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    weights = (ordered - ordered[:, :1]).exp().masked_fill(excluded, 0)  # whole numbers where all are as likely
    cumulative = weights.cumsum(dim=-1)
    enough = cumulative - weights >= top_p[:, None] * cumulative[:, -1:]
    excluded |= enough & (rank > 0) & (top_p < 1)[:, None]
    excluded |= weights < min_p[:, None]
    return scaled.masked_fill(torch.zeros_like(excluded).scatter_(-1, order, excluded), -torch.inf)


def _excludes(row: RowSettings) -> bool:
    return row.top_k > 0 or row.top_p < 1 or row.min_p > 0


def _pick(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[S] the value of each row of values [S, V] at its id."""
    return values.gather(1, ids[:, None])[:, 0]
