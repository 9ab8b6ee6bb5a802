"""Leaves the world as it was: random numbers, gradients, buffers.

Note [Snapshot]
 1. A step that starts without gradients needs no copy of any: they are dropped again. Where there are some
    (the user adds up several steps), a copy doubles them, so it is made only where the budget has room.
 2. Buffers of at most 64 KiB are copied: the running statistics that BatchNorm writes, unseen by version
    counters. Of larger ones those that the verified steps were seen to write to.
 3. What has no copy is watched by its version: the batch and the parameters too. Was it written to, the
    step cannot be run again, and that is said.
 4. A verified step is run again from its start wherever its promise was broken, so it also keeps what the
    model's own code changes: submodules, numbers, words and detached tensors that are attributes. A counter
    of calls, or BigBird, which exchanges its attention in its first forward, would go another way else.
 5. Not kept: such attributes in other steps, tables of tensors (they may hold a whole former step), and
    generators other than the default ones.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from memfit.runtime.meter import resident_bytes, resident_sizes
from memfit.runtime.modules import named_modules_of

_SMALL_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class RandomStreams:
    """The states of all default generators: torch on each device, Python, NumPy.

    That of the CPU is kept in a generator: a tensor with it would count as memory of a step on a CPU.
    """

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

    def keep_changed(self) -> None:
        """Lets go of all that hold what they held; of the others it takes what they hold now."""
        self._contents = [
            (buffer, buffer.detach().clone())
            for buffer, content in self._contents
            if not torch.equal(buffer.detach(), content)
        ]

    def restore(self) -> None:
        """Puts it back, in the same tensors."""
        with torch.no_grad():
            for buffer, content in self._contents:
                _fill(buffer, content)


class _Kept(NamedTuple):
    """A tensor as it was: its shape, its version, and a copy, perhaps flat, if there is one."""

    tensor: Tensor
    shape: torch.Size
    version: int
    copy: Tensor | None = None

    @staticmethod
    def of(tensor: Tensor, *, copied: bool = False) -> _Kept:
        """The present content."""
        return _Kept(tensor, tensor.shape, _version(tensor), tensor.detach().clone() if copied else None)

    @property
    def is_changed(self) -> bool:
        """Whether something has written to it since, as far as can be told."""
        moved, content = self.version != _version(self.tensor), self.content
        return moved or (content is not None and not torch.equal(self.tensor.detach(), content))

    @property
    def content(self) -> Tensor | None:
        """The copy in the shape that the tensor had."""
        if self.copy is None or self.copy.shape == self.shape:
            return self.copy
        return self.copy.view(self.shape)

    @property
    def is_lost(self) -> bool:
        """Whether it was written to and nothing knows what it was."""
        return self.copy is None and self.is_changed

    def restore(self) -> None:
        """Puts the content back."""
        content = self.content
        if content is not None:
            _fill(self.tensor, content)


class _Buffer(NamedTuple):
    """A buffer, its name in the model, and where its module holds it."""

    name: str
    owner: dict[str, Tensor | None]
    key: str
    kept: _Kept


class _Attributes:
    """What the attributes of a module are, as far as Note [Snapshot] 4 goes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = set(module.__dict__)
        self._values = {name: value for name, value in module.__dict__.items() if _is_plain_state(value)}
        self._submodules = dict(module._modules)

    def restore(self) -> None:
        """Puts them back; what is new goes."""
        for name in set(self._module.__dict__) - self._names:
            del self._module.__dict__[name]
        self._module.__dict__.update(self._values)
        self._module._modules.clear()
        self._module._modules.update(self._submodules)


def _is_plain_state(value: object) -> bool:
    """Whether an attribute can be kept by a reference."""
    if isinstance(value, Tensor):
        return value.grad_fn is None
    return value is None or isinstance(value, bool | int | float | str)


