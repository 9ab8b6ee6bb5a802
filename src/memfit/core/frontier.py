"""The plans worth choosing from: none is beaten by another in both memory and seconds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Protocol, TypeVar

from memfit.core.graph import Profile
from memfit.core.plan import Plan, Planner

_PLENTY_BYTES = 1 << 62


def frontier(
    profile: Profile,
    *,
    micro_batch_size: int | None = None,
    plans: int = 24,
    budgets_bytes: Collection[int] = (),
) -> list[Plan]:
    """The undominated plans from the least memory that works to no recomputation, least memory first.

    Each one takes more memory than the one before and is faster. Each plan's budget is its own peak.

    Pure, like :func:`memfit.find_plan`.

    Args:
        micro_batch_size: Pins the micro-batch; otherwise each plan has its own.
        plans: How many budgets to plan for, at least 2: the two ends, ``budgets_bytes`` as far as they are
            between and there is room, and the middles of the widest gaps, as ratios of the memory above
            the residents; without ``budgets_bytes``, at equal ratios.
        budgets_bytes: Budgets of interest, such as the peaks of other ways to run the step.

    Raises:
        ValueError: ``plans`` is below 2, or the profile has no step, or no such micro-batch.
    """
    if plans < 2:
        raise ValueError(f"a frontier of {plans} plans has no two ends: ask for at least 2")
    planner = Planner(profile, micro_batch_size)
    lowest, fastest = planner.lowest(), planner.fastest(_PLENTY_BYTES)
    assert fastest is not None
    lowest = planner.fastest(lowest.predicted_peak_bytes) or lowest
    found = [lowest, fastest]
    base_bytes = min(profile.residents.total_bytes, lowest.predicted_peak_bytes - 1)
    ends = (lowest.predicted_peak_bytes, fastest.predicted_peak_bytes)
    for budget_bytes in _budgets(ends, base_bytes, plans - 2, budgets_bytes):
        plan = planner.fastest(budget_bytes)
        if plan is not None:
            found.append(plan)
    return [replace(plan, budget_bytes=plan.predicted_peak_bytes) for plan in undominated(found)]


def _budgets(ends: tuple[int, int], base_bytes: int, count: int, wanted: Collection[int]) -> list[int]:
    """So many budgets between two, those that are wanted first. See :func:`frontier`."""
    low, high = ends
    between = sorted({budget for budget in wanted if low < budget < high})
    if not between:
        ratio = (high - base_bytes) / (low - base_bytes)
        return [
            base_bytes + round((low - base_bytes) * ratio ** (i / (count + 1))) for i in range(1, count + 1)
        ]
    found = between if len(between) <= count else [between[i * len(between) // count] for i in range(count)]
    while len(found) < count:
        around = sorted([low, *found, high])
        below, above = max(pairwise(around), key=lambda gap: (gap[1] - base_bytes) / (gap[0] - base_bytes))
        found.append(base_bytes + round(math.sqrt((below - base_bytes) * (above - base_bytes))))
    return found


def fallbacks(profile: Profile, plan: Plan) -> Iterator[Plan]:
    """The plans to turn to, one after the other, when memory has run out under one.

    Each peaks lower than the one before: first at its micro-batch size, down to the least, then at smaller
    ones. The first is to take a tenth less, the next a fifth less than that, and so on, for running out of
    memory again takes longer than a plan that could have recomputed a little less.

    Pure, like :func:`memfit.find_plan`. The budget of each is what it was planned for.
    """
    peak_bytes, size = plan.predicted_peak_bytes, plan.micro_batch_size
    smaller = {graph.rows for graph in profile.graphs if graph.rows < size}
    for rows in (size, *sorted(smaller, reverse=True)):
        planner = Planner(profile, rows)
        for cut in (10, 20, 40, 80, 100):
            found = planner.fastest(peak_bytes * (100 - cut) // 100) or planner.lowest()
            if found.predicted_peak_bytes >= peak_bytes:
                break
            peak_bytes = found.predicted_peak_bytes
            yield found


class Point(Protocol):
    """A way to run the step, as far as memory and seconds go."""

    @property
    def predicted_peak_bytes(self) -> int:
        """Highest allocated bytes of the whole step."""

    @property
    def predicted_step_s(self) -> float:
        """Seconds of the step."""


P = TypeVar("P", bound=Point)


def undominated(plans: Iterable[P]) -> list[P]:
    """The plans that no other one beats, least memory first."""
    kept: list[P] = []
    for plan in sorted(plans, key=lambda p: (p.predicted_peak_bytes, p.predicted_step_s)):
        if not kept or plan.predicted_step_s < kept[-1].predicted_step_s:
            kept.append(plan)
    return kept
