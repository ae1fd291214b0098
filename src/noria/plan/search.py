"""The search for a plan: a few numbers decide it, and what they leave of memory is filled by what it is worth there.

For given laps, groups and rows at once, memory is two knapsacks. A byte of a block on the device saves a byte of the link in
each round, a byte of the cache the part of it that is filled: so either the blocks come first, or the cache does, which needs
no staging, or something between the two where another resource binds. Those corners are tried, and all blocks on the device, by
whatever leaves them room there, with all of the cache elsewhere, for all rows at once and for more and more waves, and from the
fastest of them each number is moved for as long as the prediction of the whole run gets better; then once more from the best of
all with one choice after another taken otherwise. Every plan that is compared is a whole one: built, counted and predicted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from noria.errors import InputError
from noria.plan import costs, moves
from noria.plan.building import build, plan_of, sized
from noria.plan.cut import Cut
from noria.plan.plan import Plan
from noria.plan.problem import STEP_TOKENS, Candidate, Problem
from noria.plan.rates import Rates
from noria.plan.shares import is_budget

MICROBATCH_TOKENS = 4096
GAIN = 1.003  # times as fast, for which a number is moved
SIMPLER = 0.99  # of the tokens/s: what each departure from the plain plan must at least be worth
HALVINGS = 5  # of the part of the cache that finds room on the device
MANY = 4  # waves
# Whether the longest row finds room, tokens/s of the whole run less what is off for departures.
Value = tuple[bool, float]


@dataclass
class Tried:
    """Candidates with their plans: each is built once, and those that come to the same plan are predicted once."""

    problem: Problem
    known: Rates
    plans: dict[Candidate, tuple[Value, Plan | None]] = field(default_factory=dict)
    same: dict[object, tuple[Value, Plan | None]] = field(default_factory=dict)

    def value(self, candidate: Candidate) -> Value:
        if candidate not in self.plans:
            self.plans[candidate] = self._tried(candidate)
        return self.plans[candidate][0]

    def plan(self, candidate: Candidate) -> Plan | None:
        """None: it does not fit."""
        self.value(candidate)
        return self.plans[candidate][1]

    def _tried(self, candidate: Candidate) -> tuple[Value, Plan | None]:
        try:
            sizes, pages = sized(self.problem, candidate)
        except InputError:
            return (False, 0.0), None
        key = sizes.key, *pages.values()
        if key not in self.same:
            self.same[key] = self._predicted(plan_of(self.problem, candidate, sizes, pages), sizes.cut)
        return self.same[key]

    def _predicted(self, plan: Plan, cut: Cut) -> tuple[Value, Plan | None]:
        problem, workload = self.problem, self.problem.workload
        plan = replace(plan, predicted=costs.predict(plan, cut, self.known, workload))
        speed = plan.predicted["tokens_per_second"] * SIMPLER ** _departures(problem, plan)
        return (plan.holds(workload.longest), speed), plan


def best(problem: Problem, known: Rates) -> Plan:
    """The fastest plan that the search finds. Raises the InputError of the most modest candidate if none fits."""
    tried = Tried(problem, known)
    starts = (_fastest(tried, corners) for corners in _corners(tried))
    found = max((_descended(tried, start) for start in chain(*starts)), key=tried.value, default=_modest(problem))
    for turned in moves.TURNS:
        found = max((found, *(_descended(tried, other) for other in turned(problem, found))), key=tried.value)
    return tried.plan(found) or build(problem, found)


def _modest(problem: Problem) -> Candidate:
    """Steps as small as can be and room for a single row: if this does not fit, nothing does."""
    micro = problem.config.pipeline.microbatch_tokens or MICROBATCH_TOKENS
    return Candidate(
        moves.laps(problem)[0], moves.groups(problem)[-1], 1, micro, 1, activations=moves.activations(problem)[0]
    )


def _departures(problem: Problem, plan: Plan) -> int:
    """What a plan has that a plain one does not: bytes elsewhere than on the device, laps for nothing, no spare group."""
    elsewhere = (plan.weight_slots > 0, plan.cache_slots > 0, plan.activations == "cpu")
    laps = plan.laps > 1 and not plan.weight_slots and problem.config.pipeline.laps is None
    return sum(elsewhere) + laps + (plan.groups == plan.num_ranks > 1)


def _fastest(tried: Tried, candidates: Iterable[Candidate]) -> Iterable[Candidate]:
    """The fastest candidate of those that have their blocks and their cache alike, and of those with as many waves: one, a few,
    many; none that does not fit."""
    found: dict[tuple[object, ...], Candidate] = {}
    for candidate in candidates:
        waves = tried.problem.workload.num_rows / candidate.rows
        alike = candidate.laps, candidate.groups, candidate.on_device > 0, candidate.coded
        for kind in (alike, ("waves", waves > 1, waves >= MANY)):
            if tried.plan(candidate):
                found[kind] = max(found.get(kind, candidate), candidate, key=tried.value)
    return dict.fromkeys(found.values())


def _corners(tried: Tried) -> Iterator[Iterable[Candidate]]:
    """Those with blocks first, and if none of these holds all rows at once on the device the others."""
    problem, rows = tried.problem, tried.problem.workload.num_rows
    first = [_resident(tried, groups) for groups in moves.groups(problem)]
    yield first
    plans = [plan for plan in map(tried.plan, first) if plan and not plan.weight_slots]
    if not any(plan.predicted["rows"] >= rows and plan.holds(problem.workload.longest) for plan in plans):
        yield (_cache_first(tried, corner) for corner in _streaming(problem))
        if moves.is_cache_open(problem):
            yield _cache_elsewhere(tried)


def _resident(tried: Tried, groups: int) -> Candidate:
    """Blocks first, and the cache in what the device has left."""
    first = replace(_modest(tried.problem), groups=groups)
    plan = tried.plan(first)
    if plan is None:
        return first
    return _fitting(tried, _with_rounds(tried, replace(first, rows=plan.predicted["rows"])))


def _cache_elsewhere(tried: Tried) -> list[Candidate]:
    """All rows at once, their cache in CPU memory, and steps so small that the device holds all blocks: the fastest such one."""
    whole = replace(_modest(tried.problem), rows=tried.problem.workload.num_rows, on_device=0.0)
    roomy = [_fitting(tried, _with_rounds(tried, one), resident=True) for one in moves.roomy(tried.problem, whole)]
    held = [one for one in roomy if (plan := tried.plan(one)) and not plan.weight_slots]
    return [max(held, key=tried.value)] if held else []


def _with_rounds(tried: Tried, candidate: Candidate) -> Candidate:
    """With steps of about a microbatch."""
    tokens = candidate.rows * round(tried.problem.workload.prompt_tokens)
    return replace(candidate, prefill_rounds=max(-(-tokens // (candidate.groups * MICROBATCH_TOKENS)), 1))


def _streaming(problem: Problem) -> Iterator[Candidate]:
    """Prompts in one round, all rows at once and in waves, the cache on the device or elsewhere."""
    micro = problem.config.pipeline.microbatch_tokens or MICROBATCH_TOKENS
    single = problem.num_ranks == 1 and not problem.config.pipeline.groups
    waves = [1, 2, 3, 4, *(2**power for power in range(3, 20))]
    rows = dict.fromkeys(-(-problem.workload.num_rows // count) for count in waves)
    for laps in (moves.laps(problem)[-1], moves.laps(problem)[0]):
        for groups in [1] if single else moves.groups(problem):
            for count in rows:
                for part in (1.0, 0.0) if moves.is_cache_open(problem) else (1.0,):
                    rounds = -(-count * round(problem.workload.prompt_tokens) // (groups * STEP_TOKENS))
                    corner = Candidate(laps, groups, max(rounds, 1), micro, count, part, moves.activations(problem)[0])
                    yield corner
                    if problem.may_code:
                        yield replace(corner, coded=True)


def _fitting(tried: Tried, candidate: Candidate, resident: bool = False) -> Candidate:
    """With steps so small that it fits, `resident`: with all blocks on the device; else with the smallest there are."""
    while (plan := tried.plan(candidate)) is None or (resident and plan.weight_slots):
        smaller = replace(candidate, prefill_rounds=2 * candidate.prefill_rounds)
        if tried.problem.step_tokens(smaller) == tried.problem.step_tokens(candidate):
            break
        candidate = smaller
    return candidate


def _cache_first(tried: Tried, corner: Candidate) -> Candidate:
    """With as much of the cache on the device as finds room, if the corner has any there."""
    whole = _fitting(tried, corner)
    if tried.plan(whole) or not corner.on_device or not moves.is_cache_open(tried.problem):
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
        for neighbours in moves.MOVES:
            other = max(neighbours(tried.problem, found), key=tried.value, default=found)
            (roomy, speed), (has_room, fastest) = tried.value(other), tried.value(found)
            if (roomy, speed) > (has_room, fastest * GAIN):
                found = other
        found = _coded_best(tried, found)
    return found


def _coded_best(tried: Tried, here: Candidate) -> Candidate:
    """With encoded blocks on the device decoded while they load, and those that stream coded meanwhile, or not."""
    problem, asked = tried.problem, tried.problem.config.placement.weights
    # What the user gives in bytes is of weights as they are stored.
    decodings = (True, False) if problem.weighed.encoded and not (asked and is_budget(asked)) else (False,)
    codings = (False, True) if problem.may_code else (False,)
    ways = [replace(here, decoded=decoded, coded=coded) for decoded in decodings for coded in codings]
    return max(ways, key=tried.value)
