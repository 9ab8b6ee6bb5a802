"""Gradients of micro-batches in reduced precision: summed in float32, rounded once, and counted so."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import memfit
from memfit.core.reserved import predict_cuda_memory
from memfit.runtime.batch import split, tensors_of
from memfit.runtime.fake import fake_tensors
from memfit.runtime.job import optimizer_state
from memfit.runtime.meter import PeakMeter, resident_bytes
from memfit.runtime.precision import float32_sums
from strategies import flat_update

REDUCED = [torch.bfloat16, torch.float16]
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)


def mlp(dtype: torch.dtype = torch.bfloat16, width: int = 32) -> nn.Module:
    layers = [nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)]
    return nn.Sequential(*layers).to(dtype)


def batch_of(rows: int = 24) -> Batch:
    return {"x": torch.randn(rows, 16), "y": torch.randn(rows, 4)}


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The model in its precision, the loss in single precision, as transformers do."""
    dtype = next(model.parameters()).dtype
    return F.mse_loss(model(batch["x"].to(dtype)).float(), batch["y"])


def fitted(model: nn.Module, batch: Any, size: int, **others: Any) -> memfit.Step:
    arguments: dict[str, Any] = {"memory": "1GiB", "count": "rows", **others}
    return memfit.fit(model, loss_fn, batch, micro_batch_size=size, **arguments)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    assert None not in found
    return [g for g in found if g is not None]


