"""`memfit frontier`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from memfit.cli.ending import interruptible, show, show_json
from memfit.cli.options import (
    AsJson,
    BatchSize,
    MicroBatchSize,
    PlannedDevice,
    Quiet,
    Seed,
    StoredProfile,
    Target,
)
from memfit.cli.recording import record_target, refuse_with_profile
from memfit.cli.stdout import own_stdout
from memfit.report.terminal import (
    frontier_table,
    frontier_verdict,
    spaced,
    strategy_notes,
    strategy_table,
)
from memfit.workload import DEFAULT_TARGET


def frontier(
    target: Target = DEFAULT_TARGET,
    *,
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None,
    plans: Annotated[int, typer.Option(help="How many budgets to plan for.", min=2)] = 12,
    seed: Seed = 0,
    device: PlannedDevice = None,
    profile: StoredProfile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print what each amount of memory buys for TARGET, and what checkpointing by hand would cost."""
    refuse_with_profile(profile, device=device, batch_size=batch_size)
    title = target if profile is None else profile.name
    with interruptible(), own_stdout():
        from memfit.api import frontier as find_frontier
        from memfit.core.strategies import notable, strategies

        recorded, micro_batch_size, _ = record_target(
            target, batch_size, micro_batch_size, seed, device, stored=profile, quiet=quiet
        )
        found = find_frontier(recorded, micro_batch_size=micro_batch_size, plans=plans)
        others = strategies(recorded, micro_batch_size=micro_batch_size)
    if as_json:
        data = {"plans": [json.loads(p.to_json()) for p in found], "strategies": [asdict(s) for s in others]}
        show_json("frontier", data)
        return
    if not quiet:
        tables = frontier_table(found, title), strategy_table(notable(others), found), strategy_notes(others)
        show(*spaced([*tables]))
        show(f"Seconds by {recorded.source}; recomputed is a share of them. Any of these fits --memory.", "")
    show(frontier_verdict(found, title))
