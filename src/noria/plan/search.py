"""The search for a plan: a few numbers decide it, and what they leave of memory is filled by what it is worth there.

For given laps, groups and rows at once, memory is two knapsacks. A byte of a block on the device saves a byte of the link in
each round, a byte of the cache the part of it that is filled: so either the blocks come first, or the cache does, which needs
no staging, or something between the two where another resource binds. Those corners are tried, for all rows at once and for
more and more waves, and from the fastest of them each number is moved for as long as the prediction of the whole run gets
better. Every plan that is compared is a whole one: built, counted and predicted.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from noria.errors import InputError
from noria.plan import costs
from noria.plan.building import build
from noria.plan.plan import Plan
from noria.plan.problem import EVEN, STEP_TOKENS, Candidate, Problem
from noria.plan.rates import Rates
from noria.plan.shares import is_budget

MICROBATCH_TOKENS, MOST = 4096, 2**14  # of a microbatch: products gain nothing from more
GAIN = 1.001  # times as fast, for which a number is moved
SIMPLER = 0.99  # of the tokens/s: what each departure from the plain plan must at least be worth
HALVINGS = 5  # of the part of the cache that finds room on the device
FACTORS = (1.02, 1.1, 1.4, 2.0)
LAYERS = (1.0, -1.0, 3.0, -3.0)  # that a stage is taken to carry more
PARTS = (0.02, 0.1, 0.3, 1.0)  # of the cache
Value = tuple[
    bool, float
]  # whether the longest row finds room, tokens/s of the whole run less what is off for departures


@dataclass
class Tried:
    """Candidates with their plans: each is built once."""

    problem: Problem
    known: Rates
    plans: dict[Candidate, tuple[Value, Plan | None]] = field(default_factory=dict)

    def value(self, candidate: Candidate) -> Value:
        if candidate not in self.plans:
            self.plans[candidate] = self._tried(candidate)
        return self.plans[candidate][0]

    def plan(self, candidate: Candidate) -> Plan | None:
        """None: it does not fit."""
        self.value(candidate)
        return self.plans[candidate][1]

    def _tried(self, candidate: Candidate) -> tuple[Value, Plan | None]:
        problem, workload = self.problem, self.problem.workload
        try:
            plan = build(problem, candidate)
        except InputError:
            return (False, 0.0), None
        predicted = costs.predict(plan, problem.cut(candidate.laps, candidate.ends), self.known, workload)
        plan = replace(plan, predicted=predicted)
        return (plan.holds(workload.longest), predicted["tokens_per_second"] * SIMPLER ** _departures(plan)), plan


def best(problem: Problem, known: Rates) -> Plan:
    """The fastest plan that the search finds. Raises the InputError of the most modest candidate if none fits."""
    tried = Tried(problem, known)
    starts = (_fastest(tried, corners) for corners in _corners(tried))
    found = max((_descended(tried, start) for start in chain(*starts)), key=tried.value, default=_modest(problem))
    return tried.plan(found) or build(problem, found)


def _modest(problem: Problem) -> Candidate:
    """Steps as small as can be and room for a single row: if this does not fit, nothing does."""
    micro = problem.config.pipeline.microbatch_tokens or MICROBATCH_TOKENS
    return Candidate(_laps(problem)[0], _groups(problem)[-1], 1, micro, 1, activations=_activations(problem)[0])


def _departures(plan: Plan) -> int:
    """What a plan has that a plain one does not: bytes elsewhere than on the device, laps for nothing, no spare group."""
    elsewhere = (plan.weight_slots > 0, plan.cache_slots > 0, plan.activations == "cpu")
    return sum(elsewhere) + (plan.laps > 1 and not plan.weight_slots) + (plan.groups == plan.num_ranks > 1)


def _fastest(tried: Tried, candidates: Iterable[Candidate]) -> Iterable[Candidate]:
    """The fastest candidate of those that have their blocks and their cache alike; none that does not fit."""
    found: dict[tuple[int, int, bool, bool], Candidate] = {}
    for candidate in candidates:
        kind = candidate.laps, candidate.groups, candidate.on_device > 0, candidate.coded
        if tried.plan(candidate):
            found[kind] = max(found.get(kind, candidate), candidate, key=tried.value)
    return found.values()


def _corners(tried: Tried) -> Iterator[Iterable[Candidate]]:
    """Those with blocks first, and if none of these holds all rows at once on the device the others."""
    problem, rows = tried.problem, tried.problem.workload.num_rows
    first = [_resident(tried, groups) for groups in _groups(problem)]
    yield first
    plans = [plan for plan in map(tried.plan, first) if plan and not plan.weight_slots]
    if not any(plan.predicted["rows"] >= rows and plan.holds(problem.workload.longest) for plan in plans):
        yield (_cache_first(tried, corner) for corner in _streaming(problem))


def _resident(tried: Tried, groups: int) -> Candidate:
    """Blocks first, and the cache in what the device has left."""
    first = replace(_modest(tried.problem), groups=groups)
    plan = tried.plan(first)
    if plan is None:
        return first
    rows = plan.predicted["rows"]
    rounds = -(-rows * round(tried.problem.workload.prompt_tokens) // (groups * MICROBATCH_TOKENS))
    return _fitting(tried, replace(first, rows=rows, prefill_rounds=max(rounds, 1)))


def _streaming(problem: Problem) -> Iterator[Candidate]:
    """Prompts in one round, all rows at once and in waves, the cache on the device or elsewhere."""
    micro = problem.config.pipeline.microbatch_tokens or MICROBATCH_TOKENS
    single = problem.num_ranks == 1 and not problem.config.pipeline.groups
    waves = [1, 2, 3, 4, *(2**power for power in range(3, 20))]
    rows = dict.fromkeys(-(-problem.workload.num_rows // count) for count in waves)
    for laps in (_laps(problem)[-1], _laps(problem)[0]):
        for groups in [1] if single else _groups(problem):
            for count in rows:
                for part in (1.0, 0.0) if _is_cache_open(problem) else (1.0,):
                    rounds = -(-count * round(problem.workload.prompt_tokens) // (groups * STEP_TOKENS))
                    corner = Candidate(laps, groups, max(rounds, 1), micro, count, part, _activations(problem)[0])
                    yield corner
                    if problem.may_code:
                        yield replace(corner, coded=True)


def _fitting(tried: Tried, candidate: Candidate) -> Candidate:
    """With steps so small that it fits; as it is if there are none."""
    smaller, tokens = candidate, 0
    while tried.plan(smaller) is None:
        if tokens == (tokens := tried.problem.step_tokens(smaller)):
            return candidate
        smaller = replace(smaller, prefill_rounds=2 * smaller.prefill_rounds)
    return smaller


def _cache_first(tried: Tried, corner: Candidate) -> Candidate:
    """With as much of the cache on the device as finds room, if the corner has any there."""
    whole = _fitting(tried, corner)
    if tried.plan(whole) or not corner.on_device or not _is_cache_open(tried.problem):
        return whole
    base, least, most = _fitting(tried, replace(corner, on_device=0.0)), 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        least, most = (middle, most) if tried.plan(replace(base, on_device=middle)) else (least, middle)
    return replace(base, on_device=least)


def _descended(tried: Tried, start: Candidate) -> Candidate:
    """From here on each number is moved to the best of its neighbours, in turn, until that gains nothing more."""
    found, before = start, None
    while found != before:
        before = found
        for neighbours in MOVES:
            other = max(neighbours(tried.problem, found), key=tried.value, default=found)
            (roomy, speed), (has_room, fastest) = tried.value(other), tried.value(found)
            if (roomy, speed) > (has_room, fastest * GAIN):
                found = other
    return _coded_best(tried, found)


def _coded_best(tried: Tried, here: Candidate) -> Candidate:
    """With encoded blocks on the device decoded while they load, and those that stream coded meanwhile, or not."""
    problem, asked = tried.problem, tried.problem.config.placement.weights
    # What the user gives in bytes is of weights as they are stored.
    decodings = (True, False) if problem.weighed.encoded and not (asked and is_budget(asked)) else (False,)
    codings = (False, True) if problem.may_code else (False,)
    ways = [replace(here, decoded=decoded, coded=coded) for decoded in decodings for coded in codings]
    return max(ways, key=tried.value)


def _other_rows(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """More or fewer rows at once, among them those of whole waves, with the same part of the cache on the device or the same
    number of its pages."""
    most, rows = problem.workload.num_rows, here.rows
    waves = -(-most // rows)
    counts = [-(-most // count) for count in (waves - 1, waves, waves + 1) if count > 0]
    counts += [round(rows * factor) for factor in FACTORS] + [int(rows / factor) for factor in FACTORS]
    found = [replace(here, rows=count) for count in dict.fromkeys(counts) if 1 <= count <= most]
    if not _is_cache_open(problem):
        return found
    # the same with as many pages on the device as before
    return [*found, *(replace(one, on_device=min(here.on_device * rows / one.rows, 1.0)) for one in found)]


def _other_parts(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """More or less of the cache on the device."""
    if not _is_cache_open(problem):
        return []
    parts = [min(max(here.on_device + sign * part, 0.0), 1.0) for part in PARTS for sign in (1, -1)]
    return [replace(here, on_device=part) for part in dict.fromkeys(parts)]


def _other_rounds(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """Larger or smaller steps."""
    if problem.config.pipeline.step_tokens or problem.machine.device == "cpu":
        return []
    rounds = here.prefill_rounds
    counts = dict.fromkeys((1, rounds // 2, rounds - 1, rounds + 1, 2 * rounds))
    return [replace(here, prefill_rounds=count) for count in counts if count >= 1]


def _other_microbatches(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """Larger or smaller microbatches; what smaller ones leave of memory may hold a few more rows."""
    if problem.config.pipeline.microbatch_tokens or problem.machine.device == "cpu":
        return []
    tokens, most = min(here.microbatch_tokens, problem.step_tokens(here)), problem.workload.num_rows
    counts = [count for count in (tokens // 2, 2 * tokens // 3, 3 * tokens // 2, 2 * tokens) if 64 <= count <= MOST]
    more = [min(round(here.rows * factor), most) for factor in FACTORS[:2]]
    found = [replace(here, microbatch_tokens=count) for count in counts]
    return [*found, *(replace(one, rows=rows) for one in found for rows in more if one.microbatch_tokens < tokens)]


def _other_groups(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    """One group more or less, and two a rank; the ring is full with a group a rank."""
    if problem.config.pipeline.groups or problem.config.pipeline.blocking or problem.machine.device == "cpu":
        return []
    ranks = problem.num_ranks
    counts = dict.fromkeys((here.groups - 1, here.groups + 1, ranks, ranks + 1, 2 * ranks))
    return [replace(here, groups=count) for count in counts if count >= ranks]


def _other_laps(problem: Problem, here: Candidate) -> Iterable[Candidate]:
    laps = _laps(problem)
    place = laps.index(here.laps)
    return [replace(here, laps=count) for count in laps[max(place - 2, 0) : place + 3]]


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
    return [replace(here, activations=tier) for tier in _activations(problem)]


MOVES: tuple[Callable[[Problem, Candidate], Iterable[Candidate]], ...] = (
    *(_other_rows, _other_parts, _other_rounds, _other_microbatches, _other_groups, _other_laps, _other_ends, _other_activations),
)


def _is_cache_open(problem: Problem) -> bool:
    return problem.config.placement.cache is None and problem.machine.device != "cpu"


def _activations(problem: Problem) -> list[str]:
    """Where hidden states may be: elsewhere than on the device only where that is another memory."""
    asked = problem.config.placement.activations
    return [asked] if asked else ["gpu"] if problem.machine.device == "cpu" else ["gpu", "cpu"]


def _groups(problem: Problem) -> tuple[int, ...]:
    """Numbers of groups to begin with: the ring is full with a group a rank, one more hides the hop and rank 0's own work.

    A single GPU stays busy with two groups, but reads its weights for each of them.
    """
    pipeline = problem.config.pipeline
    if pipeline.groups or pipeline.blocking:
        return (pipeline.groups or problem.num_ranks,)
    if problem.num_ranks == 1:
        return (1,) if problem.machine.device == "cpu" else (2, 1)
    return (problem.num_ranks + 1,)


def _laps(problem: Problem) -> list[int]:
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
