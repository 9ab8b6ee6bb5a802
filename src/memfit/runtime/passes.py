"""Runs a loss that couples the rows of a batch in micro-batches, exactly: two passes over them.

Note [Two passes]
 1. The outputs of every micro-batch are computed in order, without a graph, and joined. The loss is taken on
    all of them, and its backward ends at the outputs.
 2. Random streams and buffers are put back to where they were, and every micro-batch runs again with a graph.
    Its backward starts from its rows of the outputs' gradient.
 3. So the gradient is that of the whole batch, for any loss that sees only the outputs, if a row's outputs do
    not depend on the rows beside it. ``fit`` proves that before (``runtime/audit.py``).
 4. Each forward must give the same outputs twice. A few numbers of each are compared before its backward.
 5. Outputs are held compactly, for a view (the first token of each row) would hold all it is a view of.
 6. Streams and buffers end as after the forwards in order, and then the loss. What the loss has written to
    buffers is written once more after the second pass, which ends in the state that the loss began in.
Source: GradCache (Gao, Zhang, Han, Callan 2021, arXiv 2101.06983), here with any nesting of outputs, buffers,
and recomputation inside the second pass.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import join, map_tensors, rows_of, tensors_of
from memfit.runtime.micro import OutputsLoss, Weighed, alone, micro_batches, weighed, without_autocast
from memfit.runtime.normalisation import normalised
from memfit.runtime.preserve import Buffers, RandomStreams
from memfit.runtime.replay import Decisions

_SAMPLED = 32  # numbers of an output that are compared
_TOLERANCE = 1e-3  # of the largest of them: kernels that add in any order differ by less, other masks by more


class Seeded(NamedTuple):
    """Outputs of one micro-batch in a graph, and the gradient of the loss with respect to them."""

    outputs: list[Tensor]
    gradients: list[Tensor]

    @property
    def roots(self) -> list[Tensor]:
        """What a backward starts from."""
        return self.outputs

    def backward(self) -> None:
        """Adds the gradients to the leaves."""
        if self.outputs:
            with without_autocast():
                torch.autograd.backward(self.outputs, self.gradients)


class Joined(NamedTuple):
    """The loss of all outputs, in a graph that begins at them, and those that have a gradient."""

    loss: Weighed
    leaves: list[Tensor]

    def backward(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Fills the gradients of the outputs."""
        self.loss.backward(scaler)


def run_in_two_passes(
    model: nn.Module,
    loss_fn: OutputsLoss,
    batch: Any,
    parts: Sequence[Any],
    decisions: Decisions,
    scaler: torch.amp.GradScaler | None = None,
    batch_norm: str = "exact",
) -> Weighed:
    """The loss of the whole batch, without a graph; adds its gradient to ``.grad``. See Note [Two passes].

    Raises:
        InexactAccumulation: An output has no row for each row, or the second pass gave other outputs.
    """
    streams, buffers = RandomStreams.now(), Buffers(model)
    with normalised(model, batch_norm, several=False):  # statistics of a step are pooled in one of the passes
        pieces = [outputs_without_graph(model, loss_fn, part) for part in parts]
        seen = [_sampled(piece) for piece in pieces]
        of_loss = Buffers(model)
        loss, gradients = _loss_and_gradients(loss_fn, pieces, batch, scaler)
        of_loss.keep_changed()
    after = RandomStreams.now()
    streams.restore()
    buffers.restore()
    del buffers
    first = 0
    with micro_batches(model, batch_norm, several=True) as begin:
        for part, sample in zip(parts, seen, strict=True):
            rows = rows_of(part)
            begin()
            seeds = [None if g is None else g.narrow(0, first, rows) for g in gradients]
            _run_again(model, loss_fn, part, seeds, sample, decisions)
            first += rows
    after.restore()
    of_loss.restore()
    return loss


