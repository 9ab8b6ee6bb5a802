"""One step of a workload: recorded on fake tensors, on real ones, or read from a file.

Note [Share]
 1. A memory of ``80%`` is a share of the device: of the card that is planned for, of the CUDA device that the
    workload is put on, and else of the memory of this machine, or of what the control group of a
    container or a job leaves of it (``memfit doctor`` says how much that is).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from memfit.cli.ending import progress
from memfit.core.devices import DEVICES
from memfit.core.devices import Device as Card
from memfit.units import parse_memory

if TYPE_CHECKING:
    from memfit.core.graph import Profile
    from memfit.workload import Workload


def record_target(
    target: str,
    batch_size: int | None,
    micro_batch_size: int | None,
    seed: int,
    device: str | None,
    *,
    stored: Path | None = None,
    quiet: bool = False,
) -> tuple[Profile, int | None, Workload | None]:
    """The profile of a workload, the micro-batch to plan it at, and the workload.

    Args:
        stored: A file of ``memfit profile``, which is read instead; then there is no workload.
    """
    from memfit.runtime.fake import fake_tensors

    console = progress(quiet=quiet)
    workload: Workload | None = None
    if stored is not None:
        recorded = read_profile(stored)
    else:
        console.print(f"recording one step of {target} on fake tensors", style="dim")
        with fake_tensors():
            recorded, workload = _record(target, batch_size, seed, device)
    if micro_batch_size is None and any(graph.coupled for graph in recorded.graphs):
        micro_batch_size = recorded.rows  # a layer looks across the rows: parts would change the gradient
    console.print("planning", style="dim")
    return recorded, micro_batch_size, workload


def record_anyhow(
    target: str, batch_size: int | None, seed: int, device: str | None, *, real: bool, quiet: bool
) -> Profile:
    """The profile of a workload: from fake tensors, or really where it is asked for or fakes fail."""
    from memfit.runtime.fake import fake_tensors

    console = progress(quiet=quiet)
    if real and find_card(device) is not None:
        raise typer.BadParameter(
            "a card is planned for on fake tensors: leave one of both out", param_hint="--real"
        )
    if not real:
        console.print(f"recording one step of {target} on fake tensors", style="dim")
        try:
            with fake_tensors():
                return _record(target, batch_size, seed, device)[0]
        except Exception as error:
            # Whatever a model does that fakes cannot: what is wrong in itself fails once more below.
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            console.print(f"fake tensors fail here ({first_line})", style="dim", soft_wrap=True)
            if find_card(device) is not None:
                raise
    console.print(f"recording steps of {target} really, on few rows", style="dim")
    return _record(target, batch_size, seed, device)[0]


def _record(target: str, batch_size: int | None, seed: int, device: str | None) -> tuple[Profile, Workload]:
    """The profile of a workload, and the workload."""
    from memfit.api import profile
    from memfit.workload import load_target

    card = find_card(device)
    place = device if card is None else None
    workload = load_target(target, batch_size=batch_size, seed=seed, device=place)
    workload.model.train()
    recorded = profile(
        workload.model,
        workload.loss_fn,
        next(workload.batches_from(0)),
        optimizer=workload.optimizer,
        device=card,
        outputs_fn=workload.outputs_fn,
        batch_norm=workload.batch_norm,
    )
    return recorded, workload


def read_profile(path: Path) -> Profile:
    """A profile that ``memfit profile`` or ``memfit train`` has stored.

    Raises:
        ValueError: It is damaged or something else.
        OSError: It cannot be read.
    """
    from memfit.core.graph import Profile

    try:
        return Profile.from_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Make one with `memfit profile TARGET --out {path}`") from error


def refuse_with_profile(stored: Path | None, **options: object) -> None:
    """Refuses options that were for the recording, where a stored profile is given instead."""
    for name, given in options.items():
        if stored is not None and given is not None:
            raise typer.BadParameter(
                f"a stored profile is of one target, batch and device: leave out --profile, or --{name}",
                param_hint="--profile",
            )


def memory_in_bytes(memory: str, device: str | None, stored: Path | None = None) -> int:
    """A stated memory in bytes. See Note [Share]; a stored profile does not know its device.

    Raises:
        ValueError: It cannot be read, or is a share of a device that is not there.
    """
    if not memory.strip().endswith("%") or stored is not None:
        return parse_memory(memory)
    card = find_card(device)
    return parse_memory(memory, total_bytes=_device_bytes(device) if card is None else card.memory_bytes)


def _device_bytes(device: str | None) -> int:
    """All bytes of a device of this machine."""
    import torch

    from memfit.runtime.meter import device_memory

    place = torch.device(device or "cpu")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "a share of a CUDA device needs one, and there is none: state the memory as in 24GiB"
        )
    return device_memory(place)[1]


def find_card(device: str | None) -> Card | None:
    """The card to plan for; None where --device is for TARGET."""
    return DEVICES.get((device or "").strip().lower())
