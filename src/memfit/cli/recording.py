"""One step of a workload, recorded on fake tensors: what the planning commands start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from memfit.core.devices import DEVICES
from memfit.core.devices import Device as Card

if TYPE_CHECKING:
    from memfit.core.graph import Profile
    from memfit.workload import Workload


def record_target(
    target: str, batch_size: int | None, micro_batch_size: int | None, seed: int, device: str | None
) -> tuple[Profile, int | None, Workload]:
    """The profile of a workload built from fake tensors, the micro-batch to plan it at, and the workload."""
    from memfit.api import profile
    from memfit.runtime.fake import fake_tensors
    from memfit.workload import load_target

    console = Console(stderr=True)
    console.print(f"recording one step of {target} on fake tensors", style="dim")
    card = find_card(device)
    with fake_tensors():
        place = device if card is None else None
        workload = load_target(target, batch_size=batch_size, seed=seed, device=place)
        workload.model.train()
        batch = next(workload.batches_from(0))
        recorded = profile(
            workload.model,
            workload.loss_fn,
            batch,
            optimizer=workload.optimizer,
            device=card,
            outputs_fn=workload.outputs_fn,
            batch_norm=workload.batch_norm,
        )
    if micro_batch_size is None and any(graph.coupled for graph in recorded.graphs):
        micro_batch_size = recorded.rows  # a layer looks across the rows: parts would change the gradient
    console.print("planning", style="dim")
    return recorded, micro_batch_size, workload


def find_card(device: str | None) -> Card | None:
    """The card to plan for; None where --device is for TARGET."""
    return DEVICES.get((device or "").strip().lower())
