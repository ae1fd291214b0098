"""The neighbours of a candidate: each number a little more or less, as far as the user left it open.

Knows nothing of what candidates are worth.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, product

from noria.errors import InputError
from noria.plan.problem import EVEN, Candidate, Problem, rounded_up
from noria.plan.terms import MEASURED_TOKENS

Move = Callable[[Problem, Candidate], Iterable[Candidate]]
MOST = MEASURED_TOKENS  # of a microbatch: products gain nothing from more
FACTORS = (1.02, 1.1, 1.4, 2.0)
LAYERS = (1.0, -1.0, 3.0, -3.0)  # that a stage is taken to carry more
PARTS = (0.02, 0.1, 0.3, 1.0)  # of the cache


def _other_rows(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """More or fewer rows at once, among them those of whole waves, with the same part of the cache on the device or the same
    number of its pages; and one more in each group, in the same steps: its prompt is computed beside rows that decode."""
    most, rows = problem.workload.num_rows, here.rows
    waves = -(-most // rows)
    counts = [-(-most // count) for count in (waves - 1, waves, waves + 1) if count > 0]
    counts += [round(rows * factor) for factor in FACTORS] + [int(rows / factor) for factor in FACTORS]
    found = [replace(here, rows=count) for count in dict.fromkeys(counts) if 1 <= count <= most]
    in_group = -(-rows // here.groups)
    if (in_group + 1) * here.groups <= most and not _are_steps_fixed(problem):
        longer = here.prefill_rounds * (in_group + 1) / in_group
        found.append(replace(here, rows=(in_group + 1) * here.groups, prefill_rounds=longer))
    if not is_cache_open(problem):
        return found
    # the same with as many pages on the device as before
    return [*found, *(replace(one, on_device=min(here.on_device * rows / one.rows, 1.0)) for one in found)]


def _other_parts(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """More or less of the cache on the device."""
    if not is_cache_open(problem):
        return []
    parts = [min(max(here.on_device + sign * part, 0.0), 1.0) for part in PARTS for sign in (1, -1)]
    return [replace(here, on_device=part) for part in dict.fromkeys(parts)]


def _other_rounds(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """Larger or smaller steps, by a prompt or by a round; where a step is one microbatch, a larger one is, too."""
    if _are_steps_fixed(problem):
        return []
    rounds, step = here.prefill_rounds, problem.step_tokens(here)
    in_group = -(-here.rows // here.groups)
    prompts = rounded_up(in_group / rounds)  # of a step
    fewer, more = (in_group / count if count else rounds for count in (prompts - 1, prompts + 1))
    whole = min(rounded_up(more), rounded_up(rounds) - 1), max(rounded_up(fewer), int(rounds) + 1)
    counts = dict.fromkeys((1, rounds // 2, *whole, more, fewer, 2 * rounds))
    found = [replace(here, prefill_rounds=count) for count in counts if count >= 1]
    if problem.config.pipeline.microbatch_tokens or here.microbatch_tokens < step:
        return found
    steps = ((one, problem.step_tokens(one)) for one in found)
    wider = (replace(one, microbatch_tokens=tokens) for one, tokens in steps if here.microbatch_tokens < tokens <= MOST)
    return [*found, *wider]


def _other_microbatches(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """Larger or smaller microbatches, and steps with them. What smaller ones leave of memory may hold a few more rows, and more
    yet where a step is one of them; for larger ones a few rows less may make room."""
    if problem.config.pipeline.microbatch_tokens or problem.machine.device == "cpu":
        return []
    step, most = problem.step_tokens(here), problem.workload.num_rows
    tokens = min(here.microbatch_tokens, step)
    counts = [count for count in (tokens // 2, 2 * tokens // 3, 3 * tokens // 2, 2 * tokens) if 64 <= count <= MOST]
    found = [replace(here, microbatch_tokens=count) for count in counts]
    fewer, more = ([one for one in found if (one.microbatch_tokens < tokens) == less] for less in (True, False))
    of_rows = [(one, min(round(here.rows * factor), most)) for one in fewer for factor in FACTORS[:2]]
    of_rows += [(one, max(int(here.rows / factor), 1)) for one in more for factor in FACTORS[:2]]
    found += [replace(one, rows=rows) for one, rows in of_rows]
    if problem.config.pipeline.step_tokens:
        return found
    with_steps = [one for one in found if one.microbatch_tokens < tokens or one.microbatch_tokens > step]
    return [
        *found,
        *(
            replace(one, prefill_rounds=max(here.prefill_rounds * step / one.microbatch_tokens, 1))
            for one in with_steps
        ),
    ]


def _other_groups(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """One group more or less, and two a rank; the ring is full with a group a rank."""
    if _are_groups_fixed(problem):
        return []
    ranks = problem.num_ranks
    part = max(here.groups // 8, 2)
    counts = dict.fromkeys((here.groups - 1, here.groups + 1, here.groups - part, here.groups + part))
    counts |= dict.fromkeys((ranks, ranks + 1, 2 * ranks))
    found = [replace(here, groups=count) for count in counts if count >= ranks]
    return [*found, *_even(problem, here)]


def _even(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """Groups that have equal parts of the rows of a whole wave, of as many waves as here and of one less."""
    most, ranks = problem.workload.num_rows, problem.num_ranks
    if ranks == 1:
        return
    waves = -(-most // here.rows)
    for rows in (-(-most // count) for count in (waves, waves - 1) if count > 0):
        left = sorted(range(ranks, 2 * ranks + 1), key=lambda count: (-rows % count, count))  # slots without a row
        found = [replace(here, groups=count, rows=rows) for count in left[:3]]
        yield from found
        if is_cache_open(
            problem
        ):  # the same with as many pages elsewhere as before, and with steps that leave more room
            part = max(1 - (1 - here.on_device) * here.rows / rows, 0.0)
            times = (1,) if problem.config.pipeline.step_tokens else (1, 2)
            rounds = [here.prefill_rounds * count for count in times]
            yield from (replace(one, on_device=part, prefill_rounds=count) for one in found for count in rounds)


def _other_laps(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    counts = laps(problem)
    place = counts.index(here.laps)
    return [replace(here, laps=count) for count in counts[max(place - 2, 0) : place + 3]]


def _other_ends(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """Fewer or more layers on the first and on the last rank: where the embedding or the head has taken memory or time."""
    if problem.config.pipeline.partition is not None or problem.num_ranks == 1:
        return []
    first, last = here.ends
    ends = [problem.head_in_layers, EVEN, *((first + step, last + step) for step in LAYERS)]
    ends += chain(*(((first + step, last), (first, last + step)) for step in LAYERS))
    cuts = {problem.cut(here.laps, one).stages: one for one in reversed(ends)}
    return [replace(here, ends=one) for one in cuts.values()]


def _other_activations(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    return [replace(here, activations=tier) for tier in activations(problem)]


MOVES: tuple[Move, ...] = (
    _other_rows,
    _other_parts,
    _other_rounds,
    _other_microbatches,
    _other_groups,
    _other_laps,
    _other_ends,
    _other_activations,
)


def _turned_groups(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    counts = (problem.num_ranks, problem.num_ranks + 1)
    if problem.num_ranks > 1 and not _are_groups_fixed(problem):
        yield from (replace(here, groups=count) for count in counts if count != here.groups)


def _turned_coding(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    if problem.may_code:
        yield replace(here, coded=not here.coded)


def _turned_activations(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    return [one for one in _other_activations(problem, here) if one != here]


def _turned_steps(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    if not _are_steps_fixed(problem):
        yield replace(here, beside=not here.beside)


# Choices on which the best values of several numbers depend, taken otherwise: a group a rank or one more, blocks that stream
# coded or as they are, hidden states in the one memory or the other, steps with room for rows that decode beside whole prompts.
TURNS: tuple[Move, ...] = (_turned_groups, _turned_coding, _turned_activations, _turned_steps)


def roomy(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """With what leaves more of the fullest device to blocks, or not: as few groups as ranks, hidden states in CPU memory, a layer
    less on the first and on the last rank."""
    counts = groups(problem) if _are_groups_fixed(problem) else dict.fromkeys((*groups(problem), problem.num_ranks))
    fixed = problem.config.pipeline.partition is not None or problem.num_ranks == 1
    ends = (here.ends,) if fixed else (here.ends, (LAYERS[0], LAYERS[0]))
    for count, tier, end in product(counts, activations(problem), ends):
        yield replace(here, groups=count, activations=tier, ends=end)


def _are_steps_fixed(problem: Problem) -> bool:
    return bool(problem.config.pipeline.step_tokens) or problem.machine.device == "cpu"


def _are_groups_fixed(problem: Problem) -> bool:
    pipeline = problem.config.pipeline
    return bool(pipeline.groups) or pipeline.blocking or problem.machine.device == "cpu"


def is_cache_open(problem: Problem) -> bool:
    return problem.config.placement.cache is None and problem.machine.device != "cpu"


def activations(problem: Problem) -> list[str]:
    """Where hidden states may be: elsewhere than on the device only where that is another memory."""
    asked = problem.config.placement.activations
    return [asked] if asked else ["gpu"] if problem.machine.device == "cpu" else ["gpu", "cpu"]


def groups(problem: Problem) -> tuple[int, ...]:
    """Numbers of groups to begin with: the ring is full with a group a rank, one more hides the hop and rank 0's own work.

    A single GPU stays busy with two groups, but reads its weights for each of them.
    """
    pipeline = problem.config.pipeline
    if pipeline.groups or pipeline.blocking:
        return (pipeline.groups or problem.num_ranks,)
    if problem.num_ranks == 1:
        return (1,) if problem.machine.device == "cpu" else (2, 1)
    return (problem.num_ranks + 1,)


def laps(problem: Problem) -> list[int]:
    """Numbers of laps that give visits of different lengths, as far as they can be cut so."""
    asked, most, how = (
        problem.config.pipeline.laps,
        problem.shape.num_layers // problem.num_ranks,
        problem.config.pipeline,
    )
    if asked or problem.num_ranks == 1 or isinstance(how.partition, list):
        listed = len(how.partition) // problem.num_ranks if isinstance(how.partition, list) else 1
        return [asked or max(listed, 1)]
    counts = sorted({most // layers for layers in range(1, most + 1)})
    return [laps for laps in counts if _is_cut(problem, laps)] or [1]


def _is_cut(problem: Problem, laps: int) -> bool:
    """Whether so many laps keep tied layers together."""
    try:
        problem.cut(laps)
    except InputError:
        return False
    return True
