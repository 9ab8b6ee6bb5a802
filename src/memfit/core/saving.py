"""Where autograd saves what is to be recomputed: elsewhere nobody has to look at what it saves."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from memfit.core.graph import LogKind, StepGraph, ValueKey

_CALLS_PER_SAVE = 1  # following so many module calls costs as much as looking at one save


def saved_in(graph: StepGraph, recomputed: Collection[ValueKey]) -> frozenset[str] | None:
    """The module calls in which something of a plan is saved; None where following them does not pay."""
    found = frames_that_save(graph, recomputed)
    elsewhere = sum(found.isdisjoint(frames) for _, frames in _saves(graph))
    return found if elsewhere > _CALLS_PER_SAVE * len(found) else None


def frames_that_save(graph: StepGraph, recomputed: Collection[ValueKey]) -> frozenset[str]:
    """The module calls in which something of a plan is saved, or may be."""
    wanted = set(recomputed)
    values = {value for value in graph.produced() if graph.value_key(value) in wanted}
    return frozenset(frame for value, frames in _saves(graph) if value in values for frame in frames)


def _saves(graph: StepGraph) -> Iterator[tuple[int, set[str]]]:
    """Each saved value, and the calls of the ops before and after the save: it may be of either."""
    frame = ""
    waiting: list[int] = []
    for kind, item in graph.log:
        if kind == LogKind.PACK:
            waiting.append(graph.saves[item].value)
        elif kind == LogKind.OP:
            is_over = item >= graph.forward_ops
            before, frame = frame, "" if is_over else graph.ops[item].key.frame
            for value in waiting:
                yield value, {before, frame}
            waiting.clear()
            if is_over:
                return
