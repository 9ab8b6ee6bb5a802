"""What micro-batches weigh on several ranks, and a torch without ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memfit.errors import InexactAccumulation
from memfit.runtime.accumulate import is_nothing
from memfit.runtime.count import Weigher
from memfit.runtime.effective import Way, open_batch
from memfit.runtime.group import process_group
from memfit.runtime.replicas import Engine


@pytest.mark.parametrize("counter", [None, {}, Weigher()])
def test_a_batch_that_nobody_can_count_is_refused_and_is_no_gradient_of_zero(counter: object) -> None:
    with pytest.raises(InexactAccumulation, match="say it with count="):
        open_batch(Engine(nn.Linear(2, 2)), counter, {"x": torch.ones(4, 2)}, Way(), None)  # type: ignore[arg-type]


def test_a_part_without_terms_is_an_error_and_not_nothing() -> None:
    assert is_nothing({"one": 0.0})
    assert not is_nothing({"one": 0.0, "other": 0.5})
    with pytest.raises(AssertionError):
        is_nothing({})


def test_a_torch_built_without_distributed_runs_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_c10d_init")  # by which torch knows that it has it
    monkeypatch.delattr(torch.distributed, "is_torchelastic_launched")
    with process_group(None) as ranks:
        assert ranks.size == 1
