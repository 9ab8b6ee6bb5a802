"""Which module gives a row another output in other company: the one that mixes the rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from memfit.runtime.draws import Span, rows_in
from memfit.runtime.opinfo import tensors_in
from memfit.runtime.twin import Twin

_LARGEST = 10_000_000  # elements of one tensor that is remembered


class _Event(NamedTuple):
    """What went into a module call or came out of it."""

    module: str
    is_output: bool
    tensors: list[Tensor]


def mixing_module(twin: Twin, span: Span) -> str | None:
    """The innermost module whose output for the rows of ``span`` depends on the others; None: no module's."""
    with twin.sequence():
        whole = _events(twin, (0, twin.rows))
    with twin.sequence():
        part = _events(twin, span)
    running: list[str] = []
    for all_rows, few in zip(whole, part, strict=False):
        if all_rows[:2] != few[:2]:
            return None  # the control flow depends on the rows
        differs = any(_differ(a, b, span, twin) for a, b in zip(all_rows.tensors, few.tensors, strict=False))
        if differs:
            # What goes in differs already: the code around the call mixes.
            return all_rows.module if all_rows.is_output else (running[-1] if running else None)
        if all_rows.is_output:
            running.pop()
        else:
            running.append(all_rows.module)
    return None


def _differ(whole: Tensor, part: Tensor, span: Span, twin: Twin) -> bool:
    """Whether the rows of a tensor differ beyond rounding."""
    rows = rows_in(whole, part.shape, span, twin.rows)
    if rows is None or whole.shape == part.shape or not whole.is_floating_point():
        return False
    scale = float(whole.abs().max())
    return bool((rows - part).abs().max() > max(1e-9, twin.tolerance) * scale) if scale > 0 else False


def _events(twin: Twin, span: Span) -> list[_Event]:
    """Every module call of a run."""
    events: list[_Event] = []
    with _listening(twin.model, events):
        twin.run(span)
    return events


@contextmanager
def _listening(model: nn.Module, events: list[_Event]) -> Iterator[None]:
    """Module calls in the body are written down."""
    handles = []

    def note(name: str, is_output: bool, tree: Any) -> None:
        tensors = [t.detach().clone() for t in tensors_in(tree) if 0 < t.numel() <= _LARGEST]
        events.append(_Event(name, is_output, tensors))

    for name, module in model.named_modules():
        label = f"{name or 'model'} ({type(module).__name__})"
        handles.append(
            module.register_forward_pre_hook(
                lambda _m, args, kwargs, label=label: note(label, False, [*args, *kwargs.values()]),
                with_kwargs=True,
            )
        )
        handles.append(
            module.register_forward_hook(lambda _m, _i, out, label=label: note(label, True, _listed(out)))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listed(out: Any) -> Any:
    """The values of a module's output; a mapping or a dataclass-like output gives its values."""
    return (
        list(out.values())
        if hasattr(out, "values") and callable(out.values) and not isinstance(out, Tensor)
        else out
    )
