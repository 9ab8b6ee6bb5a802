"""Finds the fastest plan that fits: micro-batch size, accumulation steps, and what to recompute.

Note [Search]
 1. A budget that does not bind needs no plan: nothing is recomputed.
 2. For each recorded micro-batch size a bound of the seconds from below comes first, so sizes that cannot win
    are never solved.
 3. How one size is solved is for ``core/candidate.py``.
 4. If no plan was found that fits, the plan of least peak decides: either it fits and is the answer, or its
    peak is the smallest memory that works. So a refusal is tight. It is searched as if every op took equally
    long: measured seconds differ a little from run to run, and what one run names must work in the next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import repeat

from memfit.core.candidate import Candidate
from memfit.core.export import Export, export
from memfit.core.graph import FORMAT, Level, Profile, StepGraph, ValueKey
from memfit.core.hidden import KNOB, NOTHING_HIDDEN, Hidden, hidden, told
from memfit.core.links import Choices
from memfit.core.soundness import check_plan
from memfit.core.stored import decode, of_format, read
from memfit.core.timeline import Event, Timeline, droppable, events, floors
from memfit.errors import InfeasibleBudget
from memfit.units import format_bytes, format_seconds, parse_memory

_UPDATE = "optimizer.step"
# What `memfit plan --json` adds to a plan.
_OF_THE_COMMAND = frozenset({"schema", "schema_version", "advice", "export", "candidates"})


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
        lower_bound_s: No plan of this kind recomputes less at this micro-batch size. For a model of several
            blocks in a row: one that treats each block, or run of blocks, in one of the ways tried for
            it. For any other: one that replays each op at most once, and not earlier than 24 backward
            slots before its own backward.
        recompute: The values that are computed again instead of kept.
        recomputed_bytes: Their size in one micro-batch.
        levels: One for each of them where some are computed more than once; else empty.
        is_two_pass: Every forward runs twice, for the loss couples the rows: first all outputs, then their
            gradients. ``recompute_s`` counts neither.
        hidden: What torch.compile hides, which is kept whatever the plan.
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
    is_two_pass: bool = False
    hidden: Hidden = NOTHING_HIDDEN

    @property
    def optimality_gap(self) -> float:
        """Part of a step by which the best plan of this kind could be faster, at most."""
        return max(0.0, self.recompute_s - self.lower_bound_s) / max(self.predicted_step_s, 1e-12)

    @property
    def recomputes(self) -> int:
        """How many tensors are computed again."""
        return len(self.recompute)

    def at_speed(self, factor: float, update_s: float) -> Plan:
        """The same plan where forward and backward take this many times as long, and the update as before."""
        return replace(
            self,
            predicted_step_s=(self.predicted_step_s - update_s) * factor + update_s,
            forward_s=self.forward_s * factor,
            recompute_s=self.recompute_s * factor,
            lower_bound_s=self.lower_bound_s * factor,
        )

    def __str__(self) -> str:
        """The plan for people."""
        lines = [
            f"{self.rows} rows as {self.gradient_accumulation_steps} x {self.micro_batch_size}",
            f"peak {format_bytes(self.predicted_peak_bytes)} of {format_bytes(self.budget_bytes)}, "
            f"at {self.peak_owner}",
            f"step {format_seconds(self.predicted_step_s)}",
        ]
        if self.is_two_pass:
            lines.append("two passes: every forward once more, for the loss is taken on all outputs")
        if self.recompute:
            share = self.recompute_s / max(self.forward_s, 1e-12)
            lines.append(
                f"recomputes {self.recomputes} tensors ({format_bytes(self.recomputed_bytes)} each time), "
                f"{share:.1%} of a forward; at most {self.optimality_gap:.2%} of a step from the best plan "
                "of this kind"
            )
        else:
            lines.append("recomputes nothing")
        if self.hidden.modules:
            lines += [f"torch.compile hides {told(self.hidden)}", KNOB]
        return "\n".join(lines)

    def to(self, tool: str) -> Export:
        """The nearest settings of another tool, and what they cannot say.

        Args:
            tool: ``"transformers"`` (arguments of ``TrainingArguments``) or ``"axolotl"`` (keys of its YAML).

        Raises:
            ValueError: The tool is none of these.
        """
        return export(self, tool)

    def to_json(self) -> str:
        """A JSON text that :meth:`from_json` reads back to an equal value."""
        return json.dumps(asdict(self) | {"format": FORMAT}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads a plan.

        Raises:
            ValueError: The text is not a plan of this version.
        """
        noun = "a memfit plan"
        data = of_format(decode(text, noun), FORMAT, noun)
        own = {name: value for name, value in data.items() if name not in _OF_THE_COMMAND}
        if not {"recompute", "levels"} <= own.keys():
            raise ValueError(f"this is not {noun}: it does not say what is recomputed")
        return read(Plan, own, noun, check_plan)


