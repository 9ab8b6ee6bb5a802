"""Tells one listener of a thread when chosen ops are called, and of every write; other ops cost nothing.

Note [Spare keys]
 1. A dispatch mode is called for each op, and cannot be told which to pass by. A kernel under a dispatch key
    is called for its op only, and only in threads that have the key included. So there are kernels under two
    keys that torch has for its own tests and that no tensor carries. For all other ops the keys fall through,
    which torch works out when kernels are registered, not when ops are called.
 2. ``WATCHED`` has kernels for each op whose schema writes to an argument, and for those that write without
    saying so. Whatever the dispatcher does to a tensor in place comes by: through ``.data``, through views,
    in C++ and in TorchScript. Attention and dropout write many times, all to what they have made themselves;
    where nothing of it can be planned, they do so untold.
 3. ``LISTENING`` lies above it and has kernels for the ops that some plan has named. It is included only
    where the plan may name a call.
 4. The keys lie above autograd and autocast. Where autocast or functorch takes a call, it is let through: the
    call that they make of it comes by as well. Calls made inside another op's kernel, below autograd, are not
    calls of the model. But Python calls factories (``torch.rand_like``) below autograd, too: such a call is
    one of the model if the code that Python is in has the factory's name.
 5. Kernels stay registered, for the whole process: without the keys they are never run. Ops that come with
    a later import are looked for when something was imported.
 6. ``RECORDING`` has kernels for a few composite ops, for who records a step (``runtime/record.py``).
 7. The listener is kept in torch's own thread state, which goes along into threads of a backward.
Sources: ``c10/core/DispatchKey.h``, ``aten/src/ATen/core/dispatch/OperatorEntry.cpp``, ``torch/library.py``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C import _dispatch_tls_is_dispatch_key_excluded as _is_excluded
from torch._C import _dispatch_tls_is_dispatch_key_included as _is_included
from torch._C import _dispatch_tls_set_dispatch_key_excluded as _exclude
from torch._C import _dispatch_tls_set_dispatch_key_included as _include
from torch._C import _get_obj_in_tls, _is_key_in_tls, _stash_obj_in_tls
from torch._ops import OpOverload
from torch.library import Library, fallthrough_kernel

from memfit.runtime.opinfo import OpInfo, all_writes, is_writer, op_info


def _key(name: str) -> Any:
    """A dispatch key by its name; torch's enumeration leaves some out."""
    return torch._C._parse_dispatch_key(name)


_FIRST = Lock()
_LISTENER, _RECORDER = "memfit.listener", "memfit.recorder"
_NAMES = ("TESTING_ONLY_GenericMode", "TESTING_ONLY_GenericWrapper", "DeferredInit")
_LISTENING, _WATCHED, _RECORDING = (_key(name) for name in _NAMES)
_NUMBERS = (int, float, complex)
_WRITE_THEIR_OWN = frozenset({"aten::scaled_dot_product_attention", "aten::dropout"})
_ABOVE_KERNELS = torch._C.DispatchKey.ADInplaceOrView


class PlannedOp(NamedTuple):
    """An op that a plan has named.

    Attributes:
        key: What frames count its calls by.
        call: Runs it.
    """

    key: int
    func: OpOverload
    call: Callable[..., Any]
    info: OpInfo


