"""BatchNorm in micro-batches: exact, frozen or ghost; running statistics are those of the whole batch."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memfit
from memfit.core.batching import balanced_parts
from memfit.errors import InexactAccumulation, InfeasibleBudget, UnsupportedModel
from memfit.runtime.batch import split
from memfit.runtime.normalisation import normalised
from models import assert_same, outcome_of

ROWS, WIDTH, CLASSES = 24, 8, 5
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(11)


def batch_of(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Batch:
    """Numbers that are neither centred nor scaled, with a label each."""
    return {
        "x": (3 * torch.randn(rows, WIDTH) + torch.arange(WIDTH)).to(dtype),
        "labels": torch.randint(0, CLASSES, (rows,)),
    }


def net(*layers: nn.Module) -> nn.Module:
    """Layers before a hidden layer with another BatchNorm in it."""
    middle = [nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, CLASSES)]
    return nn.Sequential(*layers, *middle)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def fitted(model: nn.Module, batch: Any, batch_norm: str, size: int | None = 8, **others: Any) -> memfit.Step:
    arguments: dict[str, Any] = {"memory": "1GiB", "count": "rows", **others}
    loss = arguments.pop("loss", loss_fn)
    return memfit.fit(model, loss, batch, micro_batch_size=size, batch_norm=batch_norm, **arguments)


def loop(model: nn.Module, batch: Batch, count: int) -> Tensor:
    """The plain loop over micro-batches; the loss of the batch."""
    sizes = balanced_parts(ROWS, count)
    losses = []
    for part, size in zip(split(batch, sizes), sizes, strict=True):
        loss = loss_fn(model, part) * (size / ROWS)
        loss.backward()
        losses.append(loss.detach())
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)


def low_memory(model: nn.Module, batch: Any, batch_norm: str, size: int) -> int:
    """A budget halfway between the least and what a step without recomputation takes."""
    free = fitted(model, batch, batch_norm, size)
    with pytest.raises(InfeasibleBudget) as refused:
        memfit.find_plan(free.profile, memory=1)
    return (refused.value.needed_bytes + free.plan.predicted_peak_bytes) // 2


# ---- exact -------------------------------------------------------------------------------------------


def test_a_refusal_names_the_two_other_choices() -> None:
    with pytest.raises(
        InexactAccumulation, match=r"batch_norm='frozen'.*batch_norm='ghost'.*another gradient"
    ):
        fitted(net(), batch_of(), "exact")


def test_an_unknown_choice_is_refused() -> None:
    message = "batch_norm is 'eval': give 'exact', 'ghost', 'frozen'"
    with pytest.raises(ValueError, match=message):
        memfit.fit(net(), loss_fn, batch_of(), memory=1, batch_norm="eval")
    with pytest.raises(ValueError, match=message):
        memfit.profile(net(), loss_fn, batch_of(), batch_norm="eval")


# ---- frozen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, ROWS])
def test_frozen_is_to_the_bit_the_step_with_those_layers_in_eval_mode(size: int) -> None:
    model, batch = net(nn.BatchNorm1d(WIDTH, momentum=None), nn.Dropout(0.5)), batch_of()
    loss_fn(model, batch_of())  # statistics that are not the initial ones
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        layer.train(not isinstance(layer, nn.BatchNorm1d))
    step = fitted(model, batch, "frozen", size)
    torch.manual_seed(1)
    outcome = outcome_of(model, step(batch))
    torch.manual_seed(1)
    assert_same(outcome, outcome_of(twin, loop(twin, batch, ROWS // size)))
    assert all(layer.training for layer in model.modules())


def test_frozen_is_split_although_the_micro_batch_is_not_pinned() -> None:
    step = fitted(net(), batch_of(), "frozen", None, count="auto")
    assert {graph.rows for graph in step.profile.graphs} > {ROWS, 1}


@pytest.mark.parametrize("batch_norm", ["frozen", "ghost"])
def test_a_body_that_raises_leaves_layers_and_statistics_as_they_were(batch_norm: str) -> None:
    class Raising(nn.BatchNorm1d):
        calls_left = 1000

        def forward(self, input: Tensor) -> Tensor:
            Raising.calls_left -= 1
            if not Raising.calls_left:
                raise ArithmeticError
            return super().forward(input)

    model = net(nn.BatchNorm1d(WIDTH), Raising(WIDTH))
    before, tables = buffers(model), [dict(m._buffers) for m in model.modules()]
    step = fitted(model, batch_of(), batch_norm)
    Raising.calls_left = 3  # the last of three micro-batches
    with pytest.raises(ArithmeticError):
        step(batch_of())
    assert_close(buffers(model), before, 0)
    for module, table in zip(model.modules(), tables, strict=True):
        assert module.training
        assert all(module._buffers[name] is tensor for name, tensor in table.items())
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert model.get_submodule("0").momentum == model.get_submodule("1").momentum == 0.1


class Functional(nn.Module):
    """Normalises over the rows without being a BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Functional(), r"0: aten\.native_batch_norm.*no BatchNorm module.*cannot be frozen"),
        (
            nn.BatchNorm1d(WIDTH, track_running_stats=False),
            r"'0' \(BatchNorm1d\) keeps no running statistics",
        ),
        (nn.InstanceNorm1d(WIDTH, track_running_stats=True), r"0: aten\.native_batch_norm.*cannot be frozen"),
    ],
    ids=["functional", "no statistics", "InstanceNorm"],
)
def test_what_cannot_be_frozen_is_refused_by_name(layer: nn.Module, message: str) -> None:
    batch = batch_of()
    if isinstance(layer, nn.InstanceNorm1d):
        layer = nn.Sequential(
            nn.Unflatten(1, (WIDTH, 1)), nn.Upsample(4), layer, nn.AvgPool1d(4), nn.Flatten()
        )
        message = message.replace(r"0: ", r"0\.2: ")
    with pytest.raises(UnsupportedModel, match=message) as refused:
        fitted(net(layer), batch, "frozen")
    assert refused.value.owner.startswith("0")


