"""`memfit plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.ending import interruptible, show
from memfit.cli.options import AsJson, BatchSize, Memory, MicroBatchSize, PlannedDevice, Seed, Target
from memfit.cli.recording import find_card, record_target
from memfit.report.terminal import plan_table, plan_verdict
from memfit.units import parse_memory
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
    export: Annotated[
        str | None, typer.Option(help="Print it as settings of another tool: transformers or axolotl.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the plan for TARGET within --memory, or most of a --device; the model takes no memory here."""
    card = find_card(device)
    if memory is None and card is None:
        raise typer.BadParameter("say how much, such as --memory 24GiB", param_hint="--memory")
    memory_bytes = parse_memory(
        memory or _SHARE_OF_A_CARD, total_bytes=None if card is None else card.memory_bytes
    )
    with interruptible():
        from memfit.api import find_plan
        from memfit.core.advice import advice, block

        recorded, micro_batch_size, work = record_target(target, batch_size, micro_batch_size, seed, device)
        found = find_plan(recorded, memory=memory_bytes, micro_batch_size=micro_batch_size)
        epoch = work.rows_per_epoch(found.rows)
        lines = advice(recorded, found, rows_per_epoch=epoch, betas=work.betas)
        settings = None if export is None else _exported(recorded, found, export)
    if as_json:
        more = {"advice": lines} | ({} if settings is None else {"export": asdict(settings)})
        print(json.dumps(json.loads(found.to_json()) | more, indent=1))
        return
    if settings is not None:
        print(settings)
        return
    show(plan_table(found, target, *_cuda_memory(recorded, found)))
    print(plan_verdict(found, target))
    if lines:
        print(block(lines))


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
