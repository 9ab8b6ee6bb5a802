"""`memfit profile`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.ending import interruptible, progress, show, show_json
from memfit.cli.options import AsJson, BatchSize, PlannedDevice, Quiet, Seed, Target
from memfit.cli.recording import record_anyhow
from memfit.report.tables import profile_tables, profile_verdict, seconds_note
from memfit.report.terminal import spaced
from memfit.workload import DEFAULT_TARGET


def profile(
    target: Target = DEFAULT_TARGET,
    *,
    out: Annotated[
        Path | None, typer.Option(help="Store the profile here, for --profile of plan, frontier and report.")
    ] = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: PlannedDevice = None,
    real: Annotated[
        bool,
        typer.Option(
            "--real", help="Build the model really and measure this machine's seconds on a few rows."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show where the memory and the seconds of TARGET's plain step go, and store the profile."""
    with interruptible():
        from memfit.core.breakdown import breakdown, bytes_by_category
        from memfit.runtime.state import replace_text

        recorded = record_anyhow(target, batch_size, seed, device, real=real, quiet=quiet)
        found = breakdown(recorded)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            replace_text(out, recorded.to_json())
            progress(quiet=quiet).print(f"stored in {out}", style="dim", soft_wrap=True)
    if as_json:
        peak = asdict(found.peak) | {
            "total_bytes": found.peak.total_bytes,
            "by_category": bytes_by_category(found.peak),
        }
        more = {"kept_bytes": found.kept_bytes, "source": recorded.source, "effective_rows": recorded.rows}
        show_json("profile", asdict(found) | {"peak": peak} | more)
        return
    if not quiet:
        show(*spaced(profile_tables(found)), seconds_note(recorded), "")
    show(profile_verdict(recorded, found, target))
