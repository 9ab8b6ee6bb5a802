"""Adds up the gradients of the micro-batches of one effective batch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from memfit.core.batching import parts_for
from memfit.errors import InexactAccumulation
from memfit.runtime.batch import rows_of, split
from memfit.runtime.count import Counter, weights
from memfit.runtime.micro import LossFn, micro_batches, weighted_loss
from memfit.runtime.replay import Decisions, Replayer


@dataclass(frozen=True, slots=True)
class Accumulation:
    """How the gradient of a batch follows from those of its parts.

    Attributes:
        counter: What each part is weighted by; None: the batch must stay whole.
        batch_norm: How BatchNorm layers normalise, see ``runtime/normalisation.py``.
    """

    model: nn.Module
    loss_fn: LossFn
    counter: Counter | None
    batch_norm: str = "exact"

    def run(self, batch: Any, micro_batch_size: int, decisions: Decisions) -> Tensor:
        """The loss of the whole batch, detached; its gradient is added to ``.grad``."""
        parts = self._parts(batch, micro_batch_size)
        if len(parts) == 1:
            with micro_batches(self.model, self.batch_norm, several=False):
                return self._run_part(parts[0], None, decisions)
        if self.counter is None:
            raise InexactAccumulation(
                f"the batch has {rows_of(batch)} rows and the plan keeps {micro_batch_size} whole, "
                "because no exact way to split it is known: fit again with a batch as large, or give count=",
                owner="loss_fn",
            )
        total: Tensor | None = None
        weighted = list(zip(parts, weights(self.counter, parts), strict=True))
        with micro_batches(self.model, self.batch_norm, several=True) as begin:
            for part, weight in weighted:
                if weight == 0:  # no valid label: its mean is not a number, its share is nothing
                    continue
                begin()
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
        loss.backward()
        return _alone(loss.detach())


def _alone(loss: Tensor) -> Tensor:
    """The loss in a storage of its own: that of ``mse_loss`` on a CPU is as large as what it is a mean of."""
    return loss if loss.untyped_storage().nbytes() == loss.element_size() else loss.clone()
