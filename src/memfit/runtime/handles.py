"""What stands for tensors that a plan drops: handles that know how to make them, and records of the ops.

Note [Handles]
 1. A *handle* is one version of a storage that the plan drops: the forward leaves no memory of it. Its
    *record* is the op that makes it again. What autograd saves of it is a *window* onto the handle. An
    argument of a record is a window, too, if it is itself dropped, else the tensor, *held*.
 2. A handle keeps what was made again until its last reference dies: the save's (autograd frees it) or that
    of a record not yet run. Reference counting is the whole memory management; ``core/timeline.py`` predicts
    it by the same rules.
 3. A record that overwrites takes the old version over if it is the only reader, else it works on a copy.
 4. A record is run under the generator state at which its op first ran (the stream is put back afterwards),
    and in its grad mode: kernels of MKL-DNN ask for it.
 5. Running statistics that BatchNorm writes are replaced by scratch copies.
 6. A value is made *in passing* if a later segment of the model needs it before its own does: then its record
    stays, to run once more. That is checkpointing in levels.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _set_grad_enabled

from memfit.core.barriers import Stretch
from memfit.core.graph import Level
from memfit.runtime.intercept import PlannedOp
from memfit.runtime.opinfo import all_in, declared_writes

# How a tensor lies in its storage: size, stride, offset, type
Geometry = tuple[torch.Size, tuple[int, ...], int, torch.dtype]

_NO_LEVEL = Level()


def geometry_of(tensor: Tensor) -> Geometry:
    """How a tensor lies in its storage."""
    return tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype  # type: ignore[return-value]


class Handle:
    """One version of a storage that is, or can be, made again.

    ``tensor`` is a tensor over the storage, once there is one; ``geometry`` is what it is or will be like.
    ``readers`` are the records that have it as an argument, ``windows`` what autograd saved of it; both may
    be dead by now.
    """

    __slots__ = (
        "__weakref__",
        "geometry",
        "is_blank",
        "level",
        "readers",
        "record",
        "stretch",
        "tensor",
        "windows",
    )

    def __init__(self, record: Record | None, geometry: Geometry) -> None:
        self.record = record
        self.geometry = geometry
        self.tensor: Tensor | None = None
        self.readers: list[weakref.ref[Record]] | None = None
        self.windows: list[weakref.ref[Window]] | None = None
        self.is_blank = False
        self.level = _NO_LEVEL
        self.stretch: Stretch = ()

    def has_other_readers(self, record: Record) -> bool:
        """Whether anyone but one record still wants this version as it is."""
        readers = (reference() for reference in self.readers or ())
        if any(r is not None and r is not record and not r.is_done for r in readers):
            return True
        return any(reference() is not None for reference in self.windows or ())


def made(tensor: Tensor) -> Handle:
    """A handle that has its memory; with its graph the tensor would keep the nodes behind it."""
    handle = Handle(None, geometry_of(tensor))
    handle.tensor = tensor.detach()
    return handle


class Held:
    """A tensor that a record holds, and its version, which tells whether it was changed since."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor, version: int | None) -> None:
        self.tensor = tensor
        self.version = version

    def is_modified(self) -> bool:
        """Whether what is held was written to behind the record."""
        return self.version is not None and self.tensor._version != self.version


class Window:
    """A tensor as a window onto a handle: what autograd or a record holds in its place.

    ``geometry`` is None where it is that of the handle. ``counter`` shares the version counter of a saved
    tensor, and nothing else of it.
    """

    __slots__ = ("__weakref__", "counter", "geometry", "handle", "version")

    def __init__(self, handle: Handle, geometry: Geometry | None = None) -> None:
        self.handle = handle
        self.geometry = geometry
        self.counter: Tensor | None = None
        self.version = 0

    def is_modified(self) -> bool:
        """Whether autograd would refuse the saved tensor."""
        return self.counter is not None and self.counter._version != self.version

    def look_at(self, handle: Handle, geometry: Geometry) -> None:
        """Is a window onto another handle from now on."""
        self.handle = handle
        self.geometry = None if geometry == handle.geometry else geometry

    def open(self) -> Tensor:
        """The tensor, over memory that must be there already."""
        whole = self.handle.tensor
        assert whole is not None
        return whole if self.geometry is None else opened(whole, self.geometry)


