"""One micro-batch: the loss, checked and weighted. Recording and running share it, to the byte.

A loss is one number or a mapping of terms, each one number, whose sum is what is trained on. A term that is
a mean over its own units (labels, rows, boxes) has a weight of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memfit.runtime.arguments import check_function
from memfit.runtime.normalisation import normalised
from memfit.runtime.precision import SUM, float32_sums
from memfit.runtime.sharding import is_sharded

Loss = Tensor | Mapping[str, Tensor]
LossFn = Callable[[nn.Module, Any], Loss]
OutputsFn = Callable[[nn.Module, Any], Any]
Weight = float | Mapping[str, float] | None  # of each term; None: it is the whole batch


class Weighed(NamedTuple):
    """The loss of one micro-batch, in a graph, and the terms it is the sum of, without one."""

    total: Tensor
    terms: dict[str, Tensor]

    @property
    def roots(self) -> list[Tensor]:
        """What a backward starts from."""
        return [self.total]

    def backward(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Adds the gradients, times the scale of ``scaler``, to the leaves."""
        backward(self.total, scaler)


@dataclass(frozen=True, slots=True)
class OutputsLoss:
    """A loss that sees only the outputs of the model, as one function of model and batch."""

    outputs_fn: OutputsFn
    of_outputs: Callable[[Any, Any], Loss]

    def __call__(self, model: nn.Module, batch: Any) -> Loss:
        """The loss of a batch."""
        return self.of_outputs(self.outputs_fn(model, batch), batch)


def whole_loss(loss_fn: LossFn | Callable[[Any, Any], Loss], outputs_fn: OutputsFn | None) -> LossFn:
    """The loss of model and batch, whether or not it is given in two functions.

    Raises:
        TypeError: One of them is no function.
    """
    first = "model" if outputs_fn is None else "outputs"
    check_function("loss_fn", loss_fn, f"loss_fn({first}, batch) -> scalar tensor, or a mapping of them")
    if outputs_fn is None:
        return loss_fn
    check_function(
        "outputs_fn", outputs_fn, "outputs_fn(model, batch) -> tensors of one row a row of the batch"
    )
    return OutputsLoss(outputs_fn, loss_fn)


@contextmanager
def micro_batches(model: nn.Module, batch_norm: str, *, several: bool) -> Iterator[Callable[[], None]]:
    """What holds while the micro-batches of one step run; call what it gives before each of them.

    Args:
        batch_norm: ``"exact"``, ``"ghost"`` or ``"frozen"``, see ``runtime/normalisation.py``.
        several: There are two or more, so gradients are added up (``runtime/precision.py``).
    """
    # FSDP adds up in the type that its policy says; the pieces are in no less than float32.
    sums = float32_sums(model) if several and not is_sharded(model) else nullcontext()
    with normalised(model, batch_norm, several=several) as begin, sums:
        yield begin


def weighted_loss(model: nn.Module, loss_fn: LossFn, part: Any, weight: Weight) -> Weighed:
    """The loss of one micro-batch times its weight in the effective batch.

    One in reduced precision is weighted, and so added up, in float32.

    Raises:
        TypeError: ``loss_fn`` returned something else than a tensor or a mapping of tensors.
        ValueError: The loss is not one number, has no graph to go backward through, or has a term without
            a weight.
    """
    torch.clear_autocast_cache()  # an autocast around the step would hold the casts of the last micro-batch
    return weighed(loss_fn(model, part), weight)


