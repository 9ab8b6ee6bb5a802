"""`memfit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.ending import show_json
from memfit.cli.options import AsJson, Quiet


def report(
    run_or_plan: Annotated[Path, typer.Argument(help="The --out of a train, or a plan of plan --json.")],
    *,
    profile: Annotated[
        Path | None, typer.Option(help="The profile of a plan; by default profile.json beside it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; by default RUN/report.html, or PLAN.html beside the plan.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write the timeline as a PNG, too.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the timeline as an SVG, too.")] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(help="Write a memory snapshot for pytorch.org/memory_viz, such as step.pickle."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for ui.perfetto.dev, such as step.trace.json.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the timeline as a table, such as step.csv.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Write the timeline and the plans as JSON, such as step.json.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page that shows a run or a plan; it opens from disk without a network."""
    from memfit.report.export import write_exports
    from memfit.report.page import write_picture, write_report

    page, content = write_report(run_or_plan, profile=profile, out=out)
    written = {"page": str(page)}
    asked = {"snapshot": snapshot, "trace": trace, "csv": csv, "data": data}
    exports = {kind: path for kind, path in asked.items() if path is not None}
    write_exports(content, exports)
    written |= {kind: str(path) for kind, path in exports.items()}
    for kind, path in (("png", png), ("svg", svg)):
        if path is not None:
            write_picture(content, path, kind)
            written[kind] = str(path)
    if as_json:
        show_json("report", written)
    else:
        print(*([written["page"]] if quiet else written.values()), sep="\n")
