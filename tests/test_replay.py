"""Any plan is correct: each way in which a replay could go wrong, against the plain step, to the bit."""

from __future__ import annotations

import copy
import functools
import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import memfit
from memfit.core.graph import Level
from memfit.core.timeline import droppable
from memfit.core.timeline import run as simulate_run
from memfit.runtime import handles, opinfo
from memfit.runtime.intercept import is_heard
from memfit.runtime.meter import PeakMeter
from memfit.runtime.replay import Replayer, decisions_of
from models import (
    CASES,
    ROWS,
    WIDTH,
    LossFn,
    Net,
    assert_same,
    count_replays,
    differences,
    floats,
    keys,
    levels_of,
    outcome_of,
    plans_of,
    recorded,
    square_loss,
    step_outcome,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops replayed so far."""
    return count_replays(monkeypatch)


@contextmanager
def everything_dropped(model: nn.Module, loss_fn: LossFn, batch: Any) -> Iterator[None]:
    """The body's forward runs under a plan that keeps nothing it could replay."""
    graph = recorded(model, loss_fn, batch)
    torch.manual_seed(11)
    with Replayer(model, decisions_of(keys(graph, droppable(graph)))):
        yield


# ---- every case at every kind of plan ------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_any_plan_gives_the_plain_step_to_the_bit(name: str, replays: list[str]) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch()
    graph = recorded(model, case.loss, batch)
    plain = step_outcome(model, case.loss, batch)
    assert replays == []
    for what, plan in plans_of(graph):
        replays.clear()
        found = differences(plain, step_outcome(model, case.loss, batch, plan))
        assert (what, found) == (what, [])
        assert replays or what != "everything" or not case.replays


@pytest.mark.parametrize("name", CASES)
def test_any_levels_give_the_plain_step_to_the_bit(name: str) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch()
    graph = recorded(model, case.loss, batch)
    plain = step_outcome(model, case.loss, batch)
    for levels in levels_of(graph):
        plan = [graph.value_key(value) for value in levels]
        assert_same(plain, step_outcome(model, case.loss, batch, plan, list(levels.values())))


def test_any_levels_take_the_memory_that_is_simulated() -> None:
    def body(m: Any, x: Tensor) -> Any:
        h = m.lin(x)
        for _ in range(5):  # autograd saves neither argument nor result of most of these
            h = torch.sin(-(-torch.sin(h) + 1.0)) * 2.0
        return h

    model, batch, parts = Net(body, lin=nn.Linear(64, 64)), torch.randn(64, 64), 4
    recorded(model, square_loss, batch)  # torch imports more with the first call
    graph = recorded(model, square_loss, batch)
    draw = random.Random(7)
    for _ in range(30):
        levels = {}
        for value in sorted(droppable(graph)):
            if draw.random() < 0.9:
                segment = graph.values[value].producer * parts // graph.forward_ops
                levels[value] = Level(segment, draw.randint(segment, parts))
        plan = decisions_of([graph.value_key(value) for value in levels], list(levels.values()))
        model.zero_grad()
        with PeakMeter("cpu") as meter:
            with Replayer(model, plan):
                loss = square_loss(model, batch)
            loss.backward()
        simulated_bytes = simulate_run(graph, levels).peak.total_bytes
        assert simulated_bytes - 100 <= meter.peak_bytes <= simulated_bytes


def test_a_branch_the_loss_does_not_use_leaves_no_memory_behind() -> None:
    def body(m: Any, x: Tensor) -> Any:
        h = m.lin(x)
        h.tanh().sigmoid()  # their outputs are saved, and no backward comes by
        return h

    model, batch = Net(body, lin=nn.Linear(WIDTH, WIDTH)), floats()
    for plan in (
        decisions_of(()),
        decisions_of(keys(graph := recorded(model, square_loss, batch), droppable(graph))),
    ):
        with PeakMeter("cpu") as meter:
            with Replayer(model, plan):
                loss = square_loss(model, batch)
            loss.backward()
            del loss
            model.zero_grad()
        assert meter.net_bytes == 0


@pytest.mark.parametrize("in_levels", [False, True])
def test_a_replay_that_failed_can_be_tried_again(in_levels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["dropout_everywhere"]
    model, batch = case.model(), case.batch()
    graph = recorded(model, case.loss, batch)
    plain = step_outcome(model, case.loss, batch)
    levels = next(levels_of(graph)) if in_levels else dict.fromkeys(droppable(graph), Level())
    twin = copy.deepcopy(model)
    torch.manual_seed(11)
    with Replayer(twin, decisions_of([graph.value_key(v) for v in levels], list(levels.values()))):
        loss = case.loss(twin, batch)
    run = handles.Record.run
    failures: list[Any] = []

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("no more")

    def failing(self: handles.Record, passing: Counter[handles.Handle] | None) -> None:
        call = self.call
        if self.seed is not None and not failures:
            failures.append(self.func)
            self.call = out_of_memory
        try:
            run(self, passing)
        finally:
            self.call = call

    monkeypatch.setattr(handles.Record, "run", failing)
    with pytest.raises(MemoryError, match="no more"):
        torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True, allow_unused=True)
    loss.backward()
    assert failures
    assert_same(plain, outcome_of(twin, loss))


@pytest.mark.parametrize("name", ["mixture_of_experts", "skipped_layers", "in_place_chain", "attention"])
@pytest.mark.parametrize("change", ["other data", "other shape"])
def test_a_plan_made_for_another_batch_is_correct(name: str, change: str, replays: list[str]) -> None:
    case = CASES[name]
    model = case.model()
    graph = recorded(model, case.loss, case.batch())
    batch = case.batch() * -1.5 if change == "other data" else torch.randn(ROWS * 2, WIDTH)
    if name == "attention":
        batch = batch[:ROWS]
    plain = step_outcome(model, case.loss, batch)
    for _, plan in plans_of(graph):
        assert_same(plain, step_outcome(model, case.loss, batch, plan))
    assert replays


def test_a_plan_made_for_another_model_is_correct() -> None:
    other = recorded(CASES["dropout_everywhere"].model(), square_loss, floats())
    plan = keys(other, other.produced())
    for name in ("in_place_chain", "batch_norm_module", "views_smaller_than_their_base"):
        case = CASES[name]
        model, batch = case.model(), case.batch()
        assert_same(step_outcome(model, case.loss, batch), step_outcome(model, case.loss, batch, plan))


@pytest.mark.parametrize("name", ["attention", "in_place_chain", "batch_norm_module", "lstm"])
def test_a_step_called_under_autocast_is_the_plain_one(name: str, replays: list[str]) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = recorded(model, case.loss, batch)
        plain = step_outcome(model, case.loss, batch)
        assert_same(plain, step_outcome(model, case.loss, batch, keys(graph, droppable(graph))))
    assert replays
    assert differences(plain, step_outcome(model, case.loss, batch))


def test_the_comparison_can_fail() -> None:
    case = CASES["batch_norm_module"]
    model, batch = case.model(), case.batch()
    plain = step_outcome(model, case.loss, batch)
    changed = step_outcome(model, lambda m, x: case.loss(m, x) * 1.0001, batch)
    assert {"loss", "grad conv.weight"} <= set(differences(plain, changed))
    again = step_outcome(model, lambda m, x: case.loss(m, x + 0 * m(x).sum()), batch)
    assert {"buffer norm.num_batches_tracked", "buffer norm.running_mean"} <= set(differences(plain, again))
    drawn = step_outcome(model, lambda m, x: case.loss(m, x) + 0 * torch.rand(()), batch)
    assert differences(plain, drawn) == ["random state"]
    with pytest.raises(AssertionError):
        assert_same(plain, changed)


def test_a_replay_that_computes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = handles.Record.run

    def wrong(self: handles.Record, passing: Counter[handles.Handle] | None) -> None:
        wanted = [reference() for _, reference in self.outputs]
        run(self, passing)
        for handle in wanted:
            if handle is not None and handle.tensor is not None and handle.tensor.is_floating_point():
                handle.tensor.mul_(1.5)

    case = CASES["saved_inputs_and_outputs"]
    model, batch = case.model(), case.batch()
    graph = recorded(model, case.loss, batch)
    monkeypatch.setattr(handles.Record, "run", wrong)
    replayed = step_outcome(model, case.loss, batch, keys(graph, droppable(graph)))
    assert differences(step_outcome(model, case.loss, batch), replayed)


# ---- buffers and random streams ------------------------------------------------------------------------


def test_running_statistics_are_updated_exactly_once(replays: list[str]) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
    batch = floats()
    with everything_dropped(model, square_loss, batch):
        loss = square_loss(model, batch)
    after_forward = {name: b.clone() for name, b in model.named_buffers()}
    loss.backward()
    assert any("batch_norm" in name for name in replays)
    assert int(after_forward["1.num_batches_tracked"]) == 1
    assert all(torch.equal(b, after_forward[name]) for name, b in model.named_buffers())


def test_the_backward_does_not_move_the_random_stream(replays: list[str]) -> None:
    case = CASES["dropout_everywhere"]
    model, batch = case.model(), case.batch()
    with everything_dropped(model, case.loss, batch):
        loss = case.loss(model, batch)
    before = torch.get_rng_state()
    loss.backward()
    assert any("bernoulli" in name for name in replays)
    assert torch.equal(torch.get_rng_state(), before)


# ---- several backwards -----------------------------------------------------------------------------------


def _two_backwards(model: nn.Module, batch: Any, loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def _second_order(model: nn.Module, batch: Any, loss: Tensor) -> None:
    slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (loss + sum(s.square().sum() for s in slopes)).backward()


def _part_by_part(model: nn.Module, batch: Any, loss: Tensor) -> None:
    for parameter in model.parameters():
        (parameter.grad,) = torch.autograd.grad(loss, parameter, retain_graph=True)


@pytest.mark.parametrize("backward", [_two_backwards, _second_order, _part_by_part])
@pytest.mark.parametrize(
    "name", ["in_place_chain", "saved_inputs_and_outputs", "custom_function", "tied_weights"]
)
def test_any_backward_over_the_graph_is_the_plain_one(
    name: str, backward: Callable[[nn.Module, Any, Tensor], None], replays: list[str]
) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch()
    twin = copy.deepcopy(model)
    with everything_dropped(model, case.loss, batch):
        loss = case.loss(model, batch)
    backward(model, batch, loss)
    torch.manual_seed(11)
    plain_loss = case.loss(twin, batch)
    backward(twin, batch, plain_loss)
    assert replays
    assert_same(outcome_of(twin, plain_loss), outcome_of(model, loss))


# ---- what autograd refuses, memfit refuses ------------------------------------------------------------


def _overwrites_what_was_saved(m: Any, x: Tensor) -> Tensor:
    h = torch.exp(m.lin(x))
    out = h * 2
    h.mul_(3.0)
    return out


def _overwrites_a_view_of_what_was_saved(m: Any, x: Tensor) -> Tensor:
    h = torch.exp(m.lin(x))
    out = h[2:] * 2
    with torch.no_grad():
        h[0].zero_()
    return out


@pytest.mark.parametrize("body", [_overwrites_what_was_saved, _overwrites_a_view_of_what_was_saved])
def test_writing_to_what_was_saved_is_an_error_with_and_without_a_plan(body: Any) -> None:
    model, batch = Net(body, lin=nn.Linear(WIDTH, WIDTH)), floats()
    spared = Net(lambda m, x: torch.exp(m.lin(x)) * 2, lin=copy.deepcopy(model.lin))
    graph = recorded(spared, square_loss, batch)
    names = [key for key in keys(graph, graph.produced()) if "exp" in key.op]
    assert names
    for plan in ((), names, keys(graph, graph.produced())):
        with Replayer(model, decisions_of(plan)):
            loss = square_loss(model, batch)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_parameter_changed_before_the_backward_is_named() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    model, batch = nn.Sequential(layer, nn.Tanh()), floats()
    with everything_dropped(model, square_loss, batch):
        loss = square_loss(model, batch)
    with torch.no_grad():
        layer.bias.add_(1.0)
    with pytest.raises(RuntimeError, match=r"'0\.bias' was modified by an inplace operation"):
        loss.backward()


def test_a_batch_changed_before_the_backward_is_an_error() -> None:
    model, batch = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), floats()
    with everything_dropped(model, square_loss, batch):
        loss = square_loss(model, batch)
    batch.zero_()
    with pytest.raises(RuntimeError, match="an input of the step was modified"):
        loss.backward()


# ---- nothing is touched and nothing stays -------------------------------------------------------------


def _hooked(m: Any, x: Tensor) -> Any:
    h = m.lin(x).sin()
    h.register_hook(lambda grad: grad * 2)
    return m.out(h * h)


def _model_with_hooks() -> Net:
    model = Net(_hooked, lin=nn.Linear(WIDTH, WIDTH), out=nn.Linear(WIDTH, WIDTH))
    lin: Any = model.lin
    lin.register_forward_hook(lambda module, args, out: out * 0.5)
    lin.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    lin.register_full_backward_hook(
        lambda module, into, outof: (into[0] * 3,) if into[0] is not None else None
    )
    return model


def test_hooks_of_the_user_see_what_they_see_in_the_plain_step(replays: list[str]) -> None:
    model, batch = _model_with_hooks(), floats().requires_grad_()
    graph = recorded(model, square_loss, batch)
    for _, plan in plans_of(graph):
        assert_same(step_outcome(model, square_loss, batch), step_outcome(model, square_loss, batch, plan))
    assert replays


def _surface(model: nn.Module) -> list[object]:
    """Everything of a model that memfit must not change: hooks, names, modes, attributes."""
    found: list[object] = [list(model.state_dict())]
    for name, module in model.named_modules():
        tables = {k: list(v) for k, v in vars(module).items() if k.endswith("hooks") or "hooks_" in k}
        found.append(
            (name, module.training, sorted(vars(module)), tables, id(getattr(module.forward, "__func__", 0)))
        )
    return found


def _raising(m: Any, x: Tensor) -> Tensor:
    m.lin(x)
    raise LookupError("the forward raised")


def test_the_surface_of_a_model_is_untouched_also_when_the_forward_raises() -> None:
    model, batch = _model_with_hooks(), floats().requires_grad_()
    graph = recorded(model, square_loss, batch)
    before = _surface(model)
    with Replayer(model, decisions_of(keys(graph, droppable(graph)))):
        assert _surface(model) != before
        square_loss(model, batch).backward()
    assert _surface(model) == before
    model.body = _raising
    with pytest.raises(LookupError), Replayer(model, decisions_of(keys(graph, droppable(graph)))):
        square_loss(model, batch)
    assert _surface(model) == before
    assert not is_heard()


def test_a_forward_that_somebody_has_set_is_called_and_stays() -> None:
    model, batch = _model_with_hooks(), floats().requires_grad_()
    lin: Any = model.lin
    own = lin.forward = functools.partial(nn.functional.linear, weight=lin.weight)
    graph = recorded(model, square_loss, batch)
    plain, plan = step_outcome(model, square_loss, batch), keys(graph, droppable(graph))
    assert_same(plain, step_outcome(model, square_loss, batch, plan))
    assert vars(lin)["forward"] is own
    assert "forward" not in vars(model.out)


def test_an_interrupt_anywhere_leaves_nothing_behind() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.out(m.lin(x).sin())  # type: ignore[no-any-return]

    model, batch = Net(body, lin=nn.Linear(WIDTH, WIDTH), out=nn.Linear(WIDTH, WIDTH)), floats()
    graph = recorded(model, square_loss, batch)
    plan = keys(graph, droppable(graph))
    decisions = decisions_of(plan)
    before = _surface(model)

    def interrupted(*args: Any) -> Tensor:
        assert is_heard()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", interrupted)
        with pytest.raises(KeyboardInterrupt), decisions.replayer(model):
            square_loss(model, batch)
    assert not is_heard()
    assert _surface(model) == before
    assert_same(step_outcome(model, square_loss, batch), step_outcome(model, square_loss, batch, plan))


def test_a_budget_that_does_not_bind_listens_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Replayer] = []
    enter = Replayer.__enter__

    def counted(self: Replayer) -> Replayer:
        entered.append(self)
        return enter(self)

    monkeypatch.setattr(Replayer, "__enter__", counted)
    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh(), nn.Softplus())]
    model, batch = nn.Sequential(*layers), torch.randn(256, 16)
    heard: list[tuple[bool, int]] = []

    def loss_fn(m: Any, x: Tensor) -> Tensor:
        heard.append((is_heard(), torch._C._len_torch_dispatch_stack()))
        return square_loss(m, x)

    free = memfit.fit(model, loss_fn, batch, memory="1GiB")
    heard.clear()
    free(batch)
    assert (entered, heard, free.plan.recompute) == ([], [(False, 0)], ())
    less = free.plan.predicted_peak_bytes - 20_000
    tight = memfit.fit(model, loss_fn, batch, memory=less, micro_batch_size=256)
    heard.clear()
    tight(batch)
    assert (len(entered), heard) == (1, [(True, 0)])


