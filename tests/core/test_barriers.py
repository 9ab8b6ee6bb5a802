"""Barriers: whatever is dropped, a replay runs only where the parameters of its ops are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memfit.core.barriers import Stretch, barriers, with_barriers
from memfit.core.graph import LogEntry, LogKind, Op, OpKey, Save, StepGraph, Storage, Value
from memfit.core.timeline import droppable

_STRETCHES: list[Stretch] = [(), ("a",), ("a", "in"), ("b",)]

Step = tuple[StepGraph, list[Stretch], list[Stretch]]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """A forward of ops that read earlier values, each in some stretch, and saves of some values."""
    ops: list[Op] = []
    places: list[Stretch] = []
    for index in range(draw(st.integers(1, 8))):
        inputs = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        key = OpKey("", f"op{index}", 0)
        ops.append(Op(key, tuple(inputs), (index,), allocates=(index,), is_replayable=draw(st.booleans())))
        places.append(draw(st.sampled_from(_STRETCHES)))
    saves = draw(st.lists(st.tuples(st.integers(0, len(ops) - 1), st.sampled_from(_STRETCHES)), max_size=6))
    graph = StepGraph(
        rows=1,
        forward_ops=len(ops),
        gradients_resident=False,
        ops=tuple(ops),
        storages=(Storage(8),) * len(ops),
        values=tuple(Value(i, i, 0) for i in range(len(ops))),
        saves=tuple(Save(value) for value, _ in saves),
        log=tuple(LogEntry(LogKind.OP, i) for i in range(len(ops))),
    )
    return graph, places, [place for _, place in saves]


def replayed_for(graph: StepGraph, dropped: set[int], value: int) -> set[int]:
    """The ops that run again when a value is wanted, by their definition."""
    if value not in dropped:
        return set()
    op = graph.values[value].producer
    return {op}.union(*(replayed_for(graph, dropped, v) for v in graph.ops[op].inputs))


def is_within(inner: Stretch, outer: Stretch) -> bool:
    return "/".join(inner).startswith("/".join(outer))


@given(steps(), st.data())
def test_no_plan_replays_an_op_whose_parameters_are_gone(step: Step, data: st.DataObject) -> None:
    graph, places, save_places = step
    allowed = sorted(droppable(with_barriers(graph, places, save_places)))
    dropped = data.draw(st.sets(st.sampled_from(allowed))) if allowed else set()
    for save, place in zip(graph.saves, save_places, strict=True):
        for op in replayed_for(graph, dropped, save.value):
            assert is_within(place, places[op])


@given(steps())
def test_each_barrier_has_a_reader_outside_of_its_stretch(step: Step) -> None:
    graph, places, save_places = step
    readers = [(v, places[i]) for i, op in enumerate(graph.ops) for v in op.inputs]
    readers += [(save.value, place) for save, place in zip(graph.saves, save_places, strict=True)]
    for value in barriers(graph, places, save_places):
        assert any(not is_within(place, places[value]) for v, place in readers if v == value)


@given(steps())
def test_a_model_without_stretches_has_no_barrier(step: Step) -> None:
    graph, places, save_places = step
    assert with_barriers(graph, [()] * len(places), [()] * len(save_places)) == graph
