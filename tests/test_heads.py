"""A few tiny heads of ``transformers`` at four unequal micro-batches; ``make heads`` has all that build."""

from __future__ import annotations

import pytest

from heads import outcome

FEW = [
    ("sequence classification", "bert", "labels"),
    ("sequence classification", "gpt2", "labels"),
    ("token classification", "electra", "labels"),
    ("masked", "roberta", "labels"),
    ("causal", "gpt2", "shifted_labels"),
    ("causal", "mixtral", "shifted_labels"),
    ("seq2seq", "t5", "labels"),
]


@pytest.mark.parametrize(("task", "model_type", "counter"), FEW)
def test_the_gradient_of_a_head_is_that_of_the_whole_batch(task: str, model_type: str, counter: str) -> None:
    found = outcome(task, model_type)
    assert (found.built, found.counter, found.parts) == (True, counter, 4), found.reason
    assert found.relative_error is not None
    assert found.relative_error <= 1e-12


def test_a_wrong_count_is_noticed_by_the_comparison() -> None:
    found = outcome("masked", "bert", count="rows")
    assert found.relative_error is not None
    assert found.relative_error > 1e-3
