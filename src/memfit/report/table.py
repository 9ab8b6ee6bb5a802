"""The timeline as a table: CSV, and JSON with the plans beside it.

Note [Table]
 1. A row is a moment of the plain step or of the planned one, in order; bytes and seconds are numbers without
    units, which the names of the columns carry. ``COLUMNS`` is the order in both files.
 2. The version of the schema goes up where a column changes its name or its meaning, or goes; a column that
    is added at the end leaves it. It is in every row of the CSV, which has no other place for it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, Final

from memfit.core.plan import Plan
from memfit.core.unrolled import Unrolled
from memfit.report.contents import sizes_of

SCHEMA_VERSION: Final = 1
_BYTES: Final = (
    "parameters_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "batch_bytes",
    "activations_bytes",
    "recomputed_bytes",
    "temporaries_bytes",
)
COLUMNS: Final = (
    *("schema_version", "state", "index", "part", "phase", "module", "op", "nth", "start_s", "seconds"),
    *(*_BYTES, "total_bytes"),
)
_LONG = ("recompute", "levels", "hidden")  # of a plan: for the plan's own file

Steps = Iterable[tuple[str, Plan, Unrolled]]


def rows(state: str, step: Unrolled) -> Iterator[tuple[Any, ...]]:
    """The moments of a step in order of ``COLUMNS``; micro-batches that are told together have none."""
    index, now_s = 0, 0.0
    for part in step.parts:
        start_s = now_s
        for tick in part.ticks:
            event, key = tick.event, tick.key
            where = (SCHEMA_VERSION, state, index, part.name, event.phase, key.frame, key.op, key.nth)
            yield (*where, start_s, tick.seconds, *sizes_of(event), event.total_bytes)
            index, start_s = index + 1, start_s + tick.seconds
        now_s += part.seconds


def as_csv(steps: Steps) -> str:
    """The table with a head; see Note [Table]."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for state, _, step in steps:
        writer.writerows(rows(state, step))
    return text.getvalue()


def as_data(steps: Steps, about: dict[str, Any]) -> dict[str, Any]:
    """The same column by column, with a summary of each plan and what else the file says of itself."""
    states = {}
    for state, plan, step in steps:
        columns = zip(COLUMNS, zip(*rows(state, step), strict=True), strict=True)
        timeline = {name: column for name, column in columns if name not in ("schema_version", "state")}
        parts = [
            {"name": part.name, "seconds": part.seconds, "moments": len(part.ticks)} for part in step.parts
        ]
        states[state] = {"plan": _summary(plan), "parts": parts, "timeline": timeline}
    return {"format": "memfit-timeline", "schema_version": SCHEMA_VERSION, **about, "states": states}


def _summary(plan: Plan) -> dict[str, Any]:
    """A plan without its list of tensors."""
    found = {name: value for name, value in asdict(plan).items() if name not in _LONG}
    return found | {"recomputes": plan.recomputes, "optimality_gap": plan.optimality_gap}