# ---- ghost: gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputes", [False, True])
def test_ghost_is_to_the_bit_the_plain_loop_over_micro_batches(recomputes: bool) -> None:
    model, batch = net(nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)), batch_of()
    twin = copy.deepcopy(model)
    memory: Any = low_memory(model, batch, "ghost", 8) if recomputes else "1GiB"
    step = fitted(model, batch, "ghost", memory=memory)
    assert (step.plan.recomputes > 0) == recomputes
    torch.manual_seed(1)
    loss = step(batch)
    torch.manual_seed(1)
    assert torch.equal(loop(twin, batch, 3), loss)
    assert all(map(torch.equal, gradients(model), gradients(twin)))


def test_one_micro_batch_is_the_plain_step_to_the_bit() -> None:
    model, batch = net(nn.BatchNorm1d(WIDTH, momentum=None)), batch_of()
    twin = copy.deepcopy(model)
    loss = fitted(model, batch, "ghost", ROWS)(batch)
    assert_same(outcome_of(model, loss), outcome_of(twin, loop(twin, batch, 1)))


def test_ghost_chooses_the_micro_batch_and_finds_the_counter() -> None:
    step = fitted(net(), batch_of(), "ghost", None, count="auto")
    assert len(step.profile.graphs) > 1
    assert not any(graph.coupled for graph in step.profile.graphs)


# ---- ghost: statistics -------------------------------------------------------------------------------


def pooled(layers: Callable[[], nn.Module], steps: int = 3, **others: Any) -> tuple[nn.Module, nn.Module]:
    """A model after some ghost steps, and one after the same plain steps of the whole batch; no updates."""
    model = net(layers())
    twin = copy.deepcopy(model)
    step = fitted(model, batch_of(), "ghost", **others)
    for _ in range(steps):
        batch = batch_of(23)
        step(batch)
        loss_fn(twin, batch)
    return model.get_submodule("0"), twin.get_submodule("0")


class Twice(nn.Module):
    """One layer that is called twice, on unlike numbers, and reads its statistics elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, momentum=0.3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert self.norm.running_mean is not None
        self.seen.append(self.norm.running_mean.clone())
        out: Tensor = self.norm(x) + self.norm(x.square())
        return out


class Checkpointed(nn.Module):
    """The user's own checkpoint, whose recomputation updates the statistics again in a plain step."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.norm, x.requires_grad_(), use_reentrant=self.use_reentrant)
        return out


