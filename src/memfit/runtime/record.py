"""Records one micro-batch's forward and backward as a pure :class:`StepGraph`.

Note [Recording]
 1. A dispatch mode sees every op below autograd; pack and unpack hooks see what autograd saves.
 2. A saved tensor is never kept alive: the hook hands autograd a copy (free on fake tensors). So a
    storage dies in the recording when the *program* is done with it, and ``FREE`` says when.
 3. The identity of a tensor is its storage; a weak reference to it tells of its death and frees the
    address for the next one.
 4. Autograd sums two gradients in place when it owns one of them, but not under a dispatch mode
    (``torch/csrc/autograd/input_buffer.cpp`` refuses tensor subclasses). The recording is mended:
    an ``add`` whose operand dies there reuses its storage. Views never are: their base owns too.
 5. What a factory makes (``empty``, ``zeros``) may be written invisibly before it is read, so it can be
    made again only for an op that overwrites all of it unread (``bernoulli_``).
 6. A value that is saved and then written to is, for autograd, what the storage holds in the end (chunks
    of ``unsafe_split``, the noise of ``rrelu``): it must be kept.
 7. A tensor that is used or saved and comes out of nowhere (``torch.tensor``) gets an op of its own. If it
    outlives the step it was there before, or is cached, and counts nothing. A number in place of a tensor
    is a tensor of 8 bytes that only autograd sees; it may save it, to the end of the backward.
 8. A region that torch.compile hides is one op, which is never replayed (``runtime/compiled.py``). It makes
    its outputs, what autograd saves of its own, and what the allocator says it has kept besides. Its backward
    is one op too where it is one node; the saves it unpacks are there before it.
 9. What is communicated with other processes is never replayed, nor what is wanted where a replay of it has
    no parameters (``core/barriers.py``).
10. Attention and ``linear`` add a mask or bias in place, but out of place where a dispatch mode looks on. The
    recording is mended: such a sum is noted as the write in place that a step without a mode does
    (``core/sums.py`` undoes it).
11. With ``hold_saved`` the originals are kept as in a plain step. It serves to measure ops, not lives.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.core.barriers import Stretch, with_barriers
from memfit.core.graph import (
    COMMUNICATION,
    COMPILED,
    LogEntry,
    LogKind,
    Op,
    OpKey,
    Save,
    StepGraph,
    Storage,
    Value,
)
from memfit.errors import UnsupportedModel
from memfit.runtime.callsite import CallSites
from memfit.runtime.compiled import Region, arguments_of, entered, saves_through, stepped_aside, unwritten
from memfit.runtime.intercept import told_of_composites
from memfit.runtime.opinfo import (
    OpInfo,
    declared_writes,
    draws_random_numbers,
    has_own_generator,
    is_plain,
    makes_blank,
    mixes_rows,
    number_bytes,
    op_info,
    overwrites_all,
    strides_of,
    tensors_in,
    written_statistics,
)
from memfit.runtime.preserve import gradients_of_others
from memfit.runtime.probe import OpCost, Probe

_ADD, _ADD_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
_SUM_IN_PLACE = (torch.ops.aten.linear.default, torch.ops.aten._scaled_dot_product_attention_math.default)
_RENORM = (
    torch.ops.aten.embedding_renorm_.default
)  # rows longer than max_norm: doing it again changes nothing
CPU_SEED_BYTES = 5056  # torch.get_rng_state(): the Mersenne twister


class Recording(NamedTuple):
    """A graph and what each op looked like, which tells whose seconds may be averaged."""

    graph: StepGraph
    signatures: tuple[tuple[object, ...], ...]
    peaks: tuple[int | None, ...]


class Differentiable(Protocol):
    """What a forward leaves."""

    @property
    def roots(self) -> Sequence[Tensor]:
        """The tensors that a backward starts from."""

    def backward(self) -> None:
        """Adds the gradients to the leaves."""


class _Saved:
    """What autograd holds in place of a saved tensor; its end is the release."""

    __slots__ = ("index", "log", "tensor", "whole")

    def __init__(self, tensor: Tensor, whole: Tensor, index: int, log: list[LogEntry]) -> None:
        self.tensor = tensor
        self.whole = whole
        self.index = index
        self.log = log

    def __del__(self) -> None:
        self.log.append(LogEntry(LogKind.RELEASE, self.index))


class _Region:
    """What a hidden region has saved so far: storages of its own, and others' values."""

    __slots__ = ("made", "saved")

    def __init__(self) -> None:
        self.made: list[int] = []
        self.saved: list[tuple[_Saved, int]] = []


