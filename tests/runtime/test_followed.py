"""Forwards that are followed: copies of modules, other threads, replays in replays, what does not begin."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memfit.core.saving import frames_that_save
from memfit.core.timeline import droppable
from memfit.runtime.intercept import is_heard
from memfit.runtime.replay import Replayer, decisions_of
from models import (
    WIDTH,
    Net,
    assert_same,
    floats,
    keys,
    plans_of,
    recorded,
    square_loss,
    step_outcome,
)


def _linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def _copies_a_module(m: Any, x: Tensor) -> Any:
    fast = copy.deepcopy(m.lin)
    with torch.no_grad():
        fast[0].weight.mul_(2.0)
    return (fast(x).sin() * m.lin(x).cos()).tanh()


def test_a_copy_of_a_module_made_in_the_forward_runs_with_its_own_weights() -> None:
    torch.manual_seed(0)
    model, batch = Net(_copies_a_module, lin=_linear()), floats()
    plain = step_outcome(model, square_loss, batch)
    graph = recorded(model, square_loss, batch)
    for _, plan in plans_of(graph):
        for frames in (None, frames_that_save(graph, plan), frozenset({"lin", "lin.0"})):
            assert_same(plain, step_outcome(model, square_loss, batch, plan, saved_in=frames))


def test_a_copy_made_in_the_forward_is_a_module_like_any_other_afterwards() -> None:
    kept: list[nn.Module] = []

    def body(m: Any, x: Tensor) -> Any:
        kept.append(copy.deepcopy(m.lin))
        return m.lin(x).sin()

    model: Any = Net(body, lin=_linear())
    batch = floats()
    graph = recorded(model, square_loss, batch)
    with Replayer(model, decisions_of(keys(graph, droppable(graph)))):
        square_loss(model, batch)
    twin: Any = kept[-1]
    with torch.no_grad():
        twin[2].weight.zero_()
        twin[2].bias.zero_()
    assert torch.equal(twin(batch), torch.zeros_like(batch))
    assert not torch.equal(copy.deepcopy(model.lin)(batch), torch.zeros_like(batch))


def _calls_in_a_thread(m: Any, x: Tensor) -> Any:
    found: list[Any] = []

    def work() -> None:
        h = m.lin(x)
        found.extend([h.add_(1.0), is_heard(), torch._C._autograd._top_saved_tensors_default_hooks(True)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[1:] == [False, None]
    return m.lin((found[0] * 2.0).sin()).cos()


@pytest.mark.parametrize(
    "frames", [None, frozenset(), frozenset({"model"}), frozenset({"lin", "lin.0", "lin.1"})]
)
def test_a_module_called_in_another_thread_is_called_as_it_is(frames: Any) -> None:
    model, batch = Net(_calls_in_a_thread, lin=_linear()), floats()
    plain = step_outcome(model, square_loss, batch)
    for _, plan in plans_of(recorded(model, square_loss, batch)):
        assert_same(plain, step_outcome(model, square_loss, batch, plan, saved_in=frames))


def test_statistics_that_an_inner_replay_holds_are_written_in_an_outer_frame() -> None:
    norm = nn.BatchNorm1d(WIDTH)
    inner = Net(lambda m, x: m.norm((x * m.norm.running_var).sin()).cos(), norm=norm)
    plan_of_inner: list[Any] = []

    def body(m: Any, x: Tensor) -> Any:
        if not plan_of_inner:
            return m.inner(m.norm(x).sin())
        with Replayer(m.inner, decisions_of(plan_of_inner)):
            return m.inner(m.norm(x).sin())

    model, batch = Net(body, inner=inner, norm=norm), floats()
    plain = step_outcome(model, square_loss, batch)
    graph = recorded(inner, square_loss, batch)
    outer = [plan for _, plan in plans_of(recorded(model, square_loss, batch))]
    plan_of_inner += keys(graph, droppable(graph))
    for plan in outer:
        assert_same(plain, step_outcome(model, square_loss, batch, plan))


def test_a_forward_that_cannot_begin_leaves_the_model_as_it_was() -> None:
    model, batch = Net(lambda m, x: m.lin(x).sin(), lin=_linear()), floats()
    graph = recorded(model, square_loss, batch)
    replayer = Replayer(model, decisions_of(keys(graph, droppable(graph))))
    not_now = torch.autograd.graph.disable_saved_tensors_hooks("not now")
    with not_now, pytest.raises(RuntimeError, match="not now"):
        replayer.__enter__()
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert replayer.is_free_for(model)
    assert not is_heard()
