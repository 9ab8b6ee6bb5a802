"""Adds up the gradients of the micro-batches of one effective batch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memfit.core.batching import parts_for
from memfit.errors import InexactAccumulation
from memfit.runtime.batch import refuse_graphs, rows_of, split, tensors_of
from memfit.runtime.count import Counter, weights
from memfit.runtime.hooks import hooks_at_the_end
from memfit.runtime.micro import LossFn, backward, refuse_no_gradients, weighted_loss
from memfit.runtime.replay import Decisions, Replayer


@dataclass(frozen=True, slots=True)
class Accumulation:
    """How the gradient of a batch follows from those of its parts.

    Attributes:
        counter: What each part is weighted by; None: the batch must stay whole.
        scaler: Its scale multiplies every gradient, and not the loss that is returned.
    """

    model: nn.Module
    loss_fn: LossFn
    counter: Counter | None
    scaler: torch.amp.GradScaler | None = None

    def run(self, batch: Any, micro_batch_size: int, decisions: Decisions) -> Tensor:
        """The loss of the whole batch, detached; its gradient is added to ``.grad``."""
        refuse_no_gradients()
        parts = self._parts(batch, micro_batch_size)
        if len(parts) == 1:
            return self._run_part(parts[0], None, decisions)
        if self.counter is None:
            raise InexactAccumulation(
                f"the batch has {rows_of(batch)} rows and the plan keeps {micro_batch_size} whole, "
                "because no exact way to split it is known: fit again with a batch as large, or give count=",
                owner="loss_fn",
            )
        refuse_graphs(batch)
        with hooks_at_the_end([*self.model.named_parameters(), *tensors_of(batch)]):
            return self._run_parts(parts, weights(self.counter, parts), decisions)

    def _run_parts(self, parts: list[Any], part_weights: list[float], decisions: Decisions) -> Tensor:
        """Adds up the micro-batches."""
        total: Tensor | None = None
        for part, weight in zip(parts, part_weights, strict=True):
            if weight == 0:  # no valid label: its mean is not a number, its share is nothing
                continue
            loss = self._run_part(part, weight, decisions)
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _parts(self, batch: Any, micro_batch_size: int) -> list[Any]:
        """The micro-batches of any batch, a short last one too."""
        if self.counter is None and rows_of(batch) <= micro_batch_size:
            return [batch]
        rows = rows_of(batch)
        return split(batch, parts_for(rows, min(rows, micro_batch_size)))

    def _run_part(self, part: Any, weight: float | None, decisions: Decisions) -> Tensor:
        """Forward under the plan, then backward. Without a plan no mode is entered."""
        with Replayer(self.model, decisions) if decisions else nullcontext():
            loss = weighted_loss(self.model, self.loss_fn, part, weight)
        backward(loss, self.scaler)
        return _alone(loss.detach())


def _alone(loss: Tensor) -> Tensor:
    """The loss in a storage of its own: that of ``mse_loss`` on a CPU is as large as what it is a mean of."""
    return loss if loss.untyped_storage().nbytes() == loss.element_size() else loss.clone()
