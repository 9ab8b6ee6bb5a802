"""Where in the model an op is called: the frame of its module call, and its occurrence there.

A frame is ``"name"`` for the first call of a module in a forward and ``"name#2"`` for its third, so
control flow that changes between steps moves only the keys of what it skips. Ops of the loss function
itself are in the frame ``""``.

A frame also tells whether writes have to be watched there (not in modules of torch that write to their own
buffers only, if nobody minds), and whether something that is recomputed may be saved there.

What FSDP does in the hooks of a sharded module (gather, free, reduce) is no op of the model: it runs in a
frame without decisions, ``COMMUNICATION``. A frame knows its stretch too, see ``core/barriers.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._ops import OpOverload
from torch.utils.hooks import RemovableHandle

from memfit.core.barriers import Stretch
from memfit.core.graph import COMMUNICATION
from memfit.runtime.compiled import Region, compiled_regions, modules_inside
from memfit.runtime.modules import marks_of, named_modules_of, writes_to_its_own
from memfit.runtime.sharding import sharded_modules

D = TypeVar("D")
Forward = Callable[..., Any]
Buffers = dict[str, Tensor | None]


class Frame(Generic[D]):
    """One module call: how often each op was called in it, and what the plan says about those.

    ``heard`` of its calls were decided about so far. ``is_watched``: writes in it may be to anything.
    ``has_saves``: what autograd saves in it may be dropped.
    """

    __slots__ = ("counts", "decisions", "has_saves", "heard", "is_watched", "name", "stretch")

    def __init__(
        self,
        name: str,
        decisions: D | None,
        stretch: Stretch = (),
        *,
        is_watched: bool = True,
        has_saves: bool = True,
    ) -> None:
        self.name = name
        self.stretch = stretch
        self.decisions = decisions
        self.is_watched = is_watched
        self.has_saves = has_saves
        self.heard = 0
        self.counts: dict[Any, int] = {}

    def occurrence(self, func: OpOverload | str | int) -> int:
        """Counts a call and returns how many came before it in this frame."""
        nth = self.counts.get(func, 0)
        self.counts[func] = nth + 1
        return nth


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
        minds: Asked whether writes to some buffers have to be told of; None: it does not matter.
    """

    def __init__(
        self,
        model: nn.Module,
        decisions: Mapping[str, D] | None = None,
        *,
        saved_in: Collection[str] | None = None,
        moves: Callable[[Frame[D]], None] | None = None,
        minds: Callable[[Iterable[Tensor | None]], bool] | None = None,
    ) -> None:
        self._model = model
        self._decisions = decisions or {}
        self._decided = {frame.partition("#")[0] for frame in self._decisions}
        self._asked = None if decisions is None else self._decided
        self._saved_in = saved_in
        self._moves = moves
        self._minds = minds
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[dict[str, Any], Forward, Forward | None]] = []
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
        for table, ours, _ in self._replaced:
            table["forward"] = ours
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for table, ours, former in reversed(self._replaced):
            if table.get("forward") is not ours:  # the model has set another one meanwhile
                continue
            if former is None:
                del table["forward"]
            else:
                table["forward"] = former
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
        # Sharded: each frame has to know its stretch
        asked = None if sharded or self._saved_in is not None else self._asked
        wanted = names if asked is None else _within(names, asked)
        for module, name in names.items():
            if module in sharded:
                self._sharded.append((module, name, sharded[module]))
                continue
            name = name or "model"
            is_quiet = self._minds is not None and name not in self._decided and writes_to_its_own(module)
            if is_quiet or module in wanted:
                self._replace(name, module, is_asked=asked is None or name in asked, is_quiet=is_quiet)

    def _replace(self, name: str, module: nn.Module, *, is_asked: bool, is_quiet: bool) -> None:
        """Makes the forward that is to enter a frame, or to leave one, in the place of a module's own."""
        forward, table = module.forward, module.__dict__
        buffers = module._buffers if is_quiet else None
        ours = self._framed(name, forward, buffers) if is_asked else self._apart(forward, buffers)
        ours.__wrapped__ = forward  # type: ignore[attr-defined]  # for who reads its signature
        self._replaced.append((table, ours, table.get("forward")))

    def _framed(self, name: str, forward: Forward, buffers: Buffers | None) -> Forward:
        """A forward that runs in a frame of its own; ``buffers``: all that it can write to."""

        def framed(*args: Any, **kwargs: Any) -> Any:
            outer, frame = self.current, self._frame(name, self.current.stretch)
            frame.is_watched = buffers is None or self._watches(buffers)
            self._go_to(frame)
            try:
                return forward(*args, **kwargs)
            finally:
                self._go_to(outer)

        return framed

    def _apart(self, forward: Forward, buffers: Buffers | None) -> Forward:
        """A forward whose ops are not counted, nor taken for those of the frame around it."""
        nowhere: Frame[D] = Frame("", None)
        quiet: Frame[D] = Frame("", None, is_watched=False)

        def apart(*args: Any, **kwargs: Any) -> Any:
            outer, is_watched = self.current, buffers is None or self._watches(buffers)
            if outer.decisions is None and is_watched:
                return forward(*args, **kwargs)
            self._go_to(nowhere if is_watched else quiet)
            try:
                return forward(*args, **kwargs)
            finally:
                self._go_to(outer)

        return apart

    def _watches(self, buffers: Buffers) -> bool:
        """Whether a call that writes to nothing but some buffers is to be watched."""
        assert self._minds is not None
        return self._minds(buffers.values()) or _has_modes()

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


def _has_modes() -> bool:
    """Whether somebody's mode may do more than what is called."""
    return bool(_len_torch_function_stack() or _len_torch_dispatch_stack())


def _within(names: Mapping[nn.Module, str], asked: Collection[str]) -> Collection[nn.Module]:
    """The modules that can be called within a frame that is asked for."""
    if "" in asked:
        return names
    outer = (module for module, name in names.items() if (name or "model") in asked)
    return {inner for module in outer for inner in module.modules()}
