"""memfit.audit: the right class for every loss and layer, exact weights, cures, and no trace."""

from __future__ import annotations

import pytest
import torch

import audits
import memfit
from audits import Case
from memfit.core.audit import Kind

CASES = [*audits.REPORT, *audits.MORE]
# Their gradients may add up once the draws are the same, or where nobody reads the state.
ALIKE = {Kind.STATEFUL, Kind.SHARED_RANDOMNESS}


def made(case: Case) -> tuple[torch.nn.Module, audits.Batch]:
    torch.manual_seed(3)
    return case.model(), case.batch()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_each_loss_is_of_its_class(case: Case) -> None:
    model, batch = made(case)
    found = memfit.audit(model, case.loss, batch)
    assert (found.kind, found.counter) == (case.kind, case.counter), str(found)
    assert found.is_exact == (case.counter is not None)
    if found.is_exact:
        assert found.worst_error <= 1e-12
        assert found.cures == ()
    else:
        assert found.cures
        assert found.kind in ALIKE or not found.worst_error <= 1e-6
