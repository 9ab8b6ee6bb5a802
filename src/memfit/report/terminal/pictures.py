"""The pictures of a plan: its peak, its live bytes beside the plain step's, and its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType

from memfit.report.terminal.blocks import BlockStrip
from memfit.report.terminal.peak import PeakBar
from memfit.report.terminal.sparks import LiveBytes

if TYPE_CHECKING:
    from memfit.core.graph import Profile
    from memfit.core.plan import Plan
    from memfit.report.contents import Planned

_PLENTY_BYTES = 1 << 62


def plan_pictures(profile: Profile, plan: Plan) -> list[RenderableType]:
    """What to show of a plan. *Plain* is its largest recorded micro-batch with nothing recomputed.

    Raises:
        ValueError: The plan was made from another profile.
    """
    from memfit.core.outline import outline
    from memfit.core.plan import find_plan
    from memfit.core.strip import blocks_of, recomputed_shares

    largest = max(graph.rows for graph in profile.graphs)
    plain = find_plan(profile, memory=_PLENTY_BYTES, micro_batch_size=largest)
    drawn = outline(profile, plan)
    steps = ("plain", outline(profile, plain)), ("memfit", drawn)
    found: list[RenderableType] = [PeakBar(drawn.peak.event, plan.budget_bytes), LiveBytes(steps)]
    if plan.recompute:
        graph = profile.graph(plan.micro_batch_size)
        found.append(BlockStrip(blocks_of(graph), recomputed_shares(graph, plan)))
    return spaced(found)


def run_pictures(planned: Planned) -> list[RenderableType]:
    """The same of a run, from what its report has worked out already."""
    from memfit.core.strip import blocks_of

    own = planned.choices[planned.chosen]
    steps = ("plain", planned.plain.outline), ("memfit", own.outline)
    found: list[RenderableType] = [PeakBar(own.outline.peak.event, own.plan.budget_bytes), LiveBytes(steps)]
    if own.plan.recompute:
        blocks = blocks_of(planned.profile.graph(own.plan.micro_batch_size))
        found.append(BlockStrip(blocks, own.shares))
    return spaced(found)


def spaced(parts: list[RenderableType]) -> list[RenderableType]:
    """The parts with an empty line before each."""
    return [each for part in parts for each in ("", part)]
