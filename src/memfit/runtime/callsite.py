"""Where in the model an op is called: the frame of its module call, and its occurrence there.

A frame is ``"name"`` for the first call of a module in a forward and ``"name#2"`` for its third, so
control flow that changes between steps moves only the keys of what it skips. Ops of the loss function
itself are in the frame ``""``.

What FSDP does in the hooks of a sharded module (gather, free, reduce) is no op of the model: it runs in a
frame without decisions, ``COMMUNICATION``. A frame knows its stretch too, see ``core/barriers.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import nn
from torch._ops import OpOverload
from torch.utils.hooks import RemovableHandle

from memfit.core.barriers import Stretch
from memfit.core.graph import COMMUNICATION
from memfit.runtime.compiled import compiled_regions, modules_inside
from memfit.runtime.sharding import sharded_modules

D = TypeVar("D")


class Frame(Generic[D]):
    """One module call: how often each op was called in it, and what the plan says about those."""

    __slots__ = ("counts", "decisions", "name", "stretch")

    def __init__(self, name: str, decisions: D | None, stretch: Stretch = ()) -> None:
        self.name = name
        self.stretch = stretch
        self.decisions = decisions
        self.counts: dict[Any, int] = {}

    def occurrence(self, func: OpOverload | str) -> int:
        """Counts a call and returns how many came before it in this frame."""
        nth = self.counts.get(func, 0)
        self.counts[func] = nth + 1
        return nth


class CallSites(Generic[D]):
    """Context manager that keeps ``current`` at the innermost module call of a forward.

    It hooks every module of the model on entry and unhooks it on exit, also when the body raises. Modules
    inside a region that torch.compile hides are left alone: a hook would be traced into its graph.
    """

    def __init__(self, model: nn.Module, decisions: Mapping[str, D]) -> None:
        self._model = model
        self._decisions = decisions
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, int] = {}
        self.current: Frame[D] = Frame("", decisions.get(""))
        self._stack: list[Frame[D]] = []
        self.regions = compiled_regions(model)

    def __enter__(self) -> CallSites[D]:
        hidden, sharded = modules_inside(self.regions), sharded_modules(self._model)
        for name, module in self._model.named_modules():
            if id(module) in hidden:
                continue
            stretch = sharded.get(module)
            if stretch is None:
                self._handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
            else:
                self._handles.append(module.register_forward_pre_hook(self._communicate, prepend=True))
                self._handles.append(module.register_forward_pre_hook(self._begin(name, stretch)))
                self._handles.append(module.register_forward_hook(self._end, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        """The pre-hook of one module."""
        name = name or "model"

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(self.current)
            self.current = self._frame(name, self.current.stretch)

        return enter

    def _frame(self, name: str, stretch: Stretch) -> Frame[D]:
        """The next call of a module."""
        nth = self._calls.get(name, 0)
        self._calls[name] = nth + 1
        frame = f"{name}#{nth}" if nth else name
        return Frame(frame, self._decisions.get(frame), stretch)

    def _communicate(self, module: nn.Module, args: Any) -> None:
        """The first pre-hook of a sharded module: those of FSDP follow."""
        self._stack.append(self.current)
        self.current = Frame(COMMUNICATION, None, self.current.stretch)

    def _begin(self, name: str, stretch: Stretch) -> Callable[[nn.Module, Any], None]:
        """The last pre-hook of a sharded module: its own ops follow."""
        name = name or "model"

        def begin(module: nn.Module, args: Any) -> None:
            self.current = self._frame(name, self.current.stretch + stretch)

        return begin

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """The first hook after the forward of a sharded module: those of FSDP follow."""
        self.current = Frame(COMMUNICATION, None, self._stack[-1].stretch)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook after a module's forward, also when it raised."""
        if self._stack:
            self.current = self._stack.pop()
