"""Every operator of PyTorch, in a step that recomputes all it can, against the plain step, to the bit.

Two samples of each; ``make operators`` runs all that the database of PyTorch has.
"""

from __future__ import annotations

import pytest

from operators import judged, operators, samples_of

PARTS = 24
MOST_SAMPLES = 2


@pytest.mark.parametrize("part", range(PARTS))
def test_no_operator_gives_another_gradient_or_raises_what_the_plain_step_does_not(part: int) -> None:
    wrong: list[str] = []
    recomputed: set[str] = set()
    for info in operators()[part::PARTS]:
        for sample in samples_of(info, MOST_SAMPLES):
            found = judged(sample)
            recomputed |= found.recomputed
            if found.status in ("differs", "raises"):
                wrong.append(f"{sample.name} {found.status}: {found.reason}")
    assert wrong == []
    assert len(recomputed) > 5
