"""Step graphs and profiles as values: what they refuse, what they find, and their JSON."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.core.graph import FORMAT, LogKind, OpKey, Profile, Residents, StepGraph, ValueKey
from memfit.core.soundness import check_graph
from memfit.core.stored import read
from strategies import Piece, build, flat_update, graphs, profiles

PIECES = (Piece(sizes=(10, 4), seconds=2.0), Piece(reads=(1,), sizes=(6,), seconds=1.0))
NOTHING = Residents(0, 0, 0, 0)
PROFILE = Profile(16, tuple(build(PIECES, rows=rows) for rows in (16, 8, 4)), NOTHING)


@given(graphs())
def test_a_graph_survives_plain_data(graph: StepGraph) -> None:
    back = read(StepGraph, json.loads(json.dumps(graph.to_data())), "a graph", check_graph)
    assert back == graph
    assert hash(back) == hash(graph)


@given(profiles())
def test_a_profile_survives_json(profile: Profile) -> None:
    assert Profile.from_json(profile.to_json()) == profile


def test_the_json_holds_every_field() -> None:
    """A field that the JSON forgot would come back as its default."""
    graph = replace(PROFILE.graphs[0], coupled=("block.0: aten.native_batch_norm.default",))
    first, later = flat_update(5, state_bytes=3), flat_update(6, seconds=6.0)
    residents = Residents(1, 2, 3, 4, (1,), (1, 1), (2, 2))
    unusual = Profile(16, (graph,), residents, first, later, 6.5, 7, 9, "fake", (("torch", "2"),))
    assert Profile.from_json(unusual.to_json()) == unusual
    named = {field.name for field in fields(Profile)}
    assert set(json.loads(unusual.to_json())) == named | {"format", "seal"}
    assert set(graph.to_data()) == {field.name for field in fields(StepGraph)}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"profile"'])
def test_text_that_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a memfit profile"):
        Profile.from_json(text)


@pytest.mark.parametrize("version", [FORMAT - 1, FORMAT + 1, None, str(FORMAT)])
def test_a_profile_of_another_version_is_refused(version: object) -> None:
    text = json.dumps(json.loads(PROFILE.to_json()) | {"format": version})
    with pytest.raises(ValueError, match=f"not a memfit profile of format {FORMAT}; make it again"):
        Profile.from_json(text)


@pytest.mark.parametrize("missing", ["rows", "graphs", "residents", "update"])
def test_a_profile_that_lacks_a_field_is_refused(missing: str) -> None:
    data = json.loads(PROFILE.to_json())
    del data[missing]
    with pytest.raises(ValueError, match="not a memfit profile"):
        Profile.from_json(json.dumps(data))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_seconds_that_no_op_can_take_are_refused(seconds: float) -> None:
    graph = PROFILE.graphs[0]
    with pytest.raises(ValueError, match=r"op block.0: aten.op.default has impossible seconds"):
        replace(graph, ops=(replace(graph.ops[0], seconds=seconds), *graph.ops[1:]))


def test_temporaries_below_nothing_are_refused() -> None:
    graph = PROFILE.graphs[0]
    with pytest.raises(ValueError, match="impossible seconds or bytes; record the step again"):
        replace(graph, ops=(replace(graph.ops[0], temporary_bytes=-1), *graph.ops[1:]))


def test_a_profile_with_impossible_seconds_cannot_be_read() -> None:
    text = PROFILE.to_json().replace("2.0", "NaN", 1)
    with pytest.raises(ValueError, match="seconds: nan is no finite number"):
        Profile.from_json(text)


@given(st.integers(1, 16))
def test_the_graph_of_a_size_is_the_smallest_that_holds_it(rows: int) -> None:
    found = PROFILE.graph(rows).rows
    assert found >= rows
    assert all(graph.rows >= found for graph in PROFILE.graphs if graph.rows >= rows)


def test_a_size_that_was_not_recorded_is_refused_with_the_largest_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"no micro-batch of 17 rows \(its largest has 16\); profile the batch"
    ):
        PROFILE.graph(17)


def test_seconds_are_the_sums_of_the_ops() -> None:
    """At one row as drawn: 2 and 1 forward, the same backward."""
    graph = build(PIECES)
    assert graph.forward_s == 3.0
    assert graph.seconds == 6.0


def test_a_value_is_named_by_the_call_site_of_its_op_and_its_number() -> None:
    graph = build(PIECES)
    assert list(graph.produced()) == [0, 1, 2]
    assert graph.value_key(1) == ValueKey("block.0", "aten.op.default", 0, 1)
    assert [graph.size_bytes(value) for value in graph.produced()] == [10, 4, 6]


def test_call_sites_read_well() -> None:
    assert str(OpKey("encoder.0", "aten.relu.default", 0)) == "encoder.0: aten.relu.default"
    assert str(OpKey("", "aten.add.Tensor", 2)) == "loss: aten.add.Tensor #2"


def test_residents_add_up() -> None:
    assert Residents(1, 20, 300, 4000).total_bytes == 4321


@given(graphs())
def test_a_drawn_step_is_as_consistent_as_a_recorded_one(graph: StepGraph) -> None:
    """Each storage is made once and dies once; each save is packed, unpacked and released in this order."""
    made = [storage for op in graph.ops for storage in op.allocates]
    freed = [item for kind, item in graph.log if kind == LogKind.FREE]
    assert sorted(made) == list(range(len(graph.storages)))
    assert sorted(freed) == [i for i, storage in enumerate(graph.storages) if not storage.persists]
    assert [item for kind, item in graph.log if kind == LogKind.OP] == list(range(len(graph.ops)))
    order = (LogKind.PACK, LogKind.UNPACK, LogKind.RELEASE)
    for save in range(len(graph.saves)):
        found = [kind for kind, item in graph.log if item == save and kind in order]
        assert found in ([LogKind.PACK, LogKind.RELEASE], list(order))
    assert not any(graph.values[save.value].is_overwritten for save in graph.saves)


def test_a_profile_without_the_sizes_of_its_residents_can_still_be_read() -> None:
    data = json.loads(PROFILE.to_json())
    for name in [name for name in data["residents"] if name.endswith("_sizes")]:
        del data["residents"][name]
    del data["seal"]
    assert Profile.from_json(json.dumps(data)) == PROFILE
