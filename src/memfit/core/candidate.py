"""One micro-batch size under one budget: the fastest choice of values to drop that fits.

Note [Two planners]
 1. A model made of several blocks in a row is planned as a chain (``core/chain.py``): quick at any depth,
    and it can recompute in levels. Any other graph is one program (``core/milp.py``). A chain that is
    small, or of which most segments are unlike or short, is both: the program may drop what a chain
    keeps, entries and long skips.
 2. Either makes proposals on a ladder of memories (``core/ladder.py``), and ``core/timeline.py`` judges them.
 3. Each bounds from below what a plan of its kind recomputes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

from memfit.core.chain import Link
from memfit.core.graph import Profile, StepGraph
from memfit.core.ladder import ChainLadder, Dropped, Judged, ProgramLadder
from memfit.core.links import Choices, read_links
from memfit.core.milp import Program
from memfit.core.timeline import Event, Run, base_bytes, run

_WINDOW = 24  # slots: about a layer and a half of a transformer
_FEW_OPS = 150  # of a forward: a program of so few takes no time
_MOST_OPS = 300  # beyond, it takes too long
_SHORT_OPS = 8  # a chain of shorter segments keeps too many entries
_NOTHING: Dropped = {}


class Candidate:
    """One micro-batch size of a profile. See Note [Two planners]."""

    def __init__(self, profile: Profile, graph: StepGraph, choices: Choices, floor: Event) -> None:
        self.profile = profile
        self.graph = graph
        self.floor = floor
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
        other_s = self.profile.update_s + self.first_pass_s
        return self.steps * fixed_s + self.largest * growing_s + other_s

    @property
    def first_pass_s(self) -> float:
        """Seconds of a step before the second of two passes: all forwards, and the loss of all outputs."""
        if not self.graph.held_bytes:
            return 0.0
        return self.largest * self.graph.forward_s + self.profile.loss_of_all.seconds

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
        return sum(ops[i].replay_s for i in simulated.replayed_ops)

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
    def chain_ladder(self) -> ChainLadder:
        """The plans of the chain."""
        return ChainLadder(self.links, self.plain_bytes - self.base_bytes, self.units, self.judged)

    @cached_property
    def program_ladder(self) -> ProgramLadder:
        """The plans of the program of the whole graph."""
        program = Program(
            self.graph,
            alignment_bytes=self.profile.alignment_bytes,
            window=_WINDOW,
        )
        return ProgramLadder(program, self.plain_bytes - self.base_bytes, self.judged)

    def bound_s(self, budget_bytes: int) -> float:
        """No plan of the kind recomputes less in a micro-batch; infinite if none can fit."""
        if self.plain_bytes <= budget_bytes:
            return 0.0
        free_bytes = budget_bytes - self.base_bytes
        bounds = [math.inf]
        if self.links and free_bytes > 0:
            bounds.append(self.chain_ladder.bound_s(free_bytes))
        if self.has_program and free_bytes > 0:
            bounds.append(self.program_ladder.bound_s(free_bytes))
        return min(bounds)

    @property
    def has_program(self) -> bool:
        """Whether the whole graph is also planned as one program. See Note [Two planners] 1."""
        ops, segments = self.graph.forward_ops, len(self.links)
        are_unlike = 2 * len({link.segment.class_key for link in self.links}) >= segments
        are_short = ops < _SHORT_OPS * segments
        return not segments or ops <= _FEW_OPS or (ops <= _MOST_OPS and (are_unlike or are_short))

    def solve(self, budget_bytes: int) -> Dropped | None:
        """The fastest choice found that fits, None if none was."""
        if self.plain_bytes <= budget_bytes:
            return _NOTHING
        free_bytes = budget_bytes - self.base_bytes
        if free_bytes <= 0:
            return None
        best = self.chain_ladder.best(free_bytes) if self.links else None
        if self.has_program:
            best = self.program_ladder.best(free_bytes, best)
        return None if best is None else best.dropped

    def least(self) -> list[Dropped]:
        """Choices of which one peaks lowest, as far as is known."""
        found = self.chain_ladder.least() if self.links else []
        if self.has_program:
            found += self.program_ladder.least()
        return [_NOTHING, *(choice.dropped for choice in found)]

    def timeless(self, choices: Choices) -> Candidate:
        """The same where every op takes equally long, so that only bytes decide what is found."""
        ops = tuple(replace(op, seconds=1.0, overhead_s=0.0) for op in self.graph.ops)
        return Candidate(self.profile, replace(self.graph, ops=ops), choices, self.floor)

    @property
    def units(self) -> int:
        """How finely the chain counts memory."""
        links = len(self.links)
        return 12000 if links <= 16 else 6000 if links <= 50 else 1600
