"""Costs carried from two measured sizes to a third: lines that never fall, medians that are shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.core.costs import (
    Measured,
    fixed_share,
    measured,
    quicker,
    scaled,
    with_costs,
    with_made_bytes,
    with_overhead,
)
from memfit.core.graph import Op, OpKey, StepGraph
from strategies import Piece, build

KEY = OpKey("block.0", "aten.op.default", 0)
ONE = build((Piece(sizes=(10,)),))  # one forward op, KEY, and two of the backward
AMOUNTS = st.integers(0, 1000)
ROWS = st.integers(1, 64)


def at(rows: int, seconds: float, temporary_bytes: int = 0) -> Measured:
    """A run in which the op took this much."""
    return Measured(rows, {KEY: seconds}, {KEY: temporary_bytes})


def costs_at(rows: int, small: Measured, large: Measured) -> Op:
    """The op as it is expected to be at some rows."""
    return with_costs(replace(ONE, rows=rows), small, large).ops[0]


def timed(*seconds: float) -> StepGraph:
    """A step whose forward ops took this long."""
    graph = build(tuple(Piece(sizes=(10 * (i + 1),)) for i in range(len(seconds))))
    ops = [replace(op, seconds=s) for op, s in zip(graph.ops, seconds, strict=False)]
    return replace(graph, ops=(*ops, *graph.ops[len(ops) :]))


def test_costs_lie_on_the_line_through_both_measurements() -> None:
    """From (2, 5 s) and (4, 9 s): 2 s a row and 1 s fixed, so 17 s at 8. Bytes: 3 a row, 10 fixed: 34."""
    found = costs_at(8, at(2, 5.0, 16), at(4, 9.0, 22))
    assert (found.seconds, found.temporary_bytes) == (17.0, 34)


@given(ROWS, AMOUNTS, ROWS, AMOUNTS, ROWS, st.integers(0, 64))
def test_more_rows_never_cost_less_and_nothing_costs_less_than_nothing(
    rows_a: int, a: int, rows_b: int, b: int, rows: int, more: int
) -> None:
    small, large = sorted([at(rows_a, a, a), at(rows_b, b, b)], key=lambda run: run.rows)
    fewer, most = costs_at(rows, small, large), costs_at(rows + more, small, large)
    assert 0 <= fewer.seconds <= most.seconds
    if not {rows, rows + more} & {rows_a, rows_b}:  # a size that was measured has what was measured
        assert 0 <= fewer.temporary_bytes <= most.temporary_bytes


def test_a_larger_run_that_was_faster_gives_a_level_line() -> None:
    assert [costs_at(rows, at(2, 9.0), at(4, 5.0)).seconds for rows in (1, 4, 40)] == [5.0, 5.0, 5.0]


def test_nothing_costs_less_than_its_share_of_the_rows() -> None:
    """From (4, 1 s) and (8, 9 s) a line would fall to nothing at 3.5 rows, and a step never does."""
    found = costs_at(2, at(4, 1.0, 1), at(8, 9.0, 9))
    assert (found.seconds, found.temporary_bytes) == (9.0 * 2 / 8, 0)


@pytest.mark.parametrize(("rows", "seconds"), [(2, 3.0), (4, 6.0), (12, 18.0)])
def test_seconds_of_one_measurement_grow_with_the_rows(rows: int, seconds: float) -> None:
    assert costs_at(rows, at(4, 6.0), at(4, 6.0)).seconds == seconds


def test_the_fixed_part_is_read_off_the_whole_step_so_that_one_noisy_op_does_not_bend_its_own_line() -> None:
    """Totals 10 s and 18 s at 2 and 4 rows: 2 of 18 s are fixed, for the op that seemed to shrink as well."""
    other = OpKey("other", "aten.op.default", 0)
    small, large = Measured(2, {KEY: 4.0, other: 6.0}, {}), Measured(4, {KEY: 3.0, other: 15.0}, {})
    assert fixed_share(small, large) == pytest.approx(2 / 18)
    assert costs_at(8, small, large).seconds == pytest.approx(3.0 * (2 / 18 + 16 / 18 * 2))


def test_bytes_of_two_recorded_sizes_lie_on_their_line() -> None:
    """10 B at 2 rows and 16 B at 4 rows: 3 B a row and 4 B fixed, so 28 B at 8 rows."""
    small, large = (
        replace(ONE, rows=rows, storages=tuple(replace(s, size_bytes=size) for s in ONE.storages))
        for rows, size in ((2, 10), (4, 16))
    )
    assert {s.size_bytes for s in scaled(small, large, 8).storages} == {28}


def test_seconds_of_two_recorded_sizes_lie_on_their_line_so_that_a_launch_is_never_scaled_away() -> None:
    """5 s at 2 rows and 9 s at 4 rows: 1 s fixed and 2 s a row."""
    small, large = (
        replace(ONE, rows=rows, ops=tuple(replace(op, seconds=seconds) for op in ONE.ops))
        for rows, seconds in ((2, 5.0), (4, 9.0))
    )
    assert {op.seconds for op in scaled(small, large, 8).ops} == {17.0}
    assert {op.seconds for op in scaled(small, large, 1).ops} == {3.0}


def test_what_two_runs_did_differently_grows_with_the_rows_but_for_gradients() -> None:
    large = replace(ONE, rows=4)
    small = replace(ONE, rows=2, log=ONE.log[:-1])
    found = scaled(small, large, 8)
    expected = [s.size_bytes * (1 if s.persists else 2) for s in ONE.storages]
    assert [s.size_bytes for s in found.storages] == expected


def test_the_quicker_of_two_runs_counts_and_the_larger_of_their_temporaries() -> None:
    found = quicker(at(2, 5.0, 7), at(2, 4.0, 9))
    assert (found.seconds[KEY], found.temporary_bytes[KEY]) == (4.0, 9)


def test_an_op_seen_in_the_large_run_only_counts_as_the_same_in_both() -> None:
    unseen = Measured(2, {}, {})
    found = costs_at(8, unseen, at(4, 6.0, 11))
    assert (found.seconds, found.temporary_bytes) == (6.0, 11)


def test_an_op_that_no_run_saw_keeps_what_it_has() -> None:
    elsewhere = Measured(4, {OpKey("other", "aten.op.default", 0): 6.0}, {})
    assert with_costs(ONE, elsewhere, elsewhere) == ONE


def test_ops_that_look_alike_share_the_median_of_their_seconds() -> None:
    graph = timed(1.0, 7.0, 2.0, 30.0)
    found = measured(graph, ["add", "add", "add", "mm", *["other"] * 5], [None] * 9)
    assert [found.seconds[op.key] for op in graph.ops[:4]] == [2.0, 2.0, 2.0, 30.0]


def test_temporaries_are_what_an_op_allocated_beyond_what_it_made() -> None:
    """The ops make 10 and 20 bytes: peaks of 25 and 12 leave 15, and nothing rather than -8."""
    graph = timed(1.0, 1.0)
    found = measured(graph, range(5), [25, 12, None, None, None])
    assert found.temporary_bytes == {graph.ops[0].key: 15, graph.ops[1].key: 0}


def test_a_sum_that_autograd_does_in_place_has_no_temporaries() -> None:
    """Measured, it makes its output; in the graph it writes over an operand. Another op has what it has."""
    graph = timed(1.0, 1.0)
    sum_, other = (replace(op, allocates=()) for op in graph.ops[:2])
    sum_ = replace(sum_, key=OpKey("", "aten.add.Tensor of AddBackward0", 0))
    found = measured(replace(graph, ops=(sum_, other, *graph.ops[2:])), range(5), [10, 10, None, None, None])
    assert found.temporary_bytes == {other.key: 10}


def test_a_signature_for_each_op_is_demanded() -> None:
    with pytest.raises(ValueError, match="zip"):
        measured(ONE, ["add"], [None] * 3)


def test_what_an_op_makes_is_corrected_by_runs_of_more_rows() -> None:
    """Recorded 10 B at 8 rows, but 30 and 50 B were made at 4 and 8 rows: at 16 rows it makes 90 B."""
    graph = replace(ONE, rows=16)
    small, large = (Measured(rows, {}, {}, {KEY: size}) for rows, size in ((4, 30), (8, 50)))
    found = with_made_bytes(graph, small, large)
    assert [found.storages[s].size_bytes for s in graph.ops[0].allocates] == [90]
    unseen = Measured(4, {}, {}, {})
    assert with_made_bytes(graph, unseen, large) == graph


@pytest.mark.parametrize(("is_asynchronous", "expected"), [(False, [5.0, 7.0]), (True, [3.0, 4.0])])
def test_what_a_replay_costs_in_python_is_hidden_by_kernels_that_run_meanwhile(
    is_asynchronous: bool, expected: list[float]
) -> None:
    """Ops of 2 and 4 seconds, 3 seconds of Python for each replay."""
    pieces = (Piece(sizes=(1,), seconds=2.0), Piece(reads=(0,), sizes=(1,), seconds=4.0))
    graph = with_overhead(build(pieces), 3.0, is_asynchronous=is_asynchronous)
    assert [op.replay_s for op in graph.ops[: graph.forward_ops]] == expected
    assert all(op.overhead_s == 0 for op in graph.ops[graph.forward_ops :])
    assert graph.forward_s == 6.0


def test_temporaries_beyond_the_measured_rows_lie_on_the_line_to_those_at_the_most_rows() -> None:
    """10 at 2 rows, 20 at 4, 90 at 8: at 6 rows 55 where the old line says 30; at 3 still 15."""
    small, large, top = (Measured(rows, {KEY: 1.0}, {KEY: b}) for rows, b in ((2, 10), (4, 20), (8, 90)))
    found = [
        with_costs(replace(ONE, rows=rows), small, large, more).ops[0].temporary_bytes
        for rows, more in ((6, []), (6, [top]), (8, [top]), (3, [top]))
    ]
    assert found == [30, 55, 90, 15]


def test_temporaries_of_one_row_do_not_tell_of_those_of_more() -> None:
    """16 at 1 row and 48 at 2, as attention's backward has: 16 more a row, not 16 times the rows."""
    one, two = (Measured(rows, {KEY: 1.0}, {KEY: b}) for rows, b in ((1, 16), (2, 48)))
    found = [
        with_costs(replace(ONE, rows=rows), one, one, [two]).ops[0].temporary_bytes for rows in (1, 2, 5)
    ]
    assert found == [16, 48, 144]


def test_one_row_has_the_temporaries_measured_there_and_tells_nothing_of_more_rows() -> None:
    small, large = at(4, 1.0, 400), at(8, 2.0, 800)
    for own in (7, 900):  # less, and more, than the line through the others says
        found = {
            rows: with_costs(replace(ONE, rows=rows), small, large, [at(1, 0.0, own)]).ops[0].temporary_bytes
            for rows in (1, 2, 4, 6)
        }
        assert found == {1: own, 2: 200, 4: 400, 6: 600}
