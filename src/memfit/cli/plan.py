"""`memfit plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.ending import interruptible, show, show_json
from memfit.cli.options import (
    AsJson,
    BatchSize,
    Memory,
    MicroBatchSize,
    PlannedDevice,
    Quiet,
    Seed,
    StoredProfile,
    Target,
)
from memfit.cli.recording import find_card, memory_in_bytes, record_target, refuse_with_profile
from memfit.cli.stdout import own_stdout
from memfit.report.terminal import plan_pictures, plan_table, plan_verdict, spaced, tried_table
from memfit.workload import DEFAULT_TARGET

if TYPE_CHECKING:
    from memfit.core.allocator import Memory as CudaMemory
    from memfit.core.export import Export
    from memfit.core.graph import Profile
    from memfit.core.plan import Plan

_SHARE_OF_A_CARD = "90%"  # the rest is for CUDA itself and for what its allocator cannot use


def plan(
    target: Target = DEFAULT_TARGET,
    *,
    memory: Memory = None,
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None,
    seed: Seed = 0,
    device: PlannedDevice = None,
    profile: StoredProfile = None,
    export: Annotated[
        str | None, typer.Option(help="Print it as settings of another tool: transformers or axolotl.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print the plan for TARGET within --memory, or most of a --device; the model takes no memory here."""
    refuse_with_profile(profile, device=device, batch_size=batch_size)
    if memory is None and find_card(device) is None:
        raise typer.BadParameter("say how much, such as --memory 24GiB", param_hint="--memory")
    title = target if profile is None else profile.name
    with interruptible(), own_stdout():
        memory_bytes = memory_in_bytes(memory or _SHARE_OF_A_CARD, device, profile)
        from memfit.core.advice import advice, block
        from memfit.core.plan import Planner
        from memfit.core.tried import tried

        recorded, micro_batch_size, work = record_target(
            target, batch_size, micro_batch_size, seed, device, stored=profile, quiet=quiet
        )
        planner = Planner(recorded, micro_batch_size)
        found = planner.best(memory_bytes)
        sizes = tried(planner, found)
        epoch = None if work is None else work.rows_per_epoch(found.rows)
        lines = advice(recorded, found, rows_per_epoch=epoch, betas=None if work is None else work.betas)
        settings = None if export is None else _exported(recorded, found, export)
    if as_json:
        more = {"advice": lines, "candidates": [asdict(size) for size in sizes]} | (
            {} if settings is None else {"export": asdict(settings)}
        )
        show_json("plan", json.loads(found.to_json()) | more)
        return
    if settings is not None:
        print(settings)
        return
    if not quiet:
        show(plan_table(found, title, *_cuda_memory(recorded, found)), *plan_pictures(recorded, found))
        show("", tried_table(sizes), *spaced([block(lines)] if lines else []), "")
    show(plan_verdict(found, title))


def _cuda_memory(recorded: Profile, found: Plan) -> list[CudaMemory]:
    """What CUDA's allocator will take for a plan, without and with expandable segments; empty on a CPU."""
    from memfit.core.allocator import MIN_BLOCK_BYTES
    from memfit.core.reserved import predict_cuda_memory

    if recorded.alignment_bytes != MIN_BLOCK_BYTES:
        return []
    return [predict_cuda_memory(recorded, found, expandable_segments=is_on) for is_on in (False, True)]


def _exported(recorded: Profile, found: Plan, tool: str) -> Export:
    """A plan as another tool's settings, compared with what those are predicted to take."""
    from memfit.core.export import equal_part, export
    from memfit.core.strategies import strategies

    return export(found, tool, strategies(recorded, micro_batch_size=equal_part(found)))