def window_onto(handle: Handle, tensor: Tensor) -> Window:
    """A window that is like a tensor over the storage of a handle."""
    geometry = geometry_of(tensor)
    return Window(handle, None if geometry == handle.geometry else geometry)


def opened(whole: Tensor, geometry: Geometry) -> Tensor:
    """A tensor over the storage of another one."""
    size, stride, offset, dtype = geometry
    if whole.dtype is dtype:
        return whole.as_strided(size, stride, offset)
    return torch.empty(0, dtype=dtype, device=whole.device).set_(
        whole.untyped_storage(), offset, size, stride
    )


class Record:
    """One op to run again.

    ``arguments`` and ``keywords`` have windows and held tensors in place of tensors; where it ``is_flat``
    these are arguments themselves, not in lists, and nothing is overwritten. ``reads``: the handles behind
    the windows, once.
    """

    __slots__ = (
        "__weakref__",
        "arguments",
        "call",
        "func",
        "has_gradients",
        "info",
        "is_done",
        "is_flat",
        "keywords",
        "order",
        "outputs",
        "reads",
        "seed",
        "statistics",
        "writes",
    )

    def __init__(self, op: PlannedOp) -> None:
        self.order = 0
        self.func = op.func
        self.call = op.call
        self.info = op.info
        self.arguments: list[Any] = []
        self.keywords: dict[str, Any] | None = None
        self.is_flat = True
        self.outputs: list[tuple[int, weakref.ref[Handle]]] = []
        self.reads: tuple[Handle, ...] = ()
        self.writes: list[Handle] | None = None
        self.statistics: tuple[int, ...] = ()
        self.seed: tuple[torch.device, Tensor] | None = None
        self.has_gradients = torch.is_grad_enabled()
        self.is_done = False

    def held(self) -> Iterator[Held]:
        """What it holds among its arguments."""
        return _held_in([*self.arguments, *self.keywords.values()] if self.keywords else self.arguments)

    def live_outputs(self) -> Iterator[tuple[int, Handle]]:
        """The handles that still want a result, and its number."""
        for number, reference in self.outputs:
            handle = reference()
            if handle is not None and handle.record is self:
                yield number, handle

    def run(self, passing: Counter[Handle] | None) -> None:
        """Runs the op and hands its results to the handles that still want them.

        It lets go of its arguments unless a result is made only in passing.
        """
        stays = passing is not None and any(handle in passing for _, handle in self.live_outputs())
        if self.is_flat:
            args = [
                item.tensor if type(item) is Held else item.open() if type(item) is Window else item
                for item in self.arguments
            ]
            kwargs = self.keywords or {}
        else:
            args, kwargs = self._opened(passing, stays=stays)
        if self.seed is None:
            out = self.call(*args, **kwargs)
        else:
            with _generator_at(self, keep=stays):
                out = self.call(*args, **kwargs)
        results = all_in(out)
        if self.writes:
            results = [*declared_writes(self.info, tuple(args), kwargs), *results]
        for number, handle in self.live_outputs():
            handle.tensor = results[number]
            if passing is None or handle not in passing:
                handle.record = None
        if not stays:
            self.is_done = True
            self.arguments, self.keywords, self.writes, self.reads, self.seed = [], None, None, (), None

    def _opened(self, passing: Counter[Handle] | None, *, stays: bool) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, some of them over private copies of what they overwrite."""
        private: dict[Handle, Tensor] = {}
        for handle in self.writes or ():
            if self._must_copy(handle, passing, stays):
                private[handle] = copy_of_storage(handle.tensor)
        args = [_opened(item, private) for item in self.arguments]
        for position in self.statistics:
            args[position] = args[position].clone()
        return args, {name: _opened(item, private) for name, item in (self.keywords or {}).items()}

    def _must_copy(self, old: Handle, passing: Counter[Handle] | None, stays: bool) -> bool:
        """Whether somebody still wants a version that the op is about to overwrite."""
        if passing is not None and old in passing:
            return passing[old] > 1
        return stays or old.has_other_readers(self)


def _opened(item: Any, private: dict[Handle, Tensor]) -> Any:
    """An argument with tensors in place of windows; some over a private copy of their storage."""
    if type(item) is Window:
        if item.handle in private:
            return opened(private[item.handle], item.geometry or item.handle.geometry)
        return item.open()
    if type(item) is Held:
        return item.tensor
    if isinstance(item, (list, tuple)):
        return type(item)(_opened(part, private) for part in item)
    return item


def _held_in(items: Iterable[Any]) -> Iterator[Held]:
    """The held tensors among arguments."""
    for item in items:
        if type(item) is Held:
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _held_in(item)


def make_again(target: Handle, check: Callable[[Record], None], *, in_levels: bool) -> None:
    """Runs the records that a handle is missing, in forward order.

    Args:
        check: Raises where what a record reads has changed since.
        in_levels: Something may be made in passing only. See Note 6.
    """
    missing = _missing_records(target)
    for record in missing:
        check(record)
    passing = _made_in_passing(missing, target) if in_levels else None
    while missing:
        _run_next(missing.pop(), passing or None)


def _run_next(record: Record, passing: Counter[Handle] | None) -> None:
    """Runs a record, then forgets what was made in passing and has been read for the last time.

    A handle that only ``passing`` knew dies then, and its record with what it held.
    """
    _set_grad_enabled(record.has_gradients)
    if passing is None:
        record.run(None)
        return
    used = [handle for handle in record.reads if handle in passing]
    record.run(passing)
    passing.subtract(used)
    for handle in [*used, *(h for _, h in record.live_outputs() if h in passing)]:
        if not passing[handle]:
            handle.tensor = None
            del passing[handle]


def _made_in_passing(missing: Iterable[Record], target: Handle) -> Counter[Handle]:
    """The handles that are made only in passing, and how many of the records read each."""
    outputs = (handle for record in missing for _, handle in record.live_outputs())
    segment = target.level.segment
    found: Counter[Handle] = Counter()
    for handle in outputs:
        if handle is not target and handle.level.retained_from < segment:
            found[handle] = 0
    if found:
        for record in missing:
            found.update(handle for handle in record.reads if handle in found)
    return found


def _missing_records(handle: Handle) -> list[Record]:
    """The records a handle depends on that have not run, the last of the forward first."""
    first = handle.record
    assert first is not None
    stack = [h for h in first.reads if h.tensor is None]
    if not stack:
        return [first]
    found = {first.order: first}
    while stack:
        record = stack.pop().record
        if record is not None and record.order not in found:
            found[record.order] = record
            stack.extend(h for h in record.reads if h.tensor is None)
    return [found[order] for order in sorted(found, reverse=True)]


def copy_of_storage(tensor: Tensor | None) -> Tensor:
    """A tensor over a copy of the whole storage, same geometry."""
    assert tensor is not None
    items = tensor.untyped_storage().nbytes() // tensor.element_size()
    return (
        tensor.as_strided((items,), (1,), 0)
        .clone()
        .as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    )


def generator_state(device: torch.device) -> tuple[torch.device, Tensor]:
    """The state of a device's default generator."""
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    return device, state


@contextmanager
def _generator_at(record: Record, *, keep: bool) -> Iterator[None]:
    """Runs the body at a record's generator state and puts the stream back.

    The state is used up unless the record stays, or the body raises: a replay may be tried again. The
    present one is kept outside of tensors, so that two states are never in memory at once.
    """
    assert record.seed is not None
    device, state = record.seed
    now = _generator_of(device).clone_state()
    _set_generator(device, state)
    try:
        yield
        if not keep:
            record.seed = None
        del state
    finally:
        _set_generator(device, now.get_state())


def _generator_of(device: torch.device) -> torch.Generator:
    """A device's default generator."""
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _set_generator(device: torch.device, state: Tensor) -> None:
    """Sets the state of a device's default generator."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