class TwoThings(nn.BatchNorm1d):
    """A layer with a forward of its own, as timm has, which also pools small micro-batches over the rows."""

    pools = False

    def forward(self, input: Tensor) -> Tensor:
        out = F.relu(super().forward(input))
        return out.mean(0, keepdim=True) if self.pools and len(out) < 8 else out


@pytest.mark.parametrize(
    "layers",
    [
        lambda: nn.BatchNorm1d(WIDTH),
        lambda: nn.BatchNorm1d(WIDTH, momentum=None, affine=False),
        lambda: nn.SyncBatchNorm(WIDTH),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.BatchNorm2d(2, momentum=0.7), nn.Flatten()),
        lambda: TwoThings(WIDTH),
        Twice,
        lambda: nn.BatchNorm1d(WIDTH).eval(),
        lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
    ],
    ids=["plain", "cumulative", "sync", "2d", "subclass", "called twice", "in eval mode", "no statistics"],
)
def test_statistics_are_those_of_the_whole_batch_updated_once_a_step(layers: Callable[[], nn.Module]) -> None:
    layer, plain = pooled(layers)
    assert_close(buffers(layer), buffers(plain))


def test_statistics_of_a_bfloat16_layer_are_rounded_once() -> None:
    layer, plain = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)
    batch = batch_of()
    with normalised(layer.bfloat16(), "ghost", several=True) as begin:
        for part in batch["x"].bfloat16().split(8):
            begin()
            layer(part)
    plain(batch["x"].bfloat16().float())
    assert_close(buffers(layer), {n: b.to(buffers(layer)[n].dtype) for n, b in buffers(plain).items()}, 2**-7)


def test_nothing_else_sees_the_statistics_of_a_micro_batch() -> None:
    model = net(Twice())
    step = fitted(model, batch_of(), "ghost")
    layer = model.get_submodule("0")
    assert isinstance(layer, Twice)
    layer.seen.clear()
    for _ in range(2):
        step(batch_of())
    first, second = layer.seen[:3], layer.seen[3:]
    assert all(torch.equal(seen, torch.zeros(WIDTH)) for seen in first)
    assert all(torch.equal(seen, second[0]) for seen in second)
    assert second[0].abs().min() > 0


def test_a_layer_after_another_gets_one_update_a_step_too() -> None:
    """Its input depends on the norm before it, so only the number of updates and their weight are defined."""
    model, batch = net(nn.BatchNorm1d(WIDTH)), batch_of()
    first, _, later = (model.get_submodule(name) for name in "012")
    inputs: list[Tensor] = []
    step = fitted(model, batch, "ghost")
    handle = later.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    step(batch)
    handle.remove()
    whole = torch.cat(inputs)
    assert torch.equal(first.get_buffer("num_batches_tracked"), torch.tensor(1))
    torch.testing.assert_close(later.get_buffer("running_mean"), 0.1 * whole.mean(0))
    torch.testing.assert_close(later.get_buffer("running_var"), 0.9 + 0.1 * whole.var(0))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_of_the_users_own_does_not_update_twice(use_reentrant: bool) -> None:
    model, batch = net(Checkpointed(use_reentrant)), batch_of()
    twin = copy.deepcopy(model)
    fitted(model, batch, "ghost")(batch)
    loss_fn(twin, batch)
    assert_close(buffers(model.get_submodule("0")), buffers(twin.get_submodule("0")))


def test_memfits_own_checkpoint_updates_once() -> None:
    model, batch = net(nn.BatchNorm1d(WIDTH)), batch_of()
    twin = copy.deepcopy(model)
    with memfit.apply_gradient_checkpointing(model, blocks=["0", "2"]):
        fitted(model, batch, "ghost")(batch)
    loss_fn(twin, batch)
    assert_close(buffers(model.get_submodule("0")), buffers(twin.get_submodule("0")))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    offset=st.floats(-100, 100),
    momentum=st.none() | st.floats(0, 1),
    before=st.integers(0, 2),
)
def test_statistics_of_any_parts_pool_to_those_of_numpy(
    sizes: Sequence[int], offset: float, momentum: float | None, before: int
) -> None:
    layer = nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    x = torch.randn(sum(sizes), 3, 4, dtype=torch.float64) + offset
    for _ in range(before):
        layer(x + 1)
        plain(x + 1)
    with normalised(layer, "ghost", several=True) as begin:
        for part in x.split(list(sizes)):
            begin()
            layer(part)
    numbers = x.transpose(0, 1).flatten(1).numpy()
    factor = 1 / (before + 1) if momentum is None else momentum
    for name, found in (("running_mean", numbers.mean(1)), ("running_var", numbers.var(1, ddof=1))):
        expected = (1 - factor) * plain.get_buffer(name).numpy() + factor * found
        np.testing.assert_allclose(layer.get_buffer(name).numpy(), expected, rtol=1e-10, atol=1e-10)
    assert int(layer.get_buffer("num_batches_tracked")) == before + 1