class Listener(Protocol):
    """Who is told; of planned ops while it ``is_listening``."""

    is_listening: bool

    def begin_writes(self, tensors: list[Tensor]) -> int:
        """Some tensors are about to be written to; a number for :meth:`end_writes`."""

    def end_writes(self, begun: int) -> None:
        """They have been, or the op has raised."""

    def called(
        self, op: PlannedOp, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A planned op is called; this is to run it."""


@contextmanager
def told(listener: Listener, *, calls: bool) -> Iterator[None]:
    """The listener is told of every write in the body, and of calls, if wanted: see :func:`listen`."""
    _kernels().watch_everything()
    outer = _get_obj_in_tls(_LISTENER) if _is_key_in_tls(_LISTENER) else None
    with _included({_WATCHED: True, _LISTENING: calls}):
        _put(_LISTENER, listener)
        try:
            yield
        finally:
            _put(_LISTENER, outer)


@contextmanager
def told_of_composites(around: Callable[..., Any], funcs: Iterable[OpOverload]) -> Iterator[None]:
    """Calls of some composite ops in the body go through ``around(call, *args, **kwargs)``."""
    _kernels().announce(funcs)
    with _included({_RECORDING: True}):
        _put(_RECORDER, around)
        try:
            yield
        finally:
            _put(_RECORDER, None)


def listen(is_on: bool) -> None:
    """From now on the listener is told, or not told, when a planned op is called."""
    _include(_LISTENING, is_on)


def is_told(listener: Listener) -> bool:
    """Whether it is this listener that is told what this thread does."""
    return _is_key_in_tls(_LISTENER) and _get_obj_in_tls(_LISTENER) is listener


def is_heard() -> bool:
    """Whether somebody is told what runs now."""
    return _is_included(_WATCHED)


@contextmanager
def unheard() -> Iterator[None]:
    """Nothing in the body is told."""
    with _included({_WATCHED: False, _LISTENING: False}):
        yield


@contextmanager
def _included(wanted: dict[Any, bool]) -> Iterator[None]:
    """Keys are included, or not, in the body."""
    before = {key: _is_included(key) for key in wanted}
    for key, is_on in wanted.items():
        _include(key, is_on)
    try:
        yield
    finally:
        for key, was_on in before.items():
            _include(key, was_on)


def plan_for(funcs: Iterable[OpOverload]) -> None:
    """Makes sure that calls of these ops can be told of."""
    _kernels().listen_to(funcs)


def _kernels() -> _Kernels:
    """What is registered, for the whole process. See Note 5."""
    with _FIRST:  # threads that ask for it at the same time would register twice
        return _registered()


@cache
def _registered() -> _Kernels:
    return _Kernels()


class _Kernels:
    """The kernels under the two keys."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._libraries: dict[tuple[str, str], Library] = {}
        self._known: set[str] = set()
        self._listened: set[OpOverload] = set()
        self._announced: set[OpOverload] = set()
        self._imported = (0, 0)
        for key in _NAMES:
            self._library("_", key).fallback(fallthrough_kernel)

    def _library(self, namespace: str, key: str) -> Library:
        """Where kernels of a namespace are registered under a key; they last as long as it does."""
        if (namespace, key) not in self._libraries:
            self._libraries[namespace, key] = Library(namespace, "IMPL", key)
        return self._libraries[namespace, key]

    def watch_everything(self) -> None:
        """Registers kernels for the ops that write, those registered since the last time too."""
        imported = len(sys.modules), len(torch.library._defs)
        if imported == self._imported:
            return
        with self._lock:
            for name in torch._C._dispatch_get_all_op_names():
                if name not in self._known:
                    self._known.add(name)
                    base, _, overload = name.partition(".")
                    handle = torch._C._dispatch_find_schema_or_throw(base, overload)
                    if is_writer(handle.schema()):
                        self._register(name, _NAMES[1], _watching(base, overload))
                    elif name in _WRITE_THEIR_OWN:
                        self._register(name, _NAMES[1], _untold(base))
            self._imported = imported

    def listen_to(self, funcs: Iterable[OpOverload]) -> None:
        """Registers kernels for the ops that a plan names."""
        new = set(funcs) - self._listened
        if not new:
            return
        with self._lock:
            for func in new - self._listened:
                self._register(_name(func), _NAMES[0], _listening(func))
                self._listened.add(func)

    def announce(self, funcs: Iterable[OpOverload]) -> None:
        """Registers kernels for composite ops."""
        with self._lock:
            for func in set(funcs) - self._announced:
                self._register(_name(func), _NAMES[2], _announcing(func))
                self._announced.add(func)

    def _register(self, name: str, key: str, kernel: Callable[..., Any]) -> None:
        namespace, _, op = name.partition("::")
        self._library(namespace, key).impl(op, kernel, with_keyset=True)


def _watching(base: str, overload: str) -> Callable[..., Any]:
    """The kernel of an op that writes. What it writes in turn is not told: it is declared, or its own."""
    after = torch._C._dispatch_keyset_full_after(_WATCHED)
    elsewhere = _taken_elsewhere()
    op: PlannedOp | None = None

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal op
        if op is None:  # the most will never be called
            namespace, _, name = base.partition("::")
            op = _op(getattr(getattr(getattr(torch.ops, namespace), name), overload or "default"))
        if keyset.raw_repr() & elsewhere:
            return _passed_on(op, _WATCHED, keyset & after, *args, **kwargs)
        is_inner = _is_excluded(_ABOVE_KERNELS)
        if is_inner or not (written := all_writes(op.info, args, kwargs)):
            return _untold_call(op, args, kwargs)
        listener = _get_obj_in_tls(_LISTENER)
        begun = listener.begin_writes(written)
        try:
            if _is_included(_LISTENING):  # it has heard of the call, and may hear of others made for it
                return _passed_on(op, _WATCHED, keyset & after, *args, **kwargs)
            return _untold_call(op, args, kwargs)
        finally:
            listener.end_writes(begun)

    return kernel


def _untold(base: str) -> Callable[..., Any]:
    """The kernel of an op that writes to nothing that was there before. See Note 2."""
    after = torch._C._dispatch_keyset_full_after(_WATCHED)
    elsewhere = _taken_elsewhere()
    op = _op(getattr(torch.ops.aten, base.partition("::")[2]).default)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if keyset.raw_repr() & elsewhere or _is_included(_LISTENING):
            return _passed_on(op, _WATCHED, keyset & after, *args, **kwargs)
        return _untold_call(op, args, kwargs)

    return kernel


def _untold_call(op: PlannedOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an op, and tells of no writes meanwhile."""
    _include(_WATCHED, False)
    try:
        return op.call(*args, **kwargs)
    finally:
        _include(_WATCHED, True)


def _listening(func: OpOverload) -> Callable[..., Any]:
    """The kernel of an op that a plan has named. See Note 4."""
    after = torch._C._dispatch_keyset_full_after(_LISTENING)
    elsewhere = _taken_elsewhere()
    op = _op(func)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if keyset.raw_repr() & elsewhere:
            return _passed_on(op, _LISTENING, keyset & after, *args, **kwargs)
        listener = _get_obj_in_tls(_LISTENER)
        _include(_LISTENING, False)
        try:
            if _is_excluded(_ABOVE_KERNELS):
                return op.call(*args, **kwargs)
            return listener.called(op, op.call, args, kwargs)
        finally:
            _include(_LISTENING, listener.is_listening)

    def kernel_in_place(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """For one that writes autograd may call others, such as a clone of what it overwrites."""
        call = partial(_passed_on, op, _LISTENING, keyset & after)
        if keyset.raw_repr() & elsewhere or _is_excluded(_ABOVE_KERNELS):
            return call(*args, **kwargs)
        return _get_obj_in_tls(_LISTENER).called(op, call, args, kwargs)

    def kernel_of_factory(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """Below autograd, where Python calls it, no version would be counted of what is held."""
        was_excluded = _is_excluded(_ABOVE_KERNELS)
        if was_excluded and name not in sys._getframe(1).f_code.co_names:
            with _included({_LISTENING: False}):
                return op.call(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            _exclude(_ABOVE_KERNELS, was_excluded)
            return op.call(*args, **kwargs)

        listener = _get_obj_in_tls(_LISTENER)
        _include(_LISTENING, False)
        _exclude(_ABOVE_KERNELS, False)
        try:
            return listener.called(op, call, args, kwargs)
        finally:
            _exclude(_ABOVE_KERNELS, was_excluded)
            _include(_LISTENING, listener.is_listening)

    name = func._schema.name.partition("::")[2]
    if _is_factory(func):
        return kernel_of_factory
    return kernel_in_place if op.info.written else kernel


def _announcing(func: OpOverload) -> Callable[..., Any]:
    """The kernel of a composite op, for who records."""
    after = torch._C._dispatch_keyset_full_after(_RECORDING)
    op = _op(func)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        call = partial(_passed_on, op, _RECORDING, keyset & after)
        return _get_obj_in_tls(_RECORDER)(call, *args, **kwargs)

    return kernel


def _is_factory(func: OpOverload) -> bool:
    """Whether an op makes a tensor of given type and place, and is called by Python below autograd."""
    names = {argument.name for argument in func._schema.arguments}
    return "pin_memory" in names and "copy" not in func._schema.name


def _passed_on(op: PlannedOp, key: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an op with the keys that are left; calls that are made for it above its kernel are told.

    A number in the place of a tensor is taken only by a call from the start, which then is not told.
    """
    if _has_number(op.info, args):
        with _included({key: False}):
            return op.call(*args, **kwargs)
    return op.func._handle.redispatch_boxed(keys, *args, **kwargs)


def _put(name: str, item: object) -> None:
    """Keeps something in torch's thread state, in place of what was there."""
    if _put_takes_a_reference():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))
    _stash_obj_in_tls(name, item)


