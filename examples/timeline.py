"""The picture of the README: live bytes over one step, plain and planned, on the same scale."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from rich.console import Console

import memfit
from memfit.core.outline import outline
from memfit.report.terminal import LiveBytes


def main() -> None:
    """Runs the quick start and draws its step without and with the plan."""
    step: memfit.Step = runpy.run_path(str(Path(__file__).parent / "quickstart.py"))["step"]
    plain = memfit.find_plan(step.profile, memory="1TiB")
    steps = (("plain", plain), ("memfit", step.plan))
    console = Console(width=None if sys.stdout.isatty() else 96)
    console.print(LiveBytes(tuple((name, outline(step.profile, plan)) for name, plan in steps)))


if __name__ == "__main__":
    main()
