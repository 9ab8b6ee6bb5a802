"""BatchNorm while micro-batches run: as it is, by the statistics of each of them, or by its running ones.

Note [Choices]
 1. "exact": nothing is done here. A layer that normalises over the rows keeps the batch whole.
 2. "frozen": layers in training mode run as in eval mode, during the step only. Rows no longer meet, and the
    step is that of a model of which these layers are in eval mode, to the bit.
 3. "ghost": each micro-batch is normalised by its own statistics (ghost batch normalisation, Hoffer et al.
    2017, arXiv:1705.08741). That is another gradient than the whole batch's. Only the running statistics
    are those of the whole batch: they are updated once a step, from what the micro-batches' pool to.

Note [Pooled statistics]
 1. During a layer's own forward, and nobody else's, its running statistics are zeros and its momentum is 1:
    the kernel then leaves the statistics of the micro-batch in them, the variance with n/(n-1).
 2. They are pooled as they come (Chan, Golub, LeVeque 1983): the mean of the means, the squares within and
    between the micro-batches. The n-th call of a layer in a micro-batch pools with the n-th of the others.
 3. After the last micro-batch the layer's own update is made of them, once for each call: its momentum, or
    1/num_batches_tracked. If the body raises, there is none.
 4. A forward that runs again in the backward (the user's own checkpoint) does not count, while in a plain
    step it updates the statistics once more (pytorch#96136). Nor does one on other tensors than the layer's
    own (``functional_call``), which are written as ever.
 5. Rows that do not run (a micro-batch of weight 0) are in no statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memfit.errors import UnsupportedModel

CHOICES: Final = ("exact", "ghost", "frozen")
_STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")


def check_batch_norm(model: nn.Module, batch_norm: str, compiled: str | None) -> None:
    """Refuses a choice that the model's layers do not allow.

    Args:
        compiled: The part of the model that ``torch.compile`` hides, if any.

    Raises:
        ValueError: There is no such choice.
        UnsupportedModel: A layer cannot be frozen, or its statistics cannot be pooled.
    """
    if batch_norm not in CHOICES:
        raise ValueError(f"batch_norm is {batch_norm!r}: give {', '.join(map(repr, CHOICES))}")
    layers = _training_layers(model)
    if batch_norm == "frozen":
        for name, layer in layers.items():
            if layer.running_mean is None:
                raise UnsupportedModel(
                    f"'{name}' ({type(layer).__name__}) keeps no running statistics, so there is nothing to "
                    "freeze it at: set track_running_stats=True, or use batch_norm='exact' or 'ghost'",
                    owner=name,
                )
    if batch_norm == "ghost" and compiled is not None and layers:
        raise UnsupportedModel(
            f"{compiled} is compiled by torch.compile, which would update the statistics of its BatchNorm "
            "once a micro-batch: give fit the module itself (its ._orig_mod), or batch_norm='frozen'",
            owner=compiled,
        )
    if batch_norm == "ghost" and _ranks() > 1:
        for name, layer in layers.items():
            if isinstance(layer, nn.SyncBatchNorm):
                raise UnsupportedModel(
                    f"'{name}' is a SyncBatchNorm over {_ranks()} ranks, whose counts memfit does not know: "
                    "use batch_norm='exact' or 'frozen'",
                    owner=name,
                )


def normalised(
    model: nn.Module, batch_norm: str, *, several: bool
) -> AbstractContextManager[Callable[[], None]]:
    """What holds while the micro-batches of a step run; call what it gives before each of them.

    Args:
        several: There are two or more; one is the whole batch, which needs no pool.
    """
    if batch_norm == "frozen":
        return _frozen(model)
    if batch_norm == "ghost" and several:
        return _pooled(model)
    return nullcontext(_nothing)


def by_rows(model: nn.Module, batch_norm: str) -> AbstractContextManager[object]:
    """What holds while the loss is asked how its parts add up: layers that need not be exact do not mix."""
    return nullcontext() if batch_norm == "exact" else _frozen(model)


def is_pooled(model: nn.Module, coupled: str) -> bool:
    """Whether an op that mixes rows (``StepGraph.coupled``) is that of a layer whose statistics are pooled.

    A layer that normalises twice in one call would show one of the two.
    """
    frame, _, op = coupled.partition(": ")
    name = frame.partition("#")[0]
    return " #" not in op and ("" if name == "model" else name) in _training_layers(model)


def pooled_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors as large as those that hold the pooled statistics of a step."""
    return [t for layer in _training_layers(model).values() if _updates(layer) for t in _Pool(layer).tensors]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Layers in training mode run in eval mode."""
    layers = _training_layers(model).values()
    try:
        for layer in layers:
            layer.training = False
        yield _nothing
    finally:
        for layer in layers:
            layer.training = True


@contextmanager
def _pooled(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Running statistics are updated once, at the end of the body. See Note [Pooled statistics]."""
    pools = [_LayerPools(layer) for layer in _training_layers(model).values()]
    handles: list[Any] = []
    for layer in pools:
        handles.append(layer.layer.register_forward_pre_hook(layer.enter))
        handles.append(layer.layer.register_forward_hook(layer.leave, prepend=True, always_call=True))

    def begin() -> None:
        for layer in pools:
            layer.calls = 0

    try:
        yield begin
    finally:
        for handle in handles:
            handle.remove()
    for layer in pools:
        layer.update()