def _loss_and_gradients(
    loss_fn: OutputsLoss, pieces: list[Any], batch: Any, scaler: torch.amp.GradScaler | None
) -> tuple[Weighed, list[Tensor | None]]:
    """The loss, without a graph, and its gradient with respect to each of the joined outputs."""
    joined = loss_of_all(loss_fn, pieces, batch)
    joined.backward(scaler)
    loss = joined.loss._replace(total=alone(joined.loss.total))
    return loss, [leaf.grad for leaf in joined.leaves]


def _run_again(
    model: nn.Module,
    loss_fn: OutputsLoss,
    part: Any,
    gradients: list[Tensor | None],
    sample: list[list[complex]],
    decisions: Decisions,
) -> None:
    """A micro-batch of the second pass."""
    torch.clear_autocast_cache()  # as in weighted_loss
    with decisions.replayer(model) if decisions else nullcontext():
        outputs = loss_fn.outputs_fn(model, part)
    _refuse_other_outputs(sample, _sampled(outputs))
    seeded = with_gradients(outputs, gradients)
    del outputs
    seeded.backward()


def outputs_without_graph(model: nn.Module, loss_fn: OutputsLoss, part: Any) -> Any:
    """The outputs of one micro-batch, each tensor in a storage of its own size."""
    with torch.no_grad():
        return map_tensors(loss_fn.outputs_fn(model, part), _compact)


def loss_of_all(loss_fn: OutputsLoss, pieces: list[Any], batch: Any) -> Joined:
    """The loss of the joined outputs; takes ``pieces``, which is empty afterwards."""
    joined = join(pieces)
    pieces.clear()
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if is_differentiable(tensor):
            tensor = tensor.detach().requires_grad_()
            leaves.append(tensor)
        return tensor

    return Joined(weighed(loss_fn.of_outputs(map_tensors(joined, leaf), batch), None), leaves)


def with_gradients(outputs: Any, gradients: Sequence[Tensor | None]) -> Seeded:
    """The outputs of a micro-batch that are in a graph; ``gradients`` has one for each that may have one."""
    tensors = [tensor for _, tensor in tensors_of(outputs) if is_differentiable(tensor)]
    pairs = [
        (tensor, gradient)
        for tensor, gradient in zip(tensors, gradients, strict=True)
        if gradient is not None and tensor.requires_grad
    ]
    return Seeded([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


def is_differentiable(tensor: Tensor) -> bool:
    """Whether a loss can have a gradient with respect to a tensor."""
    return tensor.is_floating_point() or tensor.is_complex()


def _compact(tensor: Tensor) -> Tensor:
    """A tensor that holds nothing but itself. See Note 5."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _sampled(outputs: Any) -> list[list[complex]]:
    """A few numbers of each output: of its first and of its last row."""
    return [
        [number for row in (tensor[0], tensor[-1]) for number in _some(row.detach().reshape(-1))]
        for _, tensor in tensors_of(outputs)
        if tensor.dim() and len(tensor)
    ]


def _some(row: Tensor) -> list[complex]:
    """Numbers from all over a row."""
    return row[:: max(1, len(row) // _SAMPLED)].tolist() if len(row) else []


def _refuse_other_outputs(first: list[list[complex]], second: list[list[complex]]) -> None:
    """Refuses a forward that cannot be repeated. See Note 4."""
    if len(first) == len(second) and all(map(_agree, first, second)):
        return
    raise InexactAccumulation(
        "outputs_fn gave other outputs when a micro-batch was run for the second time, so the loss cannot be "
        "taken in two passes: it must not draw from a generator of its own, nor behave differently under "
        "torch.no_grad() or at the second call. Gradients of this step are incomplete: call "
        "optimizer.zero_grad()",
        owner="outputs_fn",
    )


def _agree(one: list[complex], other: list[complex]) -> bool:
    """Whether two samples of an output are the same, but for rounding."""
    limit = _TOLERANCE * max((abs(x) for x in one if math.isfinite(abs(x))), default=0.0)
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(
        x == y or abs(x - y) <= limit or (cmath.isnan(x) and cmath.isnan(y)) for x, y in pairs
    )
