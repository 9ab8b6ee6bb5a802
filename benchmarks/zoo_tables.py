"""What ``make zoo`` found, as tables: models by kind, those that were not planned, low predictions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from figures import newest

Found = dict[str, Any]
Rows = Iterable[Iterable[object]]

# What a status of benchmarks/zoo.py means, in the order of the columns.
OUTCOMES = {
    "planned": "planned and run",
    "refused": "refused",
    "raises": "raises what the plain step raises",
    "unlike": "its two plain steps differ",
    "not built": "no tiny plain step",
    "out of time": "out of time",
    "failed": "failed",
}
OF_TRANSFORMERS = "families of `transformers`"
_OWN = {"hard": "hard control flow", "case": "cases of the suite", "network": "larger networks"}


def group(row: Found) -> str:
    """Where a model comes from."""
    return _OWN.get(row["kind"], OF_TRANSFORMERS)


def of_group(name: str) -> list[Found]:
    """The models that come from there."""
    return [row for row in newest("zoo")[0] if group(row) == name]


def judged(rows: list[Found]) -> list[Found]:
    """Those with a plain step that is the same twice, so that there is something to compare with."""
    return [row for row in rows if row["status"] in ("planned", "refused", "raises", "failed")]


def wrong(rows: list[Found]) -> int:
    """Runs in which a loss, a gradient, a buffer or the random state differs in any bit."""
    return sum(bool(run["differences"]) for run in runs_of(rows))


def above(rows: list[Found]) -> int:
    """Runs that ended above their budget."""
    return sum(run["measured_bytes"] > run["budget_bytes"] for run in runs_of(rows))


def runs_of(rows: list[Found]) -> list[Found]:
    """Every run of them."""
    return [run for row in rows for run in row["runs"]]


def spread(rows: list[Found]) -> str:
    """Predicted over measured before any correction: lowest, median, highest."""
    ratios = [run["first_ratio"] for run in runs_of(rows)]
    return f"{min(ratios):.4f}, {statistics.median(ratios):.4f}, {max(ratios):.4f}" if ratios else "-"


def kinds() -> Rows:
    """A row for each origin."""
    everything: list[Found] = newest("zoo")[0]
    for name in (OF_TRANSFORMERS, *_OWN.values()):
        rows = of_group(name)
        if rows:
            yield _counted(name, rows)
    yield _counted("all", everything)


def _counted(name: str, rows: list[Found]) -> list[object]:
    able = judged(rows)
    planned = [row for row in rows if row["status"] == "planned"]
    mended = sum(run["is_mended"] for run in runs_of(rows))
    return [name, len(able), len(planned), len(runs_of(rows)), wrong(rows), mended, above(rows), spread(rows)]


def unplanned() -> Rows:
    """Every model that was not planned, those of one reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in newest("zoo")[0]:
        if row["status"] != "planned":
            reasons.setdefault((row["status"], _short(row["reason"])), []).append(f"`{row['model']}`")
    for (status, reason), names in sorted(reasons.items(), key=lambda item: list(OUTCOMES).index(item[0][0])):
        yield [", ".join(names), OUTCOMES[status], reason]


def _short(reason: str) -> str:
    """The start of an error, safe in a table."""
    start = reason if len(reason) <= 160 else f"{reason[:157]}..."
    return f"`{start.replace('`', '').replace('|', '/')}`"


def low() -> Rows:
    """Every model of which a prediction was too low, the lowest first."""
    rows = [row for row in newest("zoo")[0] if any(run["is_mended"] for run in row["runs"])]
    for row in sorted(rows, key=lambda row: min(run["first_ratio"] for run in row["runs"])):
        yield [f"`{row['model']}`", group(row), ", ".join(f"{r['first_ratio']:.4f}" for r in row["runs"])]


def hard() -> Rows:
    """Every model with hard control flow."""
    for row in of_group(_OWN["hard"]):
        ratios = ", ".join(f"{run['first_ratio']:.4f}" for run in row["runs"]) or "-"
        most = f"{max(run['recompute_share'] for run in row['runs']):.0%}" if row["runs"] else "-"
        yield [row["model"].replace("_", " "), OUTCOMES[row["status"]], most, ratios]


def names() -> str:
    """The families that were planned and run, by name."""
    planned = [row["model"] for row in of_group(OF_TRANSFORMERS) if row["status"] == "planned"]
    return ", ".join(f"`{name}`" for name in sorted(planned))
