"""A step of the effective batch: exact for every batch and loss, and a broken promise is mended."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memfit
from memfit.core.graph import Profile
from memfit.errors import InexactAccumulation, InfeasibleBudget, VerificationFailed
from memfit.runtime import step as step_module
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.meter import PeakMeter
from memfit.runtime.step import Step, Verdict
from models import LossFn, assert_same, differences, outcome_of

ROWS, WIDTH, VOCABULARY = 12, 16, 11


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


def mlp(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    """Three layers."""
    parts = [nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(32, VOCABULARY)).to(dtype)


def batch_of(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Numbers with a label each."""
    return {"x": torch.randn(rows, WIDTH, dtype=dtype), "labels": torch.randint(0, VOCABULARY, (rows,))}


def mean_over_rows(model: Any, batch: Any) -> Tensor:
    """Cross entropy, a mean over rows."""
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def sequences(rows: int = ROWS, length: int = 6) -> dict[str, Tensor]:
    """Sequences of which every row has another number of labels; row 4 has none."""
    labels = torch.randint(0, VOCABULARY, (rows, length))
    for row in range(rows):
        labels[row, 1 + row % length :] = -100
    labels[4 % rows] = -100
    return {"x": torch.randn(rows, length, WIDTH, dtype=torch.float64), "labels": labels}


def mean_over_labels(model: Any, batch: Any) -> Tensor:
    """Cross entropy, a mean over the labels that are not -100."""
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["labels"].flatten())


def mean_over_shifted_labels(model: Any, batch: Any) -> Tensor:
    """The same, each position predicting the next."""
    logits, labels = model(batch["x"])[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def total(model: Any, batch: Any) -> Tensor:
    """A sum over rows."""
    return F.cross_entropy(model(batch["x"]), batch["labels"], reduction="sum")


def weighted_mean(model: Any, batch: Any) -> Tensor:
    """A mean with a weight a row."""
    losses = F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
    loss: Tensor = (losses * batch["weight"]).sum() / batch["weight"].sum()
    return loss


def plain(model: nn.Module, loss_fn: LossFn, batch: Any) -> tuple[nn.Module, Tensor]:
    """One plain backward of the whole batch on a copy."""
    twin = copy.deepcopy(model)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    loss = loss_fn(twin, batch)
    loss.backward()
    return twin, loss.detach()


def assert_close_gradients(one: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    """Gradients agree up to the order of additions."""
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad - b.grad).abs().max()) <= tolerance * max(1.0, float(b.grad.abs().max()))


# ---- exact accumulation --------------------------------------------------------------------------------

LOSSES: list[tuple[str | Callable[[Any], float], LossFn, Callable[[], Any]]] = [
    ("rows", mean_over_rows, lambda: batch_of(dtype=torch.float64)),
    ("labels", mean_over_labels, sequences),
    ("shifted_labels", mean_over_shifted_labels, sequences),
    ("sum", total, lambda: batch_of(dtype=torch.float64)),
    (
        lambda part: float(part["weight"].sum()),
        weighted_mean,
        lambda: batch_of(dtype=torch.float64) | {"weight": torch.rand(ROWS, dtype=torch.float64)},
    ),
]


