"""Micro-batches of one row, where other ops run, of models that fake tensors do not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfit
from models import UNet

WIDTH, LENGTH = 64, 24


class Positions(nn.Module):
    """Adds positions to words, whose gradient is summed over the rows unless there is one; reads its data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(30, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.head = nn.Linear(WIDTH, 30)

    def forward(self, words: Tensor) -> Tensor:
        assert int(words.max()) < 30  # no fake can say
        x = self.words(words) + self.places(torch.arange(LENGTH))[None]
        found: Tensor = self.head(nn.functional.gelu(x))
        return found


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["words"]).flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("rows", [3, 8])
def test_the_peak_of_one_row_is_predicted_from_one_row(rows: int) -> None:
    model = Positions()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = {name: torch.randint(30, (rows, LENGTH)) for name in ("words", "labels")}
    step = memfit.fit(
        model, loss_of, batch, memory="1GiB", optimizer=optimizer, micro_batch_size=1, count="labels"
    )
    promised_bytes = step.plan.predicted_peak_bytes
    step(batch)
    assert step.verdict is not None
    assert step.verdict.measured_peak_bytes <= promised_bytes <= 1.02 * step.verdict.measured_peak_bytes


def test_convolutions_that_take_more_for_one_row_than_for_two_hold_the_least_memory() -> None:
    """At one row MKL-DNN picks kernels with larger workspaces than the line through more rows says."""
    torch.manual_seed(0)
    model, batch = UNet(width=16, depth=3), torch.randn(8, 3, 32, 32)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch).square().mean()
        return loss

    with pytest.raises(memfit.InfeasibleBudget) as refused:
        memfit.fit(model, loss_fn, batch, memory=1)
    step = memfit.fit(model, loss_fn, batch, memory=refused.value.needed_bytes)
    step(batch)
    assert step.plan.micro_batch_size == 1
    assert step.verdict is not None
    assert step.verdict.is_within_budget, step.verdict
