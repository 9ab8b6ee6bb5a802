"""A whole step as a picture shows it: live bytes over predicted time, in few points, with every peak.

Note [Outline]
 1. A step is drawn as it runs: (the loss of all, in two passes), each micro-batch, the optimizer step.
    The first micro-batch is lower, for gradients grow in it; all later ones are drawn like the second.
 2. Seconds are those of the ops, stretched so that they sum to what the plan says the step takes: parts of
    the effective batch may be a little smaller than the recorded micro-batch. The first of two passes keeps
    no activations and is not drawn.
 3. Time is cut into equal stretches; of each the highest and the lowest moment stay, with all their bytes. So
    the peak is to the byte, and each point is the highest or the lowest of its surroundings.
 4. The first step, in which the optimizer's state is born, is drawn where it peaks higher than later ones.
 5. Beyond some number of micro-batches no eye tells them apart: so many are drawn, each as long as several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from memfit.core.advice import alone
from memfit.core.graph import Level, Profile, StepGraph
from memfit.core.plan import Plan, dropped_values
from memfit.core.timeline import Event, events, run, update_events

_LOSS, _UPDATE = "loss of all", "update"
_BACKWARD = ("backward", "recompute")
_MOST_DRAWN = 2 * 150
STRETCHES = 150  # twice as many points at most: about one a pixel and a half on a screen


class Point(NamedTuple):
    """A moment that is drawn, and when it begins, in seconds of the step."""

    start_s: float
    event: Event


class Phase(NamedTuple):
    """A stretch of the step: "loss of all", "forward", "backward" (with what it recomputes) or "update"."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Outline:
    """The picture of a step. See Note [Outline].

    Attributes:
        points: In order of time; no two begin at the same moment.
        phases: What runs when.
        end_s: When the step ends.
        is_first_step: Whether it is the step in which the optimizer's state is born.
    """

    points: tuple[Point, ...]
    phases: tuple[Phase, ...]
    end_s: float
    is_first_step: bool

    @property
    def peak(self) -> Point:
        """The highest point, the first of equals."""
        return max(self.points, key=lambda point: point.event.total_bytes)


class _Timed(NamedTuple):
    """A moment and how long it lasts."""

    seconds: float
    event: Event


def outline(profile: Profile, plan: Plan, *, stretches: int = STRETCHES) -> Outline:
    """The picture of a step under a plan, in at most twice as many points as ``stretches``. Pure.

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
    found = list(_step(profile, plan, told, first_step=first_step))
    starts, end_s = [], 0.0
    for moment in found:
        starts.append(end_s)
        end_s += moment.seconds
    points = [Point(start_s, moment.event) for start_s, moment in zip(starts, found, strict=True)]
    return Outline(tuple(thinned(points, end_s, stretches)), tuple(_phases(points, end_s)), end_s, first_step)


def thinned(points: Iterable[Point], end_s: float, stretches: int) -> list[Point]:
    """The highest and the lowest point of each of so many equal stretches of time. See Note [Outline] 3.

    Of points that begin at the same moment the highest stays.
    """
    width_s = end_s / stretches or 1.0
    kept: list[Point] = []
    for _, group in groupby(points, key=lambda point: min(int(point.start_s / width_s), stretches - 1)):
        members = list(group)
        picks = {pick(range(len(members)), key=lambda i: _bytes(members[i])) for pick in (max, min)}
        for point in (members[i] for i in sorted(picks)):
            if not kept or point.start_s > kept[-1].start_s:
                kept.append(point)
            elif _bytes(point) > _bytes(kept[-1]):
                kept[-1] = point
    return kept


def _bytes(point: Point) -> int:
    return point.event.total_bytes


def _phases(points: Sequence[Point], end_s: float) -> Iterator[Phase]:
    """What runs when; a replay is part of the backward, and each micro-batch has a forward of its own."""
    groups = groupby(points, key=lambda p: "backward" if p.event.phase in _BACKWARD else p.event.phase)
    starts = [(name, next(iter(group)).start_s) for name, group in groups]
    ends = [*(start_s for _, start_s in starts[1:]), end_s]
    for (name, start_s), stop_s in zip(starts, ends, strict=True):
        yield Phase(name, start_s, stop_s)


def _step(profile: Profile, plan: Plan, told: Sequence[Event], *, first_step: bool) -> Iterator[_Timed]:
    """Every moment of the step. See Note [Outline] 1 and 2.

    Args:
        told: The moments of its second micro-batch and of the optimizer step.
    """
    graph = profile.graph(plan.micro_batch_size)
    dropped, steps = dropped_values(graph, plan), plan.gradient_accumulation_steps
    yield from _timed(profile.loss_of_all, [event for event in told if event.phase == _LOSS])
    later = list(_micro_batch(profile, graph, dropped, told))
    opening = alone(graph, profile.residents.gradients_bytes) if steps > 1 else None
    first = later
    if opening is not None:
        its_own = events(profile, opening, dropped, first_step=first_step)
        first = list(_micro_batch(profile, opening, dropped, its_own))
    factor = _stretch(profile, plan, graph, sum(moment.seconds for moment in later))
    drawn = min(steps, _MOST_DRAWN)  # see Note [Outline] 5
    for number in range(drawn):
        for moment in later if number else first:
            yield _Timed(moment.seconds * factor * steps / drawn, moment.event)
    update = profile.first_update if first_step else profile.update
    yield from _timed(update, [event for event in told if event.phase == _UPDATE])


def _stretch(profile: Profile, plan: Plan, graph: StepGraph, micro_batch_s: float) -> float:
    """How much longer micro-batches take than their ops, so that the step takes as long as the plan says."""
    other_s = profile.update_s + (plan.forward_s + profile.loss_of_all.seconds if graph.held_bytes else 0.0)
    wanted_s = (plan.predicted_step_s - other_s) / plan.gradient_accumulation_steps
    return wanted_s / micro_batch_s if min(wanted_s, micro_batch_s) > 0 else 1.0


def _micro_batch(
    profile: Profile, graph: StepGraph, dropped: Mapping[int, Level], told: Iterable[Event]
) -> Iterator[_Timed]:
    """Every moment of one micro-batch, of what is told of it."""
    inside = (event for event in told if event.phase not in (_LOSS, _UPDATE))
    moments = run(graph, dropped, alignment_bytes=profile.alignment_bytes).moments
    for moment, event in zip(moments, inside, strict=True):
        op = graph.ops[moment.op]
        yield _Timed(op.replay_s if moment.is_replay else op.seconds, event)


def _timed(graph: StepGraph, told: Sequence[Event]) -> Iterator[_Timed]:
    """The moments of a graph in which nothing is replayed; without ops they take no time."""
    ops = [op.seconds for op in graph.ops] or [0.0] * len(told)
    for seconds, event in zip(ops, told, strict=True):
        yield _Timed(seconds, event)