@pytest.mark.parametrize(("count", "loss_fn", "make"), LOSSES, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("size", [1, 5, 12])
def test_loss_and_gradient_are_those_of_the_whole_batch(
    count: Any, loss_fn: LossFn, make: Callable[[], Any], size: int
) -> None:
    model, batch = mlp(torch.float64), make()
    twin, whole = plain(model, loss_fn, batch)
    step = memfit.fit(model, loss_fn, batch, memory="1GiB", micro_batch_size=size, count=count)
    loss = step(batch)
    assert step.plan.gradient_accumulation_steps == math.ceil(ROWS / size)
    assert abs(float(loss - whole)) <= 1e-12 * float(whole)
    assert not loss.requires_grad
    assert_close_gradients(model, twin)


@pytest.mark.parametrize(
    ("expected", "loss_fn", "make"), LOSSES[:4], ids=lambda v: getattr(v, "__name__", str(v))
)
def test_auto_finds_what_the_mean_is_over(expected: str, loss_fn: LossFn, make: Callable[[], Any]) -> None:
    model, batch = mlp(torch.float64), make()
    twin, whole = plain(model, loss_fn, batch)
    loss = memfit.fit(model, loss_fn, batch, memory="1GiB", micro_batch_size=5)(batch)
    assert abs(float(loss - whole)) <= 1e-12 * float(whole)
    assert_close_gradients(model, twin)


def test_a_wrong_count_is_noticed_by_the_comparison() -> None:
    model, batch = mlp(torch.float64), sequences()
    twin, whole = plain(model, mean_over_labels, batch)
    loss = memfit.fit(
        model, mean_over_labels, batch, memory="1GiB", micro_batch_size=5, count="shifted_labels"
    )(batch)
    assert abs(float(loss - whole)) > 1e-6
    with pytest.raises(AssertionError):
        assert_close_gradients(model, twin)


def test_gradients_add_to_those_that_are_there() -> None:
    model, batch = mlp(torch.float64), batch_of(dtype=torch.float64)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    held = [p.grad for p in model.parameters()]
    twin, _ = plain(model, mean_over_rows, batch)
    memfit.fit(model, mean_over_rows, batch, memory="1GiB", micro_batch_size=5)(batch)
    assert_close_gradients(model, twin)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))


def test_fitting_leaves_gradients_buffers_and_random_numbers_alone() -> None:
    model = nn.Sequential(
        nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, VOCABULARY)
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    batch = batch_of()
    before = copy.deepcopy(outcome_of(model, torch.zeros(())))
    memfit.fit(model, mean_over_rows, batch, memory="1GiB")
    assert_same(outcome_of(model, torch.zeros(())), before)


# ---- batches of any form -------------------------------------------------------------------------------


@dataclass
class Pair:
    """A batch as a dataclass."""

    x: Tensor
    more: dict[str, Any]


def nested_loss(model: Any, batch: Any) -> Tensor:
    """Reads a nested batch."""
    pair = batch[0]
    logits = model(pair.x) * pair.more["scale"]
    return F.cross_entropy(logits, batch[1][0][:, 0])


def test_a_nested_batch_is_split_and_added_up() -> None:
    model = mlp(torch.float64)
    labels = torch.randint(0, VOCABULARY, (ROWS, 2))
    pair = Pair(
        torch.randn(ROWS, WIDTH, dtype=torch.float64), {"scale": 0.5, "names": [str(i) for i in range(ROWS)]}
    )
    batch = (pair, [labels])
    twin, whole = plain(model, nested_loss, batch)
    loss = memfit.fit(model, nested_loss, batch, memory="1GiB", micro_batch_size=5)(batch)
    assert abs(float(loss - whole)) < 1e-12
    assert_close_gradients(model, twin)


@pytest.mark.parametrize("rows", [1, 3, 5, 7, 17])
def test_any_number_of_rows_is_run_exactly(rows: int) -> None:
    model = mlp(torch.float64)
    step = memfit.fit(model, mean_over_rows, batch_of(dtype=torch.float64), memory="1GiB", micro_batch_size=5)
    batch = batch_of(rows, torch.float64)
    twin, whole = plain(model, mean_over_rows, batch)
    loss = step(batch)
    assert abs(float(loss - whole)) < 1e-12
    assert_close_gradients(model, twin)


def test_each_micro_batch_has_the_planned_size() -> None:
    model, sizes = mlp(), []

    def loss_fn(m: Any, batch: Any) -> Tensor:
        sizes.append(len(batch["x"]))
        return mean_over_rows(m, batch)

    step = memfit.fit(model, loss_fn, batch_of(), memory="1GiB", micro_batch_size=5, count="rows")
    for rows, expected in ((12, [4, 4, 4]), (11, [4, 4, 3]), (3, [3]), (17, [4, 4, 3, 3, 3])):
        sizes.clear()
        step(batch_of(rows))
        assert sizes == expected


