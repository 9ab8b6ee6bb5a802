"""The plain step and the planned one as a trace that ui.perfetto.dev and chrome://tracing open.

Note [Trace]
 1. JSON of the Trace Event Format: two processes, "plain" and "planned". Each has a track of slices ("X") in
    predicted seconds: part of the step, phase, modules from the outermost in, op; what is recomputed lies
    in a slice of its own within the backward. A slice of an op says what is live meanwhile.
 2. Counters ("C"): "live bytes" has a series for each category, which chrome://tracing stacks and Perfetto
    shows one under another; "total" is their sum.
 3. Times are integers of nanoseconds before they become the format's microseconds, so that slices nest
    exactly. Of moments that begin in the same nanosecond the counters show the highest.
 4. Micro-batches beyond the first few are one slice, as long as all of them; counters stand still meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from memfit.core.plan import Plan
from memfit.core.timeline import Event
from memfit.core.unrolled import LOSS_OF_ALL, UPDATE, Part, Tick, Unrolled
from memfit.report.contents import CATEGORIES, sizes_of
from memfit.report.places import modules_of
from memfit.units import format_bytes

_NS, _NS_IN_US = 1e9, 1e3
_TRACK = 1
_NAMES = {LOSS_OF_ALL: "loss of all outputs", UPDATE: "optimizer step"}


class Stretch(NamedTuple):
    """Something that runs for a while: inside of what, when, and what is live meanwhile."""

    path: tuple[str, ...]
    start_ns: int
    end_ns: int
    phase: str
    event: Event | None


def trace(steps: Iterable[tuple[str, Plan, Unrolled]], about: dict[str, Any]) -> dict[str, Any]:
    """A trace of some steps, each a process of its own. Pure. See Note [Trace].

    Args:
        steps: Name, plan and step of each.
        about: What else the file says of itself.
    """
    events: list[dict[str, Any]] = []
    for process, (name, plan, step) in enumerate(steps, start=1):
        told = f"{name}: peak {format_bytes(plan.predicted_peak_bytes)}"
        events.append(_meta(process, "process_name", name=told))
        events.append(_meta(process, "process_sort_index", sort_index=process))
        events.append(_meta(process, "thread_name", name="step, in predicted seconds"))
        stretches = list(_stretches(step))
        events += _slices(process, stretches)
        events += _counters(process, stretches)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _stretches(step: Unrolled) -> Iterator[Stretch]:
    """What runs when, in order; nothing between."""
    now_s, start_ns = 0.0, 0
    for part in step.parts:
        for path, seconds, phase, event in _paths(part):
            now_s += seconds
            end_ns = max(start_ns, round(now_s * _NS))
            yield Stretch(path, start_ns, end_ns, phase, event)
            start_ns = end_ns


def _paths(part: Part) -> Iterator[tuple[tuple[str, ...], float, str, Event | None]]:
    """Each moment of a part as slices within each other, or the part as one."""
    name = _NAMES.get(part.name, part.name)
    if not part.ticks:
        yield (f"{name}, each like the one before",), part.seconds, "forward and backward", None
    for tick in part.ticks:
        yield (name, *_inside(tick)), tick.seconds, tick.event.phase, tick.event


def _inside(tick: Tick) -> tuple[str, ...]:
    """The slices of a moment within its part."""
    phase = tick.event.phase
    if phase in (UPDATE, LOSS_OF_ALL):
        return (tick.key.op,)
    phases = ("backward", "recompute") if phase == "recompute" else (phase,)
    return (*phases, *modules_of(tick.key), tick.key.op)


def _slices(process: int, stretches: Iterable[Stretch]) -> list[dict[str, Any]]:
    """Slices in order, the outer before the inner; neighbours share those that begin alike, but no op."""
    found: list[tuple[int, int, int, dict[str, Any]]] = []  # start, what ends last first, depth, the slice
    opened: list[tuple[str, int, str]] = []  # name, start, phase
    now_ns = 0

    def close(depth: int) -> None:
        for at, (name, start_ns, phase) in enumerate(opened[depth:], start=depth):
            found.append((start_ns, -now_ns, at, _slice(process, name, start_ns, now_ns, phase)))
        del opened[depth:]

    for stretch in stretches:
        *outer, name = stretch.path
        pairs = zip(opened, outer, strict=False)
        same = next(
            (at for at, (one, two) in enumerate(pairs) if one[0] != two), min(len(opened), len(outer))
        )
        close(same)
        opened += [(each, stretch.start_ns, stretch.phase) for each in outer[same:]]
        now_ns = stretch.end_ns
        live = {} if stretch.event is None else {"live bytes": stretch.event.total_bytes}
        op = _slice(process, name, stretch.start_ns, now_ns, stretch.phase, live)
        found.append((stretch.start_ns, -now_ns, len(outer), op))
    close(0)
    return [each for *_, each in sorted(found, key=lambda entry: entry[:3])]


def _counters(process: int, stretches: Iterable[Stretch]) -> Iterator[dict[str, Any]]:
    """Live bytes by category, and in all, where they change."""
    highest: dict[int, Event] = {}
    for stretch in stretches:
        event, before = stretch.event, highest.get(stretch.start_ns)
        if event is not None and (before is None or event.total_bytes > before.total_bytes):
            highest[stretch.start_ns] = event
    last: tuple[int, ...] = ()
    for at_ns, event in highest.items():
        sizes = sizes_of(event)
        if sizes != last:
            yield _counter(process, "live bytes", at_ns, dict(zip(CATEGORIES, sizes, strict=True)))
            yield _counter(process, "total", at_ns, {"bytes": event.total_bytes})
        last = sizes


def _slice(
    process: int, name: str, start_ns: int, end_ns: int, phase: str, args: dict[str, int] | None = None
) -> dict[str, Any]:
    """A slice."""
    times = {"ts": start_ns / _NS_IN_US, "dur": (end_ns - start_ns) / _NS_IN_US}
    found = {"ph": "X", "pid": process, "tid": _TRACK, "name": name, "cat": phase, **times}
    return found | ({"args": args} if args else {})


def _counter(process: int, name: str, at_ns: int, sizes: dict[str, int]) -> dict[str, Any]:
    """A moment of a counter."""
    return {"ph": "C", "pid": process, "name": name, "ts": at_ns / _NS_IN_US, "args": sizes}


def _meta(process: int, what: str, **args: object) -> dict[str, Any]:
    """What a process or a track is called."""
    return {"ph": "M", "pid": process, "tid": _TRACK, "name": what, "args": args}
