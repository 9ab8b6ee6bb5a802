"""`memfit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.ending import show
from memfit.cli.options import AsJson


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
    as_json: AsJson = False,
) -> None:
    """Write one HTML page that shows a run or a plan; it opens from disk without a network."""
    from memfit.report.page import write_picture, write_report

    page, content = write_report(run_or_plan, profile=profile, out=out)
    written = {"page": str(page)}
    for kind, path in (("png", png), ("svg", svg)):
        if path is not None:
            write_picture(content, path, kind)
            written[kind] = str(path)
    if as_json:
        show(written)
    else:
        print("\n".join(written.values()))
