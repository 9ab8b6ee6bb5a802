"""Leaves the world as it was: random numbers, gradients, buffers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RandomStreams:
    """The states of all default generators: torch on each device, Python, NumPy."""

    cpu: torch.Generator
    cuda: tuple[Tensor, ...]
    python: Any
    numpy: Any

    @staticmethod
    def now() -> RandomStreams:
        """The present states."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return RandomStreams(
            torch.default_generator.clone_state(), cuda, random.getstate(), np.random.get_state()
        )

    def restore(self) -> None:
        """Puts the states back."""
        torch.set_rng_state(self.cpu.get_state())
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        random.setstate(self.python)
        np.random.set_state(self.numpy)


@contextmanager
def same_random_streams() -> Iterator[None]:
    """The body draws random numbers that nobody will miss."""
    streams = RandomStreams.now()
    try:
        yield
    finally:
        streams.restore()


class Buffers:
    """What the buffers of a model hold."""

    def __init__(self, model: nn.Module) -> None:
        self._contents = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def restore(self) -> None:
        """Puts it back, in the same tensors."""
        with torch.no_grad():
            for buffer, content in self._contents:
                buffer.copy_(content)


class Snapshot:
    """Random streams, buffers and gradients of a model, to run a step again from its start.

    Args:
        others: Tensors that get gradients too, such as inputs.
    """

    def __init__(self, model: nn.Module, others: Iterable[Tensor] = ()) -> None:
        self._streams = RandomStreams.now()
        self._buffers = Buffers(model)
        self._gradients = [
            (p, p.grad, None if p.grad is None else p.grad.detach().clone())
            for p in (*model.parameters(), *others)
        ]

    def restore(self) -> None:
        """Puts everything back, in the same tensors."""
        self._streams.restore()
        self._buffers.restore()
        with torch.no_grad():
            for parameter, gradient, values in self._gradients:
                parameter.grad = gradient
                if gradient is not None and values is not None:
                    gradient.copy_(values)


@contextmanager
def no_gradients(model: nn.Module) -> Iterator[None]:
    """The body may fill ``.grad``; afterwards the former gradients are back."""
    former = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in former:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in former:
            parameter.grad = gradient


@contextmanager
def gradients_of_others(roots: Iterable[Tensor], model: nn.Module) -> Iterator[None]:
    """The body goes backward from some tensors; other leaves than the model's keep their gradients.

    Such as those of the discriminator that the loss of a generator closes over.
    """
    own = {id(parameter) for parameter in model.parameters()}
    former = [(leaf, leaf.grad) for leaf in _leaves_behind(roots) if id(leaf) not in own]
    try:
        yield
    finally:
        for leaf, gradient in former:
            leaf.grad = gradient


def _leaves_behind(roots: Iterable[Tensor]) -> list[Tensor]:
    """The leaves whose gradients a backward would fill."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    pending: list[Any] = [root.grad_fn for root in roots]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.append(node.variable)
    return found


@contextmanager
def contents_of(model: nn.Module) -> Iterator[None]:
    """A real run in the body writes to buffers; afterwards they hold what they held."""
    snapshot = Snapshot(model)
    try:
        yield
    finally:
        snapshot.restore()
