"""What tests of several ranks run there; see ``tests/processes.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import memfit


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).to(
        dtype
    )


def batches(steps: int, rows: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Whole batches; some labels do not count, most of them in the first rows; the last batch is short."""
    made = torch.Generator().manual_seed(1)
    found = []
    for step in range(steps):
        many = rows if step < steps - 1 else max(2, rows - 5)
        labels = torch.randint(0, 10, (many,), generator=made)
        labels[: many // 3] = torch.where(
            torch.rand(many // 3, generator=made) < 0.7, -100, labels[: many // 3]
        )
        found.append({"inputs": torch.randn(many, 40, generator=made, dtype=dtype), "labels": labels})
    return found


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"])


def own_rows(batch: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """Unequal shares: rank 0 has most rows."""
    rows = len(batch["labels"])
    shares = [2 if r == 0 else 1 for r in range(ranks)]
    cuts = [rows * sum(shares[:r]) // sum(shares) for r in range(ranks + 1)]
    return {name: t[cuts[rank] : cuts[rank + 1]] for name, t in batch.items()}


def trained(model: nn.Module, step: Any, data: list[Any], optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for batch in data:
        losses.append(float(step(batch)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def simplest(rank: int) -> Any:
    """Ten steps of DDP in micro-batches of three rows."""
    model = net()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = [own_rows(batch, rank, 2) for batch in batches(10, 18)]
    step = memfit.fit(
        ddp, cross_entropy, data[0], memory="64MiB", optimizer=optimizer, micro_batch_size=3, count="labels"
    )
    losses = trained(model, step, data, optimizer)
    return losses, [p.detach() for p in model.parameters()], str(step.verdict)


def alone(steps: int = 10, rows: int = 18) -> Any:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches(steps, rows):
        loss = cross_entropy(model, batch)
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return losses, [p.detach() for p in model.parameters()]
