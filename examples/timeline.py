"""The picture of the README: live bytes over one step, plain and planned, on the same scale."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import memfit
from memfit.report.terminal import sparkline
from memfit.units import format_bytes

WIDTH = 96


def strip(profile: memfit.Profile, plan: memfit.Plan, top_bytes: int) -> str:
    """The highest live bytes of each stretch of the step, drawn against ``top_bytes``."""
    events = memfit.simulate(profile, plan).events
    totals = [event.total_bytes for event in events if event.phase != "update"]
    edges = [i * len(totals) // WIDTH for i in range(WIDTH + 1)]
    highest = [max(totals[a : max(b, a + 1)]) for a, b in itertools.pairwise(edges)]
    return sparkline([0.0, float(top_bytes), *highest])[2:]


def main() -> None:
    """Runs the quick start and draws its step without and with the plan."""
    step: memfit.Step = runpy.run_path(str(Path(__file__).parent / "quickstart.py"))["step"]
    plain = memfit.find_plan(step.profile, memory="1TiB")
    top_bytes = plain.predicted_peak_bytes
    for name, plan in (("plain", plain), ("memfit", step.plan)):
        print(f"{name:7}{format_bytes(plan.predicted_peak_bytes)}")
        print(strip(step.profile, plan, top_bytes))


if __name__ == "__main__":
    main()
