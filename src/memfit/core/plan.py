"""Finds the fastest plan that fits: micro-batch size, accumulation steps, and what to recompute.

Note [Search]
 1. A budget that does not bind needs no plan: nothing is recomputed.
 2. For each recorded micro-batch size the program's relaxation bounds the seconds from below, so sizes
    that cannot win are never solved.
 3. A solution is a proposal: the simulation judges it. What overshoots is solved again with the budget
    lowered by the overshoot; what cannot be mended falls back to rounding the relaxation until it fits.
 4. If nothing fits, the plan of least peak decides: either it fits and is the answer, or its peak is the
    smallest memory that works. So a refusal is tight.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import repeat

from memfit.core.graph import FORMAT, Level, Profile, StepGraph, ValueKey, _checked
from memfit.core.milp import Program
from memfit.core.timeline import Run, Timeline, base_bytes, droppable, events, run, update_peak_bytes
from memfit.errors import InfeasibleBudget
from memfit.units import format_bytes, format_seconds, parse_memory

_WINDOW = 24  # slots: about a layer and a half of a transformer
_GOOD_ENOUGH = 1e-3  # of a step: below the noise of any measured time


@dataclass(frozen=True, slots=True)
class Plan:
    """How to run an effective batch: a value that decides, and what it is predicted to cost.

    Attributes:
        rows: Rows of the effective batch.
        micro_batch_size: Rows of the largest micro-batch.
        gradient_accumulation_steps: Number of micro-batches.
        budget_bytes: The memory that was asked for.
        predicted_peak_bytes: Highest allocated bytes of the whole step.
        peak_owner: The phase and call site of that peak.
        predicted_step_s: Seconds of the step, update and recomputation included.
        forward_s: Seconds of the forwards of one step.
        recompute_s: Seconds of recomputation in one step.
        lower_bound_s: No plan of this kind recomputes less at this micro-batch size: one that replays each
            op at most once, and not earlier than 24 backward slots before its own backward.
        recompute: The values that are computed again instead of kept.
        recomputed_bytes: Their size in one micro-batch.
        levels: One for each of them where some are computed more than once; else empty.
    """

    rows: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    budget_bytes: int
    predicted_peak_bytes: int
    peak_owner: str
    predicted_step_s: float
    forward_s: float
    recompute_s: float
    lower_bound_s: float
    recompute: tuple[ValueKey, ...] = ()
    recomputed_bytes: int = 0
    levels: tuple[Level, ...] = ()

    @property
    def optimality_gap(self) -> float:
        """Part of a step by which the best plan of this kind could be faster, at most."""
        return max(0.0, self.recompute_s - self.lower_bound_s) / max(self.predicted_step_s, 1e-12)

    @property
    def recomputes(self) -> int:
        """How many tensors are computed again."""
        return len(self.recompute)

    def __str__(self) -> str:
        """The plan for people."""
        lines = [
            f"{self.rows} rows as {self.gradient_accumulation_steps} x {self.micro_batch_size}",
            f"peak {format_bytes(self.predicted_peak_bytes)} of {format_bytes(self.budget_bytes)}, "
            f"at {self.peak_owner}",
            f"step {format_seconds(self.predicted_step_s)}",
        ]
        if self.recompute:
            share = self.recompute_s / max(self.forward_s, 1e-12)
            lines.append(
                f"recomputes {self.recomputes} tensors ({format_bytes(self.recomputed_bytes)} each time), "
                f"{share:.1%} of a forward; at most {self.optimality_gap:.2%} of a step from the best plan "
                "of this kind"
            )
        else:
            lines.append("recomputes nothing")
        return "\n".join(lines)

    def to_json(self) -> str:
        """A JSON text that :meth:`from_json` reads back to an equal value."""
        return json.dumps(asdict(self) | {"format": FORMAT}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads a plan.

        Raises:
            ValueError: The text is not a plan of this version.
        """
        data = _checked(text, "plan")
        try:
            keys = tuple(ValueKey(*row) for row in data.pop("recompute"))
            levels = tuple(Level(*row) for row in data.pop("levels"))
            return Plan(recompute=keys, levels=levels, **data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a memfit plan: {error}") from None


def find_plan(profile: Profile, *, memory: str | int, micro_batch_size: int | None = None) -> Plan:
    """The fastest plan whose predicted peak is at most ``memory``.

    Pure: no torch, no clock, no device; the same profile and memory give the same plan.

    Args:
        profile: What the step does, from :func:`memfit.profile`.
        memory: ``"8GiB"`` or bytes: the peak of everything on the device.
        micro_batch_size: Pins the micro-batch; the profile must hold it.

    Raises:
        InfeasibleBudget: No plan fits; says the smallest memory that works.
        ValueError: ``memory`` or ``micro_batch_size`` cannot be read.

    Cost: about one linear program a candidate size, one mixed integer program for the winners.
    """
    budget_bytes = parse_memory(memory)
    graphs = profile.graphs if micro_batch_size is None else (profile.graph(micro_batch_size),)
    best: Plan | None = None
    for candidate in _ranked(profile, graphs, budget_bytes):
        if best is None or candidate.least_step_s < best.predicted_step_s:
            if not candidate.bind():
                continue
            if best is None or candidate.least_step_s < best.predicted_step_s:
                found = candidate.solve()
                if found is not None and (best is None or found.predicted_step_s < best.predicted_step_s):
                    best = found
    return best if best is not None else _least(profile, graphs, budget_bytes)


def simulate(profile: Profile, plan: Plan) -> Timeline:
    """Live bytes at every moment of the step under a plan.

    Raises:
        ValueError: The plan names a tensor the profile does not have, or one that cannot be replayed.
    """
    graph = profile.graph(plan.micro_batch_size)
    return Timeline(tuple(events(profile, graph, dropped_values(graph, plan))))


def dropped_values(graph: StepGraph, plan: Plan) -> dict[int, Level]:
    """The values of a graph that a plan recomputes, and their levels.

    Raises:
        ValueError: One of them is not in the graph, or cannot be replayed; or levels are missing.
    """
    by_key = {graph.value_key(value): value for value in graph.produced()}
    possible = droppable(graph)
    found: dict[int, Level] = {}
    if plan.levels and len(plan.levels) != len(plan.recompute):
        raise ValueError(
            f"the plan recomputes {len(plan.recompute)} tensors and has {len(plan.levels)} levels; plan again"
        )
    for key, level in zip(plan.recompute, plan.levels or repeat(Level()), strict=False):
        if key not in by_key:
            raise ValueError(f"the plan recomputes {key}, which this profile does not have; plan again")
        if by_key[key] not in possible:
            raise ValueError(f"the plan recomputes {key}, which cannot be replayed; plan again")
        found[by_key[key]] = level
    for value in found:
        for needed in graph.ops[graph.values[value].producer].inputs:
            if graph.values[needed].is_overwritten and needed not in found:
                raise ValueError(
                    f"the plan recomputes {graph.value_key(value)} from {graph.value_key(needed)}, which is "
                    "overwritten in place and not recomputed; plan again"
                )
    return found


@dataclass(slots=True)
class _Candidate:
    """One micro-batch size under one budget."""

    profile: Profile
    graph: StepGraph
    budget_bytes: int
    program: Program | None = None
    bound_s: float = 0.0

    @property
    def steps(self) -> int:
        """Micro-batches in a step."""
        return -(-self.profile.rows // self.graph.rows)

    @property
    def least_step_s(self) -> float:
        """Seconds no plan of this size can undercut."""
        return self.step_s(self.bound_s)

    @property
    def largest(self) -> float:
        """The effective batch in largest micro-batches: a little less than ``steps`` if parts are uneven."""
        return self.profile.rows / self.graph.rows

    def step_s(self, recompute_s: float) -> float:
        """Seconds of a step that recomputes this long in its largest micro-batch."""
        fixed_s = min(self.profile.fixed_s, self.graph.seconds)
        growing_s = self.graph.seconds - fixed_s + recompute_s
        return self.steps * fixed_s + self.largest * growing_s + self.profile.update_s

    @property
    def free_bytes(self) -> int:
        """What is left for one micro-batch beside what is always there."""
        return self.budget_bytes - base_bytes(self.profile, self.graph)

    def bind(self) -> bool:
        """Bounds the seconds from below if the budget binds; False if nothing can fit."""
        if self.run(frozenset()).peak.total_bytes <= self.free_bytes:
            return True
        self.program = _program(self.profile, self.graph)
        bound_s = self.program.bound_s(self.free_bytes)
        self.bound_s = bound_s or 0.0
        return bound_s is not None

    def run(self, dropped: frozenset[int]) -> Run:
        """The simulation of a choice."""
        return run(self.graph, dropped, alignment_bytes=self.profile.alignment_bytes)

    def cost_s(self, simulated: Run) -> float:
        """Seconds of recomputation in one micro-batch."""
        ops = self.graph.ops
        return sum(ops[i].seconds + self.profile.replay_overhead_s for i in simulated.replayed_ops)

    def solve(self) -> Plan | None:
        """The fastest choice found that fits, None if none was."""
        if self.program is None:
            return self.plan(frozenset())
        best: frozenset[int] | None = None
        target_bytes = self.free_bytes
        enough_s = _GOOD_ENOUGH * self.least_step_s / self.steps
        gap = min(0.5, max(5e-3, enough_s / max(self.bound_s, 1e-12)))
        for attempt in range(6):
            if attempt >= 3 and best is not None:
                break
            relaxed = self.program.relax(target_bytes)
            if relaxed is None:
                break
            best = self._faster(best, self._rounded(self.program.wishes(relaxed)))
            if best is not None and self.cost_s(self.run(best)) <= self.bound_s + enough_s:
                break
            proposal = self.program.solve(target_bytes, relaxed, gap=gap)
            overshoot = 0 if proposal is None else self.run(proposal).peak.total_bytes - self.free_bytes
            if proposal is not None and overshoot <= 0:
                best = self._faster(best, proposal)
                break
            target_bytes -= max(overshoot, self.free_bytes // 200)
        if best is None:  # all proposals overshot; what should peak lowest may fit all the same
            lowest = (self.program.least(), self.program.closure(set()))
            fitting = [d for d in lowest if self.run(d).peak.total_bytes <= self.free_bytes]
            best = min(fitting, key=lambda dropped: self.cost_s(self.run(dropped)), default=None)
        return None if best is None else self.plan(best)

    def _faster(self, one: frozenset[int] | None, other: frozenset[int] | None) -> frozenset[int] | None:
        """The choice that recomputes less."""
        if one is None or other is None:
            return one if other is None else other
        return min(one, other, key=lambda dropped: self.cost_s(self.run(dropped)))

    def _rounded(self, wishes: list[int]) -> frozenset[int] | None:
        """As many of the relaxation's wishes granted as really fit."""
        assert self.program is not None
        low, high, best = 0, len(wishes), None
        while low <= high:
            middle = (low + high) // 2
            dropped = self.program.closure(set(wishes[:middle]))
            if self.run(dropped).peak.total_bytes <= self.free_bytes:
                low, best = middle + 1, dropped
            else:
                high = middle - 1
        return best

    def plan(self, dropped: frozenset[int]) -> Plan:
        """The plan of a choice."""
        simulated = self.run(dropped)
        recompute_s = self.cost_s(simulated)
        peak_bytes = base_bytes(self.profile, self.graph) + simulated.peak.total_bytes
        update_bytes = update_peak_bytes(self.profile)
        top = simulated.peak
        phase = "recompute" if top.is_replay else "forward" if top.op < self.graph.forward_ops else "backward"
        owner = f"{phase}, {self.graph.ops[top.op].key}" if peak_bytes > update_bytes else "optimizer.step"
        return Plan(
            rows=self.profile.rows,
            micro_batch_size=self.graph.rows,
            gradient_accumulation_steps=self.steps,
            budget_bytes=self.budget_bytes,
            predicted_peak_bytes=max(peak_bytes, update_bytes),
            peak_owner=owner,
            predicted_step_s=self.step_s(recompute_s),
            forward_s=self.largest * self.graph.forward_s,
            recompute_s=self.largest * recompute_s,
            lower_bound_s=self.largest * min(self.bound_s, recompute_s),
            recompute=tuple(sorted(self.graph.value_key(v) for v in dropped)),
            recomputed_bytes=sum(self.graph.size_bytes(v) for v in dropped),
        )


def _program(profile: Profile, graph: StepGraph) -> Program:
    """The program of a graph under a profile's constants."""
    return Program(
        graph,
        alignment_bytes=profile.alignment_bytes,
        replay_overhead_s=profile.replay_overhead_s,
        window=_WINDOW,
    )


def _ranked(profile: Profile, graphs: tuple[StepGraph, ...], budget_bytes: int) -> list[_Candidate]:
    """The sizes that may fit, the most promising first."""
    if update_peak_bytes(profile) > budget_bytes:
        return []
    found = [_Candidate(profile, graph, budget_bytes) for graph in graphs]
    return sorted(found, key=lambda candidate: (candidate.least_step_s, candidate.steps))


def _least(profile: Profile, graphs: tuple[StepGraph, ...], budget_bytes: int) -> Plan:
    """The plan of least peak, if it fits. See Note [Search] 4."""
    plans: list[Plan] = []
    # Not a set: its order, and with it the choice between equals, would differ from run to run.
    for graph in dict.fromkeys((min(graphs, key=lambda g: g.rows), max(graphs, key=lambda g: g.rows))):
        candidate = _Candidate(profile, graph, budget_bytes, _program(profile, graph))
        assert candidate.program is not None
        choices = [candidate.program.least(), candidate.program.closure(set()), frozenset[int]()]
        plans.extend(candidate.plan(dropped) for dropped in choices)
    least = min(plans, key=lambda plan: (plan.predicted_peak_bytes, plan.predicted_step_s))
    if least.predicted_peak_bytes <= budget_bytes:
        return replace(least, lower_bound_s=0.0)
    needed_bytes = least.predicted_peak_bytes
    raise InfeasibleBudget(
        f"no plan fits {format_bytes(budget_bytes)} ({budget_bytes:,} B): the smallest memory that works is "
        f"{needed_bytes:,} B ({format_bytes(needed_bytes)}), held by {least.peak_owner}; parameters, "
        "gradients, optimizer state and batch alone take "
        f"{format_bytes(profile.residents.total_bytes)}. Raise the memory by "
        f"{needed_bytes - budget_bytes:,} B, or make the model, the rows or the optimizer state smaller.",
        budget_bytes=budget_bytes,
        needed_bytes=needed_bytes,
        owner=least.peak_owner,
    )