def test_a_part_without_a_valid_label_adds_nothing() -> None:
    model, batch = mlp(torch.float64), sequences()
    batch["labels"][4:8] = -100
    twin, whole = plain(model, mean_over_labels, batch)
    loss = memfit.fit(
        model, mean_over_labels, sequences(), memory="1GiB", micro_batch_size=4, count="labels"
    )(batch)
    assert abs(float(loss - whole)) < 1e-12
    assert_close_gradients(model, twin)


def test_a_batch_without_any_valid_label_is_refused() -> None:
    model, batch = mlp(torch.float64), sequences()
    step = memfit.fit(model, mean_over_labels, batch, memory="1GiB", micro_batch_size=4, count="labels")
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match=r"count gave 0 for the whole batch.*leave out batches"):
        step(batch)
    assert all(p.grad is None for p in model.parameters())


# ---- layers that look across rows --------------------------------------------------------------------


def normed() -> nn.Module:
    """A model with BatchNorm in training mode."""
    layers = [nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(64, VOCABULARY))


def test_a_coupled_batch_stays_whole_and_is_the_plain_step_to_the_bit() -> None:
    model, batch = normed(), batch_of(64)
    free = memfit.fit(model, mean_over_rows, batch, memory="1GiB")
    twin, loss = plain(model, mean_over_rows, batch)
    plain_outcome = outcome_of(twin, loss)
    with pytest.raises(InfeasibleBudget) as refused:
        memfit.find_plan(free.profile, memory=1)
    budget_bytes = (refused.value.needed_bytes + free.plan.predicted_peak_bytes) // 2
    step = memfit.fit(model, mean_over_rows, batch, memory=budget_bytes)
    assert (step.plan.gradient_accumulation_steps, step.plan.recomputes > 0) == (1, True)
    assert_same(outcome_of(model, step(batch)), plain_outcome)


def test_a_coupled_batch_is_not_split_when_pinned() -> None:
    with pytest.raises(InexactAccumulation, match=r"batch_norm.*leave micro_batch_size out") as caught:
        memfit.fit(normed(), mean_over_rows, batch_of(64), memory="1GiB", micro_batch_size=16)
    assert "batch_norm" in caught.value.owner


def test_a_coupled_model_does_not_split_a_larger_batch_either() -> None:
    step = memfit.fit(normed(), mean_over_rows, batch_of(32), memory="1GiB", count="rows")
    with pytest.raises(InexactAccumulation, match=r"64 rows and the plan keeps 32 whole"):
        step(batch_of(64))


def test_a_batch_larger_than_any_before_is_measured_again() -> None:
    step = memfit.fit(mlp(), mean_over_rows, batch_of(), memory="1GiB", count="rows")
    for _ in range(3):
        step(batch_of())
    step.verdict = None
    step(batch_of())
    assert step.verdict is None
    step(batch_of(3 * ROWS))
    assert step.verdict is not None


def test_a_frozen_batch_norm_may_be_split() -> None:
    model = normed().double()
    model.get_submodule("1").eval()
    batch = batch_of(64, torch.float64)
    twin, _ = plain(model, mean_over_rows, batch)
    memfit.fit(model, mean_over_rows, batch, memory="1GiB", micro_batch_size=16)(batch)
    assert_close_gradients(model, twin)


def coupled_loss(model: Any, batch: Any) -> Tensor:
    """A loss that no weights add up to."""
    out = model(batch["x"])
    loss: Tensor = (out @ out.T).logsumexp(1).mean()
    return loss


def test_a_loss_that_does_not_add_up_keeps_the_batch_whole() -> None:
    model, batch = mlp(), batch_of()
    step = memfit.fit(model, coupled_loss, batch, memory="1GiB")
    twin, loss = plain(model, coupled_loss, batch)
    assert step.plan.gradient_accumulation_steps == 1
    assert_same(outcome_of(model, step(batch)), outcome_of(twin, loss))


# ---- the promise -----------------------------------------------------------------------------------------


