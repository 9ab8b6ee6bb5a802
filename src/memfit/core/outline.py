"""A whole step as a picture shows it: live bytes over predicted time, in few points, with every peak.

Note [Outline]
 1. A step is drawn as it runs, which ``core/unrolled.py`` says.
 2. Time is cut into equal stretches; of each the highest and the lowest moment stay, with all their bytes. So
    the peak is to the byte, and each point is the highest or the lowest of its surroundings.
 3. Beyond some number of micro-batches no eye tells them apart: so many are drawn, each as long as several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from memfit.core.graph import Profile
from memfit.core.plan import Plan
from memfit.core.timeline import Event
from memfit.core.unrolled import MICRO_BATCH, Tick, Unrolled, unrolled

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


def outline(profile: Profile, plan: Plan, *, stretches: int = STRETCHES) -> Outline:
    """The picture of a step under a plan, in at most twice as many points as ``stretches``. Pure.

    Raises:
        ValueError: The plan was made from another profile.
    """
    step = unrolled(profile, plan, most_micro_batches=_MOST_DRAWN)
    points, end_s = [], 0.0
    for tick in _drawn(step):
        points.append(Point(end_s, tick.event))
        end_s += tick.seconds
    kept, phases = thinned(points, end_s, stretches), _phases(points, end_s)
    return Outline(tuple(kept), tuple(phases), end_s, step.is_first_step)


def _drawn(step: Unrolled) -> Iterator[Tick]:
    """Every moment that is drawn. See Note [Outline] 3."""
    rest_s = sum(part.seconds for part in step.parts if not part.ticks)
    shown_s = sum(part.seconds for part in step.parts if part.name.startswith(MICRO_BATCH) and part.ticks)
    longer = 1 + rest_s / shown_s if rest_s else 1.0
    for part in step.parts:
        factor = longer if part.name.startswith(MICRO_BATCH) else 1.0
        for tick in part.ticks:
            yield tick._replace(seconds=tick.seconds * factor)


def thinned(points: Iterable[Point], end_s: float, stretches: int) -> list[Point]:
    """The highest and the lowest point of each of so many equal stretches of time. See Note [Outline] 2.

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