def find_plan(profile: Profile, *, memory: str | int, micro_batch_size: int | None = None) -> Plan:
    """The fastest plan whose predicted peak is at most ``memory``.

    Pure: no torch, no clock, no device; the same profile and memory give the same plan.

    Args:
        profile: What the step does, from :func:`memfit.profile`.
        memory: ``"8GiB"`` or bytes: the peak of everything on the device.
        micro_batch_size: Pins the micro-batch; the profile must hold it.

    Raises:
        InfeasibleBudget: No plan fits; says the smallest memory that works.
        ValueError: ``memory`` cannot be read, or the profile does not hold ``micro_batch_size``.

    Cost: for a model of alike blocks, some small programs a kind of block and a recursion a candidate size;
    for any other, a linear program a candidate size and a mixed integer program for the winners.
    """
    budget_bytes = parse_memory(memory)
    return Planner(profile, micro_batch_size).best(budget_bytes)


def _pinned(profile: Profile, micro_batch_size: int) -> StepGraph:
    """The graph of that size and no other."""
    sizes = {graph.rows: graph for graph in profile.graphs}
    if micro_batch_size not in sizes:
        raise ValueError(
            f"the profile has no micro-batch of {micro_batch_size} rows: it holds those of "
            f"{', '.join(map(str, sorted(sizes)))}; profile the batch again"
        )
    return sizes[micro_batch_size]