class _Pool:
    """The statistics of one call of a layer over the micro-batches so far."""

    __slots__ = ("count", "mean", "squares")

    def __init__(self, layer: _BatchNorm) -> None:
        mean = layer.running_mean
        assert mean is not None
        dtype = torch.promote_types(mean.dtype, torch.float32)
        self.count = 0
        self.mean = torch.zeros_like(mean, dtype=dtype)
        self.squares = torch.zeros_like(mean, dtype=dtype)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What it holds."""
        return self.mean, self.squares

    def add(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Another micro-batch: its mean, its unbiased variance, and the numbers they are of."""
        total = self.count + count
        apart = mean - self.mean
        self.mean.add_(apart, alpha=count / total)
        self.squares.add_(variance, alpha=count - 1).add_(apart.square_(), alpha=self.count * count / total)
        self.count = total


class _LayerPools:
    """A layer, its pools in the order of its calls, and its statistics while its forward runs."""

    __slots__ = ("calls", "counts", "layer", "own", "pools", "running")

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.running = layer.running_mean
        self.calls = 0
        self.counts = True
        self.pools = [_Pool(layer)] if _updates(layer) else []
        self.own: tuple[float | None, dict[str, Tensor | None]] | None = None

    def enter(self, layer: nn.Module, args: Any) -> None:
        """Before the forward: zeros in place of the running statistics."""
        table = self.layer._buffers
        self.counts = torch._C._current_autograd_node() is None
        if not _updates(self.layer) or (self.counts and table["running_mean"] is not self.running):
            return
        self.own = self.layer.momentum, {name: table[name] for name in _STATISTICS}
        self.layer.momentum = 1.0
        with torch.no_grad():
            for name, own in self.own[1].items():
                table[name] = None if own is None else torch.zeros_like(own)

    def leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        """After the forward, also where it raised: puts its statistics back, and pools what it left."""
        if self.own is None:
            return
        (self.layer.momentum, own), self.own = self.own, None
        table = self.layer._buffers
        mean, variance, _ = (table[name] for name in _STATISTICS)
        table.update(own)
        if not self.counts or not isinstance(output, Tensor) or mean is None or variance is None:
            return
        if self.calls == len(self.pools):
            self.pools.append(_Pool(self.layer))
        seen = args[0] if args else output  # a subclass may return something of another size
        with torch.no_grad():
            self.pools[self.calls].add(mean, variance, seen.numel() // seen.shape[1])
        self.calls += 1

    @torch.no_grad()
    def update(self) -> None:
        """The update of the running statistics that the layer would have made."""
        layer = self.layer
        for pool in self.pools:
            if pool.count < 2:  # it was not called
                continue
            factor: float | Tensor = 0.0 if layer.momentum is None else layer.momentum
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.add_(1)
                if layer.momentum is None:
                    factor = layer.num_batches_tracked.double().reciprocal()
            found = (pool.mean, pool.squares.div_(pool.count - 1))
            for running, statistic in zip((layer.running_mean, layer.running_var), found, strict=True):
                assert running is not None
                running.copy_(running.to(statistic.dtype) * (1 - factor) + statistic * factor)


def _training_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers in training mode, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}


def _updates(layer: _BatchNorm) -> bool:
    """Whether a forward of a layer updates running statistics."""
    return layer.training and layer.track_running_stats and layer.running_mean is not None


def _ranks() -> int:
    """How many processes train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _nothing() -> None:
    """No statistics are pooled."""
