"""Laws of cutting rows into micro-batches."""

from __future__ import annotations

import doctest
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.core import batching
from memfit.core.batching import balanced_parts, candidate_part_counts, parts_for

ROWS = st.integers(min_value=1, max_value=5_000)


def rows_and_parts() -> st.SearchStrategy[tuple[int, int]]:
    """Draws a number of rows and a number of parts that it can be cut into."""
    return ROWS.flatmap(lambda rows: st.tuples(st.just(rows), st.integers(1, rows)))


def test_the_examples_in_the_documentation_are_true() -> None:
    results = doctest.testmod(batching)
    assert (results.failed, results.attempted) == (0, 3)


@given(rows_and_parts())
def test_parts_lose_no_row_and_differ_by_one_at_most(drawn: tuple[int, int]) -> None:
    rows, parts = drawn
    sizes = balanced_parts(rows, parts)
    assert sum(sizes) == rows
    assert len(sizes) == parts
    assert min(sizes) >= 1
    assert sizes[0] - sizes[-1] <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(ROWS, st.integers(min_value=1, max_value=6_000))
def test_no_fewer_parts_respect_the_micro_batch_size(rows: int, micro_batch_size: int) -> None:
    sizes = parts_for(rows, micro_batch_size)
    assert max(sizes) <= micro_batch_size
    fewer = len(sizes) - 1
    assert fewer == 0 or max(balanced_parts(rows, fewer)) > micro_batch_size


@given(ROWS, st.integers(min_value=2, max_value=20))
def test_candidates_are_few_distinct_and_hold_both_ends(rows: int, limit: int) -> None:
    counts = candidate_part_counts(rows, limit)
    assert counts[0] == 1
    assert counts[-1] == rows
    assert len(counts) <= limit
    largest = [balanced_parts(rows, count)[0] for count in counts]
    assert largest == sorted(set(largest), reverse=True)


@given(st.integers(min_value=2, max_value=5_000))
def test_neighbouring_candidates_leave_no_gap_larger_than_half(rows: int) -> None:
    counts = candidate_part_counts(rows, limit=100)
    largest = [balanced_parts(rows, count)[0] for count in counts]
    assert all(2 * smaller + 1 >= larger for larger, smaller in pairwise(largest))


@pytest.mark.parametrize(
    ("rows", "limit", "expected"),
    [
        (1, 8, (1,)),
        (2, 8, (1, 2)),
        (3, 8, (1, 2, 3)),
        (4, 8, (1, 2, 4)),
        (7, 8, (1, 2, 3, 4, 7)),
        (32, 100, (1, 2, 3, 4, 6, 8, 11, 16, 32)),
        (32, 2, (1, 32)),
        (256, 8, (1, 2, 6, 12, 24, 64, 128, 256)),
    ],
)
def test_candidates_of_batches_known_by_hand(rows: int, limit: int, expected: tuple[int, ...]) -> None:
    assert candidate_part_counts(rows, limit) == expected


@pytest.mark.parametrize(("rows", "parts"), [(4, 5), (4, 0), (4, -1)])
def test_a_number_of_parts_that_leaves_one_empty_is_refused(rows: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"cannot cut 4 rows into {parts} parts: choose from 1 to 4"):
        balanced_parts(rows, parts)


def test_a_batch_or_a_micro_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 0 rows cannot be split"):
        parts_for(0, 1)
    with pytest.raises(ValueError, match="a batch of 0 rows cannot be split"):
        candidate_part_counts(0)
    with pytest.raises(ValueError, match="a micro-batch of 0 rows holds nothing"):
        parts_for(4, 0)
    with pytest.raises(ValueError, match="a limit of 1 leaves no room"):
        candidate_part_counts(4, limit=1)
