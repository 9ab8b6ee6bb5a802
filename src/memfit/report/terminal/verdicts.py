"""A plan, a frontier, a run: each in one line, which is the last that a command prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memfit.units import format_bytes

if TYPE_CHECKING:
    from memfit.core.plan import Plan
    from memfit.train import RunResult


def plan_verdict(plan: Plan, title: str) -> str:
    """Returns the plan in one line."""
    fits = f"{title} fits into {format_bytes(plan.budget_bytes)}"
    how = f"{plan.gradient_accumulation_steps} micro-batches of at most {plan.micro_batch_size} rows"
    if plan.gradient_accumulation_steps == 1:
        how = "the whole batch at once"
    if plan.recomputes == 0:
        return f"{fits}: {how}, nothing recomputed."
    return f"{fits}: {how}, {plan.recompute_s / plan.predicted_step_s:.1%} of a step spent recomputing."


def frontier_verdict(plans: Sequence[Plan], title: str) -> str:
    """Returns a frontier in one line: its two ends."""
    least, fastest = plans[0], plans[-1]
    slower = least.predicted_step_s / fastest.predicted_step_s if fastest.predicted_step_s else 1.0
    return (
        f"{title} runs in {format_bytes(least.predicted_peak_bytes)} and more: the fastest step takes "
        f"{format_bytes(fastest.predicted_peak_bytes)}, one in the least memory {slower:.2f} times as long."
    )


def result_verdict(result: RunResult, title: str) -> str:
    """Returns a run in one line: its steps, its losses, and whether the promise held."""
    steps = f"{result.steps_done} step{'s' if result.steps_done != 1 else ''}"
    done = f"{title}, {steps}, loss {result.first_loss:.4f} -> {result.last_loss:.4f}"
    measured = result.measured_peak_bytes
    peak = "peak not measured" if measured is None else f"measured peak {format_bytes(measured)}"
    if result.plan is None:
        return f"{done}: {peak}, without a plan."
    budget = format_bytes(result.plan.budget_bytes)
    if result.held is None:
        return f"{done}: {peak}, of {budget}."
    return f"{done}: {peak}, {'within' if result.held else 'NOT AS PROMISED within'} {budget}."
