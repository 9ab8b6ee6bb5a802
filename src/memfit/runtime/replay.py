"""Carries out a plan: keeps what it says, and computes the rest again when the backward asks.

Note [Replay]
 1. During the forward memfit is told when an op is called that the plan names, and of every write
    (``runtime/intercept.py``); all other ops run as they would without it. A named op runs and leaves a
    record, its dropped outputs get handles (``runtime/handles.py``), and nothing holds their memory.
 2. An argument that is itself dropped is referred to by its handle; any other is held, so whatever the
    plan forgot costs memory, never correctness.
 3. Packing a tensor that lives in a dropped value returns a window onto its handle. Unpacking runs the
    missing records, in forward order, once. An op's own outputs are packed before it returns, so before they
    have handles: these saves come *early*, and find their handles when it has returned.
 4. A write in place begins a new version of its storage. A handle belongs to the old one. If something held
    as an argument is about to be overwritten, the record gets a copy first.
    memfit is told of a write before autograd is, which may still read and save the old version (the clone
    that ``mul_`` needs). So the new one begins when the version counter has moved, at the latest with the end
    of the op.
 5. Replays run below autograd and autocast, as the kernels of the recorded ops did.
 6. Autograd checks that saved tensors were not modified, but not behind hooks: memfit checks instead. What
    is written after it was saved, and autograd does not mind (chunks of ``unsafe_split`` count versions
    of their own; ``rrelu`` writes its noise uncounted), is held from then on, as autograd would.
 7. Blank memory (``empty``, ``zeros``) may be written invisibly, so it is held as soon as anything but a
    complete overwrite looks at it.
 8. A region that torch.compile hides runs untold, as in a plain step (``runtime/compiled.py``).
    What it has made is kept; what it saves of others' is packed like any other save.
 9. Parameters under ``fully_shard`` are there only while their own module runs, forward or backward. FSDP
    frees and fills their storage, which stays the same, so a record may hold them. What is wanted outside of
    its module is held, whatever the plan says (``core/barriers.py``).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain, repeat
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack, _set_grad_enabled
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes

from memfit.core.barriers import is_there
from memfit.core.graph import Level, ValueKey
from memfit.runtime.callsite import CallSites, Frame
from memfit.runtime.compiled import Region, arguments_of, entered, saves_through, unwritten
from memfit.runtime.handles import (
    Handle,
    Held,
    Record,
    Window,
    copy_of_storage,
    generator_state,
    geometry_of,
    made,
    make_again,
    opened,
    window_onto,
)
from memfit.runtime.intercept import PlannedOp, is_heard, is_told, listen, plan_for, told, unheard
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
from memfit.runtime.savehooks import SaveHooks

# number of each output to drop -> its level
Dropped = Mapping[int, Level]


class Planned(NamedTuple):
    """What is planned in one frame: identity of an op -> occurrence -> outputs to drop; how many calls."""

    of_ops: Mapping[int, Mapping[int, Dropped]]
    calls: int


class Decisions:
    """A plan's values to recompute, arranged for the hot path.

    Attributes:
        of_frames: For each frame what is planned there.
        funcs: The ops that are named anywhere.
        in_levels: Whether something may be made in passing.
        saved_in: The frames in which what is recomputed is saved; None: it may be any.
    """

    __slots__ = ("_replayer", "funcs", "in_levels", "of_frames", "saved_in")

    def __init__(
        self,
        of_frames: Mapping[str, Planned],
        funcs: frozenset[OpOverload],
        *,
        in_levels: bool,
        saved_in: frozenset[str] | None,
    ) -> None:
        self.of_frames = of_frames
        self.funcs = funcs
        self.saved_in = saved_in
        self.in_levels = in_levels
        self._replayer: Replayer | None = None

    def __bool__(self) -> bool:
        """Whether anything is recomputed."""
        return bool(self.funcs)

    def replayer(self, model: nn.Module) -> Replayer:
        """One for the next forward of a model; the last one, if it is free, for it knows the model."""
        if self._replayer is None or not self._replayer.is_free_for(model):
            self._replayer = Replayer(model, self)
        return self._replayer


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
    """An op that is being recorded.

    ``reads`` are the handles among its arguments, ``given`` the storages it was given as they are,
    ``early`` what is saved of its outputs before it returns. One argument that is not plain, and the op
    could not be run again.
    """

    __slots__ = ("early", "given", "is_plain", "reads", "record")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.reads: dict[Handle, None] = {}
        self.given: set[int] = set()
        self.early: list[tuple[int, Window, Tensor]] = []
        self.is_plain = True


class Replayer:
    """The forward of one micro-batch under a plan; use as a context manager around the forward only."""

    def __init__(self, model: nn.Module, decisions: Decisions) -> None:
        self._model = model
        self._decisions = decisions
        self._sites: CallSites[Planned] = CallSites(
            model,
            decisions.of_frames,
            saved_in=decisions.saved_in,
            moves=self._move,
            follows=partial(is_told, self),
        )
        self._saves = SaveHooks(saves_through((), self._pack, self._unpack))
        self._dropped: dict[int, Handle] = {}
        self._held: dict[int, list[weakref.ref[Held]]] = {}
        self._pins: list[int] = []
        self._empties: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._running: _Running | None = None
        self._writes: list[_Write] = []
        self._order = 0
        self._has_blanks = False
        self._lock = threading.RLock()
        self._stack = ExitStack()
        self._is_entered = False
        self.is_listening = False

    def is_free_for(self, model: nn.Module) -> bool:
        """Whether it can be entered for a forward of a model."""
        return self._model is model and not self._is_entered

    def __enter__(self) -> Replayer:
        self._is_entered = True
        try:
            self._enter()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _enter(self) -> None:
        """Has all in force that tells of the forward."""
        plan_for(self._decisions.funcs)
        self._stack.enter_context(self._sites)
        if self._sites.regions:
            self._stack.enter_context(entered(self._sites.regions, self._around))
            self._saves = SaveHooks(saves_through(self._sites.regions, self._pack, self._unpack))
        self._stack.enter_context(self._saves)
        self._saves.set(is_on=self._sites.current.has_saves)
        self.is_listening = _has_more(self._sites.current)
        self._stack.enter_context(told(self, calls=self.is_listening))

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

    def _move(self, frame: Frame[Planned]) -> None:
        """The forward goes on in another frame, where other things are to be told."""
        now, has_more = self._sites.current, _has_more(frame)
        if has_more is not self.is_listening:
            self._listen(has_more)
        if frame.has_saves is not now.has_saves:
            self._saves.set(is_on=frame.has_saves)

    def _listen(self, is_on: bool) -> None:
        """Is to be told of planned ops from now on, or not."""
        self.is_listening = is_on
        listen(is_on)

    def _around(self, region: Region, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a region that torch.compile hides. See Note 8."""

        def called(*args: Any, **kwargs: Any) -> Any:
            with unwritten(region, arguments_of(args, kwargs)), unheard():
                return call(*args, **kwargs)

        return called

    def called(
        self, op: PlannedOp, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs an op that is planned somewhere, maybe here; after the last one of a frame none is told of."""
        frame = self._sites.current
        planned = frame.decisions.of_ops.get(op.key) if frame.decisions is not None else None
        if planned is not None:
            dropped = planned.get(frame.occurrence(op.key))
            if dropped is not None:
                out = self._run_recorded(op, call, args, kwargs, dropped)
                frame.heard += 1
                if not _has_more(frame):
                    self._listen(False)
                return out
        return call(*args, **kwargs)

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
        if self._has_blanks:
            self._hold_blanks(info, all_in([*args, *kwargs.values()]), written)
        if self._sites.is_sharded:
            self._hold_barriers(all_in([*args, *kwargs.values()]))
        running = self._begin_record(op, args, kwargs, written)
        if running is None:
            return call(*args, **kwargs)
        outer, self._running = self._running, running
        try:
            out = call(*args, **kwargs)
        finally:
            self._running = outer
        running.record.order = self._order  # after those of calls that autograd has made for it
        self._order += 1
        results = [*written, *all_in(out)] if written else all_in(out)
        is_blank = info.makes_blank and makes_blank(info, written)
        self._make_handles(running.record, results, dropped, is_blank=is_blank)
        if running.early:
            self._find_handles(running.early)
        return out

    def _begin_record(
        self, op: PlannedOp, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]
    ) -> _Running | None:
        """What it takes to run a call again, as it is now.

        None where that would not do the same, or could not reach every argument.
        """
        info = op.info
        if not info.may_replay or (kwargs and has_own_generator(kwargs)):
            return None
        if written and not all(_address(tensor) in self._dropped for tensor in written):
            return None
        record = Record(op)
        running = _Running(record)
        statistics = written_statistics(info, args)
        if statistics:
            record.statistics, record.is_flat = statistics, False
            # Their value is not read, so they are taken as they are then.
            args = tuple(Held(item, None) if i in statistics else item for i, item in enumerate(args))
        record.arguments = [self._stand_in(item, running) for item in args]
        if kwargs:
            record.keywords = {name: self._stand_in(value, running) for name, value in kwargs.items()}
            record.is_flat = record.is_flat and not all_in([*kwargs.values()])
        if not running.is_plain:
            return None
        if written:
            record.writes = [self._dropped[_address(tensor)] for tensor in written]
            record.is_flat = False
            running.given.difference_update(map(_address, written))
        if running.reads:
            record.reads, reference = tuple(running.reads), weakref.ref(record)
            for handle in record.reads:
                handle.readers = handle.readers or []
                handle.readers.append(reference)
        if info.is_random and draws_random_numbers(info, op.func, args, kwargs):
            record.seed = generator_state(_device_of(args, kwargs))
        return running

    def _hold_blanks(self, info: OpInfo, given: list[Tensor], written: list[Tensor]) -> None:
        """Takes blank memory out of the plan if the op looks at it. See Note 7."""
        unread = {_address(t) for t in written} if overwrites_all(info, written) else set()
        for tensor in given:
            found = self._dropped.get(_address(tensor))
            if found is not None and found.is_blank and _address(tensor) not in unread:
                del self._dropped[_address(tensor)]

    def _hold_barriers(self, given: list[Tensor]) -> None:
        """Takes out of the plan what could not be made again for the op. See Note 9."""
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
        stretch = self._sites.current.stretch
        for number, level in dropped.items():
            if number < len(results) and is_plain(result := results[number]):
                handle = Handle(record, geometry_of(result))
                handle.level = level
                handle.stretch = stretch
                handle.is_blank = is_blank
                record.outputs.append((number, weakref.ref(handle)))
                block = result.untyped_storage()
                self._dropped[block._cdata] = handle
                self._pins.append(block._weak_ref())  # type: ignore[arg-type]  # keeps the address

    def _stand_in(self, item: Any, running: _Running) -> Any:
        """What a record has in place of an argument; handles behind windows are noted."""
        if isinstance(item, Tensor):
            if not is_plain(item):
                running.is_plain = False
                return item
            address = item.untyped_storage()._cdata
            running.given.add(address)
            handle = self._dropped.get(address)
            if handle is None:
                return self._hold(item, address)
            running.reads[handle] = None
            return window_onto(handle, item)
        if type(item) in _LISTS and all_in(item):
            running.record.is_flat = False
            return type(item)(self._stand_in(part, running) for part in item)
        return item

    def _hold(self, tensor: Tensor, address: int) -> Held:
        """What is not dropped is held from now on, without its graph."""
        kept = Held(tensor.detach(), _version_of(tensor))
        if self._writes and any(w.address == address and not w.has_happened() for w in self._writes):
            _hold_copies([kept])
        else:
            self._held.setdefault(address, []).append(weakref.ref(kept))
        return kept

    def begin_writes(self, tensors: list[Tensor]) -> int:
        """Writes are about to happen: what is held must not see them. See Note 4."""
        begun = len(self._writes)
        for tensor in tensors:
            address = _address(tensor)
            known = (reference() for reference in self._held.pop(address, ()))
            _hold_copies([kept for kept in known if kept is not None])
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
                    window = window_onto(handle, tensor)
                    self._note_saved(window, tensor)
                    return window
            elif self._running is not None and address not in self._running.given:
                window = Window(_NOTHING_YET)
                self._running.early.append((address, window, tensor))
                return window
        return _without_graph(tensor), tensor._version

    def _find_handles(self, early: list[tuple[int, Window, Tensor]]) -> None:
        """Joins what was saved within an op to the handles of its outputs. See Note 3."""
        for address, window, tensor in early:
            handle = self._dropped.get(address)
            if handle is None or not is_plain(tensor) or not self._may_be_made(handle):
                window.handle = kept = made(tensor)
                window.counter, window.version = kept.tensor, tensor._version
            else:
                window.look_at(handle, geometry_of(tensor))
                self._note_saved(window, tensor)

    def _note_saved(self, window: Window, tensor: Tensor) -> None:
        """From now on a window tells of writes to a saved tensor, without keeping its memory."""
        kind = tensor.dtype, tensor.device
        if kind not in self._empties:
            self._empties[kind] = torch.empty(0, dtype=kind[0], device=kind[1])
        window.counter, window.version = tensor.detach(), tensor._version
        window.counter.data = self._empties[kind]
        handle = window.handle
        handle.windows = handle.windows or []
        handle.windows.append(weakref.ref(window))

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
        """Computes a handle's value, which is missing."""
        with_gradients = torch.is_grad_enabled()
        is_seen = is_heard() or _len_torch_dispatch_stack() > 0
        with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
            try:
                with _unseen() if is_seen else nullcontext():
                    make_again(handle, self._check_sources, in_levels=self._decisions.in_levels)
            finally:
                _set_grad_enabled(with_gradients)

    def _check_sources(self, record: Record) -> None:
        """Refuses to compute from what was changed since the forward."""
        for kept in record.held():
            if kept.is_modified():
                raise RuntimeError(_modified(self._name_of(kept.tensor)))

    def _name_of(self, leaf: Tensor) -> str:
        """What a leaf is called in the model."""
        address = _address(leaf)
        named = [*self._model.named_parameters(), *self._model.named_buffers()]
        return next((f"'{name}'" for name, t in named if _address(t) == address), "an input of the step")


def _has_more(frame: Frame[Planned]) -> bool:
    """Whether calls are planned in a frame that have not come yet."""
    return frame.decisions is not None and frame.heard < frame.decisions.calls


_LISTS = (list, tuple)
_NOTHING_YET = made(torch.empty(0))


def _version_of(tensor: Tensor) -> int | None:
    """How often autograd has counted a write; tensors of inference mode have no counter."""
    return None if tensor.is_inference() else tensor._version


def _hold_saved(handle: Handle, tensor: Tensor) -> None:
    """What autograd saved of a version that is overwritten now is the storage itself. See Note 6."""
    windows = [window for reference in handle.windows or () if (window := reference()) is not None]
    if windows:
        kept = made(tensor)
        for window in windows:
            window.look_at(kept, window.geometry or handle.geometry)
        handle.windows = None


def _hold_copies(held: list[Held]) -> None:
    """Holds one copy in place of a storage that is about to be overwritten."""
    if held:
        with unheard():
            whole = copy_of_storage(held[0].tensor)
            for kept in held:
                kept.tensor, kept.version = opened(whole, geometry_of(kept.tensor)), None


@contextmanager
def _unseen() -> Iterator[None]:
    """No mode of the user and no forward that is going on sees what runs in the body."""
    with _disable_current_modes(), unheard():
        yield


def decisions_of(
    recomputed: Iterable[ValueKey],
    levels: Collection[Level] = (),
    saved_in: frozenset[str] | None = None,
) -> Decisions:
    """A plan's values to recompute, arranged for the hot path; ``saved_in`` as of :class:`Decisions`."""
    found: dict[str, dict[int, dict[int, dict[int, Level]]]] = {}
    funcs: set[OpOverload] = set()
    for key, level in zip(recomputed, chain(levels, repeat(Level())), strict=False):
        frame, op, nth, output = key
        namespace, name, overload = op.split(".")
        func = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        funcs.add(func)
        found.setdefault(frame, {}).setdefault(id(func), {}).setdefault(nth, {})[output] = level
    in_levels = any(level != Level() for level in levels)
    of_frames = {frame: Planned(of_ops, sum(map(len, of_ops.values()))) for frame, of_ops in found.items()}
    return Decisions(of_frames, frozenset(funcs), in_levels=in_levels, saved_in=saved_in)


def _without_graph(tensor: Tensor) -> Tensor:
    """What autograd may hold of a tensor it saves: its memory and version counter, not its node.

    An output holds the node that is to hold it: a cycle, and a leak where no backward comes by, as in a
    branch the loss does not use.
    """
    return tensor if tensor.grad_fn is None else tensor.detach()


def _address(tensor: Tensor) -> int:
    """The identity of a storage while something watches it."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else 0


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device whose generator an op uses."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return next((t.device for t in tensors_in([*args, *kwargs.values()])), torch.device("cpu"))


def _modified(what: str) -> str:
    """The message for memory that changed between forward and backward."""
    return (
        f"{what} was modified by an inplace operation between the forward and the backward of the step, so "
        "the gradient would be wrong. Write to it after step() has returned, or out of place."
    )
