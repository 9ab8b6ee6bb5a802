"""Sums that a step does in place, and not where a dispatch mode looks on.

ATen adds the mask of attention and the bias of ``linear`` to what a matmul has just made, in place, unless a
dispatch mode or a tensor subclass looks on (``isTensorSubclassLike``). A graph has the step without a mode;
selective checkpointing runs one.
Sources: ``aten/src/ATen/native/transformers/attention.cpp``, ``aten/src/ATen/native/Linear.cpp`` (2.13).
"""

from __future__ import annotations

from dataclasses import replace

from memfit.core.graph import LogEntry, LogKind, Op, StepGraph, Storage, Value


def out_of_place(graph: StepGraph) -> StepGraph:
    """The same step with a dispatch mode: each of these sums has a storage of its own."""
    if not any(op.is_sum_in_place for op in graph.ops):
        return graph
    ops, storages, values = list(graph.ops), list(graph.storages), list(graph.values)
    log: list[LogEntry] = []
    moved: dict[int, int] = {}  # a storage that a sum has left -> the one it lives on in
    for kind, index in graph.log:
        if kind == LogKind.FREE:
            log.append(LogEntry(kind, moved.get(index, index)))
            continue
        log.append(LogEntry(kind, index))
        if kind == LogKind.OP and ops[index].is_sum_in_place:
            left = _give_own_storage(index, ops, storages, values)
            moved[left] = len(storages) - 1
            log.append(LogEntry(LogKind.FREE, left))
    return replace(graph, ops=tuple(ops), storages=tuple(storages), values=tuple(values), log=tuple(log))


def _give_own_storage(index: int, ops: list[Op], storages: list[Storage], values: list[Value]) -> int:
    """Lets a sum allocate its result; the storage that its operand is left in."""
    op = ops[index]
    (old,) = op.overwrites
    left, own = values[old].storage, len(storages)
    storages.append(storages[left])
    storages[left] = replace(storages[left], persists=False)
    for number, value in enumerate(values):
        if value.storage == left and value.producer >= index:
            values[number] = replace(value, storage=own)
    values[old] = replace(values[old], is_overwritten=False)
    ops[index] = replace(op, overwrites=(), allocates=(*op.allocates, own), is_sum_in_place=False)
    return left
