"""A loop with Accelerate trains with memfit as it does without."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import memfit
from memfit.errors import UnsupportedModel
from memfit.integrations import accelerate as integration


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    """Accelerate keeps what the first Accelerator was made with."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """A mean over rows."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def prepared(precision: str) -> tuple[Accelerator, Any, Any, Any, Any]:
    """An accelerator and what it has prepared, the same at every call."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    data = TensorDataset(torch.randn(16 * 3 + 7, 8), torch.randint(3, (16 * 3 + 7,)))
    parts = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=16), schedule)
    return accelerator, *parts


def trained(precision: str, size: int | None) -> tuple[list[float], list[float], nn.Module]:
    """Losses, rates and the model after two epochs; with micro-batches of ``size``, or plain."""
    accelerator, model, optimizer, loader, schedule = prepared(precision)
    step: Any = None
    if size is not None:
        step = integration.fit(
            accelerator, model, loss_fn, next(iter(loader)), memory="1MiB", optimizer=optimizer,
            micro_batch_size=size,
        )  # fmt: skip
    losses, rates = [], []
    for batch in [batch for _ in range(2) for batch in loader]:
        if step is None:
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
        else:
            loss = step(batch)
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        rates.append(schedule.get_last_lr()[0])
    assert step is None or step.verdict.held
    return losses, rates, model


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_one_micro_batch_is_the_plain_loop_bit_for_bit(precision: str) -> None:
    plain, found = trained(precision, None), trained(precision, 16)
    assert found[:2] == plain[:2]
    for one, other in zip(found[2].parameters(), plain[2].parameters(), strict=True):
        assert torch.equal(one, other)


def test_micro_batches_are_the_plain_loop_to_rounding() -> None:
    plain, found = trained("no", None), trained("no", 5)
    assert found[1] == plain[1]
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    for one, other in zip(found[2].parameters(), plain[2].parameters(), strict=True):
        assert float((one - other).detach().norm() / other.detach().norm()) < 1e-5


def test_fit_without_the_integration_does_the_same() -> None:
    _, model, optimizer, loader, _ = prepared("bf16")
    twin = copy.deepcopy(model)
    batch = next(iter(loader))
    memfit.fit(model, loss_fn, batch, memory="1MiB", optimizer=optimizer, micro_batch_size=16)(batch)
    loss_fn(twin, batch).backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_the_state_of_the_wrapped_optimizer_is_counted() -> None:
    _, model, optimizer, loader, _ = prepared("no")
    step = memfit.fit(model, loss_fn, next(iter(loader)), memory="1MiB", optimizer=optimizer)
    parameters_bytes = sum(p.nbytes for p in model.parameters())
    assert step.profile.residents.optimizer_bytes >= 2 * parameters_bytes


def test_a_loop_that_accumulates_is_refused() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with pytest.raises(UnsupportedModel, match="batch_size 4 times as large"):
        integration.fit(accelerator, nn.Linear(2, 2), loss_fn, torch.ones(4, 2), memory="1MiB")


def test_a_state_that_was_saved_and_loaded_goes_on_alike(tmp_path: Path) -> None:
    accelerator, model, optimizer, loader, _ = prepared("no")
    batch = next(iter(loader))
    make = {"memory": "1MiB", "optimizer": optimizer, "micro_batch_size": 5}
    step = integration.fit(accelerator, model, loss_fn, batch, **make)
    losses = []
    for _ in range(2):
        for number in range(3):
            losses.append(float(step(batch)))
            optimizer.step()
            optimizer.zero_grad()
            if number == 0 and len(losses) == 1:
                accelerator.save_state(str(tmp_path))
        accelerator.load_state(str(tmp_path))
        profile = memfit.Profile.from_json(step.profile.to_json())
        step = integration.fit(accelerator, model, loss_fn, batch, profile=profile, **make)
    assert losses[3:5] == losses[1:3]
