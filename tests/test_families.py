"""The promise for whole steps, ``optimizer.step()`` included, on the families that differ most."""

from __future__ import annotations

import copy

import pytest
import torch

import memfit
from families import FAMILIES, judged_steps, own_loss, stepped
from models import budgets_of

ROWS = 4
MOST_ABOVE = 1.01  # predicted over measured

# Experts, a branch the loss does not use, padding, BatchNorm over convolutions, one key for many queries.
UNLIKE = ["mixtral", "fnet", "resnet"]


@pytest.mark.parametrize("name", UNLIKE)
def test_whole_steps_keep_every_promise(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(4)
    model, batch = family.build(), family.batch(ROWS)
    optimizer = torch.optim.AdamW(model.parameters())
    profile = memfit.profile(
        model, own_loss, batch, optimizer=optimizer, micro_batch_size=ROWS, limit_bytes=2**30
    )
    for budget in budgets_of(profile, 3)[:2]:
        twin = copy.deepcopy(model)
        for judged in judged_steps(family, twin, batch, *stepped(twin, profile, budget)):
            assert judged.differences == []
            assert judged.measured_bytes <= judged.predicted_bytes <= budget
            assert judged.ratio <= MOST_ABOVE
