"""Pure data to Altair charts: the timeline, the frontier, the losses.

Note [One chart, two uses]
 1. A chart takes its rows from a named table. The page fills the table and fills it anew when the slider
    moves; a picture (PNG, SVG) has the rows in it. Both are the same chart.
 2. The axes are the same for every plan of a report, so that two pictures can be compared.
 3. Colours of categories are those of ``categories.py``. Thin lines between neighbours tell them apart where
    colours do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import altair as alt

from memfit.core.frontier import Point
from memfit.core.outline import Outline
from memfit.report.categories import CATEGORIES, LIGHT, sizes_of
from memfit.report.contents import Choice, Contents, Planned
from memfit.units import format_bytes, format_seconds

Rows = list[dict[str, Any]]
Chart = Any  # of Altair; what its methods return is typed too loosely to say more
_FAMILIES = ("plain", "every block", "every k-th block", "matmuls saved", "half the matmuls")
_SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down")
_RED = "#e5355f"  # to be read on light and dark
_HEADROOM = 1.12  # above the highest bytes: for the names of the phases
_NAMED_FROM, _NAMED_FROM_NARROW = (
    0.075,
    0.2,
)  # part of the axis a phase must take to be named: wide, on a phone


class Unit(NamedTuple):
    """What an axis counts in: its name, and how much of the base unit that is."""

    name: str
    size: float


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes that all timelines of a report share."""

    memory: Unit
    time: Unit
    top_bytes: int
    end_s: float


def axes(planned: Planned) -> Axes:
    """Axes on which the plain step and every plan has room."""
    every = (planned.plain, *planned.choices)
    own = planned.choices[planned.chosen].plan
    top_bytes = max(*(choice.plan.predicted_peak_bytes for choice in every), _shown_budget(own, planned))
    end_s = max(choice.outline.end_s for choice in every)
    memory = Unit("GiB", 2**30) if top_bytes >= 2**31 else Unit("MiB", 2**20)
    memory = Unit("KiB", 2**10) if top_bytes < 2**21 else memory
    return Axes(memory, Unit("s", 1.0) if end_s >= 2 else Unit("ms", 1e-3), top_bytes, end_s)


def _shown_budget(own: Any, planned: Planned) -> int:
    """The budget, unless it is so high above all peaks that nothing else could be seen."""
    highest = max(choice.plan.predicted_peak_bytes for choice in (planned.plain, *planned.choices))
    return int(own.budget_bytes) if own.budget_bytes <= 1.3 * highest else 0


# ---- tables -----------------------------------------------------------------------------------------


def timeline_rows(drawn: Outline, scale: Axes) -> Rows:
    """One row a point, and one more at the end: nothing changes between two."""
    rows = []
    for point in drawn.points:
        sizes = sizes_of(point.event)
        row = {"t": point.start_s / scale.time.size, "phase": point.event.phase, "owner": point.event.owner}
        row |= {name: size / scale.memory.size for name, size in zip(CATEGORIES, sizes, strict=True)}
        rows.append(row | {"total": point.event.total_bytes / scale.memory.size})
    return [*rows, rows[-1] | {"t": drawn.end_s / scale.time.size}]


def phase_rows(drawn: Outline, scale: Axes) -> Rows:
    """One row a phase."""
    size = scale.time.size
    return [{"phase": p.name, "start": p.start_s / size, "end": p.end_s / size} for p in drawn.phases]


def mark_rows(choice: Choice, scale: Axes, *, with_budget: bool = True) -> Rows:
    """The peak, and the budget if wanted."""
    peak, plan = choice.outline.peak, choice.plan
    at = {"t": peak.start_s / scale.time.size, "total": peak.event.total_bytes / scale.memory.size}
    rows: Rows = [{"kind": "peak", **at}]
    if with_budget and plan.budget_bytes <= scale.top_bytes * 1.1:
        budget = {"total": plan.budget_bytes / scale.memory.size, "label": format_bytes(plan.budget_bytes)}
        rows.append({"kind": "budget", "t": 0.0, **budget})
    return rows


# ---- charts -----------------------------------------------------------------------------------------


