"""Whether a step graph, a profile or a plan can be one: what every planner and simulation takes for granted.

Graphs made by the recorder are sound by construction; those that are read from a file are checked here, once.

Note [Sound]
 1. Each number that names something names what is there. An op reads what was made before it, so that
    replays end. Each value has one producer that lists it, each storage at most one maker.
 2. The log runs each op once, forward and backward in order. A save is packed once, then unpacked, then
    released once; a storage is let go of once, after it was made.
 3. All bytes together stay below 2**60, and all seconds below 10**12: sums stay exact in 64 bits and finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memfit.core.graph import Profile, StepGraph
    from memfit.core.plan import Plan

MOST_ROWS = 1 << 32
_MOST_BYTES = 1 << 60
_MOST_SECONDS = 1e12
_MOST_ALIGNMENT = 1 << 30
_OP, _PACK, _UNPACK, _RELEASE, _FREE = range(5)  # as LogKind has them


def check_plan(plan: Plan) -> None:
    """Raises ValueError where a plan holds numbers no plan can have."""
    _check_rows(plan.rows, plan.micro_batch_size, plan.gradient_accumulation_steps)
    if max(plan.micro_batch_size, plan.gradient_accumulation_steps) > plan.rows:
        raise ValueError("its micro-batches have more rows than the batch")
    _check_bytes([plan.predicted_peak_bytes, plan.recomputed_bytes, *plan.hidden[1:]])
    if plan.budget_bytes < 0:
        raise ValueError("its budget is below nothing")
    _check_seconds([plan.predicted_step_s, plan.forward_s, plan.recompute_s, plan.lower_bound_s])
    if plan.levels and len(plan.levels) != len(plan.recompute):
        raise ValueError(
            f"{len(plan.recompute)} tensors are recomputed, and there are {len(plan.levels)} levels"
        )


def check_profile(profile: Profile) -> None:
    """Raises ValueError where a profile is one that nothing recorded. See Note [Sound]."""
    _check_rows(profile.rows, *(graph.rows for graph in profile.graphs))
    residents = profile.residents
    if not profile.graphs or not 1 <= profile.alignment_bytes <= _MOST_ALIGNMENT:
        raise ValueError("there is no graph, or its alignment is none")
    _check_bytes([*residents.totals, profile.unexplained_bytes, residents.summed_bytes or 0])
    for sizes in (residents.parameter_sizes, residents.gradient_sizes, residents.batch_sizes):
        _check_bytes(sizes)
    _check_bytes(residents.summed_sizes)
    _check_seconds([profile.fixed_s])
    for graph in (*profile.graphs, profile.first_update, profile.update, profile.loss_of_all):
        check_graph(graph, alignment_bytes=profile.alignment_bytes)


def check_graph(graph: StepGraph, *, alignment_bytes: int = 1) -> None:
    """Raises ValueError where a graph is one that nothing recorded. See Note [Sound]."""
    _check_rows(graph.rows)
    if not 0 <= graph.forward_ops <= len(graph.ops):
        raise ValueError(f"it has {len(graph.ops)} ops, and {graph.forward_ops} of them are forward")
    sizes = [-(-s.size_bytes // alignment_bytes) * alignment_bytes for s in graph.storages]
    inner = [size for op in graph.ops for size in (op.temporary_bytes, op.seed_bytes, op.scratch_bytes)]
    if min((s.size_bytes for s in graph.storages), default=0) < 0:
        raise ValueError("a storage has less than no bytes")
    _check_bytes([*sizes, *inner, graph.held_bytes])
    _check_seconds([op.seconds for op in graph.ops] + [op.overhead_s for op in graph.ops])
    _check_values(graph)
    _check_ops(graph)
    _check_log(graph)


def _check_values(graph: StepGraph) -> None:
    """Values and saves name what is there."""
    for value in graph.values:
        if value.producer < -1 or value.output < 0:
            raise ValueError("a value has no such producer")
    _check_names(len(graph.storages), (value.storage for value in graph.values), "storage")
    _check_names(len(graph.ops), (v.producer for v in graph.values if v.producer >= 0), "op")
    _check_names(len(graph.values), (save.value for save in graph.saves), "value")


def _check_ops(graph: StepGraph) -> None:
    """Ops name what is there, and read what was made before."""
    made: set[int] = set()
    for index, op in enumerate(graph.ops):
        for values in (op.inputs, op.outputs, op.overwrites):
            _check_names(len(graph.values), values, "value")
        _check_names(len(graph.storages), op.allocates, "storage")
        if any(graph.values[value].producer >= index for value in (*op.inputs, *op.overwrites)):
            raise ValueError(f"op {op.key} reads what is made later")
        if any(graph.values[value].producer != index for value in op.outputs):
            raise ValueError(f"op {op.key} gives what another op makes")
        if not made.isdisjoint(op.allocates) or len(set(op.allocates)) < len(op.allocates):
            raise ValueError(f"op {op.key} allocates a storage for the second time")
        made.update(op.allocates)


def _check_log(graph: StepGraph) -> None:
    """What happens, happens in an order that is possible."""
    ran = set[int]()
    in_order = graph.forward_ops > 0  # an update begins with what is there all along
    packed, unpacked, released, freed = set[int](), set[int](), set[int](), set[int]()
    alive: set[int] = set()
    for kind, item in graph.log:
        is_possible = (
            (kind == _OP and 0 <= item < len(graph.ops) and item not in ran)
            or (kind == _PACK and 0 <= item < len(graph.saves) and item not in packed)
            or (kind == _UNPACK and item in packed and item not in released)
            or (kind == _RELEASE and item in packed and item not in released)
            or (kind == _FREE and item in alive and item not in freed)
        )
        if not is_possible or (kind == _OP and in_order and item != len(ran)):
            raise ValueError("the log names what is not there, or what cannot be at that moment")
        if kind == _OP:
            alive.update(graph.ops[item].allocates)
            ran.add(item)
        else:
            (packed, unpacked, released, freed)[kind - 1].add(item)
    if len(ran) != len(graph.ops):
        raise ValueError("the log names what is not there: it leaves ops out")


def _check_names(count: int, items: Iterable[int], noun: str) -> None:
    """Refuses an index without anything behind it."""
    if any(not 0 <= item < count for item in items):
        raise ValueError(f"it names a {noun} that is not there")


def _check_rows(*rows: int) -> None:
    if any(not 1 <= number <= MOST_ROWS for number in rows):
        raise ValueError(f"a number of rows is not between 1 and {MOST_ROWS:,}")


def _check_bytes(sizes: Sequence[int]) -> None:
    if any(size < 0 for size in sizes) or sum(sizes) >= _MOST_BYTES:
        raise ValueError("sizes are below nothing, or more than any machine has")


def _check_seconds(seconds: Sequence[float]) -> None:
    if not all(0 <= s < math.inf for s in seconds) or not sum(seconds) < _MOST_SECONDS:
        raise ValueError("seconds are below nothing, or more than anybody waits")
