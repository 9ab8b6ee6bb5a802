"""One micro-batch size under one budget: the fastest choice of values to drop that fits.

Note [Two planners]
 1. A model made of several blocks in a row is planned as a chain (``core/chain.py``): quick at any depth,
    and it can recompute in levels. Any other graph is one program (``core/milp.py``). A chain that is
    small, or of which most segments are unlike or short, is both: the program may drop what a chain
    keeps, entries and long skips.
 2. Either makes proposals, and ``core/timeline.py`` judges them. What overshoots is asked for again with
    less memory; between what overshot and what fitted the chain halves.
 3. Each bounds from below what a plan of its kind recomputes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from memfit.core.chain import Link
from memfit.core.graph import Level, Profile, StepGraph
from memfit.core.ladder import Judged, Ladder
from memfit.core.links import Choices, read_links
from memfit.core.milp import Program
from memfit.core.timeline import Run, base_bytes, run

Dropped = Mapping[int, Level]

_WINDOW = 24  # slots: about a layer and a half of a transformer
_GOOD_ENOUGH = 1e-3  # of a step: below the noise of any measured time
_ATTEMPTS = 8
_FEW_OPS = 150  # of a forward: a program of so few takes no time
_MOST_OPS = 300  # beyond, it takes too long
_SHORT_OPS = 8  # a chain of shorter segments keeps too many entries
_NOTHING: Dropped = {}


def _single(dropped: frozenset[int]) -> Dropped:
    """Values that are made once each."""
    return dict.fromkeys(sorted(dropped), Level())


class Candidate:
    """One micro-batch size of a profile. See Note [Two planners]."""

    def __init__(self, profile: Profile, graph: StepGraph, choices: Choices) -> None:
        self.profile = profile
        self.graph = graph
        self._choices = choices

    # ---- costs ------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Micro-batches in a step."""
        return -(-self.profile.rows // self.graph.rows)

    @property
    def largest(self) -> float:
        """The effective batch in largest micro-batches: a little less than ``steps`` if parts are uneven."""
        return self.profile.rows / self.graph.rows

    @cached_property
    def base_bytes(self) -> int:
        """What is there at every moment of a micro-batch."""
        return base_bytes(self.profile, self.graph)

    def step_s(self, recompute_s: float) -> float:
        """Seconds of a step that recomputes this long in its largest micro-batch."""
        fixed_s = min(self.profile.fixed_s, self.graph.seconds)
        growing_s = self.graph.seconds - fixed_s + recompute_s
        return self.steps * fixed_s + self.largest * growing_s + self.profile.update_s

    def run(self, dropped: Dropped) -> Run:
        """The simulation of a choice."""
        return run(self.graph, dropped, alignment_bytes=self.profile.alignment_bytes)

    def peak_bytes(self, dropped: Dropped) -> int:
        """Peak of a micro-batch under a choice, all included."""
        return self.base_bytes + self.run(dropped).peak.total_bytes

    def judged(self, dropped: Dropped) -> Judged:
        """A choice with its peak, residents not counted, and its seconds of recomputation."""
        simulated = self.run(dropped)
        return Judged(dropped, simulated.peak.total_bytes, self.cost_s(simulated))

    def cost_s(self, simulated: Run) -> float:
        """Seconds of recomputation in one micro-batch."""
        ops = self.graph.ops
        return sum(ops[i].seconds + self.profile.replay_overhead_s for i in simulated.replayed_ops)

    @cached_property
    def plain_bytes(self) -> int:
        """Peak without any recomputation."""
        return self.peak_bytes(_NOTHING)

    # ---- proposals --------------------------------------------------------------------------------

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """The chain; empty where the graph is none."""
        return read_links(self.graph, self._choices)

    @cached_property
    def ladder(self) -> Ladder:
        """The plans of the chain."""
        return Ladder(self.links, self.plain_bytes - self.base_bytes, self.units, self.judged)

    @cached_property
    def program(self) -> Program:
        """The program of the whole graph."""
        return Program(
            self.graph,
            alignment_bytes=self.profile.alignment_bytes,
            replay_overhead_s=self.profile.replay_overhead_s,
            window=_WINDOW,
        )

    def bound_s(self, budget_bytes: int) -> float:
        """No plan of the kind recomputes less in a micro-batch; infinite if none can fit."""
        if self.plain_bytes <= budget_bytes:
            return 0.0
        free_bytes = budget_bytes - self.base_bytes
        bounds = [math.inf]
        if self.links and free_bytes > 0:
            bounds.append(self.ladder.bound_s(free_bytes))
        if self.has_program:
            bound_s = self.program.bound_s(free_bytes)
            bounds.append(math.inf if bound_s is None else bound_s)
        return min(bounds)

    @property
    def has_program(self) -> bool:
        """Whether the whole graph is also planned as one program. See Note [Two planners] 1."""
        ops, segments = self.graph.forward_ops, len(self.links)
        are_unlike = 2 * len({link.segment.class_key for link in self.links}) >= segments
        are_short = ops < _SHORT_OPS * segments
        return not segments or ops <= _FEW_OPS or (ops <= _MOST_OPS and (are_unlike or are_short))

    def solve(self, budget_bytes: int, bound_s: float) -> Dropped | None:
        """The fastest choice found that fits, None if none was."""
        if self.plain_bytes <= budget_bytes:
            return _NOTHING
        search = _Search(self, budget_bytes, bound_s)
        rung = self.ladder.best(search.free_bytes) if self.links and search.free_bytes > 0 else None
        if rung is not None:
            search.best, search.best_s = rung.dropped, rung.seconds
        if self.has_program and search.best_s > search.enough_s:
            search.through_program()
        return search.best

    def least(self) -> list[Dropped]:
        """Choices of which one peaks lowest, as far as is known."""
        found = [_NOTHING]
        if self.links:
            found += [rung.dropped for rung in self.ladder.least()]
        if self.has_program:
            found += [_single(self.program.least()), _single(self.program.closure(set()))]
        return found

    @property
    def units(self) -> int:
        """How finely the chain counts memory."""
        links = len(self.links)
        return 16000 if links <= 16 else 4000 if links <= 50 else 2000


class Verdict(NamedTuple):
    """What the simulation says of a choice: bytes left over (negative: lacking), and where its peak is."""

    left_bytes: int
    in_forward: bool


@dataclass(slots=True)
class _Search:
    """Proposals for one candidate, judged one by one; the best so far."""

    candidate: Candidate
    budget_bytes: int
    bound_s: float
    best: Dropped | None = None
    best_s: float = math.inf

    @property
    def free_bytes(self) -> int:
        """What is left for one micro-batch beside what is always there."""
        return self.budget_bytes - self.candidate.base_bytes

    @property
    def enough_s(self) -> float:
        """Nothing faster is worth looking for."""
        return self.bound_s + _GOOD_ENOUGH * self.candidate.step_s(self.bound_s) / self.candidate.steps

    def judge(self, dropped: Dropped) -> Verdict:
        """Simulates a choice; remembers it if it fits and is the fastest."""
        simulated = self.candidate.run(dropped)
        top = simulated.peak
        left_bytes = self.free_bytes - top.total_bytes
        cost_s = self.candidate.cost_s(simulated)
        if left_bytes >= 0 and cost_s < self.best_s:
            self.best, self.best_s = dropped, cost_s
        return Verdict(left_bytes, top.op < self.candidate.graph.forward_ops and not top.is_replay)

    def through_program(self) -> None:
        """Rounds the relaxation, then solves the program, with less memory where the answer overshoots."""
        program, target_bytes = self.candidate.program, self.free_bytes
        gap = min(0.5, max(5e-3, (self.enough_s - self.bound_s) / max(self.bound_s, 1e-12)))
        for attempt in range(_ATTEMPTS):
            if attempt >= 3 and self.best is not None:
                break
            relaxed = program.relax(target_bytes)
            if relaxed is None:
                break
            self.round(program.wishes(relaxed))
            if self.best_s <= self.enough_s:
                break
            proposal = program.solve(target_bytes, relaxed, gap=gap)
            left_bytes = 0 if proposal is None else self.judge(_single(proposal)).left_bytes
            if proposal is not None and left_bytes >= 0:
                break
            target_bytes -= max(-left_bytes, self.free_bytes // 200)
        if self.best is None:  # all proposals overshot; what should peak lowest may fit all the same
            for dropped in (program.least(), program.closure(set())):
                self.judge(_single(dropped))

    def round(self, wishes: list[int]) -> None:
        """As many of the relaxation's wishes granted as really fit."""
        low, high = 0, len(wishes)
        while low <= high:
            middle = (low + high) // 2
            if self.judge(_single(self.candidate.program.closure(set(wishes[:middle])))).left_bytes >= 0:
                low = middle + 1
            else:
                high = middle - 1
