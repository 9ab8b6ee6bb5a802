"""Carries out a plan: keeps what it says, and computes the rest again when the backward asks.

Note [Replay]
 1. During the forward memfit is told when an op is called that the plan names, and of every write
    (``runtime/intercept.py``); all other ops run as they would without it. A named op runs and leaves a
    *record*: the op, and where its arguments come from. Its dropped outputs get *handles*; nothing holds
    their memory.
 2. An argument that is itself dropped is referred to by its handle; any other is held, so whatever the
    plan forgot costs memory, never correctness.
 3. Packing a tensor that lives in a dropped value returns a reference to the handle. Unpacking runs the
    missing records, in forward order, once. A handle keeps what was replayed until its last reference
    dies: the save's (autograd frees it) or that of a record not yet replayed. Reference counting is the
    whole memory management; ``core/timeline.py`` predicts it by the same rules.
    An op's own outputs are packed before it returns, so before they have handles: these saves come *early*,
    and find their handles when it has returned.
 4. A write in place begins a new version of its storage. A handle belongs to the old one. A replayed
    write takes the old version over if it is the only reader, else it works on a copy. If something
    held as an argument is about to be overwritten, the record gets a copy first.
    memfit is told of a write before autograd is, which may still read and save the old version (the clone
    that ``mul_`` needs). So the new one begins when the version counter has moved, at the latest with the end
    of the op.
 5. Replays run below autograd and autocast, as the kernels of the recorded ops did, under the generator state
    at which the op first ran (the stream is put back afterwards) and its grad mode: kernels of MKL-DNN ask
    for it.
 6. Running statistics that BatchNorm writes are replaced by scratch copies in a replay.
 7. Autograd checks that saved tensors were not modified, but not behind hooks: memfit checks instead. What
    is written after it was saved, and autograd does not mind (chunks of ``unsafe_split`` count versions
    of their own; ``rrelu`` writes its noise uncounted), is held from then on, as autograd would.
 8. A plan may make a value *in passing*: a replay for a later segment of the model uses it and lets go of it,
    and its record stays, to run once more when its own segment is due. That is checkpointing in levels.
 9. Blank memory (``empty``, ``zeros``) may be written invisibly, so it is held as soon as anything but a
    complete overwrite looks at it.
10. A region that torch.compile hides runs untold, as in a plain step (``runtime/compiled.py``).
    What it has made is kept; what it saves of others' is packed like any other save.
11. Parameters under ``fully_shard`` are there only while their own module runs, forward or backward. FSDP
    frees and fills their storage, which stays the same, so a record may hold them. What is wanted outside of
    its module is held, whatever the plan says (``core/barriers.py``).
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, repeat
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack, _set_grad_enabled
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes

from memfit.core.barriers import Stretch, is_there
from memfit.core.graph import Level, ValueKey
from memfit.runtime.callsite import CallSites
from memfit.runtime.compiled import Region, arguments_of, entered, saves_through, unwritten
from memfit.runtime.intercept import PlannedOp, is_heard, listen, plan_for, told, unheard
from memfit.runtime.opinfo import (
    OpInfo,
    all_in,
    declared_writes,
    draws_random_numbers,
    has_own_generator,
    is_plain,
    makes_blank,
    overwrites_all,
    tensors_in,
    written_statistics,
)

# number of each output to drop -> its level
Dropped = Mapping[int, Level]
# identity of an op -> occurrence -> outputs to drop
Planned = Mapping[int, Mapping[int, Dropped]]


class Decisions:
    """A plan's values to recompute, arranged for the hot path.

    Attributes:
        of_frames: For each frame what is planned there.
        funcs: The ops that are named anywhere.
    """

    __slots__ = ("_replayer", "funcs", "of_frames")

    def __init__(self, of_frames: Mapping[str, Planned], funcs: frozenset[OpOverload]) -> None:
        self.of_frames = of_frames
        self.funcs = funcs
        self._replayer: Replayer | None = None

    def __bool__(self) -> bool:
        """Whether anything is recomputed."""
        return bool(self.funcs)

    def replayer(self, model: nn.Module) -> Replayer:
        """One for the next forward of a model; the last one, if it is free, for it knows the model."""
        if self._replayer is None or not self._replayer.is_free_for(model):
            self._replayer = Replayer(model, self)
        return self._replayer


class Geometry(NamedTuple):
    """How a tensor lies in its storage."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


def geometry_of(tensor: Tensor) -> Geometry:
    """How a tensor lies in its storage."""
    return Geometry(tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype)  # type: ignore[arg-type]


