"""The loop around a step stays as it was: clipping, scalers, autocast, hooks, closures, several optimizers.

Each is compared with the plain loop on the whole batch: to the bit where the batch is one micro-batch, within
1e-12 in float64 where it is several.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn import functional as F

import memfit
from memfit.core.batching import parts_for
from memfit.errors import InexactAccumulation, InfeasibleBudget, UnsupportedModel
from memfit.runtime.batch import split
from memfit.runtime.hooks import hooks_at_the_end
from memfit.runtime.job import optimizer_state
from memfit.runtime.meter import PeakMeter, resident_bytes

ROWS, WIDTH, CLASSES = 11, 16, 7
SIZES = [11, 5]  # of 11 rows: one micro-batch, and three unequal ones (4, 4, 3)
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(11)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three layers."""
    layers = [nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, CLASSES)]
    return nn.Sequential(*layers).to(dtype)


def first(model: nn.Module) -> nn.Parameter:
    """The weight of the first layer."""
    return next(model.parameters())


def batch_of(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> Batch:
    """Numbers with a label each."""
    return {"x": torch.randn(rows, WIDTH, dtype=dtype), "labels": torch.randint(0, CLASSES, (rows,))}


def loss_of(model: Any, batch: Any) -> Tensor:
    """Cross entropy, a mean over rows."""
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def fit(model: nn.Module, size: int, batch: Any = None, loss_fn: Any = loss_of, **more: Any) -> memfit.Step:
    """A step of at most so many rows at a time."""
    batch = batch_of() if batch is None else batch
    size = min(size, len(batch["x"]))
    return memfit.fit(
        model, loss_fn, batch, memory="1GiB", micro_batch_size=size, count=more.pop("count", "rows"), **more
    )


def assert_same(one: nn.Module, other: nn.Module, size: int, what: str = "grad") -> None:
    """Gradients or values agree: to the bit for one micro-batch, else up to the order of additions."""
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        a, b = (p.grad, q.grad) if what == "grad" else (p.detach(), q.detach())
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            tolerance = 0.0 if size >= ROWS else 1e-12
            assert float((a - b).norm()) <= tolerance * float(b.norm()), name


# ---- between step and optimizer.step ---------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_clipping_by_norm_trains_as_in_the_plain_loop_and_stays_within_the_prediction(size: int) -> None:
    model, batch = mlp(), batch_of()
    twin = copy.deepcopy(model)
    mine, theirs = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin))
    step = fit(model, size, batch, optimizer=mine)
    for _ in range(3):
        held = [*(p.grad for p in model.parameters() if p.grad is not None), *optimizer_state(mine)]
        entry_bytes = resident_bytes([*model.parameters(), *batch.values(), *held])
        del held
        mine.zero_grad()
        with torch.enable_grad() if step._unverified else PeakMeter("cpu") as meter:
            loss = step(batch)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            mine.step()
        expected = loss_of(twin, batch)
        expected.backward()
        expected = expected.detach()
        twin_norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        theirs.step()
        theirs.zero_grad()
        assert abs(float(loss) - float(expected)) <= 1e-12 * float(expected)
        assert abs(float(norm - twin_norm)) <= 1e-12 * float(norm)
        assert float(norm) > 0.1
        assert_same(model, twin, size, "values")
    gradients_bytes = sum(p.nbytes for p in model.parameters())
    assert isinstance(meter, PeakMeter)
    assert entry_bytes - gradients_bytes + meter.peak_bytes <= step.plan.predicted_peak_bytes


def halves(gradient: Tensor) -> Tensor:
    """A hook that is linear, so that only the number of its calls tells."""
    return gradient * 0.5


@pytest.mark.parametrize(("size", "enabled"), [(11, True), (5, True), (5, False)])
def test_a_scaler_scales_gradients_once_and_not_the_loss(size: int, enabled: bool) -> None:
    model, batch = mlp(), batch_of()
    twin = copy.deepcopy(model)
    mine, theirs = (torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled) for _ in range(2))
    loss = fit(model, size, batch, scaler=mine)(batch)
    expected = loss_of(twin, batch)
    theirs.scale(expected).backward()
    assert abs(float(loss - expected.detach())) <= 1e-12 * float(loss)
    assert_same(model, twin, size)
    scaled = float(first(model).grad.norm())  # type: ignore[union-attr]
    model.zero_grad()
    fit(model, size, batch)(batch)
    plain = float(first(model).grad.norm())  # type: ignore[union-attr]
    assert scaled == pytest.approx(plain * (2.0**10 if enabled else 1.0), rel=1e-12)


