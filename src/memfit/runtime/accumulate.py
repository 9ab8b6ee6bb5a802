"""Adds up the gradients of the micro-batches of one effective batch, on one process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memfit.core.batching import parts_for
from memfit.errors import InexactAccumulation
from memfit.runtime.batch import refuse_graphs, rows_of, split, tensors_of
from memfit.runtime.count import Counter, weights
from memfit.runtime.hooks import hooks_at_the_end
from memfit.runtime.micro import (
    LossFn,
    OutputsLoss,
    Weighed,
    Weight,
    alone,
    micro_batches,
    refuse_no_gradients,
    refuse_no_such_term,
    weighted_loss,
)
from memfit.runtime.passes import run_in_two_passes
from memfit.runtime.replay import Decisions
from memfit.runtime.sharding import Sharding, gradients_kept_whole


@dataclass(frozen=True, slots=True)
class Accumulation:
    """How the gradient of a batch follows from those of its parts.

    Attributes:
        counter: What each part is weighted by, or each term of each part.
        is_two_pass: The loss is taken on the outputs of all parts, see ``runtime/passes.py``; then the loss
            is an :class:`OutputsLoss`. With neither, the batch must stay whole.
        scaler: Its scale multiplies every gradient, and not the loss that is returned.
        batch_norm: How BatchNorm layers normalise, see ``runtime/normalisation.py``.
        sharding: How FSDP holds the model; then gradients are pieces, and hooks of parameters never run.
    """

    model: nn.Module
    loss_fn: LossFn
    counter: Counter | Mapping[str, Counter] | None
    is_two_pass: bool = False
    scaler: torch.amp.GradScaler | None = None
    batch_norm: str = "exact"
    sharding: Sharding | None = None

    def run(self, batch: Any, micro_batch_size: int, decisions: Decisions) -> Weighed:
        """The loss of the whole batch and its terms, without a graph; its gradient is added to ``.grad``."""
        refuse_no_gradients()
        parts = self._parts(batch, micro_batch_size)
        if len(parts) == 1:
            self.tell_start()
            with micro_batches(self.model, self.batch_norm, several=False):
                return self.run_part(parts[0], None, decisions)
        if self.counter is None and not self.is_two_pass:
            raise InexactAccumulation(
                f"the batch has {rows_of(batch)} rows and the plan keeps {micro_batch_size} whole, "
                "because no exact way to split it is known: fit again with a batch as large, or give count=",
                owner="loss_fn",
            )
        refuse_graphs(batch)
        leaves = self.model.named_parameters() if self.sharding is None else ()
        with hooks_at_the_end([*leaves, *tensors_of(batch)]):
            return self._run_parts(batch, parts, decisions)

    def _run_parts(self, batch: Any, parts: list[Any], decisions: Decisions) -> Weighed:
        """Adds up the micro-batches."""
        if self.counter is None:
            assert isinstance(self.loss_fn, OutputsLoss)
            self.tell_start()
            return run_in_two_passes(
                self.model, self.loss_fn, batch, parts, decisions, self.scaler, self.batch_norm
            )
        total: Weighed | None = None
        weighted = list(zip(parts, weights(self.counter, parts), strict=True))
        # No valid label: its mean is not a number, its share is nothing.
        weighted = [(part, weight) for part, weight in weighted if not is_nothing(weight)]
        self.tell_start()
        with micro_batches(self.model, self.batch_norm, several=True) as begin:
            for number, (part, weight) in enumerate(weighted, 1):
                begin()
                with gradients_kept_whole(self.sharding, is_last=number == len(weighted)):
                    loss = self.run_part(part, weight, decisions)
                total = loss if total is None else sum_of(total, loss)
        assert total is not None
        return total

    def tell_start(self) -> None:
        """Tells a loss that keeps notes that a batch starts, perhaps again: older notes are void."""
        tell = getattr(self.loss_fn, "on_batch_start", None)
        if callable(tell):
            tell()

    def _parts(self, batch: Any, micro_batch_size: int) -> list[Any]:
        """The micro-batches of any batch, a short last one too."""
        rows = rows_of(batch)
        if self.counter is None and rows <= micro_batch_size:
            return [batch]
        return split(batch, parts_for(rows, min(rows, micro_batch_size)))

    def run_part(self, part: Any, weight: Weight, decisions: Decisions) -> Weighed:
        """Forward under the plan, then backward."""
        loss = self.forward(part, weight, decisions)
        loss.backward(self.scaler)
        return loss._replace(total=alone(loss.total))

    def forward(self, part: Any, weight: Weight, decisions: Decisions) -> Weighed:
        """The loss of a part in its graph. Without a plan no mode is entered."""
        with decisions.replayer(self.model) if decisions else nullcontext():
            loss = weighted_loss(self.model, self.loss_fn, part, weight)
        if isinstance(self.counter, Mapping) and isinstance(weight, Mapping):  # an audit's may have ended
            refuse_no_such_term(loss.terms, weight)
        return loss


def is_nothing(weight: Weight) -> bool:
    """Whether no part of the loss counts."""
    if not isinstance(weight, Mapping):
        return weight == 0
    assert weight, "a loss has at least one term"
    return not any(weight.values())


def sum_of(one: Weighed, other: Weighed) -> Weighed:
    """The sum of two losses, term by term."""
    terms = dict(one.terms)
    for name, term in other.terms.items():
        terms[name] = terms[name] + term if name in terms else term
    return Weighed(one.total + other.total, terms)
