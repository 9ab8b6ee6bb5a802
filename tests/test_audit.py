"""memfit.audit: the right class for every loss and layer, exact weights, cures, and no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import audits
import memfit
from audits import Case
from memfit.core.audit import Kind
from memfit.runtime.audit import audit_job
from memfit.runtime.fake import fake_tensors
from memfit.runtime.job import Job

CASES = [*audits.REPORT, *audits.MORE]
EXACT = [case for case in CASES if case.count is not None]
REFUSED = [case for case in CASES if case.counter is None]
# Their gradients may add up once the draws are the same, or where nobody reads the state.
ALIKE = {Kind.STATEFUL, Kind.SHARED_RANDOMNESS}


def made(case: Case) -> tuple[nn.Module, audits.Batch]:
    """The model and the batch of a case, always the same."""
    torch.manual_seed(3)
    return case.model(), case.batch()


def named(name: str) -> Case:
    """One case."""
    return next(case for case in CASES if case.name == name)


def test_the_report_has_seventeen_losses_and_there_are_more_of_every_class() -> None:
    assert len(audits.REPORT) == 17
    assert len(audits.MORE) >= 10
    assert {case.kind for case in CASES} == {*Kind} - {Kind.OPTIMIZER, Kind.UNDECIDED, Kind.SAME}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_each_loss_is_of_its_class(case: Case) -> None:
    model, batch = made(case)
    found = memfit.audit(model, case.loss, batch)
    assert (found.kind, found.counter) == (case.kind, case.counter), str(found)
    assert found.is_exact == (case.counter is not None)
    if found.is_exact:
        assert found.worst_error <= 1e-12
        assert found.cures == ()
        assert sum(found.weights) == pytest.approx(3 if case.counter == "sum" else 1, rel=1e-12)
    else:
        assert found.cures
        assert all(cure in str(found) for cure in found.cures)
        assert found.kind in ALIKE or not found.worst_error <= 1e-6


@pytest.mark.parametrize("case", EXACT, ids=[case.name for case in EXACT])
@pytest.mark.parametrize("sizes", [(1, 2, 5), (3, 5), (7, 1)], ids=str)
def test_what_is_accepted_adds_up_by_hand(case: Case, sizes: tuple[int, ...]) -> None:
    assert case.count is not None
    model, batch = made(case)
    assert audits.split_error(model, case.loss, batch, case.count, sizes) <= 1e-12


JUDGED = [case for case in REFUSED if case.kind not in {*ALIKE, Kind.GRADIENT_HOOK}]


@pytest.mark.parametrize("case", JUDGED, ids=[case.name for case in JUDGED])
def test_what_is_refused_does_not_add_up_by_hand(case: Case) -> None:
    model, batch = made(case)
    counts: list[audits.Count] = [audits.rows, audits.nothing]
    if "labels" in batch:
        counts.append(audits.valid)
    assert min(audits.split_error(model, case.loss, batch, count, (2, 6)) for count in counts) > 1e-5


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("BatchNorm", "1: aten::native_batch_norm"),
        ("functional batch_norm", "1: aten::native_batch_norm"),
        ("batch deviation", "1 (BatchDeviation)"),
        ("attention over rows", "1 (Across)"),
        ("codebook", "1.mean"),
        ("counter of forwards", "1.calls"),
        ("depth drawn for all", "1: aten::rand"),
        ("mixup", "loss_fn: aten::randperm"),
        ("clamping hook", "0.weight"),
        ("norms in a module's backward", "2"),
        ("InfoNCE", "loss_fn"),
    ],
)
def test_the_owner_is_named(name: str, owner: str) -> None:
    case = named(name)
    model, batch = made(case)
    assert memfit.audit(model, case.loss, batch).owner.startswith(owner)


def test_the_units_of_a_mixed_loss_are_named() -> None:
    case = named("token ce + auxiliary loss by rows")
    model, batch = made(case)
    assert memfit.audit(model, case.loss, batch).notes == ("terms over rows and over labels",)


def test_hidden_class_weights_are_derived() -> None:
    model, batch = made(named("class-weighted ce, weights hidden"))
    found = memfit.audit(model, audits.weighted_secretly, batch)
    known = memfit.audit(model, audits.weighted, batch)
    assert found.counter is None
    assert found.weights == pytest.approx(known.weights, rel=1e-9)
    assert "count=" in found.cures[0]


# ---- no trace ------------------------------------------------------------------------------------


def state_of(model: nn.Module, batch: audits.Batch) -> list[Any]:
    """Everything that an audit might change."""
    tensors = [*model.parameters(), *model.buffers(), *batch.values()]
    gradients = [p.grad for p in model.parameters()]
    return [
        [id(t) for t in tensors],
        [t.detach().clone() for t in tensors],
        [t.requires_grad for t in tensors],
        [id(g) for g in gradients],
        [None if g is None else g.clone() for g in gradients],
        [
            (
                sorted(module.__dict__),
                module.training,
                [len(v) for v in module.__dict__.values() if isinstance(v, dict)],
            )
            for module in model.modules()
        ],
        [list(dict(p._backward_hooks or {}).items()) for p in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        list(np.random.get_state()),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    ]


def equal(one: Any, other: Any) -> bool:
    """Whether two states are the same."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool((one == other).all())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def meddling(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """The loss, with everything changed on the way that a loss may change."""

    def fn(m: Any, b: Any) -> Tensor:
        random.random()
        np.random.rand()
        torch.rand(2)
        b["x"].mul_(1.5)
        m.train(not m.training)
        m.train(not m.training)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float16)
        return loss(m, b)

    return fn


def failing(m: Any, b: Any) -> Tensor:
    """A loss that changes much, and then does not work."""
    meddling(audits.mse)(m, b)
    raise LookupError("no such label")


@pytest.mark.parametrize("largest_copy_bytes", [1 << 30, 0], ids=["on a copy", "on itself"])
@pytest.mark.parametrize("loss", [meddling(audits.mse), failing], ids=["a loss", "a loss that raises"])
def test_an_audit_leaves_no_trace(loss: Callable[[Any, Any], Tensor], largest_copy_bytes: int) -> None:
    torch.manual_seed(0)
    model = audits.classifier(nn.BatchNorm1d(10), nn.Dropout(0.3), audits.Codebook())
    model[3].eval()
    next(model.parameters()).register_hook(lambda g: 2 * g)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    batch = audits.labelled()
    before = state_of(model, batch)
    try:
        audit_job(Job(model, loss, batch, None), largest_copy_bytes=largest_copy_bytes)
    except LookupError:
        assert loss is failing
    else:
        assert loss is not failing
    after = state_of(model, batch)
    assert [equal(a, b) for a, b in zip(before, after, strict=True)] == [True] * len(before)


def test_a_generator_of_ones_own_is_put_back() -> None:
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()

    def noisy(m: Any, b: Any) -> Tensor:
        x = b["x"] + torch.randn(b["x"].shape, generator=generator)
        return audits.mse(m, {**b, "x": x})

    assert memfit.audit(audits.classifier(), noisy, audits.labelled()).counter == "rows"
    assert torch.equal(generator.get_state(), state)


def test_a_loss_may_write_to_its_batch() -> None:
    def writing(m: Any, b: Any) -> Tensor:
        b["x"].mul_(1.5)
        return audits.mse(m, b)

    assert memfit.audit(audits.classifier(), writing, audits.labelled()).counter == "rows"


def test_a_loss_around_another_model_leaves_that_as_it_was() -> None:
    torch.manual_seed(0)
    model, batch = audits.classifier(nn.BatchNorm1d(10), nn.Dropout(0.2)), audits.labelled()
    before = state_of(model, batch)
    assert memfit.audit(model, lambda _, b: audits.mse(model, b), batch).kind is Kind.COUPLED_LAYER
    assert [equal(a, b) for a, b in zip(before, state_of(model, batch), strict=True)] == [True] * len(before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off_an_audit_turns_them_on_for_itself(context: Any) -> None:
    model = audits.classifier()
    with context():
        assert memfit.audit(model, audits.ce, audits.labelled()).counter == "labels"
        assert not torch.is_grad_enabled()


def test_a_model_that_hooks_itself_is_not_hooked_again() -> None:
    class Recorded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(audits.WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "is_recorded"):
                self.layer.register_forward_hook(lambda *_: None)
                self.is_recorded = True
            out: Tensor = self.layer(x)
            return out

    model = Recorded()
    audit_job(Job(model, audits.mse, audits.labelled(), None), largest_copy_bytes=0)
    assert not model.layer._forward_hooks


# ---- errors, limits ------------------------------------------------------------------------------


def test_an_error_in_the_loss_says_what_was_probed() -> None:
    with pytest.raises(LookupError, match="no such label") as caught:
        memfit.audit(audits.classifier(), failing, audits.labelled())
    assert "memfit.audit was probing rows 0 to 5 of 6" in caught.value.__notes__[-1]


def test_a_loss_that_fails_on_parts_only_is_undecided() -> None:
    def paired(m: Any, b: Any) -> Tensor:
        if len(b["x"]) % 2:
            raise ValueError("rows come in pairs")
        return audits.mse(m, b)

    found = memfit.audit(audits.classifier(), paired, audits.labelled())
    assert (found.kind, found.is_exact) == (Kind.UNDECIDED, False)
    assert "rows come in pairs" in found.undecided[0]


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_a_model_without_numbers_is_refused(where: str) -> None:
    if where == "meta":
        model = audits.classifier().to("meta")
    else:
        with fake_tensors():
            model = audits.classifier()
    with pytest.raises(memfit.UnsupportedModel, match="no gradients to compare") as caught:
        memfit.audit(model, audits.mse, audits.labelled())
    assert caught.value.owner == "0.weight"


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (lambda m, b: m(b["x"]), ValueError),
        (lambda m, b: 1.0, TypeError),
        (lambda m, b: m(b["x"]).sum().detach(), ValueError),
    ],
    ids=["a matrix", "a number", "no graph"],
)
def test_what_is_no_loss_is_refused(loss: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        memfit.audit(audits.classifier(), loss, audits.labelled())


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        memfit.audit(audits.classifier().requires_grad_(False), audits.mse, audits.labelled())


@pytest.mark.parametrize("rows", range(1, 9))
def test_three_rows_are_enough(rows: int) -> None:
    torch.manual_seed(1)
    batch = {name: t[:rows] for name, t in audits.labelled().items()}
    found = memfit.audit(audits.classifier(), audits.ce, batch)
    assert found.counter == ("labels" if rows >= 3 else None)
    assert (found.kind is Kind.UNDECIDED) == (rows < 3)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that steps in the backward."""
    optimizer = torch.optim.SGD(model.parameters())
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: optimizer.step())
    return optimizer


