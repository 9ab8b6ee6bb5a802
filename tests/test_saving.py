"""Hooks of saved tensors are set aside where nothing of the plan is saved: no gradient, no peak changes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from memfit.core.saving import frames_that_save, saved_in
from memfit.core.timeline import droppable
from memfit.runtime.meter import PeakMeter
from memfit.runtime.replay import Replayer, decisions_of
from memfit.runtime.savehooks import SaveHooks
from models import (
    CASES,
    WIDTH,
    Net,
    assert_same,
    floats,
    keys,
    outcome_of,
    plans_of,
    recorded,
    square_loss,
    step_outcome,
)


@pytest.mark.parametrize("name", CASES)
def test_hooks_in_the_frames_that_save_are_as_good_as_hooks_everywhere(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(3)
    model, batch = case.model(), case.batch()
    graph = recorded(model, case.loss, batch)
    plan = keys(graph, droppable(graph))
    found, peaks_bytes = [], []
    for frames in (None, frames_that_save(graph, plan)):
        with PeakMeter(torch.device("cpu")) as meter:
            found.append(step_outcome(model, case.loss, batch, plan, saved_in=frames))
        peaks_bytes.append(meter.peak_bytes)
    assert_same(*found)
    assert peaks_bytes[1] <= peaks_bytes[0]


@pytest.mark.parametrize("name", CASES)
def test_hooks_in_any_frames_at_all_give_the_plain_step_to_the_bit(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(3)
    model, batch = case.model(), case.batch()
    graph = recorded(model, case.loss, batch)
    plain = step_outcome(model, case.loss, batch)
    frames = sorted({op.key.frame for op in graph.ops[: graph.forward_ops]})
    draw = random.Random(5)
    for _, plan in plans_of(graph):
        for some in ((), [f for f in frames if draw.random() < 0.5]):
            assert_same(plain, step_outcome(model, case.loss, batch, plan, saved_in=frozenset(some)))


def test_following_calls_pays_where_most_saves_are_elsewhere() -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.GELU()) for _ in range(6)))
    graph = recorded(blocks, square_loss, floats())
    every = keys(graph, droppable(graph))
    last = [key for key in every if key.frame == "5.1"]
    assert frames_that_save(graph, last) >= {"5.1"}
    assert "0.1" not in frames_that_save(graph, last)
    assert saved_in(graph, every) is None
    assert frames_that_save(graph, ()) == frozenset()


# ---- whose hooks are in force ------------------------------------------------------------------------


class Inner(nn.Module):
    """A few saves."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return torch.tanh(self.lin(x).exp().sin())


def _hooked(counts: list[int]) -> Any:
    """A model with hooks of its own around some of its modules."""

    def pack(tensor: Tensor) -> Tensor:
        counts[0] += 1
        return tensor

    def body(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            x = m.second(x).cos()
        return m.third(checkpoint(m.second, x, use_reentrant=False))  # type: ignore[no-any-return]

    return Net(body, first=Inner(), second=Inner(), third=Inner())


@pytest.mark.parametrize(
    "frames", [(), ("first",), ("second",), ("second#1", "third"), ("model", "second.lin")]
)
def test_hooks_of_the_model_get_all_saves_that_they_get_in_the_plain_step(frames: tuple[str, ...]) -> None:
    counts, batch = [0], floats()
    model = _hooked(counts)
    plain = step_outcome(model, square_loss, batch)
    of_the_plain_step = counts[0]
    graph = recorded(model, square_loss, batch)
    plan = keys(graph, droppable(graph))
    counts[0] = 0
    twin = copy.deepcopy(model)
    torch.manual_seed(11)
    with Replayer(twin, decisions_of(plan, saved_in=frozenset(frames))):
        loss = square_loss(twin, batch)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    loss.backward()
    assert counts[0] == of_the_plain_step
    assert_same(plain, outcome_of(twin, loss))


def test_hooks_go_back_only_onto_what_lay_under_them() -> None:
    names: list[str] = []

    def named(name: str) -> saved_tensors_hooks:
        def pack(tensor: Tensor) -> Tensor:
            names.append(name)
            return tensor

        return saved_tensors_hooks(pack, lambda tensor: tensor)

    def save() -> str:
        names.clear()
        torch.ones(1, requires_grad=True).exp()
        return "".join(names)

    with named("under"):
        with SaveHooks(named("ours")) as ours:
            assert save() == "ours"
            with named("theirs"):
                ours.set(is_on=False)
                assert save() == "theirs"
            assert save() == "ours"
            ours.set(is_on=False)
            assert save() == "under"
            with named("theirs"):
                ours.set(is_on=True)
                assert save() == "theirs"
            assert save() == "under"
            ours.set(is_on=True)
            assert save() == "ours"
        assert save() == "under"
        with SaveHooks(named("ours")) as ours:
            ours.set(is_on=False)
        assert save() == "under"
    assert save() == ""