def weighed(loss: Loss, weight: Weight) -> Weighed:
    """The same of a loss. A term of weight 0 is left out: a mean over nothing is not a number."""
    if not isinstance(loss, Mapping):
        total = _in_a_graph(one_number(loss).reshape(()))
        if isinstance(weight, Mapping):
            raise ValueError("count= names terms, and loss_fn returned one tensor: give one count for it")
        return Weighed(total if weight is None else _times(total, weight), {})
    terms = {name: one_number(term, f"loss_fn's term {name!r}").reshape(()) for name, term in loss.items()}
    if not terms:
        raise ValueError("loss_fn returned a mapping without any term: return {'name': scalar tensor, ...}")
    if weight is not None:
        weights = _weight_of_each(terms, weight)
        terms = {name: _times(term, weights[name]) for name, term in terms.items() if weights[name]}
    first, *others = terms.values()
    return Weighed(_in_a_graph(sum(others, first)), {name: alone(term) for name, term in terms.items()})


def _times(loss: Tensor, weight: float) -> Tensor:
    """A loss times its weight; one in reduced precision is weighted, and so added up, in float32."""
    return loss.to(torch.promote_types(loss.dtype, SUM)) * weight


def _weight_of_each(terms: Mapping[str, Tensor], weight: float | Mapping[str, float]) -> Mapping[str, float]:
    """The weight of each term."""
    if not isinstance(weight, Mapping):
        return dict.fromkeys(terms, weight)
    for name in terms:
        if name not in weight:
            raise ValueError(
                f"loss_fn returned the term {name!r}, and count= has none for it (it names "
                f"{', '.join(map(repr, weight))}): give count={{{name!r}: ...}} too"
            )
    return weight


def refuse_no_such_term(terms: Mapping[str, Tensor], weight: Mapping[str, float]) -> None:
    """Refuses weights of which one is of no term; a term of weight 0 is left out, so it may be missing.

    Raises:
        ValueError: There is one, and it is named.
    """
    for name, share in weight.items():
        if share and name not in terms:
            raise ValueError(
                f"count= names the term {name!r}, and loss_fn did not return it (it returned "
                f"{', '.join(map(repr, terms))}): leave it out of count=, or return it as a 0 where it does "
                "not apply"
            )


def one_number(loss: object, who: str = "loss_fn") -> Tensor:
    """The loss, if it is a tensor that holds one number.

    Raises:
        TypeError: It is something else than a tensor.
        ValueError: It holds more or fewer numbers.
    """
    returned = "loss_fn returned" if who == "loss_fn" else f"{who} is"
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{returned} a {type(loss).__name__}, not a tensor: return the scalar loss itself "
            "(for a transformers output, output.loss)"
        )
    if loss.numel() != 1 or loss.dim() > 1:
        raise ValueError(
            f"{returned} a tensor of shape {tuple(loss.shape)}, not one number: reduce it with .mean() "
            "or .sum()"
        )
    return loss


def alone(loss: Tensor) -> Tensor:
    """A number without graph, in a storage of its own: that of ``mse_loss`` is as large as its data."""
    loss = loss.detach()
    return loss if loss.untyped_storage().nbytes() == loss.element_size() else loss.clone()


def _in_a_graph(loss: Tensor) -> Tensor:
    """The loss, if a gradient can be taken of it."""
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no graph: no parameter that requires a gradient led to it. Do not call .detach(), "
            ".item() or torch.no_grad() in loss_fn, and train a model with requires_grad parameters"
        )
    return loss


def backward(loss: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
    """Goes backward, outside of any autocast: each op then runs in the type that its forward chose.

    Args:
        scaler: Its scale is the gradient to begin with, as after ``scaler.scale(loss).backward()``.
    """
    with without_autocast():
        start = None if scaler is None else scaler.scale(torch.ones_like(loss)).to(loss.dtype)
        loss.backward(start)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast around the caller is off in the body."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)


def refuse_no_gradients() -> None:
    """Refuses a step where autograd is off.

    Raises:
        ValueError: Inside ``torch.no_grad()`` or ``torch.inference_mode()``.
    """
    for is_off, where in (
        (torch.is_inference_mode_enabled(), "torch.inference_mode()"),
        (not torch.is_grad_enabled(), "torch.no_grad()"),
    ):
        if is_off:
            raise ValueError(
                f"step was called inside {where}, which lets no gradient be made: call it outside"
            )
