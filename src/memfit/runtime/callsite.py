"""Where in the model an op is called: the frame of its module call, and its occurrence there.

A frame is ``"name"`` for the first call of a module in a forward and ``"name#2"`` for its third, so
control flow that changes between steps moves only the keys of what it skips. Ops of the loss function
itself are in the frame ``""``.

A frame also tells whether something that is recomputed may be saved there.

What FSDP does in the hooks of a sharded module (gather, free, reduce) is no op of the model: it runs in a
frame without decisions, ``COMMUNICATION``. A frame knows its stretch too, see ``core/barriers.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from types import MethodType, TracebackType
from typing import Any, Generic, TypeVar

from torch import nn
from torch._ops import OpOverload
from torch.utils.hooks import RemovableHandle

from memfit.core.barriers import Stretch
from memfit.core.graph import COMMUNICATION
from memfit.runtime.compiled import Region, compiled_regions, modules_inside
from memfit.runtime.modules import marks_of, named_modules_of
from memfit.runtime.sharding import sharded_modules

D = TypeVar("D")
Forward = Callable[..., Any]


class Frame(Generic[D]):
    """One module call: how often each op was called in it, and what the plan says about those.

    ``heard`` of its calls were decided about so far. ``has_saves``: what autograd saves in it may be dropped.
    """

    __slots__ = ("counts", "decisions", "has_saves", "heard", "name", "stretch")

    def __init__(
        self,
        name: str,
        decisions: D | None,
        stretch: Stretch = (),
        *,
        has_saves: bool = True,
    ) -> None:
        self.name = name
        self.stretch = stretch
        self.decisions = decisions
        self.has_saves = has_saves
        self.heard = 0
        self.counts: dict[Any, int] = {}

    def occurrence(self, func: OpOverload | str | int) -> int:
        """Counts a call and returns how many came before it in this frame."""
        nth = self.counts.get(func, 0)
        self.counts[func] = nth + 1
        return nth


class _Followed:
    """The forward of a module while it is followed; a copy of the module has the module's own."""

    def __init__(self, module: nn.Module, call: Forward) -> None:
        self._module = module
        self._call = call
        self.former: Forward | None = module.__dict__.get("forward")
        self.__wrapped__ = module.forward  # for who reads its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it."""
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What belongs into the copy of the module."""
        if self.former is not None:
            return copy.deepcopy(self.former, memo)
        twin = memo.get(id(self._module))
        return self.__wrapped__ if twin is None else MethodType(type(twin).forward, twin)


class CallSites(Generic[D]):
    """Context manager that keeps ``current`` at the innermost module call of a forward.

    Each module's ``forward`` is replaced in its dictionary on entry and put back on exit, also when the body
    raises: that costs a call a tenth of what a pair of hooks does. Modules inside a region that torch.compile
    hides are left alone: they would be traced into its graph. Ops of a module without any decision are not
    counted: whoever replays asks for nothing of them.
    It can be entered again, which costs less as long as the model has not changed.

    Args:
        decisions: For each frame what is decided there; None: every module call gets a frame.
        saved_in: The frames in which what is recomputed may be saved; None: any.
        moves: Told of the frame of the ops that follow, while ``current`` is still the one before.
        follows: Asked whether calls are to be followed where they are made, which may be another thread;
            None: always.
    """

    def __init__(
        self,
        model: nn.Module,
        decisions: Mapping[str, D] | None = None,
        *,
        saved_in: Collection[str] | None = None,
        moves: Callable[[Frame[D]], None] | None = None,
        follows: Callable[[], bool] | None = None,
    ) -> None:
        self._model = model
        self._decisions = decisions or {}
        self._asked = None if decisions is None else {frame.partition("#")[0] for frame in decisions}
        self._saved_in = saved_in
        self._moves = moves
        self._follows = follows
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[dict[str, Any], _Followed]] = []
        self._marks: list[Any] = []
        self._sharded: list[tuple[nn.Module, str, Stretch]] = []
        self._calls: dict[str, int] = {}
        self.current = self._frame("", ())
        self._stack: list[Frame[D]] = []
        self.is_sharded = False
        self.regions: list[Region] = []

    def __enter__(self) -> CallSites[D]:
        marks = marks_of(self._model)
        if marks != self._marks:
            self._prepare()
            self._marks = marks
        self._calls.clear()
        self.current = self._frame("", ())
        for module, name, stretch in self._sharded:
            self._handles.append(module.register_forward_pre_hook(self._communicate, prepend=True))
            self._handles.append(module.register_forward_pre_hook(self._begin(name, stretch)))
            self._handles.append(module.register_forward_hook(self._end, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        for table, ours in self._replaced:
            table["forward"] = ours
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for table, ours in reversed(self._replaced):
            if table.get("forward") is not ours:  # the model has set another one meanwhile
                continue
            if ours.former is None:
                del table["forward"]
            else:
                table["forward"] = ours.former
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _prepare(self) -> None:
        """Looks at the model: which forwards are to be replaced, and by what."""
        self.regions = compiled_regions(self._model)
        hidden, sharded = modules_inside(self.regions), sharded_modules(self._model)
        self.is_sharded = bool(sharded)
        self._replaced.clear()
        self._sharded.clear()
        names = {module: name for name, module in named_modules_of(self._model) if id(module) not in hidden}
        # Sharded: each frame has to know its stretch, and any may save
        asked = self._asked if not sharded else None
        within = names if asked is None else _within(names, asked)
        saved_in = {frame.partition("#")[0] for frame in self._saved_in or ()}
        for module, name in names.items():
            name = name or "model"
            if module in sharded:
                self._sharded.append((module, name, sharded[module]))
            elif asked is None or name in asked or name in saved_in:
                self._replace(module, self._framed(name, module.forward))
            elif module in within:
                self._replace(module, self._apart(module.forward))

    def _replace(self, module: nn.Module, call: Forward) -> None:
        """Makes the forward that is to enter a frame, or to leave one, in the place of a module's own."""
        self._replaced.append((module.__dict__, _Followed(module, call)))

    def _framed(self, name: str, forward: Forward) -> Forward:
        """A forward that runs in a frame of its own."""

        def framed(*args: Any, **kwargs: Any) -> Any:
            if not self._is_followed():
                return forward(*args, **kwargs)
            outer = self.current
            self._go_to(self._frame(name, outer.stretch))
            try:
                return forward(*args, **kwargs)
            finally:
                self._go_to(outer)

        return framed

    def _apart(self, forward: Forward) -> Forward:
        """A forward whose ops are not counted, nor taken for those of the frame around it."""

        def apart(*args: Any, **kwargs: Any) -> Any:
            outer = self.current
            if outer.decisions is None or not self._is_followed():
                return forward(*args, **kwargs)
            self._go_to(Frame("", None, has_saves=outer.has_saves))
            try:
                return forward(*args, **kwargs)
            finally:
                self._go_to(outer)

        return apart

    def _is_followed(self) -> bool:
        """Whether a call is to be followed that is made here."""
        return self._follows is None or self._follows()

    def _go_to(self, frame: Frame[D]) -> None:
        """The frame of the ops that follow."""
        if self._moves is not None:
            self._moves(frame)
        self.current = frame

    def _frame(self, name: str, stretch: Stretch) -> Frame[D]:
        """The next call of a module; what is called by no module is in that of no name."""
        nth = self._calls.get(name, 0)
        self._calls[name] = nth + 1
        frame = f"{name}#{nth}" if nth else name
        has_saves = self._saved_in is None or frame in self._saved_in
        return Frame(frame, self._decisions.get(frame), stretch, has_saves=has_saves)

    def _communicate(self, module: nn.Module, args: Any) -> None:
        """The first pre-hook of a sharded module: those of FSDP follow."""
        self._stack.append(self.current)
        self._go_to(Frame(COMMUNICATION, None, self.current.stretch))

    def _begin(self, name: str, stretch: Stretch) -> Callable[[nn.Module, Any], None]:
        """The last pre-hook of a sharded module: its own ops follow."""
        name = name or "model"

        def begin(module: nn.Module, args: Any) -> None:
            self._go_to(self._frame(name, self.current.stretch + stretch))

        return begin

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """The first hook after the forward of a sharded module: those of FSDP follow."""
        self._go_to(Frame(COMMUNICATION, None, self._stack[-1].stretch))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook after a module's forward, also when it raised."""
        if self._stack:
            self._go_to(self._stack.pop())


def _within(names: Mapping[nn.Module, str], asked: Collection[str]) -> Collection[nn.Module]:
    """The modules that can be called within a frame that is asked for."""
    if "" in asked:
        return names
    outer = (module for module, name in names.items() if (name or "model") in asked)
    return {inner for module in outer for inner in module.modules()}