@pytest.mark.parametrize(
    ("make", "owner"),
    [(lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS"), (fused, "0.weight")],
    ids=["closure", "in the backward"],
)
def test_an_optimizer_that_cannot_accumulate_is_named(make: Any, owner: str) -> None:
    model = audits.classifier()
    found = memfit.audit(model, audits.mse, audits.labelled(), optimizer=make(model))
    assert (found.kind, found.is_exact) == (Kind.OPTIMIZER, False)
    assert found.owner.startswith(owner)


def test_an_optimizer_that_steps_once_is_fine() -> None:
    model = audits.classifier()
    assert memfit.audit(
        model, audits.mse, audits.labelled(), optimizer=torch.optim.AdamW(model.parameters())
    ).is_exact


@pytest.mark.parametrize("name", ["token ce", "InfoNCE", "BatchNorm", "mixup"])
def test_a_model_too_large_to_copy_is_probed_itself_and_says_what_is_lost(name: str) -> None:
    case = named(name)
    model, batch = made(case)
    found = audit_job(Job(model, case.loss, batch, None), largest_copy_bytes=0)
    assert (found.kind, found.counter) == (case.kind, case.counter)
    assert any("too large to copy" in text for text in found.undecided)


def test_a_loss_around_another_model_is_probed_on_that() -> None:
    model = audits.classifier()
    found = memfit.audit(model, lambda _, b: audits.ce(model, b), audits.labelled())
    assert found.counter == "labels"
    assert any("does not depend on the parameters" in text for text in found.undecided)


def autocast(m: Any, b: Any) -> Tensor:
    """A loss in half precision."""
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(m(b["x"]).float(), b["labels"])


class Recomputed(nn.Module):
    """A model that recomputes its middle, dropout included."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.last = nn.Linear(audits.WIDTH, 8), nn.Linear(8, audits.CLASSES)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.4))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        hidden = checkpoint(self.middle, self.first(x), use_reentrant=self.use_reentrant)
        out: Tensor = self.last(hidden)
        return out


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (audits.classifier, autocast),
        (lambda: audits.classifier().bfloat16(), lambda m, b: audits.ce(m, {**b, "x": b["x"].bfloat16()})),
        (audits.classifier, lambda m, b: F.cross_entropy(m(b["x"]).float(), b["labels"])),
        (lambda: Recomputed(True), audits.ce),
        (lambda: Recomputed(False), audits.ce),
    ],
    ids=["autocast", "bfloat16", "float", "reentrant checkpoint", "checkpoint"],
)
def test_low_precision_and_recomputation_are_proved_in_double(model: Any, loss: Any) -> None:
    torch.manual_seed(2)
    found = memfit.audit(model(), loss, audits.labelled())
    assert found.counter == "labels"
    assert found.worst_error <= 1e-12
    assert found.undecided == ()


def test_a_head_that_starts_at_zero_hides_nothing() -> None:
    model = audits.classifier(audits.Across())
    nn.init.zeros_(model.get_parameter("3.weight"))
    assert memfit.audit(model, audits.ce, audits.labelled()).kind is Kind.COUPLED_LAYER


def test_what_counts_alike_in_the_batch_is_told_apart_by_the_probe() -> None:
    batch = {"x": torch.rand(8, audits.WIDTH), "importance": torch.ones(8)}

    def weighed(m: Any, b: Any) -> Tensor:
        loss: Tensor = (m(b["x"]).square().mean(1) * b["importance"]).sum() / b["importance"].sum()
        return loss

    for importance in (torch.ones(8), torch.rand(8)):
        batch["importance"] = importance
        found = memfit.audit(audits.classifier(), weighed, batch)
        assert (found.counter, found.undecided) == ("sum of batch['importance']", ())


def test_padding_that_the_example_has_not_is_told_from_rows() -> None:
    def ignoring_padding(m: Any, b: Any) -> Tensor:
        logits: Tensor = m(b["ids"])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), b["ids"][:, 1:].flatten(), ignore_index=0)

    ids = torch.randint(1, audits.WORDS, (8, audits.LENGTH))
    found = memfit.audit(audits.Words(), ignoring_padding, {"ids": ids})
    assert found.counter == "entries of batch['ids'][:, 1:] that are not 0"


PAD = 3
CRITERION = nn.CrossEntropyLoss(ignore_index=3)


def by_name(m: Any, b: Any) -> Tensor:
    """Ignores what has a name."""
    logits: Tensor = m(b["ids"])[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), b["ids"][:, 1:].flatten(), ignore_index=PAD)


def by_number(m: Any, b: Any) -> Tensor:
    """Ignores a number that stands in the code."""
    logits: Tensor = m(b["ids"])[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), b["ids"][:, 1:].flatten(), ignore_index=3)


def by_criterion(m: Any, b: Any) -> Tensor:
    """Ignores what a criterion ignores."""
    logits: Tensor = m(b["ids"])[:, :-1]
    loss: Tensor = CRITERION(logits.flatten(0, 1), b["ids"][:, 1:].flatten())
    return loss


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("loss", [by_name, by_number, by_criterion])
def test_what_a_loss_says_that_it_ignores_is_counted(loss: Any, is_padded: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(4, audits.WORDS, (8, audits.LENGTH))
    if is_padded:
        ids[1, 5:] = ids[4, 3:] = 3
    found = memfit.audit(audits.Words(), loss, {"ids": ids})
    assert found.counter == "entries of batch['ids'][:, 1:] that are not 3"


def test_what_cannot_be_told_apart_is_listed() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, audits.WIDTH), "kind": torch.arange(8) % 4, "group": torch.arange(8)}
    found = memfit.audit(audits.classifier(), lambda m, b: F.cross_entropy(m(b["x"]), b["kind"]), batch)
    assert found.counter == "rows"
    assert {f"entries of batch['kind'] that are not {value}" for value in (-1, -100)} <= {*found.alike}
    assert "entries of batch['kind'] that are not 0" not in found.alike


# ---- large models --------------------------------------------------------------------------------


def wide_words() -> nn.Module:
    """A model of words with two large parameters."""
    model = audits.Words()
    model.embed, model.norm, model.head = nn.Embedding(2100, 512), nn.LayerNorm(512), nn.Linear(512, 2100)
    return model


def audit_as_large(model: nn.Module, loss: Any, batch: Any) -> memfit.Audit:
    """The audit, where even such a model is called large."""
    return audit_job(Job(model, loss, batch, None), large_bytes=0)


@pytest.mark.parametrize("name", ["token ce", "causal ce", "token ce + auxiliary loss by rows", "perplexity"])
def test_a_large_model_is_audited_on_few_rows_and_tokens_and_no_large_gradient(name: str) -> None:
    torch.manual_seed(3)
    case, seen = named(name), list[torch.Size]()

    def loss(m: Any, b: Any) -> Tensor:
        seen.append(b["ids"].shape)
        return case.loss(m, b)

    ids = torch.randint(0, audits.WORDS, (8, 100))
    labels = ids.clone()
    labels[:, :60] = -100  # a long prompt, whose first tokens alone would show nothing
    found = audit_as_large(wide_words(), loss, {"ids": ids, "labels": labels})
    assert (found.kind, found.counter) == (case.kind, case.counter)
    assert {shape[1] for shape in seen} == {16}
    assert seen[0][0] == 3
    if found.is_exact:
        assert "sequences were cut to 16 of 100 tokens" in found.notes
        assert any("gradients of 2 of 5 parameters were not compared" in note for note in found.notes)


def test_a_penalty_on_a_parameter_that_is_not_compared_is_seen_in_the_losses() -> None:
    def with_penalty(m: Any, b: Any) -> Tensor:
        logits = m(b["ids"]).flatten(0, 1)
        loss = F.cross_entropy(logits, b["labels"].flatten(), reduction="sum")
        penalised: Tensor = loss + m.head.weight.square().sum()
        return penalised

    found = audit_as_large(wide_words(), with_penalty, audits.worded())
    assert found.kind is Kind.MIXED


def test_a_model_that_needs_its_length_is_not_cut() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix = wide_words(), nn.Parameter(torch.randn(40, 40))

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.mix @ self.words(ids)[..., :11]
            return out

    torch.manual_seed(3)
    ids = torch.randint(0, audits.WORDS, (8, 40))
    found = audit_as_large(Fixed(), audits.tokens, {"ids": ids, "labels": ids})
    assert found.counter == "labels"
    assert not any("cut" in note for note in found.notes)
