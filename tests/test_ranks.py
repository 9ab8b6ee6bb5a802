"""Several processes train as one does with the whole batch, and stop together; see ``tests/ranked.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import ranked
from memfit.runtime.ranks import Ranks
from processes import on_ranks

Told = dict[str, Any]


def furthest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest number of a tensor."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(some, others, strict=True)
    )


@pytest.fixture(scope="module")
def ran() -> list[dict[str, Any]]:
    return on_ranks("ranked:everything")


@pytest.fixture(scope="module")
def two(ran: list[dict[str, Any]]) -> list[dict[str, Told]]:
    return [rank["same_as_one_process"] for rank in ran]


WAYS = (
    *("micro-batches", "counted by the audit", "whole batches", "unused", "views", "views, whole"),
    *("terms", "float32"),
)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one_process_does_with_the_whole_batch(
    two: list[dict[str, Told]], way: str
) -> None:
    dtype = torch.float32 if way == "float32" else torch.float64
    losses, weights = ranked.plain(ranked.both if way == "terms" else ranked.cross_entropy, dtype)
    near = 1e-5 if dtype is torch.float32 else 1e-12
    for rank in two:
        assert rank[way]["losses"] == pytest.approx(losses, rel=near)
        assert furthest(rank[way]["weights"], weights) < near


@pytest.mark.parametrize("way", WAYS)
def test_a_step_takes_one_all_reduce_a_bucket_whatever_the_accumulation(
    two: list[dict[str, Told]], way: str
) -> None:
    for rank in two:
        if way not in ("unused", "float32"):  # which have other buckets
            assert rank[way]["reduced"] == two[0]["whole batches"]["reduced"]
        assert rank[way]["reduced"][2] == rank[way]["reduced"][-1] > 1


@pytest.mark.parametrize("way", WAYS)
def test_ranks_have_one_plan_and_one_profile(two: list[dict[str, Told]], way: str) -> None:
    first, second = (rank[way] for rank in two)
    assert first["plan"] == second["plan"]
    assert first["profile"] == second["profile"]
    assert first["verdict"] == second["verdict"]
    assert first["verdict"].held
    assert first["verdict"].measured_peak_bytes <= first["verdict"].predicted_peak_bytes


def test_the_micro_batch_is_the_one_that_was_asked_for_on_the_largest_rank(
    two: list[dict[str, Told]],
) -> None:
    plan = json.loads(two[1]["micro-batches"]["plan"])
    assert plan["micro_batch_size"] <= 3
    assert plan["rows"] == 16
    assert two[0]["terms"]["terms"] == ["labels", "rows"]


def test_four_ranks_train_as_one_process_does() -> None:
    losses, weights = ranked.plain(rows=40)
    for rank in on_ranks("ranked:four", ranks=4):
        assert rank["losses"] == pytest.approx(losses, rel=1e-12)
        assert furthest(rank["weights"], weights) < 1e-12


def test_hooks_see_the_gradient_of_the_rank_once_as_in_plain_ddp(ran: list[dict[str, Any]]) -> None:
    for plain, ours, calls in (rank["hooked"] for rank in ran):
        assert furthest(ours, plain) < 1e-12
        assert float(plain[0].abs().max()) <= 1e-3  # the hook bites
        assert calls == 1


def test_gradients_in_bfloat16_are_added_up_in_float32(ran: list[dict[str, Any]]) -> None:
    for ours, exact, types in (rank["in_bfloat16"] for rank in ran):
        assert types == {torch.bfloat16}
        assert furthest(ours, exact) < 0.02


def test_a_rank_without_a_valid_label_takes_part(ran: list[dict[str, Any]]) -> None:
    for ours, plain, loss, expected in (rank["nothing_to_count"] for rank in ran):
        assert furthest(ours, plain) < 1e-12
        assert loss == pytest.approx(expected, rel=1e-12)


def test_ranks_count_by_the_counters_that_all_of_them_know(ran: list[dict[str, Any]]) -> None:
    for loss, expected in (rank["alike_on_one"] for rank in ran):
        assert loss == pytest.approx(expected, rel=1e-12)


def test_the_peak_of_each_rank_is_predicted_with_the_buckets(ran: list[dict[str, Any]]) -> None:
    for found in (rank["of_memory"] for rank in ran):
        for promised, measured in found:
            assert max(measured) <= promised <= max(measured) * 1.02


def test_out_of_memory_on_one_rank_is_rescued_on_all(ran: list[dict[str, Any]]) -> None:
    for losses, rescues, attempts, ours, plain in (rank["rescued"] for rank in ran):
        assert (rescues, attempts) == (1, 1)
        assert furthest(ours, plain) < 1e-12
        assert len(losses) == 4


def test_what_goes_wrong_on_one_rank_is_said_on_all(ran: list[dict[str, Any]]) -> None:
    first, second = (rank["refusals"] for rank in ran)
    assert first["one rank fails"] == "ValueError: rank 1: a label is 12, and there are 10 classes"
    assert second["one rank fails"] == "ValueError: a label is 12, and there are 10 classes"
    assert first["again"] == first["one rank fails"]
    for name, start in {
        "no memory": "InfeasibleBudget: ",
        "another budget": "InfeasibleBudget: ",
        "coupled": "InexactAccumulation: ",
        "batch norm": "InexactAccumulation: ",
        "static": "UnsupportedModel: DistributedDataParallel(static_graph=True)",
        "join": "UnsupportedModel: the step runs inside of DDP's join()",
        "nothing to count": "ValueError: count gave 0 for the whole batch",
        "bad batch": "InexactAccumulation: ",
    }.items():
        for rank in (first, second):
            assert rank[name].replace("rank 0: ", "").startswith(start), (name, rank[name])
    assert first["unlike"].startswith("InexactAccumulation: rank 1: the ranks do not count alike")
    assert second["unlike"] == first["unlike"].replace("rank 1: ", "")
    assert "count='rows'" in first["coupled"]
    assert "batch_norm='frozen'" in first["batch norm"]
    assert first["loss"] == second["loss"]


def test_one_process_meets_nobody() -> None:
    alone = Ranks()
    assert alone.table([1.0, 2.0]) == [[1.0, 2.0]]
    assert alone.share("text", 0) == "text"
    with pytest.raises(ValueError, match="own"), alone.together():
        raise ValueError("own")