def test_nothing_stays_alive_after_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    records: list[weakref.ref[Any]] = []
    make_handle, make_record = handles.Handle.__init__, handles.Record.__init__

    def handle_made(self: handles.Handle, *args: Any) -> None:
        make_handle(self, *args)
        made.append(weakref.ref(self))

    def record_made(self: handles.Record, *args: Any) -> None:
        make_record(self, *args)
        records.append(weakref.ref(self))

    monkeypatch.setattr(handles.Handle, "__init__", handle_made)
    monkeypatch.setattr(handles.Record, "__init__", record_made)
    case = CASES["in_place_chain"]
    model, batch = case.model(), case.batch()
    gc.disable()
    try:
        with everything_dropped(model, case.loss, batch):
            loss = case.loss(model, batch)
        assert any(handle() for handle in made)
        loss.backward()
        assert not [r for r in [*made, *records] if r() is not None]
    finally:
        gc.enable()
    assert made
    assert records


def test_dropped_memory_is_gone_between_forward_and_backward() -> None:
    alive: list[weakref.ref[Any]] = []

    def body(m: Any, x: Tensor) -> Any:
        h = torch.sin(m.lin(x))
        alive.append(weakref.ref(h.untyped_storage()))
        return torch.cos(h).exp()

    model, batch = Net(body, lin=nn.Linear(WIDTH, WIDTH)), floats()
    loss = square_loss(model, batch)
    assert alive[-1]() is not None
    with everything_dropped(model, square_loss, batch):
        loss = square_loss(model, batch)
    assert alive[-1]() is None
    loss.backward()