class Handle:
    """One version of a storage that is, or can be, computed again.

    ``tensor`` is a tensor over the storage, once there is one; ``geometry`` is what it is or will be like.
    ``version`` is that of a tensor held as it is, which tells whether it was changed since. ``readers`` are
    the records that have it as an argument, ``windows`` what autograd saved of it; both may be dead by now.
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
        "version",
        "windows",
    )

    def __init__(self, record: Record | None, like: Tensor) -> None:
        self.record = record
        self.geometry = geometry_of(like)
        self.tensor: Tensor | None = None
        self.version: int | None = None
        self.readers: list[weakref.ref[Record]] = []
        self.windows: list[weakref.ref[Window]] = []
        self.is_blank = False
        self.level = _NO_LEVEL
        self.stretch: Stretch = ()

    def has_other_readers(self, record: Record) -> bool:
        """Whether anyone but one record still wants this version as it is."""
        waiting = (reference() for reference in self.readers)
        wanted = any(r is not None and r is not record and not r.is_done for r in waiting)
        return wanted or any(w() for w in self.windows)

    def is_modified(self) -> bool:
        """Whether what is held was written to behind the handle."""
        return self.version is not None and self.tensor is not None and self.tensor._version != self.version


def held(tensor: Tensor) -> Handle:
    """A handle that holds a tensor's memory; with its graph it would keep the nodes behind it."""
    handle = Handle(None, tensor)
    handle.tensor = tensor.detach()
    return handle


class Window:
    """A tensor as a window onto a handle: what autograd or a record holds in its place.

    ``geometry`` is None where it is that of the handle. ``counter`` shares the version counter of a saved
    tensor, and nothing else of it.
    """

    __slots__ = ("__weakref__", "counter", "geometry", "handle", "version")

    def __init__(self, handle: Handle, geometry: Geometry | None) -> None:
        self.handle = handle
        self.geometry = geometry
        self.counter: Tensor | None = None
        self.version = 0

    def is_modified(self) -> bool:
        """Whether autograd would refuse the saved tensor."""
        return self.counter is not None and self.counter._version != self.version

    def move_to(self, handle: Handle) -> None:
        """Looks at another handle from now on, in the same way."""
        self.geometry = self.geometry or self.handle.geometry
        self.handle = handle

    def open(self) -> Tensor:
        """The tensor, over memory that must be there already."""
        whole = self.handle.tensor
        assert whole is not None
        return whole if self.geometry is None else opened(whole, self.geometry)


def opened(whole: Tensor, geometry: Geometry) -> Tensor:
    """A tensor over the storage of another one."""
    size, stride, offset, dtype = geometry
    if whole.dtype is dtype:
        return whole.as_strided(size, stride, offset)
    return torch.empty(0, dtype=dtype, device=whole.device).set_(
        whole.untyped_storage(), offset, size, stride
    )


