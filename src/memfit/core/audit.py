"""Is a batch's gradient the weighted sum of its parts' gradients, and under which weights? Pure arithmetic.

Note [Verdict]
 1. *Evidence* is the gradient of every span of neighbouring rows that was run, as a column. Only relations
    between columns matter, so they come in an orthonormal basis of few dimensions.
 2. A counter gives each part the share count / sum of counts; "sum" gives each the weight 1. It fits if
    the weighted columns of each partition add up to the column of the whole. Parts are unequal: equal ones
    fit wrong rules too.
 3. Where none fits, least squares derives the weights of each partition. Weights that fit, sum to 1 and are
    sums of one number a row are a mean over unknown units; ones that fit but are not, belong to a function
    of an additive statistic (a root of a mean, say).
 4. A sum of two means over different units u, v is found without seeing its terms: the gradient of a span S
    is then the sum over its rows r of u_r/u(S) t_r + v_r/v(S) s_r, linear in the unknown t and s. There are
    more spans than unknowns, so a good fit is a proof.
 5. What is left depends on all rows at once.
Source: the classes A1 to A5 and B are those of the gradient accumulation literature collected for memfit;
points 3 and 4 are ordinary least squares (numpy.linalg.lstsq).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memfit.core.stored import FloatOrNan

Vector = NDArray[np.float64]
Span = tuple[int, int]
Counts = Mapping[str, Mapping[Span, float]]

SUM = "sum"
ROWS = "rows"


class Kind(Enum):
    """How the gradient of a batch follows from the gradients of its parts."""

    SUM = "sum"
    ROWS = "mean over rows"
    UNITS = "mean over counted units"
    MIXED = "terms with different weights"
    STATISTIC = "function of an additive statistic"
    COUPLED_LOSS = "loss couples the rows"
    COUPLED_LAYER = "layer couples the rows"
    STATEFUL = "forward changes its own state"
    SHARED_RANDOMNESS = "random numbers shared by the rows"
    GRADIENT_HOOK = "gradient hook is not linear"
    OPTIMIZER = "optimizer cannot accumulate"
    SAME = "every part has the same gradient"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Audit:
    """Whether gradient accumulation is exact for a model, loss, batch and optimizer, and why.

    Attributes:
        kind: What decides it.
        counter: What each micro-batch is weighted by: "rows", "labels", "shifted_labels", "sum" (weight 1)
            or the description of another count; None: no exact weights of micro-batches are known.
        worst_error: The largest relative error of the gradient that any split of the probe had, under
            ``counter``; without one, under the known counter that came nearest. NaN if nothing was run.
            Every parameter's gradient is scaled to the same norm before, so that a small one counts.
        owner: What decides: a module's path, a parameter or buffer, an optimizer, or "loss_fn".
        cures: What the user can do; empty where accumulation is exact.
        undecided: What this audit could not see.
        weights: The weights of the parts of the first split, where they are known.
        notes: What is worth knowing besides.
        alike: Counters that counted like ``counter`` wherever it was looked: a batch in which they differ
            must not be split.
        terms: Of a loss that is a mapping of terms which no one count fits: the audit of each, by name.
    """

    kind: Kind
    counter: str | None
    worst_error: FloatOrNan
    owner: str
    cures: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()
    terms: tuple[tuple[str, Audit], ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether weighted micro-batches, or terms of them, give the gradient of the whole batch."""
        terms = [audit for _, audit in self.terms]
        return all(term.is_exact for term in terms) if terms else self.counter is not None

    @property
    def reason(self) -> str:
        """Why micro-batches cannot be added up exactly, for a sentence."""
        if self.kind in {Kind.UNDECIDED, Kind.SAME}:
            return "it cannot be shown under which weights they add up" + "".join(
                f" ({reason})" for reason in self.undecided
            )
        return f"{self.owner}: {self.kind.value}"

    def to_data(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        error = None if np.isnan(self.worst_error) else self.worst_error
        terms = [[name, audit.to_data()] for name, audit in self.terms]
        return asdict(replace(self, terms=())) | {
            "kind": self.kind.name,
            "worst_error": error,
            "terms": terms,
        }

    def __str__(self) -> str:
        """A few lines for people."""
        counts = ", ".join(f"{name} by {audit.counter}" for name, audit in self.terms) or f"by {self.counter}"
        answer = f"exact, weighted {counts}" if self.is_exact else "not exact"
        error = "" if np.isnan(self.worst_error) else f" (worst relative error {self.worst_error:.1e})"
        lines = [f"accumulation is {answer}: {self.kind.value}, {self.owner}{error}"]
        for title, entries in (("cure", self.cures), ("undecided", self.undecided), ("note", self.notes)):
            lines += [f"  {title}: {entry}" for entry in entries]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The gradients of spans of rows of one probe. See Note [Verdict].

    Attributes:
        rows: Rows of the probe.
        columns: The gradient of each span, (dimensions,): of the whole and all parts.
        partitions: Each covers all rows.
        counts: By counter and span.
        tolerance: A relative error below it is rounding.
    """

    rows: int
    columns: Mapping[Span, Vector]
    partitions: tuple[tuple[Span, ...], ...]
    counts: Counts
    tolerance: float

    @property
    def whole(self) -> Vector:
        """The gradient of all rows."""
        return self.columns[0, self.rows]


class Finding(NamedTuple):
    """What the gradients alone say. ``equals`` are other counters that count alike on this probe."""

    kind: Kind
    counter: str | None
    error: float
    weights: tuple[float, ...] = ()
    equals: tuple[str, ...] = ()
    units: tuple[str, ...] = ()


def unequal_partitions(rows: int) -> tuple[tuple[Span, ...], ...]:
    """Splits of 3 or more rows into unequal neighbours, of which no two share a part.

    >>> unequal_partitions(6)
    (((0, 1), (1, 3), (3, 6)), ((0, 3), (3, 4), (4, 6)), ((0, 2), (2, 5), (5, 6)))
    """
    if rows < 3:
        raise ValueError(f"{rows} rows have no unequal splits: give at least 3")
    cuts: dict[int, list[tuple[int, ...]]] = {3: [(1,), (2,)], 4: [(1,), (3,)], 5: [(1,), (2, 3), (4,)]}
    chosen = cuts.get(rows, [(1, 3), (3, 4), (2, rows - 1)])
    return tuple(spans_between(rows, inner) for inner in chosen)


def spans_between(rows: int, inner: Sequence[int]) -> tuple[Span, ...]:
    """The spans that the cuts ``inner`` make of ``rows`` rows."""
    return tuple(pairwise([0, *inner, rows]))


def all_spans(rows: int) -> tuple[Span, ...]:
    """Every span of neighbouring rows."""
    return tuple((a, b) for a in range(rows) for b in range(a + 1, rows + 1))


def exact_counter(evidence: Evidence) -> Finding:
    """The counter that fits all partitions, or ``COUPLED_LOSS`` with the error of the nearest one."""
    errors = {name: _worst_error(evidence, name) for name in evidence.counts}
    fitting = [name for name, error in errors.items() if error <= evidence.tolerance]
    if not fitting:
        return Finding(Kind.COUPLED_LOSS, None, min(errors.values()))
    first = fitting[0]
    shares = shares_of(evidence, first)
    alike = [np.allclose(shares_of(evidence, name), shares, rtol=1e-9, atol=0) for name in fitting]
    if not all(alike):  # parts of equal gradients fit anything
        return Finding(Kind.SAME, None, errors[first], equals=tuple(fitting))
    kind = {SUM: Kind.SUM, ROWS: Kind.ROWS}.get(first, Kind.UNITS)
    weights = tuple(shares[: len(evidence.partitions[0])])
    return Finding(kind, first, errors[first], weights, tuple(fitting[1:]))


def explained(evidence: Evidence) -> Finding:
    """What a gradient is that no counter fits, from all spans: classes A3, A4, A5 or B."""
    nearest = exact_counter(evidence).error
    partitions = [spans_between(evidence.rows, (cut,)) for cut in range(1, evidence.rows)]
    partitions = [*evidence.partitions, *partitions]
    solved = [(p, _derived(evidence, p)) for p in partitions if all(_finite(evidence, s) for s in p)]
    if solved and all(error <= evidence.tolerance for _, (_, error) in solved):
        weights = tuple(float(w) for w in solved[0][1][0])
        kind = Kind.UNITS if _is_a_mean(evidence, solved) else Kind.STATISTIC
        return Finding(kind, None, nearest, weights)
    for units in combinations(_distinct(evidence), 2):
        if _two_terms(evidence, units) <= evidence.tolerance:
            return Finding(Kind.MIXED, None, nearest, units=units)
    return Finding(Kind.COUPLED_LOSS, None, nearest)


def shares_of(evidence: Evidence, name: str) -> list[float]:
    """The weights of the parts of all partitions, one after the other."""
    return [share for partition in evidence.partitions for share in _shares(evidence, name, partition)]


def _shares(evidence: Evidence, name: str, partition: Sequence[Span]) -> list[float]:
    """The weight of each part."""
    counts = [evidence.counts[name][span] for span in partition]
    return [1.0] * len(counts) if name == SUM else [count / sum(counts) for count in counts]


def _worst_error(evidence: Evidence, name: str) -> float:
    """The largest relative error over the partitions. A part that counts nothing need not have a gradient."""
    worst = 0.0
    for partition in evidence.partitions:
        counts = [evidence.counts[name][span] for span in partition]
        if not (all(np.isfinite(counts)) and min(counts) >= 0 and sum(counts) > 0):
            return float("inf")
        pairs = zip(_shares(evidence, name, partition), partition, strict=True)
        total = sum((w * evidence.columns[span] for w, span in pairs if w), np.zeros_like(evidence.whole))
        error = float(np.linalg.norm(total - evidence.whole) / np.linalg.norm(evidence.whole))
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst


def _derived(evidence: Evidence, partition: Sequence[Span]) -> tuple[Vector, float]:
    """Least-squares weights of a partition and their relative residual; infinite where anything would fit."""
    columns = np.stack([evidence.columns[span] for span in partition], axis=1)
    if np.linalg.matrix_rank(columns) < len(partition) or len(evidence.whole) <= len(partition):
        return np.zeros(len(partition)), float("inf")
    weights: Vector = np.linalg.lstsq(columns, evidence.whole, rcond=None)[0].astype(np.float64)
    residual = np.linalg.norm(columns @ weights - evidence.whole) / np.linalg.norm(evidence.whole)
    return weights, float(residual)


def _is_a_mean(evidence: Evidence, solved: Sequence[tuple[tuple[Span, ...], tuple[Vector, float]]]) -> bool:
    """Whether one number a row explains all derived weights, and they sum to 1."""
    spans = [span for partition, _ in solved for span in partition]
    member = np.array(
        [[float(a <= row < b) for row in range(evidence.rows)] for a, b in [*spans, (0, evidence.rows)]]
    )
    weights = np.concatenate([*(found for _, (found, _) in solved), [1.0]])
    units = np.linalg.lstsq(member, weights, rcond=None)[0]
    # Weights are as good as the columns are independent, so they get a wider margin than the gradient.
    return bool(np.abs(member @ units - weights).max() <= max(1e-6, 10 * evidence.tolerance))


def _distinct(evidence: Evidence) -> list[str]:
    """One counter of each set that counts alike, in order."""
    found: dict[tuple[float, ...], str] = {}
    for name, counts in evidence.counts.items():
        usable = all(np.isfinite(c) and c >= 0 for c in counts.values())
        if usable and counts[0, evidence.rows] > 0:
            found.setdefault(tuple(round(share, 12) for share in shares_of_rows(evidence, name)), name)
    return list(found.values())


def shares_of_rows(evidence: Evidence, name: str) -> list[float]:
    """The share of each row in the whole; 1 for a sum."""
    counts = evidence.counts[name]
    total = 1.0 if name == SUM else counts[0, evidence.rows]
    return [counts[row, row + 1] / total for row in range(evidence.rows)]


def _two_terms(evidence: Evidence, units: tuple[str, str]) -> float:
    """The relative residual of a sum of two means over two units. See Note [Verdict] 4."""
    spans = [span for span in all_spans(evidence.rows) if _finite(evidence, span)]
    spans = [span for span in spans if all(evidence.counts[unit][span] > 0 for unit in units)]
    matrix = np.zeros((len(spans), 2 * evidence.rows))
    for line, (a, b) in enumerate(spans):
        for block, unit in enumerate(units):
            counts = evidence.counts[unit]
            for row in range(a, b):
                share = 1.0 if unit == SUM else counts[row, row + 1] / counts[a, b]
                matrix[line, block * evidence.rows + row] = share
    if len(spans) < np.linalg.matrix_rank(matrix) + 3 or len(evidence.whole) < 3:
        return float("inf")  # too few spans to be refuted by
    columns = np.stack([evidence.columns[span] for span in spans])
    terms = np.linalg.lstsq(matrix, columns, rcond=None)[0]
    return float(np.linalg.norm(matrix @ terms - columns) / np.linalg.norm(columns))


def _finite(evidence: Evidence, span: Span) -> bool:
    """Whether a span has a gradient (one without any valid label has not)."""
    return span in evidence.columns and bool(np.isfinite(evidence.columns[span]).all())
