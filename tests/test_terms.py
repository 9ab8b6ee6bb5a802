"""A loss of several terms: each one is weighted by what it is a mean over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memfit
from memfit.core.audit import Kind
from memfit.errors import InexactAccumulation

ROWS, LENGTH, WIDTH, CLASSES = 7, 5, 8, 6
PLENTY = "1GiB"
COUNTS: dict[str, Any] = {"tokens": "labels", "size": "rows", "decay": "rows"}
Batch = dict[str, Tensor]


def model_of(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(2)
    parts = [nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, CLASSES)]
    return nn.Sequential(*parts).to(dtype)


def sequences(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> Batch:
    """Every row has another number of labels; two in a row have none, which may be a whole micro-batch."""
    torch.manual_seed(4)
    labels = torch.randint(0, CLASSES, (rows, LENGTH))
    for row in range(rows):
        labels[row, 1 + row % LENGTH :] = -100
    labels[2:4] = -100
    return {"x": torch.randn(rows, LENGTH, WIDTH, dtype=dtype), "labels": labels}


def terms_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A mean over labels, one over rows, and one that does not depend on the data."""
    logits = model(batch["x"])
    return {
        "tokens": F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()),
        "size": logits.logsumexp(-1).square().mean(),
        "decay": 0.1 * torch.stack([p.square().sum() for p in model.parameters()]).sum(),
    }


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("micro", [1, 2, 3, 7])
def test_each_term_has_the_weight_of_its_own_units(micro: int) -> None:
    model, batch = model_of(), sequences()
    twin = copy.deepcopy(model)
    step = memfit.fit(model, terms_of, batch, memory=PLENTY, micro_batch_size=micro, count=COUNTS)
    loss = step(batch)
    plain = terms_of(twin, batch)
    total = plain["tokens"] + plain["size"] + plain["decay"]
    total.backward()
    torch.testing.assert_close(loss, total.detach(), rtol=1e-12, atol=0)
    for found, expected in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_the_terms_of_the_last_batch_can_be_read() -> None:
    model, batch = model_of(), sequences()
    step = memfit.fit(model, terms_of, batch, memory=PLENTY, micro_batch_size=2, count=COUNTS)
    assert step.terms == {}
    loss = step(batch)
    plain = terms_of(model, batch)
    assert list(step.terms) == list(plain)
    for name, term in step.terms.items():
        assert not term.requires_grad
        torch.testing.assert_close(term, plain[name].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(step.terms.values()), loss, rtol=1e-12, atol=0)


def test_one_micro_batch_of_terms_is_the_plain_step_to_the_bit_whatever_is_recomputed() -> None:
    batch = sequences(64, torch.float32)
    model = model_of(torch.float32, dropout=0.3)
    profile = memfit.profile(model, terms_of, batch, micro_batch_size=64)
    least = memfit.frontier(profile)[0]
    for memory in (PLENTY, least.predicted_peak_bytes):
        one, twin = copy.deepcopy(model), copy.deepcopy(model)
        step = memfit.fit(one, terms_of, batch, memory=memory, micro_batch_size=64)
        torch.manual_seed(1)
        loss = step(batch)
        torch.manual_seed(1)
        total = sum(terms_of(twin, batch).values(), torch.zeros(()))
        total.backward()
        assert torch.equal(loss, total.detach())
        assert all(torch.equal(a, b) for a, b in zip(gradients(one), gradients(twin), strict=True))
        assert step.verdict is not None
        assert step.verdict.held


