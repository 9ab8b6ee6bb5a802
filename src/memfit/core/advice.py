"""What a user could change to train in less memory or time. Advice, never action.

Note [Advice]
 1. Only a plan that pays for its memory gets advice: one that accumulates or recomputes.
 2. Accumulation and recomputation are two ways to pay. The best plan of the other way comes from the same
    profile and the same memory.
 3. A smaller effective batch is one micro-batch of the plan by itself. Without accumulation no gradients are
    there during its forward: in its graph each gradient stays where it was added to a former one.
 4. A smaller batch needs no accumulation if the half-life of Adam's second moment stays the same number of
    rows: ``beta2 ** (new rows / old rows)``. Source: Marek et al. 2025, arXiv 2507.07101.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from memfit.core.graph import LogEntry, LogKind, Profile, StepGraph
from memfit.core.plan import Plan, find_plan
from memfit.errors import InfeasibleBudget
from memfit.units import format_bytes, format_seconds

_ACCUMULATES = "AccumulateGrad"  # in the name of the op by which autograd adds to .grad
_NOTABLE = 0.01  # of bytes or seconds


def advice(
    profile: Profile,
    plan: Plan,
    *,
    rows_per_epoch: int | None = None,
    betas: tuple[float, float] | None = None,
) -> tuple[str, ...]:
    """Lines for people on what else could be done; none where nothing is worth saying. See Note [Advice].

    Pure; every number is the profile's or a plan's of it.

    Args:
        profile: What ``plan`` was made from.
        rows_per_epoch: How many rows the data has, where that is known.
        betas: Adam's, where the optimizer has them.
    """
    lines = [*_other_way(profile, plan)]
    if plan.gradient_accumulation_steps > 1:
        lines += [*_smaller_batch(profile, plan), *_updates(plan, rows_per_epoch), *_half_life(plan, betas)]
    return tuple(lines)


def block(lines: Sequence[str]) -> str:
    """Advice as a block of lines."""
    return "\n".join(["advice:", *(f"  {line}" for line in lines)])


def alone(graph: StepGraph, gradients_bytes: int) -> StepGraph | None:
    """A micro-batch as a step of its own: gradients appear in its backward. None where some are not found."""
    if not graph.gradients_resident:
        return graph
    kept: set[int] = set()
    log: list[LogEntry] = []
    adds = False
    for entry in graph.log:
        if entry.kind == LogKind.OP:
            adds = _ACCUMULATES in graph.ops[entry.item].key.op
        if adds and entry.kind == LogKind.FREE:  # the first one is what was added
            kept.add(entry.item)
            adds = False
        else:
            log.append(entry)
    if sum(graph.storages[index].size_bytes for index in kept) != gradients_bytes:
        return None
    storages = tuple(replace(s, persists=s.persists or i in kept) for i, s in enumerate(graph.storages))
    return replace(graph, gradients_resident=False, storages=storages, log=tuple(log))


def _other_way(profile: Profile, plan: Plan) -> Iterator[str]:
    """What the best plan with one micro-batch, or with several, would cost instead. See Note [Advice] 2."""
    accumulates = plan.gradient_accumulation_steps > 1
    others = tuple(g for g in profile.graphs if (g.rows >= profile.rows) == accumulates)
    if not others or not (accumulates or plan.recomputes):
        return
    try:
        other = find_plan(replace(profile, graphs=others), memory=plan.budget_bytes)
    except InfeasibleBudget as error:
        if accumulates:
            needed = format_bytes(error.needed_bytes)
            yield f"without accumulation the batch of {plan.rows} rows takes at least {needed}"
        return
    one, another = ("accumulation", "recomputation")[:: 1 if accumulates else -1]
    share = other.predicted_step_s / plan.predicted_step_s - 1
    if abs(share) >= _NOTABLE:
        yield (
            f"{one} costs {'less' if share > 0 else 'more'} here than {another}: {_how(other)} would take "
            f"{format_seconds(other.predicted_step_s)}, {abs(share):.1%} {'more' if share > 0 else 'less'}"
        )


def _how(plan: Plan) -> str:
    """A plan in a few words."""
    steps, rows = plan.gradient_accumulation_steps, plan.micro_batch_size
    parts = "the whole batch at once" if steps == 1 else f"{steps} micro-batches of {rows} rows"
    share = plan.recompute_s / plan.predicted_step_s
    return f"{parts}, {share:.1%} of it recomputing," if plan.recomputes else parts


def _smaller_batch(profile: Profile, plan: Plan) -> Iterator[str]:
    """What one micro-batch as the effective batch would save. See Note [Advice] 3."""
    graph = alone(profile.graph(plan.micro_batch_size), profile.residents.gradients_bytes)
    if graph is None:
        return
    batch_bytes = -(-profile.residents.batch_bytes * graph.rows // profile.rows)
    small = replace(
        profile,
        rows=graph.rows,
        graphs=(graph,),
        residents=replace(profile.residents, batch_bytes=batch_bytes, batch_sizes=()),
    )
    with suppress(InfeasibleBudget):
        yield from _savings(plan, find_plan(small, memory=plan.budget_bytes))


def _savings(plan: Plan, small: Plan) -> Iterator[str]:
    """What a smaller batch saves, and what that costs a row."""
    peak_bytes, less_bytes = plan.predicted_peak_bytes, small.predicted_peak_bytes
    row_s, there_s = (each.predicted_step_s / each.rows for each in (plan, small))
    if less_bytes <= (1 - _NOTABLE) * peak_bytes or there_s <= (1 - _NOTABLE) * row_s:
        yield (
            f"an effective batch of {small.rows} rows needs no accumulation: it peaks at "
            f"{format_bytes(less_bytes)} instead of {format_bytes(peak_bytes)} and takes "
            f"{format_seconds(there_s)} a row instead of {format_seconds(row_s)}"
        )


def _updates(plan: Plan, rows_per_epoch: int | None) -> Iterator[str]:
    """How many optimizer updates an epoch has."""
    if rows_per_epoch is not None:
        now, then = (-(-rows_per_epoch // rows) for rows in (plan.rows, plan.micro_batch_size))
        yield (
            f"an epoch of {rows_per_epoch:,} rows has {now:,} optimizer updates; with a batch of "
            f"{plan.micro_batch_size} rows it would have {then:,}"
        )


def _half_life(plan: Plan, betas: tuple[float, float] | None) -> Iterator[str]:
    """The alternative to accumulation. See Note [Advice] 4."""
    if betas is not None and 0 < betas[1] < 1:
        rows = plan.micro_batch_size
        beta2 = betas[1] ** (rows / plan.rows)
        yield (
            f"small batches can replace accumulation: with {rows} rows, beta2 {beta2:.6g} keeps the "
            f"half-life of {betas[1]:.6g} in rows (arXiv 2507.07101)"
        )