def test_an_in_place_replay_takes_over_what_nobody_else_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Tensor] = []
    copy_of = handles.copy_of_storage

    def counted(tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        copies.append(tensor)
        return copy_of(tensor)

    monkeypatch.setattr(handles, "copy_of_storage", counted)

    def body(m: Any, x: Tensor) -> Any:
        h = m.lin(x) * 2
        torch.sin(h.detach())  # its record dies unused and must not count as a reader
        return h.add_(1).mul_(0.5).sin()

    model, batch = Net(body, lin=nn.Linear(WIDTH, WIDTH)), floats()
    with everything_dropped(model, square_loss, batch):
        loss = square_loss(model, batch)
    copies.clear()
    loss.backward()
    assert copies == []


# ---- undeclared writers --------------------------------------------------------------------------------


class _Comparing(TorchDispatchMode):
    """Finds ops that change an argument which their schema does not say they write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        info = opinfo.op_info(func)
        written = {t.untyped_storage()._cdata for t in opinfo.all_writes(info, args, kwargs)}
        watched = [
            t
            for t in opinfo.tensors_in([*args, *kwargs.values()])
            if t.layout is torch.strided and t.untyped_storage()._cdata not in written
        ]
        before = [_bytes_of(t).clone() for t in watched]
        out = func(*args, **kwargs)
        self.seen += 1
        if not all(torch.equal(_bytes_of(t), b) for t, b in zip(watched, before, strict=True)):
            self.found.add(str(func))
        return out


def _bytes_of(tensor: Tensor) -> Tensor:
    """The whole storage, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


# Writes to its workspace; backward ops are never replayed, and nothing else reads a workspace.
_KNOWN_BACKWARD_WRITERS = {"aten.mkldnn_rnn_layer_backward.default"}


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("invisible")])
def test_every_op_that_writes_says_so_or_is_in_the_table(name: str) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch()
    with _Comparing() as mode:
        case.loss(model, batch).backward()
    assert mode.seen > 3
    assert mode.found <= _KNOWN_BACKWARD_WRITERS


def test_the_search_for_undeclared_writers_finds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opinfo, "_STATISTICS", {})
    with _Comparing() as mode:
        F.batch_norm(floats(), torch.zeros(WIDTH), torch.ones(WIDTH), training=True)
    assert mode.found == {"aten.native_batch_norm.default"}