class Recorder(TorchDispatchMode):
    """The dispatch mode that writes the log. See Note [Recording]."""

    def __init__(self, sites: CallSites[None], probe: Probe, *, hold_saved: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sites = sites
        self._probe = probe
        self._hold_saved = hold_saved
        self._paused = False
        self._start = 0
        self.is_forward = True
        self.owner = ""
        self.ops: list[Op] = []
        self.storages: list[Storage] = []
        self.values: list[Value] = []
        self.saves: list[Save] = []
        self.log: list[LogEntry] = []
        self.signatures: list[tuple[object, ...]] = []
        self.coupled: list[str] = []
        self.save_frames: list[str] = []
        self.op_stretches: list[Stretch] = []
        self.save_stretches: list[Stretch] = []
        self.backward_counts: dict[tuple[str, str], int] = {}
        self.changed: list[Tensor] = []
        self._parameters: dict[int, Tensor] = {}
        self._before: list[tuple[Tensor, Tensor]] = []
        self.appeared: dict[int, int] = {}
        self.place = ""
        self.numbers: dict[int, int] = {}
        self.owning_sums: set[int] = set()
        self.sums_in_place: set[int] = set()
        self._summing = False
        self.blank_ops: list[int] = []
        self.overwriting_ops: set[int] = set()
        self.hidden: dict[int, int] = {}
        self.region_saves: list[int] = []
        self._region: _Region | None = None
        self._alive: dict[int, int] = {}
        self._watchers: dict[int, weakref.ref[Any]] = {}
        self._current: dict[int, int] = {}
        self._copies: weakref.WeakValueDictionary[tuple[int, torch.dtype], Tensor] = (
            weakref.WeakValueDictionary()
        )

    # ---- ops -------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an op and notes what it read, made, overwrote and cost."""
        kwargs = kwargs or {}
        info = op_info(func)
        if self._paused or info.is_invisible or info.is_view:
            return func(*args, **kwargs)
        is_sum = func is _ADD and self._is_sum_in_place(args)
        key = self._key(_ADD_IN_PLACE if is_sum else func)
        for tensor in tensors_in([*args, *kwargs.values()]):
            if _address(tensor) not in self._alive:
                self._appear(tensor)
        inputs = self._inputs(args, kwargs)
        written = declared_writes(info, args, kwargs)
        if func is _ADD and isinstance(args[0], Tensor) and not args[0]._is_view():
            self.owning_sums.add(len(self.ops))
        if self.is_forward and written:
            self._note_writes(func, written)
        out = self._probe.call(func, args, kwargs)
        if is_sum:
            self.sums_in_place.add(len(self.ops))
            self._take_over(args[0], out)
            func, written = _ADD_IN_PLACE, [out]
        self._note(func, op_info(func), key, inputs, written, out, args, kwargs)
        return out

    def summing(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs an op in which sums are in place. See Note 10."""
        self._summing = True
        try:
            return call(*args, **kwargs)
        finally:
            self._summing = False

    def _is_sum_in_place(self, args: tuple[Any, ...]) -> bool:
        """Whether the sum about to run takes over its first operand in a step without a mode. See Note 10."""
        if not self._summing or not self.is_forward or not all(isinstance(t, Tensor) for t in args):
            return False
        into, other = args
        is_alike = into.dtype == other.dtype and torch.broadcast_shapes(into.shape, other.shape) == into.shape
        return is_alike and self._alive.get(_address(into), _EXTERNAL) in self._current

    def _take_over(self, operand: Tensor, out: Tensor) -> None:
        """The storage of an operand lives on as that of the result."""
        address = _address(operand)
        storage = self._alive.pop(address)
        del self._watchers[address]
        self._remember(out, storage)

    def watch(self, model: nn.Module) -> None:
        """Parameters to put back if the forward writes to them, through ``p.data`` too."""
        self._parameters = {_address(p) or id(p): p for p in model.parameters()}

    def _note_writes(self, func: OpOverload, written: list[Tensor]) -> None:
        """Notes which parameters the forward writes to, and keeps what they held."""
        for tensor in written:
            parameter = self._parameters.get(_address(tensor) or id(tensor))
            if parameter is None:
                continue
            if func is not _RENORM:
                self.changed.append(parameter)
            if not any(parameter is known for known, _ in self._before):
                with _passing_through(self), torch.no_grad():
                    self._before.append((parameter, parameter.detach().clone()))

    def put_back(self) -> None:
        """Undoes what the forward wrote to parameters."""
        with torch.no_grad():
            for parameter, before in self._before:
                parameter.copy_(before)
        self._before.clear()

    def _key(self, func: OpOverload) -> OpKey:
        """The call site of the op about to run; backward ops belong to the frame of what they unpacked."""
        if self.is_forward:
            frame = self._sites.current
            return OpKey(frame.name, str(func), frame.occurrence(func))
        node = torch._C._current_autograd_node()
        name = f"{func} of {node.name()}" if node is not None else str(func)
        nth = self.backward_counts.get((self.owner, name), 0)
        self.backward_counts[self.owner, name] = nth + 1
        return OpKey(self.owner, name, nth)

    def _note(
        self,
        func: OpOverload,
        info: OpInfo,
        key: OpKey,
        inputs: tuple[int, ...],
        written: list[Tensor],
        out: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Appends the op with its new storages and values."""
        op = len(self.ops)
        self.log.append(LogEntry(LogKind.OP, op))
        self.op_stretches.append(self._sites.current.stretch)
        external = any(_address(t) not in self._alive for t in written)
        overwrites, outputs, allocates = self._results(op, written, out)
        allocates += self._numbers(op, number_bytes(info, args) if self.place == "cpu" else 0)
        if self.is_forward and makes_blank(info, written):
            self.blank_ops.append(op)
        if self.is_forward and overwrites_all(info, written):
            self.overwriting_ops.add(op)
        plain = all(is_plain(t) for tree in (args, list(kwargs.values()), out) for t in tensors_in(tree))
        random = draws_random_numbers(info, func, args, kwargs)
        device = next((t.device.type for t in tensors_in(out)), "cpu")
        may_replay = info.may_replay if device == "cpu" else info.may_replay_on_cuda
        if self.is_forward and mixes_rows(info, args):
            self.coupled.append(str(key))
        self.ops.append(
            Op(
                key=key,
                inputs=inputs,
                outputs=outputs,
                overwrites=overwrites,
                allocates=allocates,
                seed_bytes=CPU_SEED_BYTES if random and device == "cpu" else 0,
                scratch_bytes=sum(args[i].nbytes for i in written_statistics(info, args)),
                is_random=random,
                is_replayable=self.is_forward
                and may_replay
                and key.frame != COMMUNICATION
                and plain
                and not external
                and bool(outputs)
                and not has_own_generator(kwargs),
            )
        )
        self.signatures.append((str(func), *_shapes(args), *_shapes(kwargs.values())))

    def _numbers(self, op: int, size_bytes: int) -> tuple[int, ...]:
        """A storage for the Python numbers of an op; one of the forward is freed when the step ends."""
        if not size_bytes:
            return ()
        self.storages.append(Storage(size_bytes))
        self.numbers[op] = size_bytes
        if not self.is_forward:
            self.log.append(LogEntry(LogKind.FREE, len(self.storages) - 1))
        return (len(self.storages) - 1,)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """The values an op reads that the step itself made, each once."""
        seen: dict[int, None] = {}
        for tensor in tensors_in([*args, *kwargs.values()]):
            storage = self._alive.get(_address(tensor), -1)
            if storage in self._current:
                seen[self._current[storage]] = None
        return tuple(seen) if self.is_forward else ()

    def _results(
        self, op: int, written: list[Tensor], out: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """New versions of what was written, and values in storages that did not exist before."""
        overwrites: list[int] = []
        outputs: list[int] = []
        allocates: list[int] = []
        for number, tensor in enumerate(written):
            storage = self._alive.get(_address(tensor), -1)
            if storage >= 0:  # an out= argument may have grown
                self.storages[storage] = Storage(tensor.untyped_storage().nbytes())
            if storage in self._current and self.is_forward:
                old = self._current[storage]
                overwrites.append(old)
                self.values[old] = replace(self.values[old], is_overwritten=True)
                outputs.append(self._new_value(storage, op, number))
        for number, tensor in enumerate(tensors_in(out), start=len(written)):
            if _address(tensor) not in self._alive and _has_storage(tensor):
                storage = self._watch(tensor)
                allocates.append(storage)
                if self.is_forward:
                    outputs.append(self._new_value(storage, op, number))
        return tuple(overwrites), tuple(outputs), tuple(allocates)

    def _new_value(self, storage: int, op: int, number: int) -> int:
        """A new version of a storage becomes its current one."""
        self.values.append(Value(storage, op, number))
        self._current[storage] = len(self.values) - 1
        return len(self.values) - 1

    def _watch(self, tensor: Tensor) -> int:
        """Gives a new storage a number and notes its death."""
        index = len(self.storages)
        self.storages.append(Storage(tensor.untyped_storage().nbytes()))
        self._remember(tensor, index)
        return index

    def adopt_external(self, tensors: Iterable[Tensor]) -> None:
        """Marks storages the step did not make, so that they are never taken for new ones."""
        for tensor in tensors:
            self.place = self.place or tensor.device.type
            if _has_storage(tensor):
                self._remember(tensor, _EXTERNAL)

    def _appear(self, tensor: Tensor) -> None:
        """Notes a storage that no op has made. See Note 7."""
        if not _has_storage(tensor):
            return
        if tensor.device.type != self.place:
            self._remember(tensor, _EXTERNAL)
            return
        op, frame = len(self.ops), self._sites.current.name if self.is_forward else self.owner
        storage = self._watch(tensor)
        self.appeared[op] = storage
        self.op_stretches.append(self._sites.current.stretch)
        self.log.append(LogEntry(LogKind.OP, op))
        self.ops.append(Op(OpKey(frame, "appears", op), allocates=(storage,)))
        self.signatures.append(("appears",))

    def _remember(self, tensor: Tensor, index: int) -> None:
        """Maps the address of a storage to its number until the storage dies."""
        block = tensor.untyped_storage()
        address = block._cdata
        self._alive[address] = index

        def died(reference: weakref.ref[Any]) -> None:
            if index != _EXTERNAL:
                self.log.append(LogEntry(LogKind.FREE, index))
            del self._alive[address], self._watchers[address]
            self._current.pop(index, None)

        self._watchers[address] = weakref.ref(block, died)

    def forget(self) -> None:
        """Watches no storage any longer; so the recorder is in no reference cycle, which would outlive it."""
        self._watchers.clear()

    # ---- regions that torch.compile hides --------------------------------------------------------

    def around(self, region: Region, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a region, noted as one op. See Note 8."""

        def called(*args: Any, **kwargs: Any) -> Any:
            tensors = arguments_of(args, kwargs)
            for tensor in tensors:
                if _address(tensor) not in self._alive:
                    self._appear(tensor)
            frame = self._sites.current
            name = f"{COMPILED}{region.name}"
            key, self._region = OpKey(frame.name, name, frame.occurrence(name)), _Region()
            inputs = self._inputs((tensors,), {})
            start = len(self.log)
            try:
                with unwritten(region, tensors), stepped_aside(self):
                    self._probe.begin()
                    out = call(*args, **kwargs)
                    self._probe.end()
            finally:
                here, self._region = self._region, None
            self._note_region(key, inputs, here, arguments_of((out,), {}), start)
            self._copy_saves(here)
            self._watch_backward(region, out, tensors)
            if any(isinstance(m, _BatchNorm) and m.training for m in region.module.modules()):
                self.coupled.append(str(key))
            return out

        return called

    def _note_region(
        self, key: OpKey, inputs: tuple[int, ...], here: _Region, out: list[Tensor], start: int
    ) -> None:
        """Appends the op of a region: what it saved of its own is there until autograd lets go of it."""
        op = len(self.ops)
        self.log.insert(start, LogEntry(LogKind.OP, op))
        outputs: list[int] = []
        allocates = list(here.made)
        for number, tensor in enumerate(out):
            if _address(tensor) not in self._alive and _has_storage(tensor):
                allocates.append(self._watch(tensor))
            storage = self._alive.get(_address(tensor), _EXTERNAL)
            if storage in allocates and storage not in self._current:
                outputs.append(self._new_value(storage, op, number))
        self.region_saves += here.made
        self.storages.append(Storage(0))  # what it has kept besides, see _with_hidden
        self.hidden[op] = len(self.storages) - 1
        self.ops.append(
            Op(key, inputs=inputs, outputs=tuple(outputs), allocates=(*allocates, self.hidden[op]))
        )
        self.signatures.append((key.op, *_shapes(out)))

    def _copy_saves(self, here: _Region) -> None:
        """Copies what a region saved of others'; in the region itself that would count as its own memory."""
        for saved, value in here.saved:
            if not self._hold_saved:
                saved.whole = self._copy(saved.tensor, value)
                saved.tensor = _view_of(saved.whole, saved.tensor)
        here.saved.clear()

    def _watch_backward(self, region: Region, out: Any, given: list[Tensor]) -> None:
        """Makes one op of each node behind a region's outputs that is a compiled backward."""
        stops = {tensor.grad_fn for tensor in given}
        pending = [tensor.grad_fn for tensor in arguments_of((out,), {})]
        while pending:
            node = pending.pop()
            if node is None or node in stops:
                continue
            stops.add(node)
            pending += [following for following, _ in node.next_functions]
            if "CompiledFunction" in node.name() and _SEEN not in (known := _metadata(node)):
                known[_SEEN] = True
                node.register_prehook(self._begin_backward)
                node.register_hook(partial(self._end_backward, region.name))

    def _begin_backward(self, _: Any) -> None:
        """A compiled backward is about to run."""
        self._paused = True
        self._start = len(self.log)
        self._probe.begin()

    def _end_backward(self, name: str, gradients: Any, _: Any) -> None:
        """It has run: first its saves were unpacked, then it allocated, and some was freed meanwhile."""
        self._probe.end()
        self._paused = False
        op = len(self.ops)
        allocates = [
            self._watch(tensor)
            for tensor in tensors_in(gradients)
            if _has_storage(tensor) and _address(tensor) not in self._alive
        ]
        said = f"{COMPILED}{name} backward"
        nth = self.backward_counts.get(("", said), 0)
        self.backward_counts["", said] = nth + 1
        self.ops.append(Op(OpKey("", said, nth), allocates=tuple(allocates)))
        self.signatures.append((said, *_shapes(tensors_in(gradients))))
        meanwhile = self.log[self._start :]
        unpacked = [entry for entry in meanwhile if entry.kind == LogKind.UNPACK]
        others = [entry for entry in meanwhile if entry.kind != LogKind.UNPACK]
        self.log[self._start :] = [*unpacked, LogEntry(LogKind.OP, op), *others]

    # ---- saves -----------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Any:
        """Notes a save and hands autograd a copy of it."""
        if _address(tensor) not in self._alive:
            if self._region is not None and _has_storage(tensor):
                self._region.made.append(self._watch(tensor))
                return tensor
            self._appear(tensor)
        storage = self._alive.get(_address(tensor), -1)
        if storage not in self._current or self._paused:
            return tensor
        index = len(self.saves)
        self.saves.append(Save(self._current[storage]))
        self.save_frames.append(self._sites.current.name)
        self.save_stretches.append(self._sites.current.stretch)
        self.log.append(LogEntry(LogKind.PACK, index))
        if self._region is not None:
            held = tensor.detach()
            self._region.saved.append((_Saved(held, held, index, self.log), self._current[storage]))
            return self._region.saved[-1][0]
        if self._hold_saved:
            held = tensor.detach()  # with its graph, an output would hold the node that is to hold it
            return _Saved(held, held, index, self.log)
        whole = self._copy(tensor, self._current[storage])
        return _Saved(_view_of(whole, tensor), whole, index, self.log)

    def unpack(self, packed: Any) -> Tensor:
        """Notes that the backward wants a saved tensor."""
        if isinstance(packed, Tensor):
            return packed
        self.log.append(LogEntry(LogKind.UNPACK, packed.index))
        self.owner = self.save_frames[packed.index]
        tensor: Tensor = packed.tensor
        return tensor

    def _copy(self, tensor: Tensor, value: int) -> Tensor:
        """A private copy of a tensor's whole storage, shared by the saves of one value."""
        whole = self._copies.get((value, tensor.dtype))
        if whole is None:
            with _passing_through(self), torch.no_grad():
                items = tensor.untyped_storage().nbytes() // tensor.element_size()
                whole = tensor.as_strided((items,), (1,), 0).clone()
            self._copies[value, tensor.dtype] = whole
            self._remember(whole, _EXTERNAL)
        return whole


@contextmanager
def _passing_through(recorder: Recorder) -> Iterator[None]:
    """Ops in the body belong to the recorder, not to the step."""
    recorder._paused = True
    try:
        yield
    finally:
        recorder._paused = False


def record(
    model: nn.Module,
    forward: Callable[[], Differentiable],
    externals: Iterable[Tensor],
    probe: Probe,
    *,
    rows: int,
    gradients_resident: bool,
    hold_saved: bool = False,
) -> Recording:
    """Runs forward and backward once and returns what happened.

    Args:
        forward: Computes the loss of one micro-batch, in a graph, and what else lives through the backward.
        externals: Every tensor that is alive before the step: parameters, buffers, the batch.
        probe: Runs each op and measures it.
        gradients_resident: Whether ``.grad`` exists already; only noted in the graph.
        hold_saved: Keep saved tensors as a plain step does, see Note 11.
    """
    with CallSites[None](model) as sites, _no_collection():
        recorder = Recorder(sites, probe, hold_saved=hold_saved)
        recorder.adopt_external(externals)
        recorder.watch(model)
        try:
            with probe:
                with (
                    told_of_composites(recorder.summing, _SUM_IN_PLACE),
                    entered(sites.regions, recorder.around),
                    saves_through(sites.regions, recorder.pack, recorder.unpack),
                    recorder,
                ):
                    loss = forward()
                _refuse_writes(model, recorder.changed)
                forward_ops = len(recorder.ops)
                recorder.is_forward = False
                with gradients_of_others(loss.roots, model), recorder:
                    loss.backward()
                del loss
        finally:
            recorder.put_back()
    recorder.forget()
    return _finish(recorder, probe, rows, forward_ops, gradients_resident)


def record_update(
    update: Callable[[], object],
    externals: Iterable[Tensor],
    probe: Probe,
    state: Callable[[], Iterable[Tensor]],
) -> Recording:
    """Runs ``optimizer.step()`` once; what it makes and does not free again is the optimizer's state.

    Args:
        externals: Every tensor that is alive before.
        state: The optimizer's state afterwards: that of which no op knows (a counter) counts all the same.
    """
    with CallSites[None](nn.Module()) as sites, _no_collection():
        recorder = Recorder(sites, probe, hold_saved=False)
        recorder.is_forward = False
        recorder.adopt_external(externals)
        with probe, recorder:
            update()
        for tensor in state():
            if _address(tensor) not in recorder._alive:
                recorder._appear(tensor)
    recorder.forget()
    # A counter is made long before the first op that reads it, so all of them count from the start.
    recorder.log.sort(key=lambda entry: entry.kind != LogKind.OP or entry.item not in recorder.appeared)
    recorder.owning_sums.clear()  # these sums are the optimizer's, not the engine's
    return _finish(recorder, probe, 1, 0, True, keeps_appeared=True)


def _refuse_writes(model: nn.Module, changed: list[Tensor]) -> None:
    """Refuses a forward that changes a parameter: it would do so once a micro-batch, and while measuring."""
    for name, parameter in model.named_parameters():
        if any(parameter is other for other in changed):
            raise UnsupportedModel(
                f"the forward writes to the parameter '{name}', and would do so again for every micro-batch: "
                "make it a buffer, or write to it after optimizer.step()",
                owner=name,
            )


def _finish(
    recorder: Recorder,
    probe: Probe,
    rows: int,
    forward_ops: int,
    gradients_resident: bool,
    *,
    keeps_appeared: bool = False,
) -> Recording:
    """Joins the log with the costs into a graph."""
    measured = iter(probe.costs())
    costs = [
        OpCost(0.0, None)
        if index in recorder.appeared
        else _with_numbers(next(measured), recorder.numbers.get(index, 0))
        for index in range(len(recorder.ops))
    ]
    recorder.log += [
        LogEntry(LogKind.FREE, recorder.ops[op].allocates[-1]) for op in recorder.numbers if op < forward_ops
    ]
    for index in recorder.sums_in_place:
        costs[index] = costs[index]._replace(peak_bytes=0 if costs[index].peak_bytes is not None else None)
    _note_hidden(recorder, costs)
    kept = _must_be_kept(recorder)
    ops = [
        replace(
            op,
            seconds=cost.seconds,
            is_replayable=op.is_replayable and index not in kept,
            is_sum_in_place=index in recorder.sums_in_place,
        )
        for index, (op, cost) in enumerate(zip(recorder.ops, costs, strict=True))
    ]
    freed = {index for kind, index in recorder.log if kind == LogKind.FREE}
    storages = [replace(s, persists=i not in freed) for i, s in enumerate(recorder.storages)]
    for index in [*recorder.appeared.values(), *recorder.region_saves]:
        if storages[index].persists and not keeps_appeared:
            storages[index] = Storage(0)
    graph = StepGraph(
        rows=rows,
        forward_ops=forward_ops,
        gradients_resident=gradients_resident,
        ops=tuple(ops),
        storages=tuple(storages),
        values=tuple(recorder.values),
        saves=tuple(recorder.saves),
        log=tuple(recorder.log),
        coupled=tuple(dict.fromkeys(recorder.coupled)),
    )
    graph = with_barriers(graph, recorder.op_stretches, recorder.save_stretches)
    return Recording(
        sum_in_place(graph, recorder.owning_sums),
        tuple(recorder.signatures),
        tuple(c.peak_bytes for c in costs),
    )


def _note_hidden(recorder: Recorder, costs: list[OpCost]) -> None:
    """What a region has kept that no hook saw counts to the end of the step. See Note [Recording] 8."""
    for op, storage in recorder.hidden.items():
        known_bytes = sum(recorder.storages[index].size_bytes for index in recorder.ops[op].allocates)
        kept_bytes = costs[op].net_bytes or 0
        recorder.storages[storage] = Storage(max(0, kept_bytes - known_bytes))
        recorder.log.append(LogEntry(LogKind.FREE, storage))


def _with_numbers(cost: OpCost, size_bytes: int) -> OpCost:
    """The inner peak of an op with the numbers it was called with, which are made just before it.

    Twice: a replay makes its own while autograd keeps the first.
    """
    return cost if cost.peak_bytes is None else cost._replace(peak_bytes=cost.peak_bytes + 2 * size_bytes)


def _must_be_kept(recorder: Recorder) -> set[int]:
    """Ops whose outputs a replay might make differently. See Note [Recording] 5 and 6."""
    saved = {save.value for save in recorder.saves}
    read = {
        value
        for index, op in enumerate(recorder.ops)
        for value in op.inputs
        if index not in recorder.overwriting_ops or value not in op.overwrites
    }
    blank = {
        op for op in recorder.blank_ops if any(v in saved or v in read for v in recorder.ops[op].outputs)
    }
    return blank | {recorder.values[v].producer for v in saved if recorder.values[v].is_overwritten}


def sum_in_place(graph: StepGraph, owning_sums: Collection[int]) -> StepGraph:
    """Lets the engine's sums of two gradients reuse a dying operand. See Note [Recording] 4."""
    ops, log = list(graph.ops), list(graph.log)
    same: dict[int, int] = {}
    for position, (kind, index) in enumerate(graph.log):
        if kind != LogKind.OP or index < graph.forward_ops or index not in owning_sums:
            continue
        dying = _freed_right_after(graph, position, graph.ops[index].allocates)
        if dying is not None:
            (made,) = graph.ops[index].allocates
            ops[index] = replace(graph.ops[index], allocates=())
            log[dying] = _NOTHING
            same[made] = same.get(graph.log[dying].item, graph.log[dying].item)
    moved = (
        LogEntry(kind, same.get(index, index)) if kind == LogKind.FREE else LogEntry(kind, index)
        for kind, index in log
        if (kind, index) != _NOTHING
    )
    storages = list(graph.storages)
    for made, operand in same.items():
        storages[operand] = replace(storages[operand], persists=graph.storages[made].persists)
        storages[made] = replace(storages[made], persists=False)
    return replace(graph, ops=tuple(ops), log=tuple(moved), storages=tuple(storages))


def _freed_right_after(graph: StepGraph, position: int, allocates: tuple[int, ...]) -> int | None:
    """The log position at which a storage as large as the op's only output dies before the next op."""
    if len(allocates) != 1:
        return None
    size_bytes = graph.storages[allocates[0]].size_bytes
    for later in range(position + 1, len(graph.log)):
        kind, index = graph.log[later]
        if kind == LogKind.OP:
            return None
        if kind == LogKind.FREE and index != allocates[0] and graph.storages[index].size_bytes == size_bytes:
            return later
    return None


_NOTHING = LogEntry(-1, -1)
_SEEN = "memfit"
_EXTERNAL = -1


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector from choosing when a storage dies."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has bytes of its own that can be watched."""
    return tensor.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _metadata(node: Any) -> dict[str, Any]:
    """What can be noted at a node of autograd's graph; its stub takes the property for a method."""
    found: dict[str, Any] = node.metadata
    return found


def _address(tensor: Tensor) -> int:
    """The identity of a tensor's storage while it lives; 0 where there is none."""
    return int(tensor.untyped_storage()._cdata) if _has_storage(tensor) else 0


def _view_of(whole: Tensor, like: Tensor) -> Tensor:
    """The same window into a copy of the storage."""
    return whole.as_strided(like.shape, like.stride(), like.storage_offset())


def _shapes(arguments: Iterable[Any]) -> tuple[object, ...]:
    """What decides an op's cost: shapes, strides and types of tensors, other arguments as they are."""
    return tuple(
        (tuple(t.shape), strides_of(t), t.dtype)
        if isinstance(t, Tensor)
        else tuple((tuple(x.shape), x.dtype) for x in tensors_in(t))
        if isinstance(t, (list, tuple)) and any(True for _ in tensors_in(t))
        else repr(t)
        for t in arguments
    )