def shrunk(profile: Profile, factor: float) -> Profile:
    """A profile that believes every activation to be smaller than it is."""

    def smaller(graph: Any) -> Any:
        storages = tuple(
            s if s.persists else dataclasses.replace(s, size_bytes=int(s.size_bytes * factor))
            for s in graph.storages
        )
        return dataclasses.replace(graph, storages=storages)

    return dataclasses.replace(profile, graphs=tuple(smaller(g) for g in profile.graphs))


def least_bytes(profile: Profile) -> int:
    """The smallest memory that works."""
    with pytest.raises(InfeasibleBudget) as refused:
        memfit.find_plan(profile, memory=1)
    return refused.value.needed_bytes


def deceived(model: nn.Module, batch: Any, factor: float, budget_share: float) -> Step:
    """A step planned from a profile whose bytes are wrong; a share of 0 is the least it believes in."""
    true = memfit.profile(model, mean_over_rows, batch, micro_batch_size=len(batch["x"]))
    most = memfit.find_plan(true, memory="1GiB").predicted_peak_bytes
    false = shrunk(true, factor)
    budget = int(most * budget_share) or least_bytes(false)

    def find(profile: Profile) -> memfit.Plan:
        return memfit.find_plan(profile, memory=budget)

    return Step(Accumulation(model, mean_over_rows, None), find(false), false, optimizer=None, find=find)


def deep() -> nn.Module:
    """A model in which recomputation saves much."""
    layers = [
        layer
        for width in (WIDTH, 64, 64, 64)
        for layer in (nn.Linear(width, 64), nn.BatchNorm1d(64), nn.Softplus(), nn.Dropout(0.1))
    ]
    return nn.Sequential(*layers, nn.Linear(64, VOCABULARY))


def test_a_broken_promise_is_mended_and_the_batch_run_again_from_its_start() -> None:
    model, batch = deep(), batch_of(256)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    step = deceived(model, batch, 0.8, 0.85)
    first = step.plan
    torch.manual_seed(5)
    twin, loss = plain(model, mean_over_rows, batch)
    expected = outcome_of(twin, loss)
    torch.manual_seed(5)
    replayed = step(batch)
    assert_same(outcome_of(model, replayed), expected)
    assert step.verdict is not None
    assert step.verdict.attempts > 1
    assert step.verdict.held
    assert step.plan != first
    assert step.profile.unexplained_bytes > 0


def test_a_prediction_that_is_too_low_within_the_budget_is_corrected_without_another_run() -> None:
    model, batch = deep(), batch_of(256)
    step = deceived(model, batch, 0.9, 1.5)
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    step(batch)
    assert step.verdict is not None
    assert (len(runs), step.verdict.attempts, step.verdict.held) == (1, 1, True)
    assert step.plan.predicted_peak_bytes >= step.verdict.measured_peak_bytes


@pytest.mark.parametrize("stubborn", [True, False], ids=["the plan never changes", "nothing fits any more"])
def test_a_promise_that_cannot_be_kept_fails_and_leaves_no_trace(stubborn: bool) -> None:
    model, batch = deep(), batch_of(256)
    step = deceived(model, batch, 0.5, 0.75 if stubborn else 0)
    if stubborn:
        step._find = lambda profile: step.plan
    before = copy.deepcopy(outcome_of(model, torch.zeros(())))
    with pytest.raises(VerificationFailed, match=r"BROKEN.*gradients are as before") as caught:
        step(batch)
    assert step.verdict is not None
    assert step.verdict.attempts == (step_module._ATTEMPTS if stubborn else 1)
    assert caught.value.measured_bytes > caught.value.budget_bytes >= caught.value.predicted_bytes
    assert_same(outcome_of(model, torch.zeros(())), before)


def test_the_memory_that_a_failed_verification_names_is_enough() -> None:
    model, batch = deep(), batch_of(256)
    step = deceived(model, batch, 0.5, 0)
    with pytest.raises(VerificationFailed) as caught:
        step(batch)
    needed_bytes = caught.value.needed_bytes
    assert needed_bytes is not None
    assert f"{needed_bytes:,} B should be enough" in str(caught.value)
    profile = step.profile
    plan = memfit.find_plan(profile, memory=needed_bytes)
    again = Step(
        Accumulation(model, mean_over_rows, None), plan, profile, optimizer=None, find=lambda _: plan
    )
    again(batch)
    assert again.verdict is not None
    assert again.verdict.held