class Snapshot:
    """What a step may change, to run it again from its start. See Note [Snapshot].

    Args:
        inputs: The tensors of the batch.
        room_bytes: Gradients are copied only where all of them take no more; None: everything is copied.
        written: The names of the large buffers that steps write to.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Iterable[Tensor] = (),
        *,
        room_bytes: int | None = None,
        written: Collection[str] = (),
    ) -> None:
        self._streams = RandomStreams.now()
        self._model = model
        self._inputs = [_Kept.of(tensor) for tensor in inputs]
        self._parameters = [_Kept.of(parameter) for parameter in model.parameters()]
        self._buffers = _buffers(model, None if room_bytes is None else written)
        self._gradients = self._present_gradients(room_bytes)
        self._attributes = [_Attributes(module) for module in model.modules()] if room_bytes is None else []
        self._written = written

    @property
    def lasting_sizes(self) -> tuple[int, ...]:
        """Bytes of each copy that the snapshot of any other step holds too."""
        return _sizes(buffer.kept for buffer in self._buffers if self._is_lasting(buffer))

    @property
    def passing_sizes(self) -> tuple[int, ...]:
        """Bytes of each other copy."""
        passing = [buffer.kept for buffer in self._buffers if not self._is_lasting(buffer)]
        return _sizes([*passing, *(kept for _, kept in self._gradients if kept is not None)])

    def _is_lasting(self, buffer: _Buffer) -> bool:
        return _is_small(buffer.kept.tensor) or buffer.name in self._written

    def _present_gradients(self, room_bytes: int | None) -> list[tuple[Tensor, _Kept | None]]:
        """The leaves that collect gradients, and what each has; copied if there is room for all."""
        inputs = (k.tensor for k in self._inputs if k.tensor.requires_grad and k.tensor.is_leaf)
        leaves = [*(k.tensor for k in self._parameters), *inputs]
        needed_bytes = resident_bytes(leaf.grad for leaf in leaves if leaf.grad is not None)
        copied = room_bytes is None or needed_bytes <= room_bytes
        return [(leaf, None if leaf.grad is None else _Kept.of(leaf.grad, copied=copied)) for leaf in leaves]

    def restore(self) -> None:
        """Puts everything back, in the same tensors."""
        self._streams.restore()
        for attributes in self._attributes:
            attributes.restore()
        with torch.no_grad():
            for buffer in self._buffers:
                buffer.owner[buffer.key] = buffer.kept.tensor
                buffer.kept.restore()
            for leaf, kept in self._gradients:
                leaf.grad = None if kept is None else kept.tensor
                if kept is not None:
                    kept.restore()

    def lost(self) -> str | None:
        """What was changed since and cannot be put back; None: everything can."""
        names = [f"the parameter '{name}'" for name, _ in self._model.named_parameters()]
        holders = [*names, *("the batch" for _ in self._inputs)]
        things = [("the batch", kept) for kept in self._inputs]
        things += [(name, kept) for name, kept in zip(names, self._parameters, strict=False)]
        things += [
            (f"the gradient of {name}", kept)
            for name, (_, kept) in zip(holders, self._gradients, strict=False)
            if kept is not None
        ]
        things += [(f"the buffer '{buffer.name}'", buffer.kept) for buffer in self._buffers]
        return next((name for name, kept in things if kept.is_lost), None)

    def written(self) -> set[str]:
        """The names of the large buffers to which something has written since."""
        large = (buffer for buffer in self._buffers if not _is_small(buffer.kept.tensor))
        return {buffer.name for buffer in large if buffer.kept.is_changed}


def small_buffer_sizes(model: nn.Module) -> tuple[int, ...]:
    """Bytes of each copy that a snapshot holds in any case."""
    groups = _in_groups(buffer for buffer in model.buffers() if _is_small(buffer))
    return tuple(sum(b.numel() * b.element_size() for b in group) for group in groups)


def _buffers(model: nn.Module, written: Collection[str] | None) -> list[_Buffer]:
    """The buffers; the small ones are copied and, of the others, those that are ``written``."""
    places = [
        (f"{prefix}.{key}" if prefix else key, module._buffers, key, buffer)
        for prefix, module in named_modules_of(model)
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    copies = _copies_of_small({id(buffer): buffer for *_, buffer in places}.values())
    for name, _, _, buffer in places:
        if id(buffer) not in copies and (written is None or name in written):
            copies[id(buffer)] = buffer.detach().clone()
    return [
        _Buffer(name, owner, key, _Kept(buffer, buffer.shape, _version(buffer), copies.get(id(buffer))))
        for name, owner, key, buffer in places
    ]


def _copies_of_small(buffers: Iterable[Tensor]) -> dict[int, Tensor]:
    """Flat copies of the small ones by identity, all of a kind in one block: one kernel, not one for each."""
    copies: dict[int, Tensor] = {}
    for group in _in_groups(buffer for buffer in buffers if _is_small(buffer)):
        flat = torch.cat([buffer.detach().reshape(-1) for buffer in group])
        parts = flat.split([buffer.numel() for buffer in group])
        copies |= {id(buffer): part for buffer, part in zip(group, parts, strict=True)}
    return copies


def _in_groups(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that can lie in one block: alike in type and device."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((type(tensor), tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


def _is_small(tensor: Tensor) -> bool:
    """Whether a copy costs nothing to speak of. See Note [Snapshot] 2."""
    return tensor.layout is torch.strided and tensor.numel() * tensor.element_size() <= _SMALL_BYTES


def _sizes(things: Iterable[_Kept]) -> tuple[int, ...]:
    """Bytes of the copies among some things."""
    return resident_sizes(kept.copy for kept in things if kept.copy is not None)


def _fill(tensor: Tensor, content: Tensor) -> None:
    """Puts a content back; observers of quantisation resize their buffers when they first see data."""
    if tensor.shape != content.shape:
        tensor.resize_(content.shape)
    tensor.copy_(content)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; one made in inference mode cannot be, and does not count."""
    return 0 if tensor.is_inference() else int(tensor._version)


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
