"""Which module gives a row another output in other company: the one that mixes the rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memfit.runtime.draws import Span, rows_in
from memfit.runtime.opinfo import tensors_in
from memfit.runtime.twin import Twin

_LARGEST = 10_000_000  # elements of one tensor that is remembered


@dataclass(slots=True)
class _Call:
    """One module call: what went in, what came out, and the calls that it made."""

    module: str
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)


def mixing_module(twin: Twin, span: Span) -> str | None:
    """The innermost module whose output for the rows of ``span`` depends on the others; None: no module's.

    Only calls inside of one whose output differs are looked into: a layer that sorts tokens by expert gives
    its children rows in another order, and puts them back.
    """
    with twin.sequence():
        whole = _calls(twin, (0, twin.rows))
    with twin.sequence():
        part = _calls(twin, span)
    return _mixing(whole, part, span, twin)


def _mixing(whole: list[_Call], part: list[_Call], span: Span, twin: Twin) -> str | None:
    """The first of some calls that mixes rows, or one inside it; None: none, or the code around them."""
    for all_rows, few in zip(whole, part, strict=False):
        if all_rows.module != few.module or _differ(all_rows.inputs, few.inputs, span, twin):
            return None
        if _differ(all_rows.outputs, few.outputs, span, twin):
            return _mixing(all_rows.calls, few.calls, span, twin) or all_rows.module
    return None


def _differ(whole: list[Tensor], part: list[Tensor], span: Span, twin: Twin) -> bool:
    """Whether the rows of some tensor differ beyond rounding."""
    for full, few in zip(whole, part, strict=False):
        rows = rows_in(full, few.shape, span, twin.rows)
        if rows is None or full.shape == few.shape or not full.is_floating_point():
            continue
        if bool((rows - few).abs().max() > twin.tolerance * full.abs().max()):
            return True
    return False


def _calls(twin: Twin, span: Span) -> list[_Call]:
    """The module calls of a run, nested as they were made."""
    root = _Call("")
    with _listening(twin.model, root):
        twin.run(span)
    return root.calls


@contextmanager
def _listening(model: nn.Module, root: _Call) -> Iterator[None]:
    """Module calls in the body are written down below ``root``."""
    handles: list[RemovableHandle] = []
    running = [root]

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _Call(name, inputs=_kept([*args, *kwargs.values()]))
        running[-1].calls.append(call)
        running.append(call)

    def leave(out: Any) -> None:
        running.pop().outputs = _kept(out)

    for name, module in model.named_modules():
        label = f"{name or 'model'} ({type(module).__name__})"
        before = partial(lambda label, _, args, kwargs: enter(label, args, kwargs), label)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _m, _i, out: leave(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(tree: Any) -> list[Tensor]:
    """Copies of the tensors of some arguments or of an output, which may be a mapping."""
    values = list(tree.values()) if isinstance(tree, Mapping) else tree
    return [t.detach().clone() for t in tensors_in(values) if 0 < t.numel() <= _LARGEST]
