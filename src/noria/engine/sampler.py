"""From logits to token ids. Each row is sampled by its own settings and its own random number, whatever rides beside it.

Legend: S samples, V vocab. Knows nothing of groups, ranks or text.
"""

import numpy as np
import torch

from noria.step import NO_TOKEN, Step

CHUNK_ELEMENTS = 2**24  # logits that are sorted and summed in float64 at a time: 128 MiB


class Sampler:
    """The settings of the rows in flight, by slot, and the draw."""

    def __init__(self, device: torch.device):
        self._device = device
        self._sampling: dict[int, dict] = {}

    def apply(self, step: Step) -> None:
        """Takes over the changes of slots that a header carries."""
        for slot in step.released:
            del self._sampling[slot]
        for admitted in step.admitted:
            self._sampling[admitted.slot] = admitted.sampling

    def sample(self, logits: torch.Tensor, slots: np.ndarray, uniforms: np.ndarray) -> torch.Tensor:
        """[S] token ids (NO_TOKEN where logits are not finite) for logits [S, V]. Does not wait for the device."""
        ids = greedy(logits)
        rows = [row for row, slot in enumerate(slots) if self._sampling[int(slot)]["temperature"] > 0]
        per_chunk = max(1, CHUNK_ELEMENTS // logits.shape[1])
        for start in range(0, len(rows), per_chunk):
            chunk = rows[start : start + per_chunk]
            settings = [self._sampling[int(slots[row])] for row in chunk]
            index = torch.tensor(chunk).to(self._device, non_blocking=True)
            drawn = draw(
                logits[index],
                self._column(settings, "temperature", torch.float64),
                self._column(settings, "top_k", torch.int64),
                self._column(settings, "top_p", torch.float64),
                torch.from_numpy(uniforms[chunk]).to(self._device, non_blocking=True),
            )
            ids[index] = torch.where(ids[index] == NO_TOKEN, NO_TOKEN, drawn)
        return ids

    def _column(self, settings: list[dict], key: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([row[key] for row in settings], dtype=dtype).to(self._device, non_blocking=True)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """[S] the most likely id of each row of logits [S, V]; NO_TOKEN where a logit is NaN or all are infinite."""
    best, ids = logits.max(dim=-1)
    return torch.where(torch.isfinite(best), ids, NO_TOKEN)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """[S] ids drawn by the inverse of the cumulative distribution, in order of ids, summed in float64.

    Temperature first, then top_k (0: all), then top_p on what top_k left, as in transformers. All arguments are [S].
    """
    scaled = logits.double() / temperature[:, None]
    probabilities = torch.softmax(truncate(scaled, top_k, top_p), dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).to(torch.uint8).argmax(dim=-1)
    return torch.minimum(ids, last)


def truncate(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[S, V] scaled logits with -inf where top_k or top_p exclude an id.

    top_p keeps the smallest set of most likely ids whose probability reaches it, never none (nucleus sampling,
    Holtzman et al. 2019).
    """
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    excluded = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    probabilities = torch.softmax(ordered.masked_fill(excluded, -torch.inf), dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    excluded |= (before >= top_p[:, None]) & (rank > 0)
    return scaled.masked_fill(torch.zeros_like(excluded).scatter_(-1, order, excluded), -torch.inf)
