"""Gradient hooks see the gradient of the whole batch, once, whatever it was run in.

Note [Hooks]
 1. What ``tensor.register_hook`` runs may do anything to a gradient (clip it, log it, count calls), so it
    must not see the gradients of parts. While micro-batches run, each hook has a stand-in that does nothing,
    at its own place in the table: ``handle.remove()`` works meanwhile, and the order stays.
 2. Hooks are to see what this batch alone has given: former gradients are put aside, and added to.
 3. Then they run in a small backward that hands each tensor its sum, in the order in which the gradients
    came before. So autograd itself runs them, each tensor's in the order in which they were registered, and
    those of ``register_multi_grad_hook`` too, which ask for the backward they are in. It hands over its
    only reference, so ``.grad`` takes the sum and copies nothing.
 4. A hook that the forward registers would be there once a micro-batch, and is refused. What is hung on
    autograd's nodes (``AccumulateGrad``) cannot be seen from Python and sees every micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from memfit.errors import InexactAccumulation, UnsupportedModel
from memfit.runtime.micro import backward

Named = Iterable[tuple[str, Tensor]]
Sums = list[tuple[Tensor, Tensor]]  # leaves, and what is to be added to their gradients
_Hooks = dict[int, Callable[[Tensor], Tensor | None]]


@contextmanager
def hooks_at_the_end(tensors: Named) -> Iterator[None]:
    """The body adds up the gradients of parts; the hooks of leaves run once, on their sum. See Note [Hooks].

    Raises:
        UnsupportedModel: One of them has a hook that follows each accumulation.
        InexactAccumulation: The body registers a hook.
    """
    with sums_of_parts(tensors) as sums:
        yield
    start = handed_over(sums)
    if start is not None:
        backward(start)


@contextmanager
def sums_of_parts(tensors: Named, *, of_all: bool = False) -> Iterator[Sums]:
    """The body adds up the gradients of parts. The value has their sums afterwards, for :func:`handed_over`.

    Args:
        of_all: Those of leaves without a hook are taken too, with what their ``.grad`` was before.

    Raises:
        UnsupportedModel, InexactAccumulation: As :func:`hooks_at_the_end`.
    """
    wanted = {id(t): (name, t) for name, t in tensors if t.requires_grad and t.is_leaf}  # each once
    leaves = [*wanted.values()]
    for name, leaf in leaves:
        refuse_accumulation_hooks(name, leaf)
    known = {name: set(leaf._backward_hooks or ()) for name, leaf in leaves}
    hooked = [leaf for _, leaf in leaves if leaf._backward_hooks]
    former = [leaf.grad for leaf in hooked]
    for leaf in hooked:
        leaf.grad = None
    sums: list[Tensor | None] = []
    given: Sums = []
    try:
        with silenced(hooked) as order:
            yield given
        sums = [leaf.grad for leaf in hooked]
    finally:
        for leaf, gradient in zip(hooked, former, strict=True):
            leaf.grad = gradient
    del former
    for name, leaf in leaves:
        _refuse_new_hooks(name, set(leaf._backward_hooks or ()) - known[name])
    order |= dict.fromkeys(range(len(hooked)))  # the body may have removed the hooks of some
    given += [(hooked[i], gradient) for i in order if (gradient := sums[i]) is not None]
    if of_all:
        given += _taken(leaf for _, leaf in leaves if not leaf._backward_hooks)


def _taken(leaves: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of leaves, which have none afterwards."""
    for leaf in leaves:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            yield leaf, gradient


@contextmanager
def silenced(tensors: Iterable[Tensor]) -> Iterator[dict[int, None]]:
    """The gradient hooks of tensors do nothing in the body; those it removes stay removed.

    The value has the numbers of the tensors that got a gradient, in that order.
    """
    order: dict[int, None] = {}
    tables: list[_Hooks] = []
    before: list[_Hooks] = []
    for number, tensor in enumerate({id(tensor): tensor for tensor in tensors}.values()):
        if tensor._backward_hooks:
            tables.append(tensor._backward_hooks)
            before.append(dict(tables[-1]))
            tables[-1].update(dict.fromkeys(tables[-1], partial(_notes, order, number)))
    try:
        yield order
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.update({key: hook for key, hook in hooks.items() if key in table})


def refuse_accumulation_hooks(name: str, leaf: Tensor) -> None:
    """Refuses a hook that runs whenever something was added to ``.grad``: no stand-in could wait with it."""
    if leaf._post_accumulate_grad_hooks:
        raise UnsupportedModel(
            f"'{name}' has a hook that runs whenever its gradient has been accumulated (an optimizer "
            "fused into the backward?), which would see every micro-batch: remove it, and step the "
            "optimizer after step(batch)",
            owner=name,
        )


def _refuse_new_hooks(name: str, new: set[int]) -> None:
    """Refuses hooks that a forward has registered."""
    if new:
        raise InexactAccumulation(
            f"loss_fn registers a gradient hook on '{name}', once for every micro-batch: register it before "
            "the step",
            owner=name,
        )


def handed_over(given: Sums) -> Tensor | None:
    """A number whose backward adds gradients to those of leaves as one backward would, in this order.

    Hooks run then, with all else that waits for a gradient. ``given`` is emptied.
    """
    start: Tensor | None = None
    while given:
        leaf, gradient = given.pop()
        with torch.enable_grad():
            start = _HandOver.apply([gradient], leaf, start)  # type: ignore[no-untyped-call]
    return start


class _HandOver(Function):
    """A function of a tensor whose gradient is known beforehand, and of another such function."""

    @staticmethod
    def forward(ctx: Any, gradient: list[Tensor], leaf: Tensor, after: Tensor | None) -> Tensor:
        """Any number does."""
        ctx.gradient, ctx.is_last = gradient, after is None
        return torch.zeros((), device=leaf.device)

    @staticmethod
    def backward(ctx: Any, start: Tensor) -> Any:
        """The gradient, of which no reference stays. Autograd adds it to ``.grad`` before it goes on."""
        return None, ctx.gradient.pop(), None if ctx.is_last else start


def _notes(order: dict[int, None], number: int, _: Tensor) -> None:
    """Stands in for a hook."""
    order.setdefault(number)
