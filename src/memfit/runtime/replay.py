"""Carries out a plan: keeps what it says, and computes the rest again when the backward asks.

Note [Replay]
 1. During the forward a dispatch mode sees every op below autograd. An op the plan does not name costs
    one Python call. A named op runs as usual and leaves a *record*: the op, and where its arguments
    come from. Its dropped outputs get *handles*; nothing holds their memory.
 2. An argument that is itself dropped is referred to by its handle; any other is held, so whatever the
    plan forgot costs memory, never correctness.
 3. Packing a tensor that lives in a dropped value returns a reference to the handle. Unpacking runs the
    missing records, in forward order, once. A handle keeps what was replayed until its last reference
    dies: the save's (autograd frees it) or that of a record not yet replayed. Reference counting is the
    whole memory management; ``core/timeline.py`` predicts it by the same rules.
 4. A write in place begins a new version of its storage. A handle belongs to the old one. A replayed
    write takes the old version over if it is the only reader, else it works on a copy. If something
    held as an argument is about to be overwritten, the record gets a copy first.
 5. Replays run below autograd and autocast, as the recorded ops did, under the generator state at which the
    op first ran (the stream is put back afterwards) and its grad mode: kernels of MKL-DNN ask for it.
 6. Running statistics that BatchNorm writes are replaced by scratch copies in a replay.
 7. Autograd checks that saved tensors were not modified, but not behind hooks: memfit checks instead. What
    is written after it was saved, and autograd does not mind (chunks of ``unsafe_split`` count versions
    of their own; ``rrelu`` writes its noise uncounted), is held from then on, as autograd would.
 8. A plan may make a value *in passing*: a replay for a later segment of the model uses it and lets go of it,
    and its record stays, to run once more when its own segment is due. That is checkpointing in levels.
 9. Blank memory (``empty``, ``zeros``) may be written invisibly, so it is held as soon as anything but a
    complete overwrite looks at it.
10. A region that torch.compile hides runs without the mode, as in a plain step (``runtime/compiled.py``).
    What it has made is kept; what it saves of others' is packed like any other save.
11. Parameters under ``fully_shard`` are there only while their own module runs, forward or backward. FSDP
    frees and fills their storage, which stays the same, so a record may hold them. What is wanted outside of
    its module is held, whatever the plan says (``core/barriers.py``).
12. The hot path: an op is known by its identity, since hashing it runs Python; its function is called without
    ``OpOverload.__call__``; and the class opts out of the guard against dynamo that torch puts around each
    call of a mode (2.5 us): it steps aside for compiled regions anyway.
    A module of torch's own that writes to nothing and of which nothing is planned runs without the mode.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, repeat
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)

from memfit.core.barriers import Stretch, is_there
from memfit.core.graph import Level, ValueKey
from memfit.runtime.callsite import CallSites
from memfit.runtime.compiled import Region, arguments_of, entered, saves_through, stepped_aside, unwritten
from memfit.runtime.opinfo import (
    OpInfo,
    all_in,
    all_writes,
    declared_writes,
    draws_random_numbers,
    has_own_generator,
    is_plain,
    makes_blank,
    map_tensors,
    op_info,
    overwrites_all,
    tensors_in,
    writes_anything,
    written_statistics,
)
from memfit.runtime.quiet import writes_nothing

# number of each output to drop -> its level
Dropped = Mapping[int, Level]
# identity of an op -> occurrence -> outputs to drop
Planned = Mapping[int, Mapping[int, Dropped]]
# frame -> what is planned there
Decisions = Mapping[str, Planned]


class Handle:
    """One version of a storage that is, or can be, computed again.

    ``tensor`` is any tensor over the whole storage, once there is one. ``source`` is set for a leaf
    from outside the step, whose version tells whether it was changed since. ``readers`` are the records
    that have it as an argument, ``windows`` what autograd saved of it; both may be dead by now.
    """

    __slots__ = (
        "__weakref__",
        "is_blank",
        "level",
        "readers",
        "record",
        "source",
        "stretch",
        "tensor",
        "version",
        "windows",
    )

    def __init__(self, record: Record | None, tensor: Tensor | None = None) -> None:
        self.record = record
        self.tensor = tensor
        self.readers: list[weakref.ref[Record]] = []
        self.windows: list[weakref.ref[Window]] = []
        self.is_blank = False
        self.level = Level()
        self.source: Tensor | None = None
        self.stretch: Stretch = ()
        self.version = 0

    def has_other_readers(self, record: Record) -> bool:
        """Whether anyone but one record still wants this version as it is."""
        waiting = (reference() for reference in self.readers)
        return any(r is not None and r is not record for r in waiting) or any(w() for w in self.windows)


class Window:
    """A tensor as a window onto a handle: what autograd or a record holds in its place.

    ``counter`` shares the version counter of a saved tensor, and nothing else of it.
    """

    __slots__ = ("__weakref__", "counter", "dtype", "handle", "offset", "size", "stride", "version")

    def __init__(self, handle: Handle, tensor: Tensor) -> None:
        self.handle = handle
        self.size = tensor.size()
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.dtype = tensor.dtype
        self.counter: Tensor | None = None
        self.version = 0

    def count_versions_of(self, tensor: Tensor) -> None:
        """From now on :meth:`is_modified` tells of writes to a tensor, without keeping its memory."""
        is_plain_type = type(tensor) in (Tensor, nn.Parameter)
        with torch._C._DisableTorchDispatch() if is_plain_type else nullcontext():  # no op of the model
            self.counter, self.version = tensor.detach(), tensor._version
            self.counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def is_modified(self) -> bool:
        """Whether autograd would refuse the saved tensor."""
        return self.counter is not None and self.counter._version != self.version

    def open(self, whole: Tensor | None) -> Tensor:
        """The tensor, over memory that must be there already."""
        assert whole is not None
        if whole.dtype is self.dtype:
            return whole.as_strided(self.size, self.stride, self.offset)
        empty = torch.empty(0, dtype=self.dtype, device=whole.device)
        return empty.set_(whole.untyped_storage(), self.offset, self.size, self.stride)


class Record:
    """One op to run again. ``arguments`` hold windows in place of tensors; ``reads``: their handles, once."""

    __slots__ = (
        "__weakref__",
        "arguments",
        "func",
        "has_gradients",
        "keywords",
        "order",
        "outputs",
        "reads",
        "seed",
        "statistics",
        "writes",
    )

    def __init__(self, order: int, func: OpOverload) -> None:
        self.order = order
        self.func = func
        self.arguments: list[Any] = []
        self.keywords: dict[str, Any] = {}
        self.outputs: list[tuple[int, weakref.ref[Handle]]] = []
        self.reads: tuple[Handle, ...] = ()
        self.writes: list[Handle] = []
        self.statistics: tuple[int, ...] = ()
        self.seed: tuple[torch.device, Tensor] | None = None
        self.has_gradients = torch.is_grad_enabled()

    def live_outputs(self) -> Iterator[tuple[int, Handle]]:
        """The handles that still want a result, and its number."""
        for number, reference in self.outputs:
            handle = reference()
            if handle is not None and handle.record is self:
                yield number, handle

    def run(self, passing: Counter[Handle]) -> None:
        """Runs the op and hands its results to the handles that still want them.

        It lets go of its arguments unless a result is made only in passing.
        """
        stays = any(handle in passing for _, handle in self.live_outputs())
        private = {h: _copy_of_storage(h.tensor) for h in self.writes if self._must_copy(h, passing, stays)}
        args = _opened(self.arguments, private)
        kwargs = {name: _opened(value, private) for name, value in self.keywords.items()}
        for position in self.statistics:
            args[position] = args[position].clone()
        out = self._call(args, kwargs, keep=stays)
        info = op_info(self.func)
        results = (
            [*declared_writes(info, tuple(args), kwargs), *tensors_in(out)] if info.written else all_in(out)
        )
        for number, handle in self.live_outputs():
            handle.tensor = results[number]
            if handle not in passing:
                handle.record = None
        if not stays:
            for handle in self.reads:
                handle.readers = [r for r in handle.readers if r() is not self]
            self.arguments, self.keywords, self.writes, self.reads, self.seed = [], {}, [], (), None

    def _call(self, args: list[Any], kwargs: dict[str, Any], *, keep: bool) -> Any:
        """Runs the op as it first ran; the settings of most ops are those of the backward."""
        if self.seed is None and torch.is_grad_enabled() == self.has_gradients:
            return self.func(*args, **kwargs)
        with _generator_at(self, keep=keep), torch.set_grad_enabled(self.has_gradients):
            return self.func(*args, **kwargs)

    def _must_copy(self, old: Handle, passing: Counter[Handle], stays: bool) -> bool:
        """Whether somebody still wants a version that the op is about to overwrite."""
        return passing[old] > 1 if old in passing else stays or old.has_other_readers(self)


class Replayer(TorchDispatchMode):
    """The forward of one micro-batch under a plan; use as a context manager around the forward only."""

    def __init__(self, model: nn.Module, decisions: Decisions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._sites: CallSites[Planned] = CallSites(model, decisions, self._quieted)
        self._dropped: dict[int, tuple[Handle, StorageWeakRef]] = {}
        self._held: dict[int, tuple[weakref.ref[Handle], StorageWeakRef]] = {}
        self._writes: dict[int, bool] = {}
        self._order = 0
        self._has_blanks = False
        self._lock = threading.RLock()
        self._stack = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's guard around each call of a mode is not wanted. See Note 12."""
        return False

    def __enter__(self) -> Replayer:
        self._stack.enter_context(self._sites)
        if self._sites.regions:
            self._stack.enter_context(entered(self._sites.regions, self._around))
        self._stack.enter_context(saves_through(self._sites.regions, self._pack, self._unpack))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._stack.close()
        self._dropped.clear()
        self._held.clear()

    # ---- forward ------------------------------------------------------------------------------------

    def _quieted(self, module: nn.Module) -> Callable[..., Any] | None:
        """The forward of a module without the mode, if that hides nothing. See Note 12."""
        if not writes_nothing(module):
            return None
        forward = module.forward

        def quieted(*args: Any, **kwargs: Any) -> Any:
            if _get_current_dispatch_mode() is not self:
                return forward(*args, **kwargs)
            _pop_torch_dispatch_stack(None)
            try:
                return forward(*args, **kwargs)
            finally:
                _push_on_torch_dispatch_stack(self)

        return quieted

    def _around(self, region: Region, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a region that torch.compile hides. See Note 10."""

        def called(*args: Any, **kwargs: Any) -> Any:
            with unwritten(region, arguments_of(args, kwargs)), stepped_aside(self):
                return call(*args, **kwargs)

        return called

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The hot path: an op outside the plan costs two look-ups and the call. See Note 12."""
        key = id(func)
        frame = self._sites.current
        if frame.decisions is not None:
            planned = frame.decisions.get(key)
            if planned is not None:
                dropped = planned.get(frame.occurrence(key))
                if dropped is not None:
                    return self._run_recorded(func, args, kwargs or {}, dropped)
        writes = self._writes.get(key)
        if writes is None:
            writes = self._writes[key] = writes_anything(op_info(func))
        if writes:
            for tensor in all_writes(op_info(func), args, kwargs or {}):
                self._begin_version(tensor)
        return func._op(*args, **kwargs) if kwargs else func._op(*args)

    def _run_recorded(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], dropped: Dropped
    ) -> Any:
        """Runs an op the plan names and leaves a record, unless that would not be safe here."""
        info = op_info(func)
        written = declared_writes(info, args, kwargs) if info.written else []
        given = all_in([*args, *kwargs.values()])
        if self._has_blanks:
            self._hold_blanks(info, given, written)
        if self._sites.is_sharded:
            self._hold_barriers(given)
        if not self._can_record(info, given, kwargs, written):
            for tensor in all_writes(info, args, kwargs):
                self._begin_version(tensor)
            return func(*args, **kwargs)
        record = Record(self._order, func)
        self._order += 1
        record.statistics = written_statistics(info, args)
        record.arguments = [
            _Raw(argument) if i in record.statistics else map_tensors(argument, self._window)
            for i, argument in enumerate(args)
        ]
        record.keywords = {name: map_tensors(value, self._window) for name, value in kwargs.items()}
        record.writes = [self._dropped[_address(tensor)][0] for tensor in written]
        record.reads = tuple({*_handles_in([*record.arguments, *record.keywords.values()])})
        for handle in record.reads:
            handle.readers.append(weakref.ref(record))
        if draws_random_numbers(info, func, args, kwargs):
            record.seed = _generator_state(_device_of(args, kwargs))
        if written or record.statistics:
            for tensor in all_writes(info, args, kwargs):
                self._begin_version(tensor)
        out = func(*args, **kwargs)
        blank = makes_blank(info, written)
        self._make_handles(record, [*written, *all_in(out)], dropped, is_blank=blank)
        return out

    def _can_record(
        self, info: OpInfo, given: list[Tensor], kwargs: dict[str, Any], written: list[Tensor]
    ) -> bool:
        """Whether a replay would do the same, and could reach every argument as it is now."""
        if not info.may_replay or (kwargs and has_own_generator(kwargs)):
            return False
        return all(map(is_plain, given)) and all(_address(t) in self._dropped for t in written)

    def _hold_blanks(self, info: OpInfo, given: list[Tensor], written: list[Tensor]) -> None:
        """Takes blank memory out of the plan if the op looks at it. See Note 9."""
        unread = {_address(t) for t in written} if overwrites_all(info, written) else set()
        for tensor in given:
            found = self._dropped.get(_address(tensor))
            if found is not None and found[0].is_blank and _address(tensor) not in unread:
                del self._dropped[_address(tensor)]

    def _hold_barriers(self, given: list[Tensor]) -> None:
        """Takes out of the plan what could not be made again for the op. See Note 11."""
        stretch = self._sites.current.stretch
        for tensor in given:
            address = _address(tensor)
            found = self._dropped.get(address)
            if found is not None and found[0].stretch and not is_there(found[0].stretch, stretch):
                del self._dropped[address]
                self._hold_saved(found[0], tensor)

    def _make_handles(
        self, record: Record, results: list[Tensor], dropped: Dropped, *, is_blank: bool
    ) -> None:
        """Gives the dropped outputs handles that know how to make them again."""
        self._has_blanks |= is_blank
        for number, level in dropped.items():
            if number < len(results) and is_plain(results[number]):
                handle = Handle(record)
                handle.level = level
                handle.stretch = self._sites.current.stretch
                handle.is_blank = is_blank
                record.outputs.append((number, weakref.ref(handle)))
                block = results[number].untyped_storage()
                self._dropped[block._cdata] = (handle, StorageWeakRef(block))

    def _window(self, tensor: Tensor) -> Window:
        """A window onto the handle of a tensor; one that is not dropped is held from now on."""
        block = tensor.untyped_storage()
        address = block._cdata
        if address in self._dropped:
            return Window(self._dropped[address][0], tensor)
        held = self._held.get(address)
        handle = held[0]() if held is not None else None
        if handle is None:
            leaf = tensor.grad_fn is None
            # A tensor with a graph would keep the nodes behind it; its memory is all that is needed.
            handle = Handle(None, tensor if leaf else tensor.detach())
            if leaf:
                handle.source, handle.version = tensor, tensor._version
            self._held[address] = (weakref.ref(handle), StorageWeakRef(block))
        return Window(handle, tensor)

    def _begin_version(self, tensor: Tensor) -> None:
        """A write is about to happen: handles of the old version must not see it. See Note 4."""
        if tensor.layout is not torch.strided:
            return
        address = _address(tensor)
        dropped = self._dropped.pop(address, None)
        if dropped is not None:
            self._hold_saved(dropped[0], tensor)
        held = self._held.pop(address, None)
        handle = held[0]() if held is not None else None
        if handle is not None and handle.tensor is not None:
            handle.tensor, handle.source = _copy_of_storage(handle.tensor), None

    def _hold_saved(self, handle: Handle, tensor: Tensor) -> None:
        """What autograd saved of a version that is overwritten now is the storage itself. See Note 7."""
        windows = [window for reference in handle.windows if (window := reference()) is not None]
        if windows:
            held = Handle(None, tensor.detach())
            for window in windows:
                window.handle = held
            handle.windows.clear()

    # ---- saves --------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Any:
        """What autograd holds: a window onto a dropped value, else the tensor and its version."""
        if tensor.layout is torch.strided:
            found = self._dropped.get(tensor.untyped_storage()._cdata)
            if found is not None and is_plain(tensor) and self._may_be_made(found[0]):
                window = Window(found[0], tensor)
                window.count_versions_of(tensor)
                found[0].windows.append(weakref.ref(window))
                return window
        return _without_graph(tensor), tensor._version

    def _may_be_made(self, handle: Handle) -> bool:
        """Whether what is saved here may be a value that is made again in the backward."""
        stretch = handle.stretch
        return not handle.is_blank and (not stretch or is_there(stretch, self._sites.current.stretch))

    def _unpack(self, packed: Any) -> Tensor:
        """The saved tensor, computed again if it was dropped."""
        if type(packed) is tuple:
            tensor: Tensor = packed[0]
            if tensor._version != packed[1]:
                raise RuntimeError(_modified("a tensor that autograd saved"))
            return tensor
        if packed.is_modified():
            raise RuntimeError(_modified("a tensor that autograd saved"))
        with self._lock:
            if packed.handle.tensor is None:
                self._replay(packed.handle)
            opened: Tensor = packed.open(packed.handle.tensor)
            return opened

    def _replay(self, handle: Handle) -> None:
        """Runs the records a handle is missing, in forward order."""
        missing = _missing_records(handle)
        self._check_sources(missing)
        passing = _made_in_passing(missing, handle)
        modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()
        with modes, torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
            while missing:
                _run_next(missing.pop(), passing)

    def _check_sources(self, records: Iterable[Record]) -> None:
        """Refuses to compute from a leaf that was changed since the forward."""
        for record in records:
            for handle in record.reads:
                if handle.source is not None and handle.source._version != handle.version:
                    raise RuntimeError(_modified(self._name_of(handle.source)))

    def _name_of(self, leaf: Tensor) -> str:
        """What a leaf is called in the model."""
        address = _address(leaf)
        named = [*self._model.named_parameters(), *self._model.named_buffers()]
        return next((f"'{name}'" for name, t in named if _address(t) == address), "an input of the step")