class Counting(nn.Module):
    """Goes another way at every other call, with what is left of the last one and a number drawn once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module = deep()
        self.calls = 0
        self.drawn: float | None = None
        self.kept = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """The inner model, in one of two ways."""
        self.calls += 1
        if self.drawn is None:
            self.drawn = float(torch.rand(()))
            self.inner = nn.Sequential(*self.inner.children())  # as BigBird exchanges its attention
        out: Tensor = self.inner(x) * (1 + self.calls % 2) + self.kept * self.drawn
        self.kept = out.detach().mean()
        return out


def test_a_batch_that_runs_again_finds_the_model_as_it_was_before_the_first_attempt() -> None:
    model, batch = Counting(), batch_of(256)
    step = deceived(model, batch, 0.8, 0.85)
    torch.manual_seed(5)
    twin, loss = plain(model, mean_over_rows, batch)
    expected = outcome_of(twin, loss)
    torch.manual_seed(5)
    replayed = step(batch)
    assert step.verdict is not None
    assert step.verdict.attempts > 1
    assert_same(outcome_of(model, replayed), expected)


def test_only_the_first_steps_are_metered(monkeypatch: pytest.MonkeyPatch) -> None:
    meters: list[int] = []

    class Counted(PeakMeter):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            meters.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(step_module, "PeakMeter", Counted)
    model, batch = mlp(), batch_of()
    step = memfit.fit(model, mean_over_rows, batch, memory="1GiB")
    for _ in range(4):
        step(batch)
    assert len(meters) == 2


def test_the_optimizer_state_that_is_not_born_yet_is_in_the_verdict() -> None:
    model, batch = mlp(), batch_of()
    optimizer = torch.optim.Adam(model.parameters())
    step = memfit.fit(model, mean_over_rows, batch, memory="1GiB", optimizer=optimizer)
    step(batch)
    bare = memfit.fit(model, mean_over_rows, batch, memory="1GiB")
    model.zero_grad()
    bare(batch)
    assert step.verdict is not None
    assert bare.verdict is not None
    weights = sum(p.nbytes for p in model.parameters())
    assert 0 <= step.verdict.measured_peak_bytes - bare.verdict.measured_peak_bytes - 2 * weights < 200


def test_steps_with_dropout_differ_from_each_other_as_plain_steps_do() -> None:
    model, batch = mlp(dropout=0.5), batch_of()
    step = memfit.fit(model, mean_over_rows, batch, memory="1GiB", micro_batch_size=12)
    torch.manual_seed(1)
    twin, loss = plain(model, mean_over_rows, batch)
    expected = outcome_of(twin, loss)
    torch.manual_seed(1)
    assert_same(outcome_of(model, step(batch)), expected)
    model.zero_grad()
    assert "loss" in differences(outcome_of(model, step(batch)), expected)


def test_a_verdict_with_allocation_retries_did_not_hold() -> None:
    verdict = Verdict(90, 95, 100, 1)
    assert verdict.held
    assert "held" in str(verdict)
    slow = dataclasses.replace(verdict, alloc_retries=2)
    assert slow.is_within_budget
    assert not slow.held
    assert "BROKEN" in str(slow)
    assert "2 allocation retries" in str(slow)
    assert not dataclasses.replace(verdict, measured_peak_bytes=101).held


@pytest.mark.parametrize("start", [0, 64])
def test_a_batch_that_is_a_part_of_something_larger_counts_as_all_of_it(start: int) -> None:
    model, data = nn.Linear(64, 64), torch.randn(4096, 64)
    batch = data[start : start + 64]
    step = memfit.fit(model, lambda m, x: m(x).square().mean(), batch, memory="64MiB")
    step(batch)
    assert step.profile.residents.batch_bytes == data.nbytes
    assert step.verdict is not None
    assert step.verdict.measured_peak_bytes <= step.verdict.predicted_peak_bytes
    assert step.verdict.attempts == 1