def test_a_single_count_holds_for_every_term() -> None:
    def by_rows(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {name: term for name, term in terms_of(model, batch).items() if name != "tokens"}

    model, batch = model_of(), sequences()
    step = memfit.fit(model, by_rows, batch, memory=PLENTY, micro_batch_size=3, count="rows")
    torch.testing.assert_close(
        step(batch), sum(by_rows(model, batch).values(), torch.zeros(())).detach(), rtol=1e-12, atol=0
    )


# ---- refusals ----------------------------------------------------------------------------------------


def test_a_term_without_a_count_is_named() -> None:
    with pytest.raises(ValueError, match=r"'decay'.*count="):
        memfit.fit(
            model_of(),
            terms_of,
            sequences(),
            memory=PLENTY,
            micro_batch_size=2,
            count={"tokens": "labels", "size": "rows"},
        )(sequences())


def test_counts_of_terms_for_a_loss_without_terms_are_refused() -> None:
    def plain(model: nn.Module, batch: Batch) -> Tensor:
        return terms_of(model, batch)["size"]

    with pytest.raises(ValueError, match="one tensor"):
        memfit.fit(model_of(), plain, sequences(), memory=PLENTY, micro_batch_size=2, count=COUNTS)(
            sequences()
        )


@pytest.mark.parametrize(
    ("terms", "error", "text"),
    [
        ({}, ValueError, "without any term"),
        ({"a": 1.0}, TypeError, "term 'a' is a float"),
        ({"a": torch.ones(3, requires_grad=True)}, ValueError, r"term 'a' is a tensor of shape \(3,\)"),
    ],
)
def test_a_mapping_that_is_no_loss_is_refused(terms: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        memfit.fit(model_of(), lambda m, b: terms, sequences(), memory=PLENTY, micro_batch_size=ROWS)


def test_a_count_of_nothing_names_its_term() -> None:
    step = memfit.fit(model_of(), terms_of, sequences(), memory=PLENTY, micro_batch_size=2, count=COUNTS)
    batch = sequences()
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="term 'tokens' gave 0"):
        step(batch)


# ---- found by the audit ------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_the_audit_finds_what_each_term_is_a_mean_over(micro: int) -> None:
    model, batch = model_of(), sequences()
    twin = copy.deepcopy(model)
    step = memfit.fit(model, terms_of, batch, memory=PLENTY, micro_batch_size=micro)
    step(batch)
    total = sum(terms_of(twin, batch).values(), torch.zeros(()))
    total.backward()
    for found, expected in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    assert step.audit is not None
    assert step.audit.is_exact
    counts = {name: audit.counter for name, audit in step.audit.terms}
    assert counts.keys() == COUNTS.keys()
    assert counts["tokens"] == "labels"
    assert memfit.Profile.from_json(step.profile.to_json()).audit == step.audit


def test_an_audit_says_what_each_term_is_weighted_by() -> None:
    found = memfit.audit(model_of(), terms_of, sequences())
    assert found.is_exact
    assert "tokens by labels" in str(found)


def test_a_loss_that_is_the_same_for_every_part_is_not_split_on_its_own() -> None:
    found = memfit.audit(model_of(), lambda m, b: terms_of(m, b)["decay"], sequences())
    assert not found.is_exact
    assert found.kind is Kind.SAME
    assert "equal gradients" in found.reason


def test_a_term_that_couples_the_rows_is_named() -> None:
    def with_a_coupled_term(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch["x"]).flatten(1)
        return {**terms_of(model, batch), "spread": (logits - logits.mean(0)).square().sum().sqrt()}

    found = memfit.audit(model_of(), with_a_coupled_term, sequences())
    assert not found.is_exact
    assert found.owner == "term 'spread'"
    assert found.cures
    with pytest.raises(InexactAccumulation, match="'spread'"):
        memfit.fit(model_of(), with_a_coupled_term, sequences(), memory=PLENTY, micro_batch_size=3)


def test_a_term_that_is_a_constant_does_not_hinder_the_others() -> None:
    def with_a_constant(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {**terms_of(model, batch), "offset": torch.tensor(2.0, dtype=torch.float64)}

    model, batch = model_of(), sequences()
    step = memfit.fit(model, with_a_constant, batch, memory=PLENTY, micro_batch_size=2)
    total = sum(with_a_constant(model, batch).values(), torch.zeros(()))
    torch.testing.assert_close(step(batch), total.detach(), rtol=1e-12, atol=0)


def test_a_gradient_hook_that_is_not_linear_does_not_keep_the_batch_whole() -> None:
    """It runs once, on the gradient of the whole batch."""
    model, batch = model_of(), sequences()
    twin = copy.deepcopy(model)
    for net in (model, twin):
        next(net.parameters()).register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    step = memfit.fit(model, terms_of, batch, memory=PLENTY, micro_batch_size=2)
    step(batch)
    sum(terms_of(twin, batch).values(), torch.zeros(())).backward()
    for found, expected in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
