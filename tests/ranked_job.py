"""A job for ``memfit train`` on several processes: slow enough to be killed, and without dropout."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import memfit
from ranked import batches, cross_entropy, net

_STEP_S = 0.05


def plain() -> memfit.Workload:
    model = net()
    data = batches(24)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        time.sleep(_STEP_S / 4)
        return cross_entropy(model, batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return memfit.Workload(model, optimizer, loss_fn, data, count="labels")
