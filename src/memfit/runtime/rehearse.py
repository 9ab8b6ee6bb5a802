"""What is recorded of a step in two passes: a micro-batch of the second one, and the loss between them.

The first pass is not: it holds the outputs of the micro-batches so far where the second one holds their
gradients, and runs the same forward without keeping anything for a backward, so it is never higher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import map_tensors, rows_of, tensors_of
from memfit.runtime.micro import LossFn, OutputsLoss
from memfit.runtime.passes import (
    Joined,
    Seeded,
    is_differentiable,
    loss_of_all,
    outputs_without_graph,
    with_gradients,
)
from memfit.runtime.preserve import Buffers


class Between(NamedTuple):
    """The loss of all outputs, and what is held to run all forwards again."""

    joined: Joined
    buffers: tuple[Buffers, Buffers]

    @property
    def roots(self) -> list[Tensor]:
        """What a backward starts from."""
        return self.joined.loss.roots

    def backward(self) -> None:
        """Fills the gradients of the outputs."""
        self.joined.backward()


def second_pass(model: nn.Module, loss_fn: LossFn, part: Any) -> tuple[Callable[[], Seeded], list[Tensor]]:
    """A micro-batch of the second pass, to be recorded, and the gradients it starts from, of any content."""
    assert isinstance(loss_fn, OutputsLoss)
    outputs_fn = loss_fn.outputs_fn
    example = outputs_without_graph(model, loss_fn, part)
    gradients = [torch.empty_like(t) for _, t in tensors_of(example) if is_differentiable(t)]
    return lambda: with_gradients(outputs_fn(model, part), gradients), gradients


def loss_between(model: nn.Module, loss_fn: LossFn, batch: Any, like: Any) -> Callable[[], Between]:
    """What runs between the passes, to be recorded, on made-up outputs like those of the whole batch."""
    assert isinstance(loss_fn, OutputsLoss)

    def made_up(rows: int) -> Any:
        return map_tensors(like, lambda t: _made_up(t, (rows, *t.shape[1:])))

    def forward() -> Between:
        rows = rows_of(like)
        buffers = Buffers(model), Buffers(model)
        return Between(loss_of_all(loss_fn, [made_up(rows // 2), made_up(rows - rows // 2)], batch), buffers)

    return forward


def outputs_of_all(model: nn.Module, loss_fn: LossFn, batch: Any, rows: int) -> Any:
    """Tensors like the outputs of ``rows`` rows, from those of a batch of fewer or as many.

    Raises:
        InexactAccumulation: An output has no row for each row of the batch, or depends on their number.
    """
    assert isinstance(loss_fn, OutputsLoss)
    found = rows_of(batch)
    outputs = outputs_without_graph(model, loss_fn, batch)
    refuse_no_rows(outputs, found)
    if rows == found:
        return outputs
    return map_tensors(outputs, lambda t: _made_up(t, (rows, *t.shape[1:])))


def refuse_no_rows(outputs: Any, rows: int) -> None:
    """Refuses outputs of which one has no row for each row of the batch.

    Raises:
        InexactAccumulation: There is one, and it is named.
    """
    for path, tensor in tensors_of(outputs):
        if not tensor.dim() or len(tensor) != rows:
            _refuse_output(path, tuple(tensor.shape), rows)


def refuse_other_shapes(whole: Any, part: Any) -> None:
    """Refuses outputs whose shapes beside the rows depend on the number of rows.

    Raises:
        InexactAccumulation: One does: it compares rows with each other (a matrix of similarities).
    """
    fewer = dict(tensors_of(part))
    for path, tensor in tensors_of(whole):
        if path not in fewer or fewer[path].shape[1:] != tensor.shape[1:]:
            _refuse_output(path, tuple(tensor.shape), len(tensor))


def _refuse_output(path: str, shape: tuple[int, ...], rows: int) -> None:
    """Says which output has no rows of its own."""
    path = path.replace("batch", "outputs", 1)
    raise InexactAccumulation(
        f"{path} of {rows} rows has the shape {shape}, so the outputs of micro-batches cannot be joined: "
        "return from outputs_fn only what has one row a row of the batch, of the same shape whatever rows "
        "are beside it (embeddings, not their similarities), and compute the rest in loss_fn",
        owner=path,
    )


def _made_up(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of another shape that any loss can take: numbers from 0 to at most 1, or zeros.

    Rows are no longer than embeddings are: what a softmax of large products leaves are denormal numbers,
    with which CPUs are ten times as slow.
    """
    if is_differentiable(like):
        longest = 1.0 / math.sqrt(max(1, math.prod(shape[1:])))
        return torch.rand(shape, dtype=like.dtype, device=like.device).mul_(longest)
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