def timeline(scale: Axes, tables: Mapping[str, Rows] | None = None, **size: Any) -> Chart:
    """Stacked live bytes over a step; reads the tables "timeline", "phases" and "marks".

    Args:
        tables: Their rows; without, the page fills them in, and a line follows the pointer.
        size: ``width``, ``height`` and the like.
    """
    end = scale.end_s / scale.time.size
    top = _HEADROOM * scale.top_bytes / scale.memory.size
    x = alt.X(
        "t:Q", title=f"time in the step ({scale.time.name})", scale=alt.Scale(domain=[0, end], nice=False)
    )
    y = alt.Scale(domain=[0, top], nice=False)
    rows = alt.Chart(_table("timeline", tables))
    areas = (
        rows.transform_fold(list(CATEGORIES), as_=["category", "size"])
        .transform_calculate(order=f"indexof({list(CATEGORIES)!r}, datum.category)")
        .mark_area(interpolate="step-after", strokeWidth=0.5)
        .encode(
            x=x,
            y=alt.Y("size:Q", stack="zero", title=f"live memory ({scale.memory.name})", scale=y),
            color=alt.Color("category:N", scale=alt.Scale(domain=list(CATEGORIES)), legend=None),
            order=alt.Order("order:Q"),
        )
    )
    layers = [*_phases(end, tables), areas, *_marks(tables, y)]
    if tables is None:
        layers.append(_pointer(rows, scale, x))
    return alt.layer(*layers).properties(**({"width": "container", "height": 260} | size))


def _phases(end: float, tables: Mapping[str, Rows] | None) -> list[Any]:
    """Each backward shaded, and the phases named where there is room."""
    named_from = end * (_NAMED_FROM_NARROW if tables is None else _NAMED_FROM)
    table = alt.Chart(_table("phases", tables))
    shade = (
        table.transform_filter("datum.phase == 'backward'")
        .mark_rect(color="gray", opacity=0.13)
        .encode(x=alt.X("start:Q", scale=alt.Scale(domain=[0, end], nice=False)), x2="end:Q")
    )
    names = (
        table.transform_filter(f"datum.end - datum.start > {named_from}")
        .transform_calculate(middle="(datum.start + datum.end) / 2")
        .mark_text(baseline="top", fontSize=11)
        .encode(x="middle:Q", y=alt.value(4), text="phase:N")
    )
    return [shade, names]


def _marks(tables: Mapping[str, Rows] | None, y: alt.Scale) -> list[Any]:
    """The budget as a line, the peak as a ring."""
    table = alt.Chart(_table("marks", tables))
    budget = table.transform_filter("datum.kind == 'budget'")
    at = alt.Y("total:Q", scale=y)
    line = budget.mark_rule(strokeDash=[6, 3], strokeWidth=1.5, color=_RED).encode(y=at)
    label = (
        budget.transform_calculate(text="'budget ' + datum.label")
        .mark_text(align="left", baseline="bottom", dx=4, dy=-2, fontSize=11, color=_RED, fontWeight="bold")
        .encode(x=alt.value(0), y=at, text="text:N")
    )
    ring = (
        table.transform_filter("datum.kind == 'peak'")
        .mark_point(
            shape="circle", size=70, filled=True, fill="white", stroke="black", strokeWidth=2, opacity=1
        )
        .encode(x="t:Q", y=at)
    )
    return [line, label, ring]


def _pointer(rows: Any, scale: Axes, x: alt.X) -> Any:
    """A line that follows the pointer and tells what is there."""
    hover = alt.selection_point(
        name="at", nearest=True, on="pointermove", fields=["t"], empty=False, clear="pointerout"
    )
    amount = f",.{2 if scale.memory.name == 'GiB' else 1}f"
    told = [alt.Tooltip("owner:N", title="running"), alt.Tooltip("phase:N")]
    told.append(alt.Tooltip("t:Q", title=f"time ({scale.time.name})", format=",.2f"))
    for name in ("total", *reversed(CATEGORIES)):
        told.append(alt.Tooltip(f"{name}:Q", title=f"{name} ({scale.memory.name})", format=amount))
    line = rows.mark_rule(strokeWidth=1, color="gray").encode(
        x=x, opacity=alt.condition(hover, alt.value(0.9), alt.value(0)), tooltip=told
    )
    return line.add_params(hover)


