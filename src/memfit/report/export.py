"""A run or a plan for other tools: PyTorch's memory viewer, Perfetto, and whatever reads a table.

Kinds: "snapshot" (``report/snapshot.py``), "trace" (``report/trace.py``), "csv" and "data"
(``report/table.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import memfit
from memfit.core.plan import Plan
from memfit.core.unrolled import Unrolled, unrolled
from memfit.report.contents import Contents
from memfit.report.reading import BadReport
from memfit.report.snapshot import pickled, snapshot
from memfit.report.table import SCHEMA_VERSION, as_csv, as_data
from memfit.report.trace import trace

KINDS: Final = ("snapshot", "trace", "csv", "data")
# Later ones are like the last of these; files would only grow. The JSON says how many are told one by one.
MOST_MICRO_BATCHES: Final = 8


def write_exports(content: Contents, targets: Mapping[str, Path]) -> None:
    """Writes the step of a report into files for other tools.

    Args:
        targets: Where each kind of ``KINDS`` that is wanted goes. A file that is there is replaced, once the
            new one is whole.

    Raises:
        BadReport: The report has no plan, two kinds go to one file, or one cannot be written.
    """
    paths = [path.absolute() for path in targets.values()]
    for path in paths:
        if paths.count(path) > 1:
            raise BadReport(f"{path} is to hold two things. Give each its own file")
    for kind, path in targets.items():
        replace_file(path, exported(content, kind))


def exported(content: Contents, kind: str) -> bytes:
    """What a file of a kind of ``KINDS`` holds.

    Raises:
        BadReport: The report has no plan.
        ValueError: No such kind.
    """
    planned = content.planned
    if planned is None:
        raise BadReport("a plain run has no timeline to export: give a run with a plan, or a plan")
    plain, plan = planned.plain.plan, planned.choices[planned.chosen].plan
    if kind == "snapshot":
        return pickled(snapshot(planned.profile, plan, most_micro_batches=MOST_MICRO_BATCHES))
    steps = [(name, each, _step(content, each)) for name, each in (("plain", plain), ("planned", plan))]
    if kind == "trace":
        return _json(
            trace(steps, {"format": "memfit-trace", "schema_version": SCHEMA_VERSION, **_about(content)})
        )
    if kind == "csv":
        return as_csv(steps).encode()
    if kind == "data":
        return _json(as_data(steps, _about(content)))
    raise ValueError(f"there is no export {kind!r}: memfit knows {', '.join(KINDS)}")


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        BadReport: It cannot be written; names the file and the cure.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadReport(
            f"{path} cannot be written ({error.strerror}). Give a file in a folder that is there and "
            "that you may write to"
        ) from error


def _step(content: Contents, plan: Plan) -> Unrolled:
    """The step of one of a report's plans."""
    assert content.planned is not None
    return unrolled(content.planned.profile, plan, most_micro_batches=MOST_MICRO_BATCHES)


def _about(content: Contents) -> dict[str, Any]:
    """What a file says of itself."""
    source = content.source
    versions = {"memfit": memfit.__version__} | dict(source.versions)
    told = {name: source.result.get(name) for name in ("measured_peak_bytes", "held")}
    measured = {name: value for name, value in told.items() if isinstance(value, int)}
    return {"title": source.title, "command": source.command, "versions": versions, "measured": measured}


def _json(content: object) -> bytes:
    """JSON that every reader takes."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
