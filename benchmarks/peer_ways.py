"""Ways to run a step with less memory, as people do it by hand; each is undone when its body ends."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from rotor import Block, Schedule, members
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from memfit.runtime.meter import PeakMeter

_aten = torch.ops.aten
_MATMULS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.convolution.default,
    }
)
_REPEATS = 3


@contextmanager
def checkpointed(blocks: Sequence[nn.Module], **options: Any) -> Iterator[None]:
    """These blocks under torch.utils.checkpoint while the body runs."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _keeps(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keeps = op in _MATMULS or "attention" in str(op)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


saving_matmuls = partial(create_selective_checkpoint_contexts, _keeps)


@contextmanager
def by_transformers(model: Any, every_n_layers: int) -> Iterator[None]:
    """The model's own gradient checkpointing while the body runs.

    Raises:
        ValueError: The model has none.
    """
    model.activation_checkpointing_enable(every_n_layers=every_n_layers)
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


# ---- Rotor -------------------------------------------------------------------------------------------


class Range(nn.Module):
    """Blocks under one checkpoint, of which some may be under checkpoints of their own."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        """The blocks one after the other, each with the same further arguments."""
        return checkpoint(self._run, hidden, *args, use_reentrant=False, **kwargs)

    def _run(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        for part in self.parts:
            out = part(hidden, *args, **kwargs)
            hidden = _main(out)
        return out


def _main(out: Any) -> Any:
    """What the next block takes of an output; some come with attention weights."""
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def scheduled(model: nn.Module, lists: Sequence[str], schedule: Schedule) -> Iterator[None]:
    """The blocks of a chain run by a schedule of ``rotor.py`` while the body runs."""
    own = {path: model.get_submodule(path) for path in lists}
    blocks = [block for path in lists for block in own[path].children()]
    ends, end = [], 0
    for path in lists:
        end += len(list(own[path].children()))
        ends.append(end)
    with ExitStack() as stack:
        for path, first, last in zip(lists, [0, *ends], ends, strict=False):
            items = [item for item in schedule if first <= members((item,))[0] < last]
            stack.callback(_put, model, path, own[path])
            _put(model, path, nn.ModuleList(_part(item, blocks) for item in items))
        yield


def _part(item: Any, blocks: Sequence[nn.Module]) -> nn.Module:
    return Range([_part(i, blocks) for i in item]) if isinstance(item, tuple) else blocks[item]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def measured_blocks(model: nn.Module, lists: Sequence[str], run: Callable[[], Tensor]) -> list[Block]:
    """What each block of a chain takes, and last, as one block that is always kept, all that follows them.

    Args:
        run: The forward of the model, to its loss.
    """
    calls: dict[nn.Module, tuple[Any, Any]] = {}
    groups = {b: n for n, path in enumerate(lists) for b in model.get_submodule(path).children()}
    with ExitStack() as stack:
        for block in groups:
            hook = block.register_forward_pre_hook(
                lambda module, args, kwargs: calls.__setitem__(module, (args, kwargs)), with_kwargs=True
            )
            stack.callback(hook.remove)
        run()
    found = [_measured(block, *calls[block], group) for block, group in groups.items()]
    return [*found, _rest(next(reversed(groups)), run, len(lists))]


def _measured(block: nn.Module, args: Any, kwargs: Any, group: int) -> Block:
    """One block alone."""
    place = next(block.parameters()).device
    args, kwargs = [_alone(a) for a in args], {name: _alone(a) for name, a in kwargs.items()}
    block(*args, **kwargs)
    seconds = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        block(*args, **kwargs)
        seconds.append(time.perf_counter() - start_s)
    with torch.no_grad(), PeakMeter(place) as bare:
        block(*args, **kwargs)
    with PeakMeter(place) as forward:
        out = _main(block(*args, **kwargs))
    gradient = torch.ones_like(out)
    with PeakMeter(place) as backward:
        out.backward(gradient)
    return Block(
        statistics.median(seconds),
        out.numel() * out.element_size(),
        forward.net_bytes,
        forward.peak_bytes,
        bare.peak_bytes,
        max(0, backward.peak_bytes),
        group,
    )


def _alone(argument: Any) -> Any:
    """The argument without its past."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().requires_grad_(argument.requires_grad)


def _rest(last: nn.Module, run: Callable[[], Tensor], group: int) -> Block:
    """What follows the blocks: from the output of the last one to its gradient."""
    meter = PeakMeter(next(last.parameters()).device)

    def begin(module: nn.Module, args: Any, out: Any) -> Any:
        meter.__enter__()
        leaf = _main(out).detach().requires_grad_()
        return (leaf, *out[1:]) if isinstance(out, tuple) else leaf

    with last.register_forward_hook(begin):
        run().backward()
    meter.__exit__(None, None, None)
    return Block(0.0, 0, 0, meter.peak_bytes, meter.peak_bytes, meter.peak_bytes, group)