def boosted(model: Any, batch: Any) -> Tensor:
    """A mean over rows, each with a factor of its own."""
    losses = F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
    loss: Tensor = (losses * batch["boost"]).mean()
    return loss


@pytest.mark.parametrize("size", SIZES)
def test_a_window_that_overflows_in_one_micro_batch_is_skipped_once(size: int) -> None:
    model = mlp(torch.float32)
    good = batch_of(dtype=torch.float32) | {"boost": torch.ones(ROWS)}
    bad = good | {"boost": torch.ones(ROWS).index_fill(0, torch.tensor([2]), 1e37)}  # in the first part
    outcomes = []
    for net, is_plain in ((model, False), (copy.deepcopy(model), True)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        step = None if is_plain else fit(net, size, good, boosted, scaler=scaler)
        history = []
        for batch in (good, bad, good):
            if step is None:
                scaler.scale(boosted(net, batch)).backward()
            else:
                assert step(batch).isfinite()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            before = [p.detach().clone() for p in net.parameters()]
            scaler.step(optimizer)
            is_skipped = all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
            scaler.update()
            optimizer.zero_grad()
            history.append((is_skipped, scaler.get_scale()))
        outcomes.append((history, [p.detach() for p in net.parameters()]))
    (mine, values), (theirs, expected) = outcomes
    assert mine == theirs == [(False, 1024.0), (True, 512.0), (False, 512.0)]
    for p, q in zip(values, expected, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_two_steps_before_an_update_add_up_and_gradients_set_to_zero_stay_tensors(size: int) -> None:
    model, first, second = mlp(), batch_of(), batch_of()
    twin = copy.deepcopy(model)
    step = fit(model, size, first)
    for batch in (first, second):
        step(batch)
        loss_of(twin, batch).backward()
    assert_same(model, twin, size)
    for net in (model, twin):
        net.zero_grad(set_to_none=False)
    held = [p.grad for p in model.parameters()]
    step(second)
    loss_of(twin, second).backward()
    assert_same(model, twin, size)
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), held, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_all_of_it_together_holds_under_a_plan_that_recomputes(size: int) -> None:
    layers = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.Softplus())]
    model, batch = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)).double(), batch_of()
    twin = copy.deepcopy(model)
    for net in (model, twin):
        first(net).register_hook(clips)
    with pytest.raises(InfeasibleBudget) as refused:
        memfit.fit(model, loss_of, batch, memory=1, micro_batch_size=size, count="rows")
    mine, theirs = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin)]
    step = memfit.fit(
        model, loss_of, batch, memory=refused.value.needed_bytes, micro_batch_size=size, count="rows",
        scaler=mine, optimizer=optimizers[0],
    )  # fmt: skip
    assert step.plan.recomputes > 0
    for _ in range(2):
        step(batch)
        theirs.scale(loss_of(twin, batch)).backward()
        for net, scaler, optimizer in zip((model, twin), (mine, theirs), optimizers, strict=True):
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        assert_same(model, twin, size)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert_same(model, twin, size, "values")
    assert step.verdict is not None
    assert step.verdict.held


# ---- autocast --------------------------------------------------------------------------------------------