def frontier(planned: Planned, tables: Mapping[str, Rows] | None = None, **size: Any) -> Chart:
    """Seconds against peak: the plans as a line, the report's own a star, what is done by hand as marks.

    Reads the tables "plans", "hand" and "here" (the plan the slider is at).
    """
    scale = axes(planned)
    points: list[Point] = [*(choice.plan for choice in planned.choices), *planned.strategies]
    peaks, steps = ([getattr(p, f"predicted_{name}") for p in points] for name in ("peak_bytes", "step_s"))
    x = alt.X("peak:Q", **_spread(f"predicted peak ({scale.memory.name}", peaks))
    y = alt.Y("seconds:Q", **_spread(f"predicted step ({scale.time.name}", steps))
    told = [alt.Tooltip("what:N", title="plan"), alt.Tooltip("memory:N"), alt.Tooltip("step:N")]
    plans = alt.Chart(_table("plans", tables))
    line = plans.mark_line(color="gray", strokeWidth=1.5, interpolate="step-after").encode(x=x, y=y)
    dots = plans.mark_point(filled=True, size=36, color="gray", opacity=1).encode(x=x, y=y, tooltip=told)
    families = [name for name in _FAMILIES if any(s.family == name for s in planned.strategies)]
    shapes = [shape for name, shape in zip(_FAMILIES, _SHAPES, strict=True) if name in families]
    legend = alt.Legend(title="by hand", orient="bottom", columns=3)
    hand = (
        alt.Chart(_table("hand", tables))
        .mark_point(size=64, strokeWidth=1.8, opacity=1)
        .encode(
            x=x,
            y=y,
            shape=alt.Shape("family:N", scale=alt.Scale(domain=families, range=shapes), legend=legend),
            color=alt.Color(
                "family:N", scale=alt.Scale(domain=families, range=_hues(families)), legend=legend
            ),
            tooltip=told,
        )
    )
    own = plans.transform_filter("datum.own").mark_point(
        shape=_STAR, filled=True, size=260, color="goldenrod", stroke="black", strokeWidth=0.8, opacity=1
    )
    here = alt.Chart(_table("here", tables)).mark_point(size=320, strokeWidth=2, color=_RED, opacity=1)
    layers = [line, hand, dots, own.encode(x=x, y=y, tooltip=told), here.encode(x=x, y=y)]
    chart = alt.layer(*layers).resolve_scale(shape="independent", color="independent")
    return chart.properties(**({"width": "container", "height": 280} | size))


def _spread(title: str, values: Sequence[float]) -> dict[str, Any]:
    """An axis that does not begin at 0, logarithmic where a few far points would squeeze the rest."""
    is_far = max(values) > 2.5 * min(values) > 0
    return {
        "title": f"{title}, {'logarithmic' if is_far else 'not from 0'})",
        "scale": alt.Scale(type="log", nice=False, padding=14)
        if is_far
        else alt.Scale(zero=False, nice=False, padding=14),
        "axis": alt.Axis(tickCount=6, labelOverlap=True),
    }


_STAR = (
    "M0,-1L0.235,-0.324L0.951,-0.309L0.38,0.124L0.588,0.809L0,0.4L-0.588,0.809L-0.38,0.124L-0.951,-0.309"
    "L-0.235,-0.324Z"
)
# Okabe and Ito's colours, which colour-blind people can tell apart; the shapes say the same.
_HUES = dict(zip(_FAMILIES, ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"), strict=True))


def _hues(families: Sequence[str]) -> list[str]:
    return [_HUES[name] for name in families]


def plan_rows(planned: Planned) -> Rows:
    """One row a plan of the frontier."""
    scale = axes(planned)
    rows = []
    for index, choice in enumerate(planned.choices):
        plan = choice.plan
        what = f"memfit, {plan.gradient_accumulation_steps} x {plan.micro_batch_size} rows"
        point = _point(what, plan.predicted_peak_bytes, plan.predicted_step_s, scale)
        rows.append(point | {"own": index == planned.chosen})
    return rows


def hand_rows(planned: Planned) -> Rows:
    """One row a strategy."""
    scale = axes(planned)
    return [
        _point(
            f"{s.name}, {s.gradient_accumulation_steps} x {s.micro_batch_size} rows",
            s.predicted_peak_bytes,
            s.predicted_step_s,
            scale,
        )
        | {"family": s.family}
        for s in planned.strategies
    ]


def _point(what: str, peak_bytes: int, step_s: float, scale: Axes) -> dict[str, Any]:
    """A way to run the step as a row."""
    return {
        "what": what,
        "peak": peak_bytes / scale.memory.size,
        "seconds": step_s / scale.time.size,
        "memory": format_bytes(peak_bytes),
        "step": format_seconds(step_s),
    }


def losses(tables: Mapping[str, Rows] | None = None, **size: Any) -> Chart:
    """The loss of each step; reads the table "losses"."""
    x = alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format="d"))
    y = alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False))
    told = [
        alt.Tooltip("step:Q"),
        alt.Tooltip("loss:Q", format=".6g"),
        alt.Tooltip("seconds:Q", format=".3g"),
    ]
    base = alt.Chart(_table("losses", tables)).encode(x=x, y=y, tooltip=told)
    chart = alt.layer(base.mark_line(color="#0072B2"), base.mark_point(filled=True, size=18, color="#0072B2"))
    return chart.properties(**({"width": "container", "height": 220} | size))


