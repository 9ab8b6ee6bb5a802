"""What the planner tried: each micro-batch size under a budget, and why it was not taken.

Note [Tried]
 1. A size that cannot be faster than the plan is never solved (``core/plan.py``, Note [Search] 2). So its
    figures are bounds: it takes at least so many seconds, and its peak is known only where it fits as it is.
 2. Nothing is planned a second time: the planner remembers what it has worked out.
"""

from __future__ import annotations

from dataclasses import dataclass

from memfit.core.candidate import Candidate
from memfit.core.plan import Plan, Planner
from memfit.units import format_bytes


@dataclass(frozen=True, slots=True)
class Tried:
    """One micro-batch size. See Note [Tried].

    Attributes:
        micro_batch_size: Rows of the largest micro-batch.
        gradient_accumulation_steps: Number of micro-batches.
        predicted_peak_bytes: Highest allocated bytes of the step; None where nothing was worked out, or
            nothing fits.
        predicted_step_s: Seconds of the step; None where nothing fits.
        recompute_s: Seconds of recomputation in it; None where nothing fits.
        is_bound: The seconds are the least possible ones, not those of a plan.
        why_not: Why it was not taken; empty for the one that was.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    predicted_peak_bytes: int | None
    predicted_step_s: float | None
    recompute_s: float | None
    is_bound: bool
    why_not: str

    @property
    def is_chosen(self) -> bool:
        """Whether it is the plan's."""
        return not self.why_not


def tried(planner: Planner, plan: Plan) -> tuple[Tried, ...]:
    """Every micro-batch size that a planner has weighed for a plan, the largest first. Pure.

    Args:
        planner: The one that found the plan.
    """
    found = (_tried(planner, candidate, plan) for candidate in planner.candidates)
    return tuple(sorted(found, key=lambda each: -each.micro_batch_size))


def _tried(planner: Planner, candidate: Candidate, plan: Plan) -> Tried:
    """What is known of one size. See Note [Tried] 1."""
    rows, steps, budget_bytes = candidate.graph.rows, candidate.steps, plan.budget_bytes
    if rows == plan.micro_batch_size:
        figures = plan.predicted_peak_bytes, plan.predicted_step_s, plan.recompute_s
        return Tried(rows, steps, *figures, is_bound=False, why_not="")
    floor_bytes = candidate.floor.total_bytes
    if floor_bytes > budget_bytes:
        why = f"{candidate.floor.owner} alone takes {format_bytes(floor_bytes)}"
        return Tried(rows, steps, None, None, None, is_bound=False, why_not=why)
    if candidate.plain_bytes <= budget_bytes:
        peak_bytes = max(candidate.plain_bytes, floor_bytes)
        return Tried(rows, steps, peak_bytes, candidate.step_s(0.0), 0.0, is_bound=False, why_not="slower")
    plain_s = candidate.step_s(0.0)
    bound_s = 0.0 if plain_s >= plan.predicted_step_s else candidate.bound_s(budget_bytes)
    least_s = candidate.step_s(bound_s)
    if least_s >= plan.predicted_step_s and least_s < float("inf"):
        again_s = candidate.largest * bound_s
        return Tried(rows, steps, None, least_s, again_s, is_bound=True, why_not="slower at best")
    other = planner.of_size(rows, budget_bytes)
    if other is None:
        return Tried(rows, steps, None, None, None, is_bound=False, why_not="nothing found fits")
    figures = other.predicted_peak_bytes, other.predicted_step_s, other.recompute_s
    return Tried(rows, steps, *figures, is_bound=False, why_not="slower")
