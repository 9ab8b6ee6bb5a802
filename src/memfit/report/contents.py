"""Everything a report shows, as plain data: which plans there are, and what each does. Draws nothing.

Note [The plans of a report]
 1. The slider moves over the frontier of the profile: few plans, planned here, and the report's own one.
    They are planned for the peaks of the ways by hand, so that each is compared in its own memory.
 2. Where the batch may not be split (a layer looks across its rows, the audit says no), nor is it here; a
    micro-batch that was pinned stays pinned.
 3. *Plain* is the largest recorded micro-batch without any recomputation: the whole batch, where it was
    recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memfit.core.frontier import frontier, undominated
from memfit.core.graph import Profile, StepGraph
from memfit.core.outline import Outline, outline
from memfit.core.plan import Plan, find_plan
from memfit.core.strategies import Strategy, notable, strategies
from memfit.core.strip import Block, blocks_of, decisions, recomputed_shares, saved_bytes
from memfit.report.categories import CATEGORIES as CATEGORIES
from memfit.report.categories import sizes_of as sizes_of
from memfit.report.reading import Source
from memfit.units import format_bytes, format_seconds

PLANS = 10
_PLENTY_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan, its picture, and what it does with each forward op of its graph (see ``core/strip.py``)."""

    plan: Plan
    outline: Outline
    letters: str
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """The part of a report that is about a plan.

    Attributes:
        choices: The frontier, least memory first.
        chosen: Which of them is the report's own plan.
    """

    profile: Profile
    plain: Choice
    choices: tuple[Choice, ...]
    chosen: int
    strategies: tuple[Strategy, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """All of a report."""

    source: Source
    planned: Planned | None


def contents(source: Source, *, plans: int = PLANS) -> Contents:
    """Plans the frontier and draws up each of its plans. See Note [The plans of a report].

    Cost: that of ``frontier`` with so many plans, and some simulations of each.
    """
    profile, plan = source.profile, source.plan
    if profile is None or plan is None:
        return Contents(source, None)
    pinned = _pinned(source, profile)
    by_hand = strategies(profile, micro_batch_size=pinned)
    budgets_bytes = [strategy.predicted_peak_bytes for strategy in undominated(by_hand)]
    others = frontier(profile, micro_batch_size=pinned, plans=plans, budgets_bytes=budgets_bytes)
    others = [other for other in others if other.predicted_peak_bytes != plan.predicted_peak_bytes]
    found = sorted([*others, plan], key=lambda p: (p.predicted_peak_bytes, p.predicted_step_s))
    largest = max(graph.rows for graph in profile.graphs)
    plain = find_plan(profile, memory=_PLENTY_BYTES, micro_batch_size=largest)
    return Contents(
        source,
        Planned(
            profile=profile,
            plain=_choice(profile, plain),
            choices=tuple(_choice(profile, each) for each in found),
            chosen=found.index(plan),
            strategies=tuple(notable(by_hand)),
        ),
    )


def verdict(content: Contents) -> str:
    """The report in one line."""
    source, planned = content.source, content.planned
    measured = source.result.get("measured_peak_bytes")
    told = f"measured {format_bytes(measured)}" if isinstance(measured, int) else "not measured"
    if planned is None:
        return f"A plain run without a plan: peak {told}."
    plan, plain = planned.choices[planned.chosen].plan, planned.plain.plan
    peak, budget = format_bytes(plan.predicted_peak_bytes), format_bytes(plan.budget_bytes)
    figures = f"{peak} predicted, {told}, of {budget}"
    if source.result.get("held") is False:
        return f"The promise did not hold: {figures}."
    opening = "It held" if source.result.get("held") is True else "It fits"
    more_s = plan.predicted_step_s / plain.predicted_step_s - 1 if plain.predicted_step_s else 0.0
    cost = f"{more_s:.1%} longer than" if more_s > 0 else "no longer than"
    return (
        f"{opening}: {figures}. {_how(plan)}; a step takes {cost} the plain one, which peaks at "
        f"{format_bytes(plain.predicted_peak_bytes)}."
    )


def _how(plan: Plan) -> str:
    """How a plan runs the batch."""
    steps, rows = plan.gradient_accumulation_steps, plan.micro_batch_size
    counted = f"{rows} row{'s' if rows != 1 else ''}"
    parts = f"{steps} micro-batches of at most {counted}" if steps > 1 else f"All {counted} at once"
    share = plan.recompute_s / plan.predicted_step_s if plan.predicted_step_s else 0.0
    again = f"{share:.1%} of a step recomputing" if plan.recomputes else "nothing recomputed"
    return f"{parts}, {again}"


def held_against(content: Contents) -> list[tuple[str, str, str, str]]:
    """Rows of what was predicted, measured, and the first over the second."""
    source = content.source
    if content.planned is None:
        return []
    plan = content.planned.choices[content.planned.chosen].plan
    rows = []
    measured_bytes, measured_s = (source.result.get(n) for n in ("measured_peak_bytes", "median_step_s"))
    if isinstance(measured_bytes, int) and measured_bytes > 0:
        ratio = plan.predicted_peak_bytes / measured_bytes
        both = format_bytes(plan.predicted_peak_bytes), format_bytes(measured_bytes)
        rows.append(("peak", *both, f"{ratio:.5f}"))
    if isinstance(measured_s, int | float) and measured_s > 0:
        both = format_seconds(plan.predicted_step_s), format_seconds(measured_s)
        rows.append(("step", *both, f"{plan.predicted_step_s / measured_s:.3f}"))
    return rows


def data(content: Contents) -> dict[str, Any]:
    """What the script of the page reads: bytes as integers, columns as differences from row to row."""
    losses = [[entry.step, entry.loss, entry.seconds] for entry in content.source.losses]
    planned = content.planned
    if planned is None:
        return {"losses": losses}
    texts: dict[str, int] = {}
    rows = {choice.plan.micro_batch_size for choice in (planned.plain, *planned.choices)}
    graphs = {planned.profile.graph(size).rows: planned.profile.graph(size) for size in rows}
    return {
        "losses": losses,
        "categories": CATEGORIES,
        "plain": _choice_data(planned.plain, texts),
        "choices": [_choice_data(choice, texts) for choice in planned.choices],
        "chosen": planned.chosen,
        "strategies": [
            [s.family, s.name, s.micro_batch_size, s.predicted_peak_bytes, s.predicted_step_s]
            for s in planned.strategies
        ],
        "graphs": {str(size): _graph_data(graph, texts) for size, graph in graphs.items()},
        "texts": list(texts),
    }


def _pinned(source: Source, profile: Profile) -> int | None:
    """The micro-batch size that all plans must have. See Note [The plans of a report] 2."""
    assert source.plan is not None
    if source.micro_batch_size is not None:
        return source.plan.micro_batch_size
    audit = profile.audit
    must_stay_whole = any(graph.coupled for graph in profile.graphs) or (
        audit is not None and not audit.is_exact and not source.plan.is_two_pass
    )
    return source.plan.micro_batch_size if must_stay_whole else None


def _choice(profile: Profile, plan: Plan) -> Choice:
    """A plan drawn up."""
    graph = profile.graph(plan.micro_batch_size)
    return Choice(plan, outline(profile, plan), decisions(graph, plan), recomputed_shares(graph, plan))


def _choice_data(choice: Choice, texts: dict[str, int]) -> dict[str, Any]:
    """A plan's figures and its picture."""
    plan, drawn = choice.plan, choice.outline
    return {
        "rows": plan.micro_batch_size,
        "steps": plan.gradient_accumulation_steps,
        "budget": plan.budget_bytes,
        "peak": plan.predicted_peak_bytes,
        "owner": plan.peak_owner,
        "seconds": plan.predicted_step_s,
        "recompute_s": plan.recompute_s,
        "recomputes": plan.recomputes,
        "gap": plan.optimality_gap,
        "two_pass": plan.is_two_pass,
        "first_step": drawn.is_first_step,
        "end_ns": round(drawn.end_s * 1e9),
        "at_ns": _differences([round(point.start_s * 1e9) for point in drawn.points]),
        "sizes": [
            _differences(column)
            for column in zip(*(sizes_of(point.event) for point in drawn.points), strict=True)
        ],
        "phase": [_number(texts, point.event.phase) for point in drawn.points],
        "at": [_number(texts, point.event.owner) for point in drawn.points],
        "phases": [[p.name, round(p.start_s * 1e9), round(p.end_s * 1e9)] for p in drawn.phases],
        "letters": choice.letters,
        "shares": [round(share, 4) for share in choice.shares],
    }


def _graph_data(graph: StepGraph, texts: dict[str, int]) -> dict[str, Any]:
    """The blocks of a graph, and its forward ops."""
    blocks: Sequence[Block] = blocks_of(graph)
    return {
        "blocks": [[block.name, block.ops.start, block.ops.stop] for block in blocks],
        "ops": [_number(texts, str(op.key)) for op in graph.ops[: graph.forward_ops]],
        "saved": saved_bytes(graph),
    }


def _differences(column: Sequence[int]) -> list[int]:
    """The first number, and then each number less the one before: mostly zeros, so short."""
    return [now - before for before, now in zip((0, *column), column, strict=False)]


def _number(texts: dict[str, int], text: str) -> int:
    """The number of a text in the table of all."""
    return texts.setdefault(text, len(texts))


def about(content: Contents) -> Mapping[str, str]:
    """Versions and what else the report rests on, by name."""
    profile = content.source.profile
    found = dict(content.source.versions)
    if profile is not None:
        found |= {name: value for name, value in profile.basis if name != "torch"}
        found["seconds"] = profile.source
    return found
