"""The allocator's account of a step, op by op: an independent judge of a whole simulated timeline."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

MARK = "memfit.test.mark"
_LOOKAHEAD = 400  # operator events between two that a simulation knows of: wrappers, views, inner calls


def mark() -> None:
    """Writes a mark into the running trace."""
    with torch._C._profiler._RecordFunctionFast(MARK):
        pass


def highest_levels(body: Callable[[], object], names: Mapping[int, Sequence[str]]) -> list[int | None]:
    """The highest bytes above the start while each named operator ran, in order; None: not found.

    Args:
        names: The operators to look for after so many calls of :func:`mark`, such as ``aten::mm``. A trailing
            underscore does not matter: the engine sums gradients in place where no dispatch mode forbids it.
    """
    profiler: Any = torch.autograd.profiler.profile(profile_memory=True)
    with profiler:
        body()
    tree = profiler.kineto_results.experimental_event_tree()
    events = sorted(_all(tree), key=lambda event: int(event.start_time_ns))
    changes = list(_changes(events))
    times = [time_ns for time_ns, _ in changes]
    levels = [0, *accumulate(size_bytes for _, size_bytes in changes)]
    marks = [event.start_time_ns for event in events if event.name == MARK]
    found: list[int | None] = []
    for after, wanted in names.items():
        ops = [e for e in events if e.tag.name == "TorchOp" and e.start_time_ns >= marks[after - 1]]
        for op in _in_turn(ops, wanted):
            if op is None:
                found.append(None)
            else:
                low = bisect.bisect_left(times, op.start_time_ns)
                high = bisect.bisect_right(times, op.end_time_ns)
                found.append(max(levels[low : high + 1]))
    return found


def _in_turn(ops: Sequence[Any], names: Sequence[str]) -> Iterator[Any]:
    """One operator event after the other; None where it is not among the next."""
    at = 0
    for name in names:
        which = _next(ops, at, name)
        yield None if which is None else ops[which]
        if which is not None:
            at = which + 1
            while at < len(ops) and ops[at].start_time_ns < ops[which].end_time_ns:  # what it calls itself
                at += 1


def _next(ops: Sequence[Any], at: int, name: str) -> int | None:
    """The next operator of a name."""
    for which in range(at, min(len(ops), at + _LOOKAHEAD)):
        if ops[which].name.rstrip("_") == name.rstrip("_"):
            return which
    return None


def _all(tree: Sequence[Any]) -> Iterator[Any]:
    """Every event of a tree."""
    stack = list(tree)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)


def _changes(events: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """When the CPU allocator gave or took back how many bytes."""
    live: dict[int, int] = {}
    for event in events:
        if event.tag.name != "Allocation" or event.extra_fields.device.type != "cpu":
            continue
        block = event.extra_fields
        if block.ptr in live:
            yield event.start_time_ns, -live.pop(block.ptr)
        if block.alloc_size > 0:
            live[block.ptr] = block.alloc_size
            yield event.start_time_ns, block.alloc_size