class _Raw:
    """A tensor passed to the replay as it is then: running statistics, whose value is not read."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _run_next(record: Record, passing: Counter[Handle]) -> None:
    """Runs a record, then forgets what was made in passing and has been read for the last time.

    A handle that only ``passing`` knew dies then, and its record with what it held.
    """
    used = [handle for handle in record.reads if handle in passing] if passing else []
    record.run(passing)
    passing.subtract(used)
    for handle in [*used, *(h for _, h in record.live_outputs() if h in passing)] if passing else []:
        if not passing[handle]:
            handle.tensor = None
            del passing[handle]


def decisions_of(recomputed: Iterable[ValueKey], levels: Collection[Level] = ()) -> Decisions:
    """A plan's values to recompute, arranged for the hot path."""
    found: dict[str, dict[int, dict[int, dict[int, Level]]]] = {}
    for key, level in zip(recomputed, chain(levels, repeat(Level())), strict=False):
        frame, op, nth, output = key
        namespace, name, overload = op.split(".")
        func = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        found.setdefault(frame, {}).setdefault(id(func), {}).setdefault(nth, {})[output] = level
    return found


def _made_in_passing(missing: list[Record], target: Handle) -> Counter[Handle]:
    """The handles a replay makes only in passing, and how many of its records read each. See Note 8."""
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
    found: dict[int, Record] = {}
    stack = [handle]
    while stack:
        record = stack.pop().record
        if record is not None and record.order not in found:
            found[record.order] = record
            stack.extend(h for h in record.reads if h.tensor is None)
    return [found[order] for order in sorted(found, reverse=True)]