class Planner:
    """The plans of one profile; what is worked out for one budget serves the next. See Note [Search]."""

    def __init__(self, profile: Profile, micro_batch_size: int | None = None) -> None:
        if not any(graph.ops for graph in profile.graphs):
            raise ValueError("the profile holds no recorded step, so there is nothing to plan; profile again")
        graphs = profile.graphs if micro_batch_size is None else (_pinned(profile, micro_batch_size),)
        choices = Choices(profile.alignment_bytes)
        self._profile = profile
        floor = floors(profile)
        found = (Candidate(profile, graph, choices, floor[graph.held_bytes > 0]) for graph in graphs)
        self._candidates = sorted(found, key=lambda c: (c.step_s(0.0), c.steps))
        self._lowest: Plan | None = None

    def best(self, budget_bytes: int) -> Plan:
        """The fastest plan within a budget, or the one of least peak if that fits; see :func:`find_plan`."""
        return self.fastest(budget_bytes) or self.least(budget_bytes)

    def fastest(self, budget_bytes: int) -> Plan | None:
        """The fastest plan within a budget, None if none was found."""
        best: Plan | None = None
        for candidate in self._candidates:
            if candidate.floor.total_bytes <= budget_bytes:
                best = _faster(best, candidate, budget_bytes)
        return best

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The micro-batch sizes it weighs, that of the fastest step without recomputation first."""
        return tuple(self._candidates)

    def of_size(self, rows: int, budget_bytes: int) -> Plan | None:
        """The fastest plan of one micro-batch size within a budget, None if none was found."""
        (candidate,) = (c for c in self._candidates if c.graph.rows == rows)
        return _faster(None, candidate, budget_bytes)

    def lowest(self) -> Plan:
        """The plan of least peak. See Note [Search] 4."""
        if self._lowest is None:
            # Alike segments share choices, so that the order matters, and is always the same.
            by_rows = {candidate.graph.rows: candidate for candidate in self._candidates}
            choices = Choices(self._profile.alignment_bytes)
            plans = [
                _plan(by_rows[rows], dropped, 0, 0.0)
                for rows in dict.fromkeys((min(by_rows), max(by_rows)))
                for dropped in by_rows[rows].timeless(choices).least()
            ]
            least = min(plans, key=lambda plan: (plan.predicted_peak_bytes, plan.predicted_step_s))
            self._lowest = self._certified(least, least.predicted_peak_bytes)
        return self._lowest

    def _certified(self, plan: Plan, budget_bytes: int) -> Plan:
        """The plan with the bound of a budget."""
        (candidate,) = (c for c in self._candidates if c.graph.rows == plan.micro_batch_size)
        bound_s = candidate.largest * candidate.bound_s(budget_bytes)
        return replace(plan, budget_bytes=budget_bytes, lower_bound_s=min(bound_s, plan.recompute_s))

    def _cure(self, least: Plan) -> str:
        """What would make less memory do."""
        always_bytes = self._profile.residents.total_bytes + self._profile.unexplained_bytes
        held_bytes = least.predicted_peak_bytes - always_bytes
        if least.peak_owner != _UPDATE or held_bytes <= 0:
            return "make the model, the rows or the optimizer state smaller"
        held = format_bytes(held_bytes)
        return f"take an optimizer that holds less than {held} meanwhile: most have fused=True"

    def least(self, budget_bytes: int) -> Plan:
        """The plan of least peak where it fits.

        Raises:
            InfeasibleBudget: It does not; says the smallest memory that works.
        """
        least = self.lowest()
        needed_bytes = least.predicted_peak_bytes
        if needed_bytes <= budget_bytes:
            return self._certified(least, budget_bytes)
        raise InfeasibleBudget(
            f"no plan fits {format_bytes(budget_bytes)} ({budget_bytes:,} B): the smallest memory that works "
            f"is {needed_bytes:,} B ({format_bytes(needed_bytes)}), held by {least.peak_owner}; parameters, "
            "gradients, optimizer state and batch alone take "
            f"{format_bytes(self._profile.residents.total_bytes)}. Raise the memory by "
            f"{needed_bytes - budget_bytes:,} B, or {self._cure(least)}.",
            budget_bytes=budget_bytes,
            needed_bytes=needed_bytes,
            owner=least.peak_owner,
        )


def _faster(best: Plan | None, candidate: Candidate, budget_bytes: int) -> Plan | None:
    """The best plan so far, or that of one more size if it is faster. See Note [Search] 2."""
    limit_s = math.inf if best is None else best.predicted_step_s
    if candidate.step_s(0.0) >= limit_s:
        return best
    bound_s = candidate.bound_s(budget_bytes)
    if candidate.step_s(bound_s) >= limit_s:
        return best
    dropped = candidate.solve(budget_bytes)
    if dropped is None:
        return best
    found = _plan(candidate, dropped, budget_bytes, bound_s)
    return found if found.predicted_step_s < limit_s else best


def simulate(profile: Profile, plan: Plan, *, first_step: bool = False) -> Timeline:
    """Live bytes at every moment of a step under a plan: one micro-batch, and the optimizer step.

    With several micro-batches it is the second, in which all gradients are there; those after it are alike or
    smaller, and the first one is lower, for gradients grow in it.

    Args:
        first_step: The very first step, in which the optimizer's state is born. A plan is made for the higher
            of both.

    Raises:
        ValueError: The plan names a tensor the profile does not have, or one that cannot be replayed.
    """
    graph = profile.graph(plan.micro_batch_size)
    return Timeline(tuple(events(profile, graph, dropped_values(graph, plan), first_step=first_step)))


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


def _plan(candidate: Candidate, dropped: Mapping[int, Level], budget_bytes: int, bound_s: float) -> Plan:
    """The plan of a choice."""
    profile, graph = candidate.profile, candidate.graph
    simulated = candidate.run(dropped)
    recompute_s = candidate.cost_s(simulated)
    peak_bytes = candidate.base_bytes + simulated.peak.total_bytes
    floor = candidate.floor
    top = simulated.peak
    phase = "recompute" if top.is_replay else "forward" if top.op < graph.forward_ops else "backward"
    named = sorted((graph.value_key(value), level) for value, level in dropped.items())
    in_levels = any(level != Level() for _, level in named)
    return Plan(
        rows=profile.rows,
        micro_batch_size=graph.rows,
        gradient_accumulation_steps=candidate.steps,
        budget_bytes=budget_bytes,
        predicted_peak_bytes=max(peak_bytes, floor.total_bytes),
        peak_owner=f"{phase}, {graph.ops[top.op].key}" if peak_bytes > floor.total_bytes else _told(floor),
        predicted_step_s=candidate.step_s(recompute_s),
        forward_s=candidate.largest * graph.forward_s,
        recompute_s=candidate.largest * recompute_s,
        lower_bound_s=candidate.largest * min(bound_s, recompute_s),
        recompute=tuple(key for key, _ in named),
        recomputed_bytes=sum(graph.size_bytes(value) for value in dropped),
        levels=tuple(level for _, level in named) if in_levels else (),
        is_two_pass=graph.held_bytes > 0,
        hidden=hidden(graph, simulated),
    )


def _told(floor: Event) -> str:
    """The owner of a peak that no plan changes."""
    return _UPDATE if floor.phase == "update" else f"{floor.phase}, {floor.owner}"