class Record:
    """One op to run again. ``arguments`` hold windows in place of tensors; ``reads``: their handles, once."""

    __slots__ = (
        "__weakref__",
        "arguments",
        "func",
        "has_gradients",
        "info",
        "is_done",
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
        self.func: Callable[..., Any] = op.func
        self.info = op.info
        self.arguments: list[Any] = []
        self.keywords: dict[str, Any] = {}
        self.outputs: list[tuple[int, weakref.ref[Handle]]] = []
        self.reads: tuple[Handle, ...] = ()
        self.writes: list[Handle] = []
        self.statistics: tuple[int, ...] = ()
        self.seed: tuple[torch.device, Tensor] | None = None
        self.has_gradients = torch.is_grad_enabled()
        self.is_done = False

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
        stays = bool(passing) and any(handle in passing for _, handle in self.live_outputs())
        private = {h: _copy_of_storage(h.tensor) for h in self.writes if self._must_copy(h, passing, stays)}
        args = [_opened(argument, private) for argument in self.arguments]
        kwargs = {name: _opened(value, private) for name, value in self.keywords.items()}
        for position in self.statistics:
            args[position] = args[position].clone()
        if self.seed is None:
            out = self.func(*args, **kwargs)
        else:
            with _generator_at(self, keep=stays):
                out = self.func(*args, **kwargs)
        results = all_in(out)
        if self.writes:
            results = [*declared_writes(self.info, tuple(args), kwargs), *results]
        for number, handle in self.live_outputs():
            handle.tensor = results[number]
            if handle not in passing:
                handle.record = None
        if not stays:
            self.is_done = True
            self.arguments, self.keywords, self.writes, self.reads, self.seed = [], {}, [], (), None

    def _must_copy(self, old: Handle, passing: Counter[Handle], stays: bool) -> bool:
        """Whether somebody still wants a version that the op is about to overwrite."""
        return passing[old] > 1 if old in passing else stays or old.has_other_readers(self)


class _Write:
    """A write under way: the tensor, its version before, and the handle of what it holds, if dropped."""

    __slots__ = ("address", "handle", "tensor", "version")

    def __init__(self, tensor: Tensor, address: int, handle: Handle | None) -> None:
        self.tensor = tensor
        self.address = address
        self.handle = handle
        self.version = _version_of(tensor)

    def has_happened(self) -> bool:
        """Whether autograd has counted it; some are not counted."""
        return _version_of(self.tensor) != self.version


class _Running:
    """An op that is being recorded: what it was given as it is, and what is saved of its outputs."""

    __slots__ = ("early", "given")

    def __init__(self, given: set[int]) -> None:
        self.given = given
        self.early: list[tuple[int, Window, Tensor]] = []


class Replayer:
    """The forward of one micro-batch under a plan; use as a context manager around the forward only."""

    def __init__(self, model: nn.Module, decisions: Decisions) -> None:
        self._model = model
        self._funcs = decisions.funcs
        self._sites: CallSites[Planned] = CallSites(model, decisions.of_frames, listen)
        self._dropped: dict[int, Handle] = {}
        self._held: dict[int, weakref.ref[Handle]] = {}
        self._pins: list[int] = []
        self._empties: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._running: _Running | None = None
        self._writes: list[_Write] = []
        self._order = 0
        self._has_blanks = False
        self._lock = threading.RLock()
        self._stack = ExitStack()
        self._is_entered = False

    def is_free_for(self, model: nn.Module) -> bool:
        """Whether it can be entered for a forward of a model."""
        return self._model is model and not self._is_entered

    def __enter__(self) -> Replayer:
        self._is_entered = True
        plan_for(self._funcs)
        self._stack.enter_context(self._sites)
        if self._sites.regions:
            self._stack.enter_context(entered(self._sites.regions, self._around))
        self._stack.enter_context(saves_through(self._sites.regions, self._pack, self._unpack))
        self._stack.enter_context(told(self, calls=self._sites.current.decisions is not None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._dropped.clear()
        self._held.clear()
        self._empties.clear()
        while self._pins:
            torch.UntypedStorage._free_weak_ref(self._pins.pop())
        self._has_blanks = False
        self._is_entered = False

    # ---- forward ------------------------------------------------------------------------------------

    def _around(self, region: Region, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a region that torch.compile hides. See Note 10."""

        def called(*args: Any, **kwargs: Any) -> Any:
            with unwritten(region, arguments_of(args, kwargs)), unheard():
                return call(*args, **kwargs)

        return called

    def called(
        self, op: PlannedOp, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs an op that is planned somewhere, maybe here."""
        frame = self._sites.current
        planned = frame.decisions.get(op.key) if frame.decisions is not None else None
        if planned is not None:
            dropped = planned.get(frame.occurrence(op.key))
            if dropped is not None:
                return self._run_recorded(op, call, args, kwargs, dropped)
        return call(*args, **kwargs)

    def names(self, key: int) -> bool:
        """Whether the plan names an op in this frame."""
        decisions = self._sites.current.decisions
        return decisions is not None and key in decisions

    def _run_recorded(
        self,
        op: PlannedOp,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dropped: Dropped,
    ) -> Any:
        """Runs an op the plan names and leaves a record, unless that would not be safe here."""
        info = op.info
        if self._writes:
            self._begin_versions()
        written = declared_writes(info, args, kwargs) if info.written else []
        given = all_in([*args, *kwargs.values()] if kwargs else args)
        if self._has_blanks:
            self._hold_blanks(info, given, written)
        if self._sites.is_sharded:
            self._hold_barriers(given)
        if not self._can_record(info, given, kwargs, written):
            return call(*args, **kwargs)
        record = self._record(op, args, kwargs, written)
        overwritten = {_address(tensor) for tensor in written}
        outer, running = self._running, _Running({_address(t) for t in given} - overwritten)
        self._running = running
        try:
            out = call(*args, **kwargs)
        finally:
            self._running = outer
        record.order = self._order  # after those of calls that autograd has made for it
        self._order += 1
        self._make_handles(record, [*written, *all_in(out)], dropped, is_blank=makes_blank(info, written))
        if running.early:
            self._find_handles(running.early)
        return out

    def _record(
        self, op: PlannedOp, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]
    ) -> Record:
        """What it takes to run a call again, as it is now."""
        record = Record(op)
        if written:
            record.writes = [self._dropped[_address(tensor)] for tensor in written]
        record.statistics = statistics = written_statistics(op.info, args)
        reads: dict[Handle, None] = {}
        record.arguments = [
            _Raw(argument) if i in statistics else self._stand_in(argument, reads)
            for i, argument in enumerate(args)
        ]
        if kwargs:
            record.keywords = {name: self._stand_in(value, reads) for name, value in kwargs.items()}
        record.reads = tuple(reads)
        for handle in reads:
            handle.readers.append(weakref.ref(record))
        if op.info.is_random and draws_random_numbers(op.info, op.func, args, kwargs):
            record.seed = _generator_state(_device_of(args, kwargs))
        return record

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
            if found is not None and found.is_blank and _address(tensor) not in unread:
                del self._dropped[_address(tensor)]

    def _hold_barriers(self, given: list[Tensor]) -> None:
        """Takes out of the plan what could not be made again for the op. See Note 11."""
        stretch = self._sites.current.stretch
        for tensor in given:
            address = _address(tensor)
            found = self._dropped.get(address)
            if found is not None and found.stretch and not is_there(found.stretch, stretch):
                del self._dropped[address]
                _hold_saved(found, tensor)

    def _make_handles(
        self, record: Record, results: list[Tensor], dropped: Dropped, *, is_blank: bool
    ) -> None:
        """Gives the dropped outputs handles that know how to make them again."""
        self._has_blanks |= is_blank
        for number, level in dropped.items():
            if number < len(results) and is_plain(results[number]):
                handle = Handle(record, results[number])
                handle.level = level
                handle.stretch = self._sites.current.stretch
                handle.is_blank = is_blank
                record.outputs.append((number, weakref.ref(handle)))
                block = results[number].untyped_storage()
                self._dropped[block._cdata] = handle
                self._pins.append(block._weak_ref())  # type: ignore[arg-type]  # the address stays its own when the memory is gone

    def _stand_in(self, item: Any, reads: dict[Handle, None]) -> Any:
        """An argument with windows in place of tensors; their handles are noted."""
        if isinstance(item, Tensor):
            window = self._window(item)
            reads[window.handle] = None
            return window
        if isinstance(item, (list, tuple)):
            return type(item)(self._stand_in(part, reads) for part in item)
        return item

    def _window(self, tensor: Tensor) -> Window:
        """A window onto the handle of a tensor; one that is not dropped is held from now on."""
        address = tensor.untyped_storage()._cdata
        handle = self._dropped.get(address)
        if handle is None:
            known = self._held.get(address)
            handle = known() if known is not None else None
            if handle is None:
                handle = held(tensor)
                if any(w.address == address and not w.has_happened() for w in self._writes):
                    self._hold_copy(handle)
                else:
                    handle.version = _version_of(tensor)
                    self._held[address] = weakref.ref(handle)
                return Window(handle, None)
        return _window_onto(handle, tensor)

    def begin_writes(self, tensors: list[Tensor]) -> int:
        """Writes are about to happen: what is held must not see them. See Note 4."""
        begun = len(self._writes)
        for tensor in tensors:
            address = _address(tensor)
            known = self._held.pop(address, None)
            handle = known() if known is not None else None
            if handle is not None:
                self._hold_copy(handle)
            self._writes.append(_Write(tensor, address, self._dropped.get(address)))
        return begun

    def end_writes(self, begun: int) -> None:
        """Writes are done: what follows sees new versions."""
        while len(self._writes) > begun:
            self._begin_version(self._writes.pop())

    def _begin_versions(self) -> None:
        """The same for those among the writes under way that have happened by now."""
        for write in self._writes:
            if write.has_happened():
                self._begin_version(write)

    def _begin_version(self, write: _Write) -> None:
        """The handle of a storage that was written to belongs to what it held before."""
        handle, write.handle = write.handle, None
        if handle is not None and self._dropped.get(write.address) is handle:
            del self._dropped[write.address]
            _hold_saved(handle, write.tensor)

    def _hold_copy(self, handle: Handle) -> None:
        """Holds a copy in place of memory that is about to be overwritten."""
        with unheard():
            handle.tensor, handle.version = _copy_of_storage(handle.tensor), None

    # ---- saves --------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Any:
        """What autograd holds: a window onto a dropped value, else the tensor and its version."""
        if tensor.layout is torch.strided:
            if self._writes:
                self._begin_versions()
            address = tensor.untyped_storage()._cdata
            handle = self._dropped.get(address)
            if handle is not None:
                if is_plain(tensor) and self._may_be_made(handle):
                    window = _window_onto(handle, tensor)
                    self._note_saved(window, tensor)
                    return window
            elif self._running is not None and address not in self._running.given:
                window = Window(_NOTHING_YET, None)
                self._running.early.append((address, window, tensor))
                return window
        return _without_graph(tensor), tensor._version

    def _find_handles(self, early: list[tuple[int, Window, Tensor]]) -> None:
        """Joins what was saved within an op to the handles of its outputs. See Note 3."""
        for address, window, tensor in early:
            handle = self._dropped.get(address)
            if handle is None or not is_plain(tensor) or not self._may_be_made(handle):
                handle = held(tensor)
                window.handle, window.counter, window.version = handle, handle.tensor, tensor._version
                continue
            window.handle = handle
            window.geometry = _window_onto(handle, tensor).geometry
            self._note_saved(window, tensor)

    def _note_saved(self, window: Window, tensor: Tensor) -> None:
        """From now on a window tells of writes to a saved tensor, without keeping its memory."""
        kind = tensor.dtype, tensor.device
        if kind not in self._empties:
            self._empties[kind] = torch.empty(0, dtype=kind[0], device=kind[1])
        window.counter, window.version = tensor.detach(), tensor._version
        window.counter.data = self._empties[kind]
        window.handle.windows.append(weakref.ref(window))

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
            opened: Tensor = packed.open()
            return opened

    def _replay(self, handle: Handle) -> None:
        """Runs the records a handle is missing, in forward order."""
        missing = _missing_records(handle)
        self._check_sources(missing)
        passing = _made_in_passing(missing, handle)
        with_gradients = torch.is_grad_enabled()
        with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast(), _nobody_told():
            try:
                while missing:
                    record = missing.pop()
                    _set_grad_enabled(record.has_gradients)
                    _run_next(record, passing)
            finally:
                _set_grad_enabled(with_gradients)

    def _check_sources(self, records: Iterable[Record]) -> None:
        """Refuses to compute from what was changed since the forward."""
        for record in records:
            for handle in record.reads:
                if handle.is_modified():
                    assert handle.tensor is not None
                    raise RuntimeError(_modified(self._name_of(handle.tensor)))

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


_NO_LEVEL = Level()
_NOTHING_YET = Handle(None, torch.empty(0))


def _version_of(tensor: Tensor) -> int | None:
    """How often autograd has counted a write; tensors of inference mode have no counter."""
    return None if tensor.is_inference() else tensor._version


def _window_onto(handle: Handle, tensor: Tensor) -> Window:
    """A window that is like a tensor over the storage of a handle."""
    geometry = geometry_of(tensor)
    return Window(handle, None if geometry == handle.geometry else geometry)


def _hold_saved(handle: Handle, tensor: Tensor) -> None:
    """What autograd saved of a version that is overwritten now is the storage itself. See Note 7."""
    windows = [window for reference in handle.windows if (window := reference()) is not None]
    if windows:
        kept = held(tensor)
        for window in windows:
            window.move_to(kept)
        handle.windows.clear()


@contextmanager
def _nobody_told() -> Iterator[None]:
    """No mode of the user and no forward that is going on sees what runs in the body."""
    modes = _disable_current_modes() if _len_torch_dispatch_stack() else nullcontext()
    with modes, unheard() if is_heard() else nullcontext():
        yield


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
    funcs: set[OpOverload] = set()
    for key, level in zip(recomputed, chain(levels, repeat(Level())), strict=False):
        frame, op, nth, output = key
        namespace, name, overload = op.split(".")
        func = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        funcs.add(func)
        found.setdefault(frame, {}).setdefault(id(func), {}).setdefault(nth, {})[output] = level
    return Decisions(found, frozenset(funcs))


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
    return tensor if tensor.grad_fn is None else tensor.detach()


def _opened(item: Any, private: Mapping[Handle, Tensor]) -> Any:
    """Arguments with tensors in place of windows; some over a private copy of their storage."""
    if type(item) is Window:
        if item.handle in private:
            return opened(private[item.handle], item.geometry or item.handle.geometry)
        return item.open()
    if type(item) is _Raw:
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
