"""Accelerate, the Trainer and Lightning on two processes train as on one with the whole batch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from torch import Tensor

import frameworks
from frameworks import Course
from processes import on_ranks

Ran = list[dict[str, Any]]

pytestmark = [  # Lightning's own
    pytest.mark.filterwarnings(r"ignore:.*`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return on_ranks("frameworks:everything", str(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def furthest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference of a tensor, by its norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(some, others, strict=True))


def assert_same(ran: Ran, name: str, plain: Course, steps: int) -> None:
    """All ranks came to what one process did, with as many reductions in each step as there are buckets."""
    assert len(plain.losses) == steps
    for found in (rank[name] for rank in ran):
        assert found.losses == pytest.approx(plain.losses, rel=1e-5)
        assert furthest(found.weights, plain.weights) < 1e-5
        assert len(found.reduced) == steps
        assert set(found.reduced) == {1}


def test_a_loop_with_accelerate_trains_as_one_process_does(ran: Ran) -> None:
    assert_same(ran, "loop", frameworks.looped(1), 6)


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [("trainer", "llama", {"even_batches": False}), ("trainer, filled", "words", {})],
)
def test_the_trainer_trains_as_one_process_does(
    ran: Ran, tmp_path: Path, name: str, kind: str, config: dict[str, Any]
) -> None:
    plain = frameworks.trained(1, str(tmp_path), kind, config)
    assert_same(ran, name, plain, 6)
    for found in (rank[name] for rank in ran):
        assert found.seen["norms"] == pytest.approx(plain.seen["norms"], rel=1e-5)
        assert found.seen["arguments"] == {(4, frameworks.ROWS // 4)}
        for what in ("logged", "events", "steps"):
            assert found.seen[what] == plain.seen[what]


def test_the_trainer_goes_on_from_a_checkpoint(ran: Ran) -> None:
    for rank in ran:
        assert rank["resumed"].losses == pytest.approx(rank["trainer"].losses, rel=1e-6)
        assert furthest(rank["resumed"].weights, rank["trainer"].weights) < 1e-6


def test_lightning_trains_as_one_process_does(ran: Ran) -> None:
    plain = frameworks.module_trained(1)
    assert_same(ran, "lightning", plain, 6)
    for rank in ran:
        for what in ("labels", "accuracy", "steps"):
            assert rank["lightning"].seen[what] == pytest.approx(plain.seen[what], rel=1e-6)
    first, second = (rank["lightning"].seen["of_rank"] for rank in ran)
    assert first != second  # on a step a metric is of the rank's own rows
    assert [sum(both) for both in zip(first, second, strict=True)] == pytest.approx(plain.seen["of_rank"])


def test_what_goes_wrong_on_one_rank_is_said_on_all(ran: Ran) -> None:
    first, second = (rank["refusals"] for rank in ran)
    assert first.keys() == second.keys()
    for name, says in {
        "budget": "InfeasibleBudget: ",
        "mean of means": "UnsupportedModel: average_tokens_across_devices: ",
        "collator": "ValueError: this row is broken",
        "step": "ValueError: a label is 12",
        "not prepared": "UnsupportedModel: the Accelerator trains in 2 processes, and the model is",
    }.items():
        for heard in (first, second):
            assert re.sub(r"^(\w+: )rank \d: ", r"\1", heard[name]).startswith(says), heard[name]