def micro_gradients(model: nn.Module, batch: Batch, size: int) -> list[list[Tensor]]:
    """The gradient of each weighted micro-batch alone, in the parameters' own precision."""
    rows = len(batch["x"])
    found, twin = [], copy.deepcopy(model)
    for part in split(batch, [size] * (rows // size)):
        twin.zero_grad()
        (loss_fn(twin, part) * (size / rows)).backward()
        found.append(gradients(twin))
    return found


def summed(parts: list[list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """The gradients of some micro-batches added up in order, in a precision."""
    totals = [g.to(dtype) for g in parts[0]]
    for part in parts[1:]:
        totals = [total + g.to(dtype) for total, g in zip(totals, part, strict=True)]
    return totals


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The relative error of a gradient, all parameters together."""
    one, other = (torch.cat([g.double().flatten() for g in gs]) for gs in (found, exact))
    return float((one - other).norm() / other.norm())


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def as_it_was(model: nn.Module) -> bool:
    return all(p.grad_dtype == p.dtype for p in model.parameters())


# ---- numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REDUCED)
def test_micro_batches_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    model, batch = mlp(dtype), batch_of()
    expected = [g.to(dtype) for g in summed(micro_gradients(model, batch, 6), torch.float32)]
    step = fitted(model, batch, 6)
    for _ in range(3):
        step(batch)
        assert_equal(gradients(model), expected)
        assert as_it_was(model)
        model.zero_grad()


def test_it_is_the_plain_loop_with_torchs_own_grad_dtype_also_where_a_parameter_is_used_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16, bias=False), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(self.first(x).tanh()))
            return out

    model, batch = Tied().bfloat16(), batch_of()
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.grad_dtype = torch.float32
    for part in split(batch, [6] * 4):
        (loss_fn(twin, part) * 0.25).backward()
    fitted(model, batch, 6)(batch)
    assert_equal(gradients(model), [g.bfloat16() for g in gradients(twin)])


def test_256_micro_batches_are_as_near_as_one_rounding() -> None:
    model, batch = mlp(), batch_of(256)
    parts = micro_gradients(model, batch, 1)
    exact = summed(parts, torch.float64)
    in_bfloat16, rounded = (
        error(summed(parts, torch.bfloat16), exact),
        error([g.bfloat16() for g in exact], exact),
    )
    fitted(model, batch, 1)(batch)
    assert error(gradients(model), exact) <= rounded * 1.001 < 2**-8 < in_bfloat16
    model.zero_grad()
    for p in model.parameters():
        p.grad_dtype = torch.float32
    fitted(model, batch, 1)(batch)
    assert error(gradients(model), exact) < 1e-6


@pytest.mark.parametrize("dtype", REDUCED)
def test_one_micro_batch_is_the_plain_step_to_the_bit(dtype: torch.dtype) -> None:
    model, batch = mlp(dtype), batch_of()
    twin = copy.deepcopy(model)
    loss = loss_fn(twin, batch)
    loss.backward()
    assert torch.equal(fitted(model, batch, 24)(batch), loss.detach())
    assert_equal(gradients(model), gradients(twin))


def test_a_loss_in_reduced_precision_is_added_up_in_float32() -> None:
    def in_bfloat16(m: nn.Module, b: Batch) -> Tensor:
        return F.mse_loss(m(b["x"].bfloat16()), b["y"].bfloat16())

    model, batch = mlp(), batch_of(30)
    losses = [float(in_bfloat16(model, part).detach()) for part in split(batch, [3] * 10)]
    loss = memfit.fit(model, in_bfloat16, batch, memory="1GiB", count="rows", micro_batch_size=3)(batch)
    assert loss.dtype == torch.float32
    assert abs(float(loss) - sum(losses) / 10) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputation_changes_no_bit_of_the_sums(dropout: float) -> None:
    model, batch = mlp(width=64), batch_of(256)
    model.add_module("dropout", nn.Dropout(dropout))
    twin = copy.deepcopy(model)
    free = fitted(model, batch, 64)
    with pytest.raises(memfit.InfeasibleBudget) as refused:
        memfit.find_plan(free.profile, memory=1)
    step = fitted(model, batch, 64, memory=refused.value.needed_bytes)
    assert step.plan.recomputes > 0
    assert step.plan.gradient_accumulation_steps == 4
    torch.manual_seed(3)
    step(batch)
    torch.manual_seed(3)
    with float32_sums(twin):
        for part in split(batch, [64] * 4):
            (loss_fn(twin, part) * 0.25).backward()
    assert_equal(gradients(model), gradients(twin))


def test_float32_and_float64_parameters_are_summed_as_ever() -> None:
    model, batch = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), batch_of()
    model[1].double()

    def mixed(m: Any, b: Batch) -> Tensor:
        return F.mse_loss(m[1](m[0](b["x"]).double()).float(), b["y"])

    twin = copy.deepcopy(model)
    for part in split(batch, [6] * 4):
        (mixed(twin, part) * 0.25).backward()
    memfit.fit(model, mixed, batch, memory="1GiB", count="rows", micro_batch_size=6)(batch)
    assert_equal(gradients(model), gradients(twin))


# ---- the gradient that was there ---------------------------------------------------------------------


def test_a_former_gradient_is_added_and_its_tensor_stays() -> None:
    """Also where it is a view of a flat buffer, which an optimizer may hold."""
    model, batch = mlp(), batch_of()
    flat = torch.randn(sum(p.numel() for p in model.parameters())).bfloat16()
    before = flat.clone()
    sizes = [p.numel() for p in model.parameters()]
    for p, piece in zip(model.parameters(), flat.split(sizes), strict=True):
        p.grad = piece.view_as(p)
    held = gradients(model)
    parts = [[g.view_as(p) for g, p in zip(before.split(sizes), model.parameters(), strict=True)]]
    parts += micro_gradients(model, batch, 6)
    fitted(model, batch, 6)(batch)
    assert all(one is other for one, other in zip(gradients(model), held, strict=True))
    expected = [g.bfloat16() for g in summed(parts, torch.float32)]
    assert_equal(gradients(model), expected)
    assert torch.equal(flat, torch.cat([g.flatten() for g in expected]))


def test_a_parameter_without_a_gradient_keeps_none_and_a_frozen_one_is_left_alone() -> None:
    model, batch = mlp(), batch_of()
    model.register_parameter("unused", nn.Parameter(torch.zeros(3).bfloat16()))
    model.get_parameter("0.weight").requires_grad_(False)
    fitted(model, batch, 6)(batch)
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["unused", "0.weight"]
    assert as_it_was(model)


def test_sparse_gradients_are_summed_and_rounded_too() -> None:
    table = nn.Embedding(5, 2, sparse=True, dtype=torch.bfloat16)
    rows = torch.tensor([1, 2, 2, 4])
    for _ in range(2):  # the second time there is a former one
        with float32_sums(table):
            for row in rows:
                (table(row) / 3).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.dtype == torch.bfloat16
    third = torch.tensor(1 / 3).bfloat16().float()
    once = torch.tensor([0, 1, 2, 0, 1])[:, None] * third
    expected = (once.bfloat16().float() + once).bfloat16()
    assert torch.equal(table.weight.grad.to_dense(), expected.expand(5, 2))


@settings(max_examples=30, deadline=None)
@given(has_former=st.booleans(), fails_at=st.integers(0, 2), dtype=st.sampled_from(REDUCED))
def test_a_body_that_raises_leaves_the_former_gradient(
    has_former: bool, fails_at: int, dtype: torch.dtype
) -> None:
    model, batch = mlp(dtype), batch_of(6)
    if has_former:
        loss_fn(model, batch).backward()
    former = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]

    def body() -> None:
        with float32_sums(model):
            for _ in range(fails_at):
                loss_fn(model, batch).backward()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        body()
    assert as_it_was(model)
    for p, (tensor, content) in zip(model.parameters(), former, strict=True):
        assert p.grad is tensor
        assert tensor is None or content is None or torch.equal(tensor, content)


def test_hooks_see_the_same_number_of_gradients_and_leave_with_their_own_type() -> None:
    """torch casts before hooks run, so inside they see float32."""
    model, seen = nn.Linear(4, 1, bias=False).bfloat16(), []
    model.weight.register_hook(lambda g: seen.append(g.dtype))
    with float32_sums(model):
        for _ in range(2):
            model(torch.ones(4).bfloat16()).sum().backward()
    model(torch.ones(4).bfloat16()).sum().backward()
    assert seen == [torch.float32] * 2 + [torch.bfloat16]


# ---- a type of the user's choice ---------------------------------------------------------------------


class Master(torch.optim.Optimizer):
    """Steps float32 copies of the parameters by float32 gradients."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p].setdefault("master", p.float())
                assert p.grad.dtype == torch.float32
                p.copy_(master.sub_(p.grad, alpha=0.1))


@pytest.mark.parametrize("size", [6, 24])
def test_grad_dtype_of_the_users_own_is_kept_and_counted(size: int) -> None:
    model, batch = mlp(), batch_of()
    parts = micro_gradients(model, batch, size)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    optimizer = Master(model.parameters())
    step = fitted(model, batch, size, optimizer=optimizer)
    residents = step.profile.residents
    assert residents.gradients_bytes == residents.resident_gradients[0] == 2 * residents.parameters_bytes
    assert residents.optimizer_bytes == 2 * residents.parameters_bytes
    step(batch)
    assert_equal(gradients(model), summed(parts, torch.float32))
    assert all(p.grad_dtype == torch.float32 for p in model.parameters())
    assert step.verdict is not None
    assert step.verdict.attempts == 1
    optimizer.step()


def test_a_profile_of_another_grad_dtype_is_not_used() -> None:
    model, batch = mlp(), batch_of()
    stored = fitted(model, batch, 6).profile
    for p in model.parameters():
        p.grad_dtype = torch.float32
    with pytest.warns(UserWarning, match="the model was"):
        fitted(model, batch, 6, profile=stored)


# ---- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 32, 16])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_the_predicted_peak_is_that_of_the_allocator(size: int, kind: str) -> None:
    """Forward, backward, rounding and update of two steps, by the allocator's own account."""
    model, batch = mlp(width=256), batch_of(64)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, foreach=True)
    step = fitted(model, batch, size, optimizer=optimizer)
    highest = 0
    for _ in range(2):
        there = [*model.parameters(), *(t for _, t in tensors_of(batch)), *optimizer_state(optimizer)]
        before_bytes = resident_bytes(there)
        step._unverified = 0  # the meter is mine
        with PeakMeter("cpu") as meter:
            step(batch)
            optimizer.step()
        highest = max(highest, before_bytes + meter.peak_bytes)
        optimizer.zero_grad()
    predicted = step.plan.predicted_peak_bytes
    assert highest <= predicted <= 1.01 * highest


def test_sums_take_twice_as_much_while_micro_batches_run_and_only_then() -> None:
    model, batch = mlp(), batch_of()
    profile = memfit.profile(model, loss_fn, batch)
    residents = profile.residents
    assert residents.resident_gradients[0] == 2 * residents.gradients_bytes == 2 * residents.parameters_bytes
    assert sum(residents.summed_sizes) == residents.summed_bytes
    assert memfit.Profile.from_json(profile.to_json()) == profile
    for size, factor in ((24, 0), (6, 2)):
        plan = memfit.find_plan(profile, memory="1GiB", micro_batch_size=size)
        events = memfit.simulate(profile, plan).events
        assert events[0].gradients_bytes == factor * residents.gradients_bytes
        assert events[-1].gradients_bytes == residents.gradients_bytes


def test_on_a_card_the_blocks_of_the_sums_are_counted() -> None:
    with fake_tensors():
        model, batch = mlp(), batch_of()
        profile = memfit.profile(model, loss_fn, batch, device="h100")
    blocks = [-(-4 * p.numel() // 512) * 512 for p in model.parameters()]
    assert profile.residents.resident_gradients[0] == sum(blocks)
    plan = memfit.find_plan(profile, memory="1GiB", micro_batch_size=6)
    few_numbers = profile.unexplained_bytes  # a block of its own there
    assert predict_cuda_memory(profile, plan).allocated_bytes == plan.predicted_peak_bytes + 512 - few_numbers
    held = replace(profile, update=(update := flat_update(1 << 20)), first_update=update)
    plan = memfit.find_plan(held, memory="1GiB", micro_batch_size=6)
    assert predict_cuda_memory(held, plan).allocated_bytes == plan.predicted_peak_bytes + 512 - few_numbers
