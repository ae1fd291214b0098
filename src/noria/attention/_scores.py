"""Softmax with its scores at hand, for what torch's fused attention does not know: a soft cap, sinks.

Products and sums are float32 in half precisions. The slow plain path: functions of tensors.
L keys of a sequence, Hkv key/value heads, G queries that share a key, D head dim, Dv that of a value.
"""

import torch

from noria.kernels.scoring import Scoring

MOST_SCORES = 1 << 22  # of a part's queries, heads and keys: 16 MiB in float32


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scoring, attended: torch.Tensor
) -> None:
    """The last tokens of a sequence, or all. queries [count, Hkv, G, D]; keys [L, Hkv, D]; values [L, Hkv, Dv].

    attended [count, Hkv, G, Dv] is written.
    """
    count, length = len(queries), len(keys)
    rows = max(1, MOST_SCORES // (queries[0].shape.numel() // queries.shape[-1] * length))
    for first in range(0, count, rows):
        last = min(first + rows, count)
        seen = slice(first_seen(length - count + first, scores.window), length - count + last)
        attended[first:last] = _part(queries[first:last], keys[seen], values[seen], scores)


def _part(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scoring) -> torch.Tensor:
    """[rows, Hkv, G, Dv]: the last `rows` of these keys' tokens. A sink takes weight and gives nothing."""
    (rows, key_heads, group, dim), wide = queries.shape, torch.promote_types(queries.dtype, torch.float32)
    asked = queries.permute(1, 2, 0, 3).reshape(key_heads, group * rows, dim).to(wide) * scores.scale
    found = torch.bmm(asked, keys.permute(1, 2, 0).to(wide)).view(key_heads, group, rows, len(keys))
    if scores.soft_cap is not None:
        found = found.div_(scores.soft_cap).tanh_().mul_(scores.soft_cap)
    if rows > 1:
        found.masked_fill_(~mask(rows, len(keys), scores.window, queries.device), -torch.inf)
    total = found.logsumexp(-1, keepdim=True)
    if scores.sinks is not None:
        total = torch.logaddexp(total, scores.sinks.to(wide).view(key_heads, group, 1, 1))
    weights = found.sub_(total).exp_().view(key_heads, group * rows, len(keys))
    attended = torch.bmm(weights, values.transpose(0, 1).to(wide)).view(key_heads, group, rows, values.shape[-1])
    return attended.permute(2, 0, 1, 3)


def first_seen(position: int, window: int | None) -> int:
    """The first key that a query at this position sees."""
    return 0 if window is None else max(0, position - window + 1)


def mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries, keys] True where the last `num_queries` of `num_keys` tokens may look."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)