# ---- ghost: memory, refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [256])
def test_the_promise_holds_with_pooled_statistics(width: int) -> None:
    layers = [nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(nn.Linear(WIDTH, width), *layers, nn.Linear(width, CLASSES))
    step = fitted(model, batch_of(), "ghost", 2)
    for _ in range(2):
        step(batch_of())
        assert step.verdict is not None
        assert step.verdict.attempts == 1
        excess = step.verdict.predicted_peak_bytes - step.verdict.measured_peak_bytes
        assert 0 <= excess <= 0.01 * step.verdict.measured_peak_bytes


def test_a_functional_batch_norm_keeps_a_ghost_batch_whole() -> None:
    with pytest.raises(InexactAccumulation, match=r"0: aten\.native_batch_norm") as refused:
        fitted(net(Functional()), batch_of(), "ghost")
    assert "batch_norm=" not in str(refused.value)
    model, batch = net(Functional()), batch_of()
    twin = copy.deepcopy(model)
    loss = fitted(model, batch, "ghost", None)(batch)
    assert_same(outcome_of(model, loss), outcome_of(twin, loop(twin, batch, 1)))


class Both(nn.BatchNorm1d):
    """Normalises twice in one call."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(super().forward(input))


def test_a_layer_that_normalises_twice_in_a_call_is_refused() -> None:
    with pytest.raises(InexactAccumulation, match=re.escape("0: aten.native_batch_norm.default #1")):
        fitted(net(Both(WIDTH)), batch_of(), "ghost")


def test_a_compiled_model_is_not_pooled() -> None:
    model = torch.compile(net(), backend="eager")
    with pytest.raises(UnsupportedModel, match=r"compiled.*_orig_mod"):
        fitted(model, batch_of(), "ghost")  # type: ignore[arg-type]


def test_a_stored_profile_of_another_choice_is_not_used() -> None:
    model, batch = net(), batch_of()
    stored = fitted(model, batch, "ghost").profile
    with pytest.warns(UserWarning, match="the batch norm was ghost and is frozen"):
        fitted(model, batch, "frozen", profile=stored)


def test_the_audit_names_the_choices_as_a_cure() -> None:
    found = memfit.audit(net(), loss_fn, batch_of())
    assert any("batch_norm='frozen'" in cure and "'ghost'" in cure for cure in found.cures)


def test_gradients_differ_from_those_of_the_whole_batch_as_is_said() -> None:
    model, batch = net(), batch_of()
    twin = copy.deepcopy(model)
    fitted(model, batch, "ghost", 4)(batch)
    loss_fn(twin, batch).backward()
    assert not torch.allclose(gradients(model)[0], gradients(twin)[0], rtol=0.01)


def test_a_call_on_other_statistics_than_the_layers_own_writes_those() -> None:
    layer, x = nn.BatchNorm1d(WIDTH), batch_of()["x"]
    plain = copy.deepcopy(layer)
    others = {name: b.clone() for name, b in layer.named_buffers()}
    with normalised(layer, "ghost", several=True) as begin:
        begin()
        torch.func.functional_call(layer, others, (x,))
    assert_close(buffers(layer), buffers(plain), 0)
    plain(x)
    assert_close(others, buffers(plain), 0)


def test_rows_are_counted_where_they_go_in() -> None:
    layer, x = TwoThings(WIDTH), batch_of()["x"]
    plain = copy.deepcopy(layer)
    layer.pools = True
    with normalised(layer, "ghost", several=True) as begin:
        for part in x.split([20, 4]):
            begin()
            layer(part)
    plain(x)
    assert_close(buffers(layer), buffers(plain))
