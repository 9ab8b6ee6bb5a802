"""Models with hard control flow at the least memory; ``make zoo`` has every model at three budgets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memfit
from every import hard_ones
from hard import HARD, floats
from heads import quiet
from judged import Specimen, judged
from models import square_loss

SPECIMENS = {name: heads[0] for name, heads in hard_ones()}
QUICK = [
    "early_exit_of_each_row",
    "experts_of_which_some_are_empty",
    "experts_by_sorting_and_splitting",
    "experts_with_a_capacity",
    "shapes_from_data",
    "layers_dropped_by_chance",
    "state_carried_from_step_to_step",
    "functional_batch_norm",
    "vector_quantisation",
    "queue_of_negatives",
    "messages_on_a_graph",
    "sparse_gradients",
    "functions_of_ones_own",
    "function_that_runs_again_in_its_backward",
    "double_backward",
    "hooks_that_change_what_passes",
    "selective_checkpoints",
    "fake_quantised_training",
    "frozen_features_quantised_dynamically",
    "activation_written_past_autograd",
    "tensors_of_a_class_of_ones_own",
]


@pytest.mark.parametrize("name", QUICK)
def test_a_hard_model_keeps_every_promise_at_the_least_memory(name: str) -> None:
    with quiet():
        found = judged(SPECIMENS[name], budgets=1)
    assert found.status == "planned", found.reason
    assert found.is_kept, found.runs


@pytest.mark.parametrize("name", [name for name, hard in HARD.items() if hard.raises])
def test_what_autograd_refuses_is_refused_and_not_hidden_by_a_replay(name: str) -> None:
    assert judged(SPECIMENS[name]).status == "raises"


def test_a_model_that_is_not_the_same_twice_is_told_from_a_wrong_gradient() -> None:
    calls: list[int] = []

    class Fickle(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(x) * len(calls)

    fickle = Specimen("fickle", "hard", lambda: Fickle(32, 32), lambda _: floats(), square_loss)
    assert judged(fickle).status == "unlike"


def test_profiling_leaves_the_shapes_of_buffers_that_a_forward_resizes() -> None:
    model = HARD["fake_quantised_training"].build()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    memfit.profile(model, square_loss, floats())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
