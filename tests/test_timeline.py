"""The simulation against the slow reference, moment by moment, and against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from memfit.core import timeline
from memfit.core.graph import Level, LogEntry, LogKind, Op, OpKey, Profile, StepGraph
from memfit.core.timeline import Timeline, Walk, droppable, events, floors, run
from reference import live_bytes, step_peak_bytes
from strategies import Piece, build, choices, graphs, graphs_and_choices, profiles

Drawn = tuple[StepGraph, frozenset[int]]


def heights(graph: StepGraph, dropped: Iterable[int] = ()) -> list[int]:
    """Total bytes at each moment."""
    return [moment.total_bytes for moment in run(graph, dropped).moments]


def agrees_with_the_reference(drawn: Drawn, alignment_bytes: int = 1) -> bool:
    graph, dropped = drawn
    simulated = run(graph, dropped, alignment_bytes=alignment_bytes).moments
    return [tuple(m) for m in simulated] == [tuple(m) for m in live_bytes(graph, dropped, alignment_bytes)]


@settings(max_examples=250)
@given(graphs_and_choices(), st.sampled_from([1, 1, 8]))
def test_every_moment_holds_what_the_reference_holds(drawn: Drawn, alignment_bytes: int) -> None:
    assert agrees_with_the_reference(drawn, alignment_bytes)


@given(graphs_and_choices())
def test_each_dropped_value_that_is_unpacked_is_made_once_and_in_forward_order(drawn: Drawn) -> None:
    graph, dropped = drawn
    replayed = run(graph, dropped).replayed_ops
    assert len(replayed) == len(set(replayed))
    unpacked = {graph.saves[item].value for kind, item in graph.log if kind == LogKind.UNPACK}
    assert {graph.values[value].producer for value in unpacked & dropped} <= set(replayed)
    assert all(dropped.intersection(graph.ops[op].outputs) for op in replayed)


@given(graphs_and_choices())
def test_only_gradients_outlive_the_step(drawn: Drawn) -> None:
    graph, dropped = drawn
    last = LogEntry(LogKind.OP, len(graph.ops))
    longer = replace(graph, ops=(*graph.ops, Op(OpKey("", "look", 0))), log=(*graph.log, last))
    left = run(longer, dropped).moments[-1]
    persisting = sum(storage.size_bytes for storage in graph.storages if storage.persists)
    assert (left.activation_bytes, left.replayed_bytes, left.temporary_bytes) == (0, 0, 0)
    assert left.gradient_bytes == left.total_bytes == persisting


@given(profiles(), st.data())
def test_the_events_of_a_step_peak_where_the_reference_says(profile: Profile, data: st.DataObject) -> None:
    graph = data.draw(st.sampled_from(profile.graphs))
    dropped = data.draw(choices(graph))
    found = Timeline(tuple(events(profile, graph, dict.fromkeys(dropped, Level()))))
    first = Timeline(
        tuple(events(profile, graph, dict.fromkeys(dropped, Level()), first_step=True)),
    )
    assert max(found.peak_bytes, first.peak_bytes) == step_peak_bytes(profile, graph, dropped)
    assert (
        max(found.events[-1].total_bytes, first.events[-1].total_bytes) == floors(profile)[False].total_bytes
    )
    live = live_bytes(graph, dropped, profile.alignment_bytes)
    phases = [
        "recompute" if x.is_replay else "forward" if x.op < graph.forward_ops else "backward" for x in live
    ]
    assert [event.phase for event in found.events] == [*phases, "update"]
    assert [event.owner for event in found.events[:-1]] == [str(graph.ops[x.op].key) for x in live]


@given(graphs())
def test_a_value_is_droppable_if_it_can_be_replayed_from_what_is_kept(graph: StepGraph) -> None:
    for value in droppable(graph):
        op = graph.ops[graph.values[value].producer]
        assert op.is_replayable
        assert all(v in droppable(graph) for v in op.inputs if graph.values[v].is_overwritten)
    for value in set(range(len(graph.values))) - droppable(graph):
        op = graph.ops[graph.values[value].producer]
        lost = [v for v in op.inputs if graph.values[v].is_overwritten and v not in droppable(graph)]
        assert lost or not op.is_replayable


# ---- by hand --------------------------------------------------------------------------------------------

CHAIN = build(
    (
        Piece(sizes=(10,), saves_outputs=(0,)),
        Piece(reads=(0,), sizes=(20,), saves_outputs=(0,), frees=(0,)),
        Piece(reads=(0,), sizes=(1,), frees=(0,)),
    )
)


def test_a_chain_of_three_ops_that_keeps_everything() -> None:
    """a = 10 and b = 20 are saved, c = 1 is the loss; every gradient is 1.

    Forward: a; a+b; a+b+c. Backward: a first gradient is 32, each next one beside the one before it 33;
    before the last, b is released: a+c+1+1.
    """
    assert heights(CHAIN) == [10, 30, 31, 32, 33, 33, 13]
    assert run(CHAIN).peak.op == 4


def test_a_chain_that_replays_its_middle() -> None:
    """b dies after the forward: a+c+1 = 12, a+c+1+1 = 13. Its replay: a+b+c+1 = 32. Then as before."""
    assert heights(CHAIN, {1}) == [10, 30, 31, 12, 13, 32, 33, 13]
    assert run(CHAIN, {1}).replayed_ops == [1]


def test_a_chain_that_replays_everything() -> None:
    """The forward no longer holds a beside c: b+c = 21. Then c+1 = 2, c+1+1 = 3.

    The replay of a: a+c+1 = 12, and of b: 32. Both are there until they are released.
    """
    assert heights(CHAIN, {0, 1}) == [10, 30, 21, 2, 3, 12, 32, 33, 13]
    assert run(CHAIN, {0, 1}).replayed_ops == [0, 1]


def test_sizes_are_rounded_up_to_whole_blocks() -> None:
    """Blocks of 8: a = 16, b = 24, c = 8, gradients 8."""
    rounded = run(CHAIN, alignment_bytes=8).moments
    assert [moment.total_bytes for moment in rounded] == [16, 40, 48, 56, 64, 64, 40]


IN_PLACE = (
    Piece(sizes=(10,)),
    Piece(reads=(0,), writes_in_place=True, saves_outputs=(0,)),
    Piece(reads=(0,), sizes=(1,), frees=(0,)),
)


def test_a_replayed_write_in_place_takes_the_old_version_over() -> None:
    """a = 10, overwritten by b; c = 1. The replays of a and of b hold b's one block: 10+c+1 = 12 both."""
    graph = build(IN_PLACE)
    assert graph.ops[1].overwrites == (0,)
    assert heights(graph, {0, 1}) == [10, 10, 11, 2, 3, 12, 12, 13, 3]


