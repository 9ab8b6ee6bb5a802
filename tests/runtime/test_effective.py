"""What micro-batches weigh on several ranks; how processes find each other, if there are others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import TCPStore

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


def test_a_restarted_process_reads_nothing_of_those_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps one store for all restarts: what a first attempt wrote there must not be found later."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    agents = {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "localhost",
    }
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(store.port)}
    for name, value in (agents | here).items():
        monkeypatch.setenv(name, value)
    written = []
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        before = {*store.list_keys()}
        with process_group(None) as ranks:
            assert ranks.size == 1
        written.append({*store.list_keys()} - before)
    assert all(written)
    assert {key.partition("/")[0] for keys in written for key in keys} == {"attempt 0", "attempt 1"}
