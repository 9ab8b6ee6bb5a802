"""The blocks of a whole step against the timeline, moment by moment and category by category."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memfit
from memfit.core import blocks
from memfit.core.blocks import block_moves
from memfit.core.graph import Profile
from memfit.core.plan import Plan, find_plan, simulate
from memfit.core.timeline import Event
from memfit.core.unrolled import LOSS_OF_ALL, unrolled
from strategies import choices, profiles


def by_category(event: Event) -> Counter[str]:
    """The bytes of a moment under the names that blocks have; nothing is left out."""
    found = Counter(
        {
            blocks.PARAMETER: event.parameters_bytes,
            blocks.GRADIENT: event.gradients_bytes,
            blocks.OPTIMIZER_STATE: event.optimizer_bytes,
            blocks.BATCH: event.batch_bytes,
            blocks.ACTIVATION: event.activations_bytes,
            blocks.RECOMPUTED: event.replayed_bytes,
            blocks.TEMPORARY: event.temporaries_bytes,
        }
    )
    assert found.total() == event.total_bytes
    return +found


def levels(profile: Profile, plan: Plan) -> Iterator[Counter[str]]:
    """What is live after each move, by category; each block comes once and goes as it came."""
    live: dict[int, tuple[int, str]] = {}
    now: Counter[str] = Counter()
    for block, size_bytes, category, _ in block_moves(profile, unrolled(profile, plan)):
        if size_bytes > 0:
            assert block not in live
            live[block] = size_bytes, category
        else:
            assert live.pop(block) == (-size_bytes, category)
        now[category] += size_bytes
        yield +now


def check(profile: Profile, plan: Plan) -> None:
    step = unrolled(profile, plan)
    found = list(levels(profile, plan))
    highest = max(
        (simulate(profile, plan, first_step=first).peak_bytes for first in (False, True)), default=0
    )
    assert max((level.total() for level in found), default=0) == highest
    stays = {blocks.PARAMETER, blocks.OPTIMIZER_STATE, blocks.BATCH, blocks.TEMPORARY}
    assert not found or set(found[-1]) <= stays
    rest = iter([Counter[str](), *found])
    wanted = [by_category(tick.event) for tick in step.ticks]
    assert all(this == last or this in rest for last, this in zip([None, *wanted], wanted, strict=False))


@settings(max_examples=150)
@given(profiles(), st.data())
def test_the_live_blocks_are_the_timeline_category_by_category(profile: Profile, data: st.DataObject) -> None:
    graph = data.draw(st.sampled_from(profile.graphs))
    dropped = data.draw(choices(graph))
    free = find_plan(profile, memory=1 << 40, micro_batch_size=graph.rows)
    check(profile, replace(free, recompute=tuple(sorted(graph.value_key(value) for value in dropped))))


def test_so_they_are_in_two_passes_and_in_several_micro_batches() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh(), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    batch = torch.randn(256, 8)

    def outputs_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(batch)
        return out

    def spread(outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.std(0).sum()

    def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(batch).square().mean()
        return out

    for options in ({"loss_fn": spread, "outputs_fn": outputs_fn}, {"loss_fn": squares}):
        profile = memfit.profile(model, batch=batch, optimizer=optimizer, **options)
        for rows in (22, 128):
            free = find_plan(profile, memory="1GiB", micro_batch_size=rows)
            tight = min(
                memfit.frontier(profile, micro_batch_size=rows), key=lambda plan: plan.predicted_peak_bytes
            )
            assert tight.recomputes
            parts = [part.name for part in unrolled(profile, tight).parts]
            assert (LOSS_OF_ALL in parts) == tight.is_two_pass == ("outputs_fn" in options)
            check(profile, free)
            check(profile, tight)