def test_a_replayed_write_in_place_copies_what_another_replay_will_read() -> None:
    """d = 5 reads a too, and is needed after b: so a lives beside b from 10+c+1 = 12 to 20+c+1 = 22.

    b's node: a+b+c+1+1 = 23. b is released; the replay of d reads a: 10+5+c+1 = 17; then d: 5+c+1+1 = 8.
    """
    first, *rest = IN_PLACE
    reader = Piece(reads=(0,), sizes=(5,), saves_outputs=(0,))
    graph = build((first, reader, *rest[:1], Piece(reads=(0,), sizes=(1,), frees=(0, 0))))
    assert graph.ops[2].overwrites == (0,)
    assert heights(graph, {0, 1, 2}) == [10, 15, 15, 16, 2, 3, 12, 22, 23, 17, 8, 3]


def test_a_value_that_two_nodes_saved_is_replayed_once_and_lives_until_both_are_done() -> None:
    """a = 10 is saved by the ops that make b = 2 and c = 1; each takes 10 on top of c, 1 and 1."""
    reader = Piece(reads=(0,), sizes=(2,), saves_inputs=True)
    graph = build((Piece(sizes=(10,)), reader, reader._replace(sizes=(1,), frees=(0, 0))))
    assert heights(graph, {0}) == [10, 12, 13, 2, 12, 13, 13, 3]
    assert run(graph, {0}).replayed_ops == [0]


def test_a_record_that_nobody_needs_lasts_as_long_as_the_forward() -> None:
    """b = 20 is dropped but never saved: its record holds a = 10 and a generator state of 7 beside c = 1."""
    random = Piece(reads=(0,), sizes=(20,), seed_bytes=7, frees=(0,))
    graph = build((Piece(sizes=(10,)), random, Piece(reads=(0,), sizes=(1,), frees=(0,))))
    assert heights(graph, {1}) == [10, 37, 38, 2, 3, 3, 3]
    assert run(graph, {1}).replayed_ops == []


def test_a_value_released_in_the_forward_and_saved_again_is_replayed_once() -> None:
    """A dead node saves a = 10 and lets it go; the next op saves it again, when only its record has it."""
    dead = Piece(sizes=(10,), saves_outputs=(0,), is_dead=True)
    graph = build((dead, Piece(reads=(0,), sizes=(1,), saves_inputs=True, frees=(0,))))
    assert heights(graph, {0}) == [10, 11, 2, 12, 13]


# ---- canaries -------------------------------------------------------------------------------------------


class ReplayedValuesWeighNothing(Walk):
    def _note(self, op: int, is_replay: bool, temporary_bytes: int) -> None:
        self.replayed, replayed = 0, self.replayed
        super()._note(op, is_replay, temporary_bytes)
        self.replayed = replayed


class ReplaysNeedNoTemporaries(Walk):
    def _note(self, op: int, is_replay: bool, temporary_bytes: int) -> None:
        super()._note(op, is_replay, 0 if is_replay else temporary_bytes)


class TheProgramLetsNothingGo(Walk):
    def free(self, storage: int) -> None:
        pass


class TheBackwardReleasesNothing(Walk):
    def release(self, save: int) -> None:
        pass


class EveryWriteCopies(Walk):
    def _overwritten(self, index: int, output: int) -> int | None:
        return None


class GeneratorStatesWeighNothing(Walk):
    def __init__(self, graph: StepGraph, dropped: Mapping[int, Level], alignment_bytes: int) -> None:
        ops = tuple(replace(op, seed_bytes=0) for op in graph.ops)
        super().__init__(replace(graph, ops=ops), dropped, alignment_bytes)


class RecordsOutliveTheForward(Walk):
    def end_forward(self) -> None:
        pass


class BlocksAreNotRounded(Walk):
    def __init__(self, graph: StepGraph, dropped: Mapping[int, Level], alignment_bytes: int) -> None:
        super().__init__(graph, dropped, 1)


MUTANTS = (
    ReplayedValuesWeighNothing,
    ReplaysNeedNoTemporaries,
    TheProgramLetsNothingGo,
    TheBackwardReleasesNothing,
    EveryWriteCopies,
    GeneratorStatesWeighNothing,
    RecordsOutliveTheForward,
    BlocksAreNotRounded,
)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_comparing_whole_timelines_kills_a_mutant(
    mutant: type[Walk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "Walk", mutant)
    search = settings(
        max_examples=400, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck)
    )
    # Raises NoSuchExample if the comparison above would not notice the mutant.
    find(graphs_and_choices(), lambda drawn: not agrees_with_the_reference(drawn, 8), settings=search)