def _without_graph(tensor: Tensor) -> Tensor:
    """What autograd may hold of a tensor it saves: its memory and version counter, not its node.

    An output holds the node that is to hold it: a cycle, and a leak where no backward comes by, as in a
    branch the loss does not use.
    """
    if tensor.grad_fn is None:
        return tensor
    if type(tensor) is not Tensor:
        return tensor.detach()
    with torch._C._DisableTorchDispatch():  # past the mode it takes 1 us in place of 4
        return tensor.detach()


def _handles_in(items: Iterable[Any]) -> Iterator[Handle]:
    """The handles that windows among an op's arguments refer to, some maybe twice."""
    for item in items:
        if isinstance(item, Window):
            yield item.handle
        elif isinstance(item, (list, tuple)):
            yield from _handles_in(item)


def _opened(item: Any, private: Mapping[Handle, Tensor]) -> Any:
    """Arguments with tensors in place of windows; some over a private copy of their storage."""
    if isinstance(item, Window):
        return item.open(private.get(item.handle, item.handle.tensor))
    if isinstance(item, _Raw):
        return item.tensor
    if isinstance(item, (list, tuple)):
        return type(item)(_opened(part, private) for part in item)
    return item


def _copy_of_storage(tensor: Tensor | None) -> Tensor:
    """A tensor over a copy of the whole storage, same geometry."""
    assert tensor is not None
    items = tensor.untyped_storage().nbytes() // tensor.element_size()
    return (
        tensor.as_strided((items,), (1,), 0)
        .clone()
        .as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    )


def _address(tensor: Tensor) -> int:
    """The identity of a storage while something watches it."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else 0


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device whose generator an op uses."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return next((t.device for t in tensors_in([*args, *kwargs.values()])), torch.device("cpu"))


def _generator_state(device: torch.device) -> tuple[torch.device, Tensor]:
    """The state of a device's default generator."""
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    return device, state


@contextmanager
def _generator_at(record: Record, *, keep: bool) -> Iterator[None]:
    """Runs the body at a record's generator state and puts the stream back.

    The state is used up unless the record stays, or the body raises: a replay may be tried again. The
    present one is kept outside of tensors, so that two states are never in memory at once.
    """
    if record.seed is None:
        yield
        return
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


def _modified(what: str) -> str:
    """The message for memory that changed between forward and backward."""
    return (
        f"{what} was modified by an inplace operation between the forward and the backward of the step, so "
        "the gradient would be wrong. Write to it after step() has returned, or out of place."
    )