def bf16(enabled: bool = True) -> torch.autocast:
    """Mixed precision on a CPU."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def loss_in_bf16(model: Any, batch: Any) -> Tensor:
    """The loss in mixed precision."""
    with bf16():
        return loss_of(model, batch)


def in_parts(model: nn.Module, batch: Batch, size: int) -> nn.Module:
    """Plain accumulation in mixed precision on a copy: forwards under autocast, backwards outside."""
    twin = copy.deepcopy(model)
    rows = len(batch["x"])
    for part in split(batch, parts_for(rows, min(size, rows))):
        loss = loss_in_bf16(twin, part)
        (loss if size >= rows else loss * (len(part["x"]) / rows)).backward()
    return twin


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("where", "fitted_inside"), [("loss_fn", False), ("step", True), ("step", False)])
def test_autocast_is_the_plain_one_to_the_bit(
    size: int, fitted_inside: bool, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = mlp(torch.float32), batch_of(dtype=torch.float32)
    expected = in_parts(model, batch, size)
    around = where == "step"
    with bf16(around and fitted_inside), caplog.at_level(logging.WARNING, "memfit"):
        step = fit(model, size, batch, loss_of if around else loss_in_bf16)
    for _ in range(3):
        model.zero_grad()
        with bf16(around), caplog.at_level(logging.WARNING, "memfit"):
            step(batch)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert step.verdict is not None
    assert step.verdict.held
    said = [record.message for record in caplog.records]
    unplanned = around and not fitted_inside
    assert len(said) == unplanned
    assert all("runs with" in text and "under autocast to torch.bfloat16" in text for text in said)


def test_the_backward_of_a_step_under_autocast_runs_outside_of_it() -> None:
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            forwards.append(torch.is_autocast_enabled("cpu"))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            backwards.append(torch.is_autocast_enabled("cpu"))
            return g

    def asking(model: Any, batch: Any) -> Tensor:
        return Asks.apply(loss_of(model, batch))  # type: ignore

    model, batch = mlp(torch.float32), batch_of(dtype=torch.float32)
    forwards: list[bool] = []
    backwards: list[bool] = []
    step = fit(model, 5, batch, asking)
    forwards.clear()
    backwards.clear()
    with bf16():
        step(batch)
        assert torch.is_autocast_enabled("cpu")
    assert (forwards, backwards) == ([True] * 3, [False] * 3)


@pytest.mark.parametrize("size", SIZES)
def test_weights_updated_under_one_autocast_are_cast_anew(size: int) -> None:
    model, batch = mlp(torch.float32), batch_of(dtype=torch.float32)
    step = fit(model, size, batch)
    with bf16():
        step(batch)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        model.zero_grad()
        step(batch)
    mine = [p.grad for p in model.parameters()]
    model.zero_grad()
    expected = in_parts(model, batch, size)
    for gradient, p in zip(mine, expected.parameters(), strict=True):
        assert torch.equal(gradient, p.grad)  # type: ignore[arg-type]


# ---- gradient hooks --------------------------------------------------------------------------------------


def clips(gradient: Tensor) -> Tensor:
    """A hook that is far from linear."""
    return gradient.clamp(-1e-3, 1e-3)


def squares(gradient: Tensor) -> Tensor:
    """Another one, which does not commute with the first."""
    return gradient * gradient + gradient


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_former", [True, False])
def test_hooks_see_the_gradient_of_the_whole_batch_once_and_in_order(size: int, with_former: bool) -> None:
    model, batch = mlp(), batch_of()
    twin = copy.deepcopy(model)
    seen: dict[str, list[Any]] = {"mine": [], "theirs": []}
    for net, log in ((model, seen["mine"]), (twin, seen["theirs"])):
        for name, p in net.named_parameters():
            if with_former:
                p.grad = torch.full_like(p, 0.25)
            if name != "2.weight":  # one without
                p.register_hook(lambda g, log=log, name=name: log.append((name, g.clone())))
                p.register_hook(clips)
                p.register_hook(squares)
        weights = [p for name, p in net.named_parameters() if name.endswith("weight")]
        register_multi_grad_hook(weights, lambda gs, log=log: log.append(("all", gs[0].clone())))
    held = [p.grad for p in model.parameters()]
    step = fit(model, size, batch)
    assert seen["mine"] == []  # not while profiling
    step(batch)
    loss_of(twin, batch).backward()
    assert_same(model, twin, size)
    assert [name for name, _ in seen["mine"]] == [name for name, _ in seen["theirs"]]
    assert len(seen["mine"]) == 6
    for (_, a), (_, b) in zip(seen["mine"], seen["theirs"], strict=True):
        assert float((a - b).norm()) <= 1e-12 * float(b.norm())
    if with_former:
        assert all(p.grad is gradient for p, gradient in zip(model.parameters(), held, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_a_hook_may_remove_itself_or_another_and_handles_keep_working(size: int) -> None:
    model, batch = mlp(), batch_of()
    calls: list[str] = []

    def once(gradient: Tensor) -> None:
        calls.append("once")
        handles["once"].remove()

    def in_forward(net: Any, part: Any) -> Tensor:
        handles["forward"].remove()
        return loss_of(net, part)

    loss_fns: list[Any] = [loss_of]
    step = fit(model, size, batch, lambda net, part: loss_fns[-1](net, part))
    loss_fns.append(in_forward)
    weight = first(model)
    handles = {
        "once": weight.register_hook(once),
        "forward": weight.register_hook(lambda g: calls.append("forward")),
        "stays": weight.register_hook(lambda g: calls.append("stays")),
    }
    step(batch)
    assert calls == ["once", "stays"]
    loss_fns.append(loss_of)
    step(batch)
    assert calls == ["once", "stays", "stays"]
    handles["stays"].remove()
    step(batch)
    assert len(calls) == 3
    assert not weight._backward_hooks


@pytest.mark.parametrize("size", SIZES)
def test_the_only_hook_of_a_parameter_may_be_removed_by_the_forward(size: int) -> None:
    model, batch = mlp(), batch_of()
    twin = copy.deepcopy(model)
    loss_fns: list[Any] = [loss_of]
    step = fit(model, size, batch, lambda net, part: loss_fns[-1](net, part))
    handle = first(model).register_hook(squares)

    def removes(net: Any, part: Any) -> Tensor:
        handle.remove()
        return loss_of(net, part)

    loss_fns.append(removes)
    step(batch)
    loss_of(twin, batch).backward()
    assert_same(model, twin, size)


def test_hooks_and_former_gradients_are_back_after_an_error() -> None:
    model, batch = mlp(), batch_of()
    loss_fns: list[Any] = [loss_of]
    step = fit(model, 5, batch, lambda net, part: loss_fns[-1](net, part))
    calls: list[Tensor] = []
    handle = first(model).register_hook(calls.append)
    former = first(model).grad = torch.ones_like(first(model))
    parts: list[int] = []

    def failing(net: Any, part: Any) -> Tensor:
        parts.append(1)
        if len(parts) == 3:
            raise LookupError("no such row")
        return loss_of(net, part)

    loss_fns.append(failing)
    with pytest.raises(LookupError, match="no such row"):
        step(batch)
    assert first(model).grad is former
    assert torch.equal(former, torch.ones_like(former))
    assert calls == []
    model.zero_grad()
    loss_of(model, batch).backward()
    assert len(calls) == 1
    handle.remove()
    assert not first(model)._backward_hooks


def test_a_hook_that_raises_leaves_all_hooks_in_place() -> None:
    model, batch = mlp(), batch_of()
    step = fit(model, 5, batch)

    def refuses(gradient: Tensor) -> None:
        raise ArithmeticError("the gradient explodes")

    handle = first(model[2:]).register_hook(refuses)
    with pytest.raises(ArithmeticError, match="explodes"):
        step(batch)
    handle.remove()
    model.zero_grad()
    twin = copy.deepcopy(model)
    step(batch)
    loss_of(twin, batch).backward()
    assert_same(model, twin, 5)


def test_a_hook_registered_by_the_forward_is_refused_by_name_where_it_would_be_there_twice() -> None:
    def registers(net: Any, part: Any) -> Tensor:
        net[0].weight.register_hook(halves)
        return loss_of(net, part)

    model, batch = mlp(), batch_of()
    loss_fns: list[Any] = [loss_of]
    step = fit(model, 5, batch, lambda net, part: loss_fns[-1](net, part))
    loss_fns.append(registers)
    with pytest.raises(
        InexactAccumulation, match=r"registers a gradient hook on '0.weight'.*before the step"
    ):
        step(batch)


def test_a_hook_that_follows_accumulation_is_refused_where_the_batch_is_split() -> None:
    model, batch = mlp(), batch_of()
    step = fit(model, 5, batch)
    handle = first(model).register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(UnsupportedModel, match=r"'0.weight' has a hook that runs whenever"):
        step(batch)
    handle.remove()
    step(batch)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sparse", [False, True])
def test_hooks_on_tied_and_sparse_embeddings_are_those_of_the_plain_step(size: int, sparse: bool) -> None:
    embed = nn.Embedding(20, 8, sparse=sparse, dtype=torch.float64)
    head = nn.Linear(8, 20, bias=False, dtype=torch.float64)
    if not sparse:
        head.weight = embed.weight
    model = nn.Sequential(embed, nn.Tanh(), head)
    batch = {"x": torch.randint(0, 20, (ROWS,)), "labels": torch.randint(0, 20, (ROWS,))}
    twin = copy.deepcopy(model)
    for net in (model, twin):
        net[0].weight.register_hook(lambda g: g * g)  # type: ignore
    step = fit(model, size, batch)
    step(batch)
    loss_of(twin, batch).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        mine, theirs = (t.grad.to_dense() for t in (p, q))  # type: ignore[union-attr]
        assert float((mine - theirs).norm()) <= 1e-12 * float(theirs.norm())


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_of_a_hook_is_within_the_prediction(size: int) -> None:
    model, batch = mlp(), batch_of()
    for p in model.parameters():
        p.register_hook(halves)
    step = fit(model, size, batch)
    predicted = step.plan.predicted_peak_bytes
    for _ in range(2):
        model.zero_grad()
        step(batch)
        assert step.verdict is not None
        assert step.verdict.measured_peak_bytes <= predicted == step.plan.predicted_peak_bytes


Gradients = list[list[float]]
NUMBERS = st.integers(-32, 32).map(lambda x: x / 8)  # sums are exact
MADE: list[Callable[[Tensor], Tensor | None]] = [clips, squares, halves, lambda g: None, torch.sign]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=5),
    hooks=st.lists(st.sampled_from(MADE), max_size=4),
    former=st.none() | NUMBERS,
)
def test_any_hooks_of_any_parts_are_the_hooks_of_their_sum(
    parts: Gradients, hooks: list[Any], former: float | None
) -> None:
    leaf = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(3, dtype=torch.float64)
    for values in parts:
        expected += torch.tensor(values, dtype=torch.float64)
    for hook in hooks:
        leaf.register_hook(hook)
        changed = hook(expected)
        expected = expected if changed is None else changed
    if former is not None:
        leaf.grad = torch.full_like(leaf, former)
        expected = former + expected
    with hooks_at_the_end([("leaf", leaf)]):
        for values in parts:
            (leaf * torch.tensor(values, dtype=torch.float64)).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected)


# ---- what gets a gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_inputs_get_their_gradients_and_hooks_on_them_see_them_whole(size: int) -> None:
    model, batch = mlp(), batch_of()
    twin, theirs = copy.deepcopy(model), {name: t.clone() for name, t in batch.items()}
    for each in (batch, theirs):
        each["x"].requires_grad_().register_hook(lambda g: g / g.norm())
    step = fit(model, size, batch)
    assert batch["x"].grad is None
    predicted = step.plan.predicted_peak_bytes
    step(batch)
    loss_of(twin, theirs).backward()
    assert batch["x"].grad is not None
    assert theirs["x"].grad is not None
    assert torch.allclose(batch["x"].grad, theirs["x"].grad, rtol=1e-12, atol=1e-15)
    assert_same(model, twin, size)
    assert step.verdict is not None
    assert step.verdict.measured_peak_bytes <= predicted


def test_inputs_computed_with_gradients_serve_one_backward_and_fitting_leaves_it_to_the_step() -> None:
    encoder, model, batch = nn.Linear(WIDTH, WIDTH).double(), mlp(), batch_of()
    made = batch | {"x": encoder(batch["x"])}
    with pytest.raises(
        InexactAccumulation, match=r"batch\['x'\] was computed with gradients.*detach"
    ) as caught:
        fit(model, 5, made)(made)
    assert caught.value.owner == "batch['x']"
    twins = copy.deepcopy(nn.ModuleList([encoder, model]))
    fit(model, ROWS, made)(made)
    loss_of(twins[1], batch | {"x": twins[0](batch["x"])}).backward()
    assert_same(nn.ModuleList([encoder, model]), twins, ROWS)


def gradient_penalty(model: Any, batch: Any) -> Tensor:
    """A loss with the slope of the model in it: a second derivative. A mean over rows, as the slopes are."""
    x = batch["x"].detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    penalty: Tensor = slope.square().sum(dim=1).mean()
    return loss_of(model, batch) + penalty


def looks_back(model: Any, batch: Any) -> Tensor:
    """A loss that goes backward once on its own and keeps the graph."""
    loss = loss_of(model, batch)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return loss


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss_fn", [gradient_penalty, looks_back])
def test_a_loss_that_goes_backward_itself_is_exact(size: int, loss_fn: Any) -> None:
    model, batch = mlp(), batch_of()
    twin = copy.deepcopy(model)
    step = fit(model, size, batch, loss_fn)
    step(batch)
    loss_fn(twin, batch).backward()
    assert_same(model, twin, size)
    assert step.verdict is not None
    assert step.verdict.held


@pytest.mark.parametrize("size", SIZES)
def test_frozen_and_unused_parameters_get_no_gradient(size: int) -> None:
    model, batch = mlp(), batch_of()
    model.add_module("unused", nn.Linear(3, 3).double())
    model[2].requires_grad_(False)

    def loss_fn(net: Any, part: Any) -> Tensor:
        return loss_of(net[:5], part)

    twin = copy.deepcopy(model)
    model.get_submodule("unused").weight.register_hook(halves)  # type: ignore
    step = fit(model, size, batch, loss_fn)
    step(batch)
    loss_fn(twin, batch).backward()
    assert_same(model, twin, size)
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["2.weight", "2.bias", "unused.weight", "unused.bias"]


# ---- several optimizers, closures --------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_several_optimizers_count_with_all_their_state_and_train_as_in_the_plain_loop(size: int) -> None:
    model, batch = mlp(), batch_of()
    twin = copy.deepcopy(model)

    def optimizers(net: nn.Module) -> list[torch.optim.Optimizer]:
        first, *others = net.parameters()
        return [torch.optim.AdamW([first], lr=0.01), torch.optim.SGD(others, lr=0.1, momentum=0.9)]

    mine, theirs = optimizers(model), optimizers(twin)
    step = fit(model, size, batch, optimizer=tuple(mine))
    for _ in range(3):
        step(batch)
        loss_of(twin, batch).backward()
        for one in (*mine, *theirs):
            one.step()
            one.zero_grad()
        assert_same(model, twin, size, "values")
    state_bytes = sum(t.nbytes for t in optimizer_state(mine))
    assert step.profile.residents.optimizer_bytes == state_bytes
    alone = [fit(model, size, batch, optimizer=one).profile for one in mine]
    assert sum(p.residents.optimizer_bytes for p in alone) == state_bytes
    assert len(step.profile.update.ops) == sum(len(p.update.ops) for p in alone)
    assert step.verdict is not None
    assert step.verdict.measured_peak_bytes <= step.plan.predicted_peak_bytes


def test_an_optimizer_of_another_kind_is_refused_by_name() -> None:
    model = mlp()
    for wrong, name in (("adam", "str"), ([torch.optim.SGD(model.parameters()), 3], "int"), (0.1, "float")):
        with pytest.raises(TypeError, match=rf"optimizer is a {name}: give a torch.optim.Optimizer"):
            fit(model, 5, optimizer=wrong)


@pytest.mark.parametrize("size", SIZES)
def test_a_generator_and_a_discriminator_train_as_in_the_plain_loop(size: int) -> None:
    def nets() -> tuple[nn.Module, nn.Module]:
        generator = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        return generator.double(), nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    def losses(generator: Any, discriminator: Any) -> tuple[Any, Any]:
        bce = F.binary_cross_entropy_with_logits

        def judging(net: Any, batch: Any) -> Tensor:
            with torch.no_grad():
                fake = generator(batch["z"])
            real, made = net(batch["x"]), net(fake)
            return bce(real, torch.ones_like(real)) + bce(made, torch.zeros_like(made))

        def forging(net: Any, batch: Any) -> Tensor:
            judged = discriminator(net(batch["z"]))
            return bce(judged, torch.ones_like(judged))

        return judging, forging

    generator, discriminator = nets()
    twins = copy.deepcopy((generator, discriminator))
    batch = batch_of() | {"z": torch.randn(ROWS, 8, dtype=torch.float64)}
    judging, forging = losses(generator, discriminator)
    mine = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (discriminator, generator)]
    theirs = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (twins[1], twins[0])]
    steps = [
        fit(discriminator, size, batch, judging, optimizer=mine[0]),
        fit(generator, size, batch, forging, optimizer=mine[1]),
    ]
    assert all(p.grad is None for net in (generator, discriminator) for p in net.parameters())
    plain = losses(*twins)
    for _ in range(2):
        for step, optimizer in zip(steps, mine, strict=True):
            optimizer.zero_grad()
            step(batch)
            optimizer.step()
        for net, loss_fn, optimizer in zip((twins[1], twins[0]), plain, theirs, strict=True):
            optimizer.zero_grad()
            loss_fn(net, batch).backward()
            optimizer.step()
    assert_same(generator, twins[0], size, "values")
    assert_same(discriminator, twins[1], size, "values")
    assert_same(discriminator, twins[1], size)  # what the generator's loss left there, too


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_a_closure_runs_the_whole_batch_each_time_and_its_copies_are_predicted(
    size: int, line_search: str | None
) -> None:
    model, batch = mlp(), batch_of()
    twin = copy.deepcopy(model)
    settings = {"lr": 0.5, "max_iter": 4, "history_size": 3, "line_search_fn": line_search}
    mine, theirs = (torch.optim.LBFGS(m.parameters(), **settings) for m in (model, twin))  # type: ignore
    with pytest.warns(UserWarning, match=r"LBFGS cannot be recorded.*assumes 14 states"):
        step = fit(model, size, batch, optimizer=mine)

    def closure() -> Tensor:
        mine.zero_grad()
        return step(batch)

    def plain() -> Tensor:
        theirs.zero_grad()
        loss = loss_of(twin, batch)
        loss.backward()
        return loss

    for _ in range(2):
        assert abs(float(mine.step(closure)) - float(theirs.step(plain).detach())) < 1e-11
    held = [*(p.grad for p in model.parameters() if p.grad is not None), *optimizer_state(mine)]
    entry_bytes = resident_bytes([*model.parameters(), *batch.values(), *held])
    with PeakMeter("cpu", held=held) as meter:
        del held
        mine.step(closure)
    theirs.step(plain)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)  # the line search divides by differences
    assert entry_bytes + meter.peak_bytes <= step.plan.predicted_peak_bytes


@pytest.mark.parametrize("size", SIZES)
def test_sharpness_aware_steps_run_the_whole_batch_twice(size: int) -> None:
    def sharp(net: nn.Module, run: Callable[[], object], optimizer: torch.optim.Optimizer) -> None:
        run()
        moved = []
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()  # type: ignore
            for p in net.parameters():
                moved.append(0.05 * p.grad / norm)  # type: ignore[operator]
                p.add_(moved[-1])
        optimizer.zero_grad()
        run()
        with torch.no_grad():
            for p, shift in zip(net.parameters(), moved, strict=True):
                p.sub_(shift)
        optimizer.step()
        optimizer.zero_grad()

    model, batch = mlp(), batch_of()
    twin = copy.deepcopy(model)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin))
    step = fit(model, size, batch, optimizer=mine)
    for _ in range(2):
        sharp(model, lambda: step(batch), mine)
        sharp(twin, lambda: loss_of(twin, batch).backward(), theirs)
    assert_same(model, twin, size, "values")


def test_the_audit_refuses_a_closure_with_the_cure_that_works_here() -> None:
    model, batch = mlp(), batch_of()
    lbfgs = torch.optim.LBFGS(model.parameters())
    adam = torch.optim.Adam(model.parameters())
    found = memfit.audit(model, loss_of, batch, optimizer=[adam, lbfgs])
    assert (found.kind.value, found.is_exact) == ("optimizer cannot accumulate", False)
    assert found.owner == "LBFGS (calls the loss several times in one step)"
    assert any("let it call a step of memfit.fit" in cure for cure in found.cures)
    assert memfit.audit(model, loss_of, batch, optimizer=[adam]).is_exact


# ---- momentary things ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "name"), [(torch.no_grad, "no_grad"), (torch.inference_mode, "inference_mode")]
)
@pytest.mark.parametrize("size", SIZES)
def test_a_step_where_autograd_is_off_says_so(mode: Any, name: str, size: int) -> None:
    model, batch = mlp(), batch_of()
    step = fit(model, size, batch)
    with mode(), pytest.raises(ValueError, match=rf"inside torch\.{name}\(\).*call it outside"):
        step(batch)
    assert all(p.grad is None for p in model.parameters())
    step(batch)


def test_fitting_inside_inference_mode_says_so() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch\.inference_mode\(\)"):
        fit(mlp(), 5)


def test_fitting_inside_no_grad_works() -> None:
    model, batch = mlp(), batch_of()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        step = fit(model, 5, batch)
    step(batch)
    loss_of(twin, batch).backward()
    assert_same(model, twin, 5)


def normed() -> nn.Sequential:
    """A model whose layers know training from evaluation."""
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)).double()


def test_validation_between_steps_changes_nothing() -> None:
    model, batch = normed(), batch_of()
    twin = copy.deepcopy(model)
    step = fit(model, ROWS, batch)
    for _ in range(2):
        for net, run in ((model, step), (twin, lambda b: loss_of(twin, b).backward())):
            run(batch)
            net.eval()
            with torch.no_grad():
                loss_of(net, batch)
            net.train()
    assert_same(model, twin, ROWS)
    assert torch.equal(model[1].running_mean, twin[1].running_mean)  # type: ignore


def test_a_layer_that_is_switched_on_after_fitting_is_not_split() -> None:
    model, batch = normed(), batch_of()
    model[1].eval()
    step = fit(model, 5, batch)
    step(batch)
    model.train()
    with pytest.raises(InexactAccumulation, match=r"'1' was in eval mode.*trains now.*fit again") as caught:
        step(batch)
    assert caught.value.owner == "1"
    small = {name: t[:4] for name, t in batch.items()}
    model.zero_grad()
    twin = copy.deepcopy(model)
    step(small)  # one micro-batch is the plain step
    loss_of(twin, small).backward()
    assert_same(model, twin, ROWS)


@pytest.mark.parametrize("size", SIZES)
def test_a_model_that_was_converted_or_changed_is_measured_again_and_right(size: int) -> None:
    model, batch = mlp(torch.float32), batch_of(dtype=torch.float32)
    step = fit(model, size, batch)
    for _ in range(3):
        model.zero_grad()
        step(batch)
    first = step.verdict
    model.double()
    model[4] = nn.Linear(32, 2 * CLASSES).double()
    batch["x"] = batch["x"].double()
    model.zero_grad()
    twin = copy.deepcopy(model)
    step(batch)
    loss_of(twin, batch).backward()
    assert_same(model, twin, size)
    assert step.verdict is not None
    assert step.verdict is not first
    assert step.plan.predicted_peak_bytes >= step.verdict.measured_peak_bytes


def test_a_step_that_goes_wrong_by_type_raises_what_torch_raises() -> None:
    model, batch = mlp(torch.float32), batch_of(dtype=torch.float32)
    step = fit(model, 5, batch)
    model.double()
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        step(batch)


def test_a_retried_step_gives_inputs_their_gradients_once() -> None:
    model, batch = mlp(), batch_of()
    batch["x"].requires_grad_()
    step = fit(model, ROWS, batch)
    runs: list[int] = []
    measured = step._metered

    def lying(given: Any, before: Any) -> tuple[Tensor, int, int]:
        loss, measured_bytes, retries = measured(given, before)
        runs.append(1)
        return loss, (step.plan.budget_bytes + 1 if len(runs) == 1 else measured_bytes), retries

    step._metered = lying  # type: ignore
    step._plan_again = lambda: None  # type: ignore
    step(batch)
    twin, other = copy.deepcopy(model), {n: t.detach().clone() for n, t in batch.items()}
    other["x"].requires_grad_()
    loss_of(twin, other).backward()
    assert len(runs) == 2
    assert batch["x"].grad is not None
    assert torch.equal(batch["x"].grad, other["x"].grad)  # type: ignore[arg-type]


def test_a_hooked_input_that_is_in_the_batch_twice_is_one_leaf() -> None:
    model, calls = mlp(), []
    x = torch.randn(11, WIDTH, dtype=torch.float64, requires_grad=True)
    x.register_hook(lambda g: calls.append(len(g)))

    def both_of(net: Any, batch: Any) -> Tensor:
        found: Tensor = (net(batch["x"]) + net(batch["y"])).square().mean()
        return found

    step = memfit.fit(model, both_of, {"x": x, "y": x}, memory="1GiB", micro_batch_size=4, count="rows")
    step({"x": x, "y": x})
    found, x.grad = x.grad, None
    both_of(model, {"x": x, "y": x}).backward()
    assert found is not None
    assert x.grad is not None
    torch.testing.assert_close(found, x.grad, rtol=1e-12, atol=1e-14)
    assert calls == [11, 11]
