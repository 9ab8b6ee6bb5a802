"""The verdict from gradients alone: made-up gradients of every additive class, whose answer is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.core.audit import (
    Evidence,
    Kind,
    Span,
    Vector,
    all_spans,
    exact_counter,
    explained,
    unequal_partitions,
)

WIDE = 25
Gradient = Callable[[int, int], Vector]


def evidence(rows: int, gradient: Gradient, counts: dict[str, list[float]]) -> Evidence:
    """Evidence of all spans; ``counts`` are by row."""
    spans = all_spans(rows)
    return Evidence(
        rows,
        {span: gradient(*span) for span in spans},
        unequal_partitions(rows),
        {name: {(a, b): float(sum(each[a:b])) for a, b in spans} for name, each in counts.items()},
        1e-9,
    )


def mean_over(units: list[float], terms: Vector) -> Gradient:
    """The gradient of a mean over units, of which row r has units[r]."""
    u = np.array(units)
    return lambda a, b: u[a:b] @ terms[a:b] / u[a:b].sum()


@pytest.mark.parametrize("rows", range(3, 12))
def test_partitions_are_unequal_and_cover_all_rows_once(rows: int) -> None:
    partitions = unequal_partitions(rows)
    assert len(partitions) >= 2
    for partition in partitions:
        assert [row for a, b in partition for row in range(a, b)] == list(range(rows))
    assert any(len({b - a for a, b in partition}) > 1 for partition in partitions)
    assert len({span for partition in partitions for span in partition}) == sum(map(len, partitions))


@pytest.mark.parametrize("rows", [-1, 0, 1, 2])
def test_too_few_rows_have_no_unequal_partitions(rows: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows"):
        unequal_partitions(rows)


units_of_rows = st.lists(st.integers(1, 9), min_size=4, max_size=7).filter(lambda u: len(set(u)) > 1)


@given(units_of_rows, st.integers(0, 2**32 - 1))
def test_a_mean_over_known_units_is_found_and_over_unknown_ones_derived(units: list[int], seed: int) -> None:
    terms = np.random.default_rng(seed).normal(size=(len(units), WIDE))
    known: dict[str, list[float]] = {"rows": [1.0] * len(units), "labels": [float(u) for u in units]}
    gradient = mean_over(known["labels"], terms)
    found = exact_counter(evidence(len(units), gradient, known))
    shares = {tuple(np.array(u) / sum(u)) for u in known.values()}
    if len(shares) == 2:
        first = unequal_partitions(len(units))[0]
        by_parts = [[sum(u[a:b]) / sum(u) for a, b in first] for u in known.values()]
        if not np.allclose(by_parts[0], by_parts[1]):
            assert (found.kind, found.counter) == (Kind.UNITS, "labels")
    hidden = explained(
        evidence(len(units), gradient, {"rows": [1.0] * len(units), "sum": [1.0] * len(units)})
    )
    assert (hidden.kind, hidden.counter) == (Kind.UNITS, None)
    expected = [sum(units[a:b]) / sum(units) for a, b in unequal_partitions(len(units))[0]]
    assert hidden.weights == pytest.approx(expected, rel=1e-6)


@given(st.integers(5, 7), st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4))
def test_mixed_terms_a_root_and_coupled_rows_are_told_apart(rows: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    terms, others = rng.normal(size=(2, rows, WIDE))
    units = [float(1 + row * row % 5) for row in range(rows)]
    counts: dict[str, list[float]] = {"rows": [1.0] * rows, "labels": units}
    first, second = mean_over(units, terms), mean_over([1.0] * rows, others)
    values = rng.uniform(1, 2, rows)
    cases: list[tuple[Gradient, Kind]] = [
        (lambda a, b: first(a, b) + scale * second(a, b), Kind.MIXED),
        (lambda a, b: scale * terms[a:b].mean(0) / np.sqrt(values[a:b].mean()), Kind.STATISTIC),
        (lambda a, b: scale * rng.normal(size=WIDE), Kind.COUPLED_LOSS),
    ]
    for gradient, kind in cases:
        found = explained(evidence(rows, gradient, counts))
        assert (found.kind, found.counter) == (kind, None)
    mixed = explained(evidence(rows, cases[0][0], counts))
    assert mixed.units == ("rows", "labels")


def test_equal_gradients_of_the_parts_decide_nothing() -> None:
    found = exact_counter(
        evidence(6, lambda a, b: np.ones(WIDE), {"rows": [1.0] * 6, "labels": [1.0, 2, 3, 4, 5, 6]})
    )
    assert (found.kind, found.counter) == (Kind.SAME, None)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), 0.0])
def test_a_counter_that_counts_nonsense_never_fits(bad: float) -> None:
    terms = np.random.default_rng(0).normal(size=(6, WIDE))
    counts: dict[str, list[float]] = {"nonsense": [bad] * 6, "rows": [1.0] * 6}
    found = exact_counter(evidence(6, mean_over([1.0] * 6, terms), counts))
    assert (found.kind, found.counter, found.equals) == (Kind.ROWS, "rows", ())


def test_a_part_that_counts_nothing_needs_no_gradient() -> None:
    terms = np.random.default_rng(0).normal(size=(6, WIDE))
    units = [0.0, 2, 1, 3, 1, 2]

    def gradient(a: int, b: int) -> Vector:
        span: Span = (a, b)
        return np.full(WIDE, np.nan) if span == (0, 1) else mean_over(units, terms)(a, b)

    assert exact_counter(evidence(6, gradient, {"rows": [1.0] * 6, "labels": units})).counter == "labels"


def test_as_many_dimensions_as_parts_prove_nothing() -> None:
    rng = np.random.default_rng(1)
    found = explained(evidence(3, lambda a, b: rng.normal(size=2), {"rows": [1.0] * 3}))
    assert found.kind is Kind.COUPLED_LOSS


def test_more_parts_than_dimensions_prove_nothing() -> None:
    terms = np.random.default_rng(0).normal(size=(6, 2))
    gradient = mean_over([1.0, 2, 3, 4, 5, 7], terms)
    found = explained(evidence(6, gradient, {"rows": [1.0] * 6}))
    assert found.kind is Kind.COUPLED_LOSS