@cache
def _put_takes_a_reference() -> bool:
    """Whether torch forgets to count its reference, and gives back one that is not its own (2.10 does)."""
    item = object()
    before = sys.getrefcount(item)
    _stash_obj_in_tls("memfit.probe", item)
    if sys.getrefcount(item) > before:
        _stash_obj_in_tls("memfit.probe", None)
        return False
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(None))
    _stash_obj_in_tls("memfit.probe", None)
    return True


def _name(func: OpOverload) -> str:
    """What the dispatcher calls an op."""
    overload = func._schema.overload_name
    return f"{func._schema.name}.{overload}" if overload else str(func._schema.name)


def _op(func: OpOverload) -> PlannedOp:
    """An op, and how to run it, which is without what ``OpOverload.__call__`` adds.

    A number in the place of a tensor comes as a number; most ops do not take that, but another overload does.
    """
    info, plainly = op_info(func), func._op
    name = func._schema.name.partition("::")[2]
    if not info.tensor_positions or torch._C._should_allow_numbers_as_tensors(name):
        return PlannedOp(id(func), func, plainly, info)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (func.overloadpacket if _has_number(info, args) else plainly)(*args, **kwargs)

    return PlannedOp(id(func), func, call, info)


def _has_number(info: OpInfo, args: tuple[Any, ...]) -> bool:
    """Whether a number stands in the place of a tensor."""
    for position in info.tensor_positions:
        if position < len(args) and isinstance(args[position], _NUMBERS):
            return True
    return False


@cache
def _taken_elsewhere() -> int:
    """The keys of autocast and functorch, as bits: who has one of these calls the op once more."""
    names = [name for name in torch._C.DispatchKey.__members__ if name.startswith("Autocast")]
    names += ["AutocastMTIA", "AutocastXLA", "FuncTorchDynamicLayerFrontMode", "FuncTorchBatched"]
    names += ["FuncTorchGradWrapper", "FuncTorchVmapMode", "Batched", "VmapMode"]
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(_key(name)).raw_repr()
    return bits
