"""A whole step as it runs: part after part, moment after moment, each with its op, its seconds and its bytes.

Note [A step as it runs]
 1. Its parts are: (the loss of all, in two passes), each micro-batch, the optimizer step. The first
    micro-batch is lower, for gradients grow in it; all later ones are told like the second.
 2. Seconds are those of the ops, stretched so that they sum to what the plan says the step takes: parts of
    the effective batch may be a little smaller than the recorded micro-batch. The first of two passes keeps
    no activations and is left out.
 3. It is the first step, in which the optimizer's state is born, where that peaks higher than later ones. So
    the highest moment is what the plan promises.
 4. Of many micro-batches the later ones may be told together, as one part without moments: they are alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from memfit.core.advice import alone
from memfit.core.graph import Level, OpKey, Profile, StepGraph
from memfit.core.plan import Plan, dropped_values
from memfit.core.timeline import Event, events, run, update_events

LOSS_OF_ALL, MICRO_BATCH, UPDATE = "loss of all", "micro-batch", "update"
_NO_OP = OpKey("", "optimizer.step", 0)


class Tick(NamedTuple):
    """A moment: the call site that runs, for how long, and what is live meanwhile."""

    key: OpKey
    seconds: float
    event: Event


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step. See Note [A step as it runs].

    Attributes:
        name: "loss of all", "micro-batch 1", "micro-batches 9 to 64" or "update".
        graph: What runs in it.
        dropped: The values of that graph that are recomputed.
        ticks: Every moment; none where several micro-batches are told together.
        seconds: How long it takes.
    """

    name: str
    graph: StepGraph
    dropped: Mapping[int, Level]
    ticks: tuple[Tick, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Unrolled:
    """A step under a plan.

    Attributes:
        parts: In order.
        is_first_step: Whether it is the step in which the optimizer's state is born.
    """

    parts: tuple[Part, ...]
    is_first_step: bool

    @property
    def ticks(self) -> Iterator[Tick]:
        """Every moment of every part, in order."""
        return (tick for part in self.parts for tick in part.ticks)


def unrolled(profile: Profile, plan: Plan, *, most_micro_batches: int | None = None) -> Unrolled:
    """The step that a plan makes of a profile. Pure. See Note [A step as it runs].

    Args:
        most_micro_batches: How many are told one by one, from 2; by default all.

    Raises:
        ValueError: The plan was made from another profile.
    """
    graph = profile.graph(plan.micro_batch_size)
    dropped = dropped_values(graph, plan)
    told = list(events(profile, graph, dropped))
    born_bytes = max(event.total_bytes for event in update_events(profile, first=True))
    first_step = born_bytes > max(event.total_bytes for event in told)
    if first_step:
        told = list(events(profile, graph, dropped, first_step=True))
    loss = _of(profile.loss_of_all, (event for event in told if event.phase == LOSS_OF_ALL))
    update_graph = profile.first_update if first_step else profile.update
    update = _of(update_graph, (event for event in told if event.phase == UPDATE))
    parts = [_part(LOSS_OF_ALL, profile.loss_of_all, {}, loss)] if loss else []
    parts += _micro_batches(profile, plan, told, most_micro_batches, first_step=first_step)
    return Unrolled((*parts, _part(UPDATE, update_graph, {}, update)), first_step)


def _micro_batches(
    profile: Profile, plan: Plan, told: Iterable[Event], most: int | None, *, first_step: bool
) -> Iterator[Part]:
    """Every micro-batch, of what is told of the second."""
    graph, steps = profile.graph(plan.micro_batch_size), plan.gradient_accumulation_steps
    dropped = dropped_values(graph, plan)
    later = _micro_batch(profile, graph, dropped, told)
    factor = _stretch(profile, plan, graph, sum(tick.seconds for tick in later))
    stretched = _part("", graph, dropped, _stretched(later, factor))
    first = stretched
    opening = alone(graph, profile.residents.gradients_bytes) if steps > 1 else None
    if opening is not None:
        its_own = events(profile, opening, dropped, first_step=first_step)
        ticks = _micro_batch(profile, opening, dropped, its_own)
        first = _part("", opening, dropped, _stretched(ticks, factor))
    shown = steps if most is None else min(steps, most)
    for number in range(shown):
        part = stretched if number else first
        yield Part(f"{MICRO_BATCH} {number + 1}", part.graph, part.dropped, part.ticks, part.seconds)
    if shown < steps:
        name = f"{MICRO_BATCH}es {shown + 1} to {steps}"
        yield Part(name, graph, dropped, (), (steps - shown) * stretched.seconds)


def _part(name: str, graph: StepGraph, dropped: Mapping[int, Level], ticks: tuple[Tick, ...]) -> Part:
    """A part of which every moment is told."""
    return Part(name, graph, dropped, ticks, sum(tick.seconds for tick in ticks))


def _stretched(ticks: Iterable[Tick], factor: float) -> tuple[Tick, ...]:
    """The same moments, each this many times as long."""
    return tuple(Tick(tick.key, tick.seconds * factor, tick.event) for tick in ticks)


def _stretch(profile: Profile, plan: Plan, graph: StepGraph, micro_batch_s: float) -> float:
    """How much longer micro-batches take than their ops, so that the step takes as long as the plan says."""
    other_s = profile.update_s + (plan.forward_s + profile.loss_of_all.seconds if graph.held_bytes else 0.0)
    wanted_s = (plan.predicted_step_s - other_s) / plan.gradient_accumulation_steps
    return wanted_s / micro_batch_s if min(wanted_s, micro_batch_s) > 0 else 1.0


def _micro_batch(
    profile: Profile, graph: StepGraph, dropped: Mapping[int, Level], told: Iterable[Event]
) -> tuple[Tick, ...]:
    """Every moment of one micro-batch, of what is told of it."""
    inside = (event for event in told if event.phase not in (LOSS_OF_ALL, UPDATE))
    moments = run(graph, dropped, alignment_bytes=profile.alignment_bytes).moments
    found = []
    for moment, event in zip(moments, inside, strict=True):
        op = graph.ops[moment.op]
        found.append(Tick(op.key, op.replay_s if moment.is_replay else op.seconds, event))
    return tuple(found)


def _of(graph: StepGraph, events_of_it: Iterable[Event]) -> tuple[Tick, ...]:
    """The moments of a graph in which nothing is replayed; without ops they take no time."""
    told = list(events_of_it)
    if not told or not graph.ops:
        return tuple(Tick(_NO_OP, 0.0, event) for event in told)
    return tuple(Tick(op.key, op.seconds, event) for op, event in zip(graph.ops, told, strict=True))
