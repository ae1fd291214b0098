"""The sequences of a microbatch as rows of kernels/work.py, and which of them share a beginning.

Arrays of numpy: knows pages, no tensors and no kinds.
"""

import numpy as np

from noria.kernels.work import NONE, RaggedRows
from noria.step import PAGE_TOKENS, Span


def ragged(spans: list[Span]) -> RaggedRows:
    """The spans, which lie side by side, as rows. Those whose first runs of pages are the same share them as prefixes."""
    counts = np.array([span.count for span in spans], np.int64)
    lengths = np.array([span.length for span in spans], np.int64)
    offsets = _starts([len(span.runs) for span in spans])
    runs = [run for span in spans for run in span.runs]
    run_rows = np.array([run.start for run in runs], np.int64) * PAGE_TOKENS
    run_keys = np.array([run.count for run in runs], np.int64) * PAGE_TOKENS
    before = _starts(run_keys)[:-1]
    run_positions = before - np.repeat(before[offsets[:-1]] if len(runs) else before, np.diff(offsets))
    return RaggedRows(counts, lengths, offsets, run_rows, run_positions, run_keys, *_prefixes(spans))


def _prefixes(spans: list[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each span its prefix, of each prefix its keys and its parent: the runs that lie before a span's new tokens.

    A prefix is named by its parent and its own run; most have one row, which lists.make leaves to itself.
    """
    known: dict[tuple[int, int, int], int] = {}
    prefixes, shared, parents = [], [], []
    for span in spans:
        prefix, keys = NONE, 0
        for run in span.runs[:-1]:
            keys += run.count * PAGE_TOKENS
            if keys > span.length - span.count:
                break
            name = prefix, run.start, run.count
            if name not in known:
                known[name] = len(known)
                shared.append(keys)
                parents.append(prefix)
            prefix = known[name]
        prefixes.append(prefix)
    return np.array(prefixes, np.int64), np.array(shared, np.int64), np.array(parents, np.int64)


def _starts(counts: "list[int] | np.ndarray") -> np.ndarray:
    """0, and the sums of the counts up to each."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
