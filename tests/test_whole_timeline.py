"""The simulation of whole steps against the allocator, moment by moment: forward, backward, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import memfit
from memfit.core.timeline import Event
from memfit.runtime.job import optimizer_state
from memfit.runtime.meter import resident_bytes
from models import ZOO, budgets_of
from traces import highest_levels, mark

MOST_ABOVE_BYTES = 256  # the 64 B for what no recording shows, and numbers that stand for Python scalars
Make = Callable[[list[Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": torch.optim.AdamW,
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adafactor": torch.optim.Adafactor,
}


def operator(event: Event) -> str:
    """The name of an event's operator in a trace; of one that is none, a name that is not there."""
    name = event.owner.rpartition("aten.")[2].split(".")[0]
    return f"aten::{name}" if "aten." in event.owner else "appears"


def fitted(name: str, percent: int, micro_batch_size: int | None, make: Make) -> tuple[Any, ...]:
    """Model, batch, optimizer and step at a budget between the least memory and no recomputation."""
    zoo = ZOO[name]
    torch.manual_seed(4)
    model, batch = zoo.build(1).train(), zoo.batch(zoo.rows, 1)
    optimizer = make(list(model.parameters()))
    size = micro_batch_size or zoo.rows

    def loss(m: Any, b: Any) -> Tensor:
        mark()
        return zoo.loss(m, b)

    profile = memfit.profile(model, zoo.loss, batch, optimizer=optimizer, micro_batch_size=size)
    budgets = budgets_of(profile)
    budget = budgets[0] + (budgets[-1] - budgets[0]) * percent // 100
    step = memfit.fit(
        model,
        loss,
        batch,
        memory=budget,
        optimizer=optimizer,
        micro_batch_size=size,
        count=zoo.count or "auto",
    )
    return model, batch, optimizer, step


def differences(name: str, percent: int, micro_batch_size: int | None, make: Make) -> list[int | None]:
    """Predicted minus measured bytes at each operator of the first and the second step."""
    model, batch, optimizer, step = fitted(name, percent, micro_batch_size, make)
    found: list[int | None] = []
    for first in (True, False):
        simulated = memfit.simulate(step.profile, step.plan, first_step=first).events
        there = [*model.parameters(), *model.buffers(), *batch.values(), *optimizer_state(optimizer)]
        start_bytes = resident_bytes(there)

        def body() -> None:
            step(batch)
            mark()
            optimizer.step()

        steps = step.plan.gradient_accumulation_steps
        micro_batch = [event for event in simulated if event.phase != "update"]
        marks = {min(2, steps): micro_batch, steps + 1: simulated[len(micro_batch) :]}
        names = {after: [operator(event) for event in events] for after, events in marks.items()}
        levels = highest_levels(body, names)
        found += [
            None if level is None else event.total_bytes - start_bytes - level
            for event, level in zip(simulated, levels, strict=True)
            if operator(event) != "appears"
        ]
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize(
    ("name", "percent", "micro_batch_size"),
    [("gpt2", 20, None), ("gpt2", 40, 5), ("convnet", 30, None), ("vit", 60, 4), ("llama", 10, None)],
)
def test_every_moment_of_two_steps_is_what_the_allocator_says(
    name: str, percent: int, micro_batch_size: int | None, optimizer: str
) -> None:
    found = differences(name, percent, micro_batch_size, OPTIMIZERS[optimizer])
    known = [difference for difference in found if difference is not None]
    assert len(known) >= 0.99 * len(found)
    assert min(known) >= 0
    assert max(known) <= MOST_ABOVE_BYTES
