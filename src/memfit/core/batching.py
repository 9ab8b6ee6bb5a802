"""How many rows go into each micro-batch: equal parts, because time is about ``a + b * rows``.

Pure arithmetic on row counts; what a row is, the runtime knows.
"""

from __future__ import annotations


def balanced_parts(rows: int, parts: int) -> tuple[int, ...]:
    """Returns ``rows`` cut into ``parts`` sizes that differ by one at most, the larger first.

    Equal parts have the smallest largest part, and the largest part is what sets the peak.

    >>> balanced_parts(32, 3)
    (11, 11, 10)

    Args:
        rows: Rows of the effective batch, at least 1.
        parts: Number of micro-batches, from 1 to ``rows``: none is empty.

    Raises:
        ValueError: Some part would be empty, or there is none.
    """
    _check_rows(rows)
    if not 1 <= parts <= rows:
        raise ValueError(f"cannot cut {rows} rows into {parts} parts: choose from 1 to {rows}")
    size, larger = divmod(rows, parts)
    return (size + 1,) * larger + (size,) * (parts - larger)


def parts_for(rows: int, micro_batch_size: int) -> tuple[int, ...]:
    """Returns the fewest balanced parts of which none is larger than ``micro_batch_size`` rows.

    >>> parts_for(32, 12)
    (11, 11, 10)

    Raises:
        ValueError: ``rows`` or ``micro_batch_size`` is below 1.
    """
    _check_rows(rows)
    if micro_batch_size < 1:
        raise ValueError(f"a micro-batch of {micro_batch_size} rows holds nothing: choose at least 1")
    return balanced_parts(rows, -(-rows // micro_batch_size))


def candidate_part_counts(rows: int, limit: int = 8) -> tuple[int, ...]:
    """Returns at most ``limit`` numbers of parts worth trying, ascending, 1 and ``rows`` among them.

    Each one is the least that reaches its largest part, so no two have the same peak. They grow
    by powers of two and the steps half-way (1, 2, 3, 4, 6, 8, 12, ...): between neighbours the activations
    shrink by a third, and recomputation covers what lies between. Where that makes too many, those
    closest to their neighbours go, the largest first: a step with fewer parts is the faster one.

    >>> candidate_part_counts(32)
    (1, 2, 3, 4, 6, 11, 16, 32)

    Args:
        rows: Rows of the effective batch, at least 1.
        limit: Most numbers to return, at least 2.

    Raises:
        ValueError: ``rows`` is below 1, or ``limit`` is below 2.
    """
    _check_rows(rows)
    if limit < 2:
        raise ValueError(f"a limit of {limit} leaves no room for 1 and {rows} parts: choose at least 2")
    counts = {1, rows}
    power = 2
    while power < rows:
        wanted = (power, power + power // 2) if power > 2 else (2, 3)
        counts.update(_fewest_with_the_same_largest(rows, parts) for parts in wanted if parts < rows)
        power *= 2
    ascending = sorted(counts)
    while len(ascending) > limit:
        _drop_the_most_crowded(ascending)
    return tuple(ascending)


def _drop_the_most_crowded(ascending: list[int]) -> None:
    """Removes the inner count whose neighbours are closest in ratio; the largest one of several."""
    inner = range(1, len(ascending) - 1)
    crowded = min(inner, key=lambda at: (ascending[at + 1] / ascending[at - 1], -at))
    del ascending[crowded]


def _fewest_with_the_same_largest(rows: int, parts: int) -> int:
    largest = -(-rows // parts)
    return -(-rows // largest)


def _check_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"a batch of {rows} rows cannot be split: give at least 1 row")