def hero(content: Contents) -> Chart:
    """The main picture: the plain step over the planned one, on the same axes, with a legend.

    Raises:
        ValueError: The report has no plan.
    """
    planned = content.planned
    if planned is None:
        raise ValueError("a plain run has no timeline to draw: give a run with a plan, or a plan")
    own = planned.choices[planned.chosen]
    return timelines(
        (("plain", planned.plain), ("memfit", own)), axes(replace(planned, choices=(own,), chosen=0))
    )


def timelines(named: Sequence[tuple[str, Choice]], scale: Axes, *, height: int = 200) -> Chart:
    """Plans one below the other on the same axes, with a legend; the last one's budget is drawn."""
    pictures = []
    for name, choice in named:
        tables = {
            "timeline": timeline_rows(choice.outline, scale),
            "phases": phase_rows(choice.outline, scale),
            "marks": mark_rows(choice, scale, with_budget=choice is named[-1][1]),
        }
        title = alt.Title(f"{name}: {_told(choice)}", subtitle=f"peak at {_short(choice.plan.peak_owner)}")
        pictures.append(timeline(scale, tables, width=760, height=height, title=title))
    chart = alt.vconcat(*pictures, _key(), spacing=14).resolve_scale(color="independent")
    return chart.configure(**config(LIGHT, is_dark=False))


def _told(choice: Choice) -> str:
    """A plan in a few words."""
    plan = choice.plan
    parts = f"{plan.gradient_accumulation_steps} x {plan.micro_batch_size} rows"
    peak, step = format_bytes(plan.predicted_peak_bytes), format_seconds(plan.predicted_step_s)
    return f"peak {peak}, {step} a step, {parts}"


def _short(text: str, most: int = 110) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _key() -> Chart:
    """The legend as a row of squares and names."""
    ends = accumulate(6 * len(name) + 34 for name in CATEGORIES)
    rows = [{"name": name, "at": at} for name, at in zip(CATEGORIES, (6, *ends), strict=False)]
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=alt.X("at:Q", axis=None, scale=None))
    colour = alt.Color("name:N", scale=alt.Scale(domain=list(CATEGORIES)), legend=None)
    squares = base.mark_point(shape="square", filled=True, size=120, opacity=1).encode(color=colour)
    names = base.mark_text(align="left", fontSize=11, dx=10).encode(text="name:N")
    return alt.layer(squares, names).properties(width=760, height=16)


def config(colours: Sequence[str], *, is_dark: bool) -> dict[str, Any]:
    """The look of every chart on a light or a dark page."""
    text, grid, back = ("#e6e8ec", "#3a3f47", "#16181d") if is_dark else ("#1d2129", "#e2e5ea", "#ffffff")
    return {
        "background": back,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "range": {"category": list(colours)},
        "axis": {
            "labelColor": text,
            "titleColor": text,
            "gridColor": grid,
            "domainColor": text,
            "tickColor": text,
            "titleFontWeight": "normal",
        },
        "legend": {"labelColor": text, "titleColor": text, "labelLimit": 200},
        "title": {"color": text, "subtitleColor": text, "anchor": "start", "fontSize": 13},
        "text": {"color": text},
        "area": {"stroke": back},
    }


def _table(name: str, tables: Mapping[str, Rows] | None) -> alt.NamedData | alt.InlineData:
    """A named table, empty where the page fills it."""
    if tables is None:
        return alt.NamedData(name=name)
    return alt.InlineData(values=tables[name])
