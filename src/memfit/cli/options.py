"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memfit.core.devices import DEVICES

Target = Annotated[
    str,
    typer.Argument(help="package.module:function or file.py:function that returns a memfit.Workload."),
]
Memory = Annotated[
    str | None,
    typer.Option(help="The peak of all tensors on the device, such as 400MiB, 8GiB, or 80% of the device."),
]
BatchSize = Annotated[int | None, typer.Option(help="Rows of the effective batch.", min=1)]
MicroBatchSize = Annotated[
    int | None, typer.Option(help="Pins the rows of a micro-batch; otherwise memfit chooses.", min=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print the verdict in one line, and errors; nothing else.")
]
Seed = Annotated[int, typer.Option(help="Seed of weights, data and dropout.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda, if TARGET takes a device.")]
PlannedDevice = Annotated[
    str | None,
    typer.Option(
        "--device", help=f"What to plan for: {', '.join(DEVICES)}; or cpu or cuda, if TARGET takes a device."
    ),
]
StoredProfile = Annotated[
    Path | None, typer.Option("--profile", help="Start from what `memfit profile --out` has stored.")
]
