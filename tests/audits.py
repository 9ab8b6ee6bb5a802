"""Losses and models of every class that an audit must tell apart, and a gradient computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfit.core.audit import Kind
from memfit.runtime.batch import split

ROWS, WIDTH, CLASSES, LENGTH, WORDS = 8, 6, 4, 7, 11
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.5])

Batch = dict[str, Tensor]
Count = Callable[[Batch], float]


@dataclass(frozen=True)
class Case:
    """A model, a batch, a loss, the class it is of, and for an exact one what is counted."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[Any, Batch], Tensor]
    kind: Kind
    counter: str | None = None
    count: Count | None = None


def classifier(*extra: nn.Module) -> nn.Sequential:
    """A small classifier of rows."""
    return nn.Sequential(nn.Linear(WIDTH, 10), *extra, nn.Tanh(), nn.Linear(10, CLASSES))


class Words(nn.Module):
    """A small model that gives logits for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, (rows, length, words)."""
        out: Tensor = self.head(self.norm(torch.tanh(self.embed(ids)).cumsum(1)))
        return out


def labelled() -> Batch:
    """Rows of numbers with a class each."""
    return {"x": torch.randn(ROWS, WIDTH), "labels": torch.randint(0, CLASSES, (ROWS,))}


def partly_labelled() -> Batch:
    """The same, one label ignored."""
    batch = labelled()
    batch["labels"][2] = -100
    return batch


def worded() -> Batch:
    """Tokens with labels, some of them ignored."""
    ids = torch.randint(0, WORDS, (ROWS, LENGTH))
    labels = ids.clone()
    labels[1, 4:] = labels[4, 2:] = -100
    return {"ids": ids, "labels": labels}


def masked() -> Batch:
    """Tokens with a mask that happens to be full."""
    return {"ids": torch.randint(0, WORDS, (ROWS, LENGTH)), "mask": torch.ones(ROWS, LENGTH)}


def advantages() -> Batch:
    """Actions with their rewards."""
    return {**labelled(), "reward": torch.randn(ROWS)}


def pictures() -> Batch:
    """Small images with a mask to be found."""
    return {"image": torch.randn(ROWS, 1, 5, 5), "region": (torch.rand(ROWS, 1, 5, 5) < 0.4).float()}


def signals() -> Batch:
    """Sequences for connectionist temporal classification."""
    return {"x": torch.randn(ROWS, 9, WIDTH), "labels": torch.randint(1, CLASSES, (ROWS, 3))}


def rows(part: Batch) -> float:
    """Rows."""
    return float(len(next(iter(part.values()))))


def valid(part: Batch) -> float:
    """Labels that are not ignored."""
    return float((part["labels"] != -100).sum())


def valid_shifted(part: Batch) -> float:
    """Labels after the first that are not ignored."""
    return float((part["labels"][:, 1:] != -100).sum())


def class_mass(part: Batch) -> float:
    """The class weights of the labels."""
    return float(CLASS_WEIGHTS.double()[part["labels"][part["labels"] >= 0]].sum())


def nothing(part: Batch) -> float:
    """Marks a sum."""
    return -1.0


# ---- losses --------------------------------------------------------------------------------------


def out(m: Any, x: Tensor) -> Tensor:
    """What a model gives."""
    given: Tensor = m(x)
    return given


def decay(m: Any) -> Tensor:
    """A tenth of the squares of all parameters."""
    return 0.1 * torch.stack([p.square().sum() for p in m.parameters()]).sum()


def mse(m: Any, b: Batch) -> Tensor:
    return out(m, b["x"]).square().mean()


def ce(m: Any, b: Batch) -> Tensor:
    return F.cross_entropy(out(m, b["x"]), b["labels"])


def ce_sum(m: Any, b: Batch) -> Tensor:
    return F.cross_entropy(out(m, b["x"]), b["labels"], reduction="sum")


def tokens(m: Any, b: Batch) -> Tensor:
    return F.cross_entropy(out(m, b["ids"]).flatten(0, 1), b["labels"].flatten())


def next_token(m: Any, b: Batch) -> Tensor:
    return F.cross_entropy(out(m, b["ids"])[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten())


def per_sequence(m: Any, b: Batch) -> Tensor:
    each = F.cross_entropy(out(m, b["ids"]).mT, b["labels"], reduction="none")
    keep = b["labels"] != -100
    return ((each * keep).sum(1) / keep.sum(1)).mean()


def tokens_and_decay(m: Any, b: Batch) -> Tensor:
    return tokens(m, b) + decay(m)


def weighted(m: Any, b: Batch) -> Tensor:
    logits = out(m, b["x"])
    return F.cross_entropy(logits, b["labels"], weight=CLASS_WEIGHTS.to(logits.dtype))


def weighted_secretly(m: Any, b: Batch) -> Tensor:
    logits = out(m, b["x"])
    return F.cross_entropy(logits, b["labels"], weight=logits.new_tensor([0.5, 1.0, 2.0, 3.5]))


def rmse(m: Any, b: Batch) -> Tensor:
    return mse(m, b).sqrt()


def perplexity(m: Any, b: Batch) -> Tensor:
    return tokens(m, b).exp()


def tokens_and_aux(m: Any, b: Batch) -> Tensor:
    logits = out(m, b["ids"])
    return tokens(m, b) + 0.01 * logits.logsumexp(-1).square().mean()


def sum_and_decay(m: Any, b: Batch) -> Tensor:
    return ce_sum(m, b) + decay(m)


def info_nce(m: Any, b: Batch) -> Tensor:
    z = F.normalize(out(m, b["x"]), dim=1)
    other = F.normalize(out(m, b["x"] + 0.3), dim=1)
    return F.cross_entropy(z @ other.T / 0.1, torch.arange(len(z)))


def dice(m: Any, b: Batch) -> Tensor:
    p = torch.sigmoid(out(m, b["image"]))
    return 1 - (2 * (p * b["region"]).sum() + 1) / (p.sum() + b["region"].sum() + 1)


def policy(m: Any, b: Batch) -> Tensor:
    chosen = F.log_softmax(out(m, b["x"]), 1).gather(1, b["labels"].clamp(min=0)[:, None])[:, 0]
    reward = b["reward"]
    return -(chosen * (reward - reward.mean()) / (reward.std(unbiased=False) + 1e-4)).mean()


def load_balance(m: Any, b: Batch) -> Tensor:
    probabilities = torch.softmax(out(m, b["x"]), 1)
    frequency = F.one_hot(probabilities.argmax(1), CLASSES).to(probabilities.dtype).mean(0)
    return CLASSES * (frequency * probabilities.mean(0)).sum()


def vicreg(m: Any, b: Batch) -> Tensor:
    z = out(m, b["x"])
    return F.relu(1 - (z.var(0, unbiased=False) + 1e-4).sqrt()).mean() + z.square().mean()


def hardest(m: Any, b: Batch) -> Tensor:
    z = out(m, b["x"])
    distance = (z[:, None] - z[None]).square().sum(-1) + 9.0 * torch.eye(len(z), dtype=z.dtype)
    return (-distance.amin(1)).exp().mean()


def masked_error(m: Any, b: Batch) -> Tensor:
    each = out(m, b["ids"]).square().mean(-1)
    return (each * b["mask"]).sum() / b["mask"].sum()


def ctc(m: Any, b: Batch) -> Tensor:
    steps = F.log_softmax(out(m, b["x"]), -1).transpose(0, 1)
    lengths = torch.full((steps.shape[1],), 9)
    return F.ctc_loss(steps, b["labels"].clamp(min=0), lengths, torch.full_like(lengths, 3))


def mixup(m: Any, b: Batch) -> Tensor:
    order = torch.randperm(len(b["x"]))
    return ce(m, {**b, "x": 0.7 * b["x"] + 0.3 * b["x"][order]})


def distilled(m: Any, b: Batch) -> Tensor:
    logits = out(m, b["x"])
    teacher = torch.softmax(b["x"][:, :CLASSES], 1)
    return F.cross_entropy(logits, b["labels"]) + F.kl_div(
        F.log_softmax(logits, 1), teacher, reduction="batchmean"
    )


# ---- layers --------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Normalises over rows by a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class BatchDeviation(nn.Module):
    """Adds the spread over the batch to each row, as StyleGAN's discriminator does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.std(0, unbiased=False).mean()


class Across(nn.Module):
    """Attention from row to row."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.T, 1) @ x


class Codebook(nn.Module):
    """A moving mean that the forward reads and writes."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.mean
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return out


class Counted(nn.Module):
    """A buffer that counts forwards, and that nobody reads."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class SkippedForAll(nn.Module):
    """Stochastic depth that keeps or drops a branch for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.tanh() * (torch.rand(1) < 0.8)


class SkippedByRow(nn.Module):
    """Stochastic depth that keeps or drops a branch for each row."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.tanh() * torch.empty(len(x), 1).bernoulli_(0.5)


def clamped() -> nn.Module:
    """A model with a gradient hook that is not linear."""
    model = classifier()
    next(model.parameters()).register_hook(lambda g: g.clamp(-0.01, 0.01))
    return model


def scaled() -> nn.Module:
    """A model with a gradient hook that is linear."""
    model = classifier()
    next(model.parameters()).register_hook(lambda g: 2 * g)
    return model


def normed(_: nn.Module, gradients: Any) -> tuple[Tensor]:
    """A gradient of norm 1, whatever it was."""
    return (gradients[0] / gradients[0].norm(),)


def clipped_inside() -> nn.Module:
    """A model one of whose modules changes gradients in a way that is not linear."""
    model = classifier()
    model[-1].register_full_backward_pre_hook(normed)
    return model


def frozen() -> nn.Module:
    """A model whose BatchNorm is in eval mode."""
    model = classifier(nn.BatchNorm1d(10))
    model[1].eval()
    return model


def conv() -> nn.Module:
    """A small segmenter."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1))


def spectral() -> nn.Module:
    """A model with a power iteration in each forward."""
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, 10)), nn.Linear(10, CLASSES)
    )


REPORT = [  # the 17 losses of section 3.3 of the field report
    Case("mse mean", classifier, labelled, mse, Kind.ROWS, "rows", rows),
    Case("ce mean", classifier, labelled, ce, Kind.UNITS, "labels", valid),
    Case("frozen BatchNorm", frozen, labelled, mse, Kind.ROWS, "rows", rows),
    Case("LayerNorm", lambda: classifier(nn.LayerNorm(10)), labelled, mse, Kind.ROWS, "rows", rows),
    Case("mean over sequences of means", Words, worded, per_sequence, Kind.ROWS, "rows", rows),
    Case("ce sum", classifier, labelled, ce_sum, Kind.SUM, "sum", nothing),
    Case("token ce", Words, worded, tokens, Kind.UNITS, "labels", valid),
    Case(
        "class-weighted ce",
        classifier,
        labelled,
        weighted,
        Kind.UNITS,
        "sum of CLASS_WEIGHTS[batch['labels']]",
        class_mass,
    ),
    Case("token ce + L2", Words, worded, tokens_and_decay, Kind.UNITS, "labels", valid),
    Case("class-weighted ce, weights hidden", classifier, labelled, weighted_secretly, Kind.UNITS),
    Case("rmse", classifier, labelled, rmse, Kind.STATISTIC),
    Case("token ce + auxiliary loss by rows", Words, worded, tokens_and_aux, Kind.MIXED),
    Case("InfoNCE", classifier, labelled, info_nce, Kind.COUPLED_LOSS),
    Case("batch Dice", conv, pictures, dice, Kind.COUPLED_LOSS),
    Case("normalised advantages", classifier, advantages, policy, Kind.COUPLED_LOSS),
    Case("load balancing", classifier, labelled, load_balance, Kind.COUPLED_LOSS),
    Case("BatchNorm", lambda: classifier(nn.BatchNorm1d(10)), labelled, mse, Kind.COUPLED_LAYER),
]

MORE = [
    Case("causal ce", Words, worded, next_token, Kind.UNITS, "shifted_labels", valid_shifted),
    Case(
        "masked mean",
        Words,
        masked,
        masked_error,
        Kind.UNITS,
        "sum of batch['mask']",
        lambda b: float(b["mask"].sum()),
    ),
    Case("ctc", classifier, signals, ctc, Kind.ROWS, "rows", rows),
    Case("distillation + ce", classifier, partly_labelled, distilled, Kind.MIXED),
    Case("ce sum + L2", classifier, labelled, sum_and_decay, Kind.MIXED),
    Case("perplexity", Words, worded, perplexity, Kind.STATISTIC),
    Case("VICReg", classifier, labelled, vicreg, Kind.COUPLED_LOSS),
    Case("hardest negative", classifier, labelled, hardest, Kind.COUPLED_LOSS),
    Case("functional batch_norm", lambda: classifier(Functional()), labelled, mse, Kind.COUPLED_LAYER),
    Case("batch deviation", lambda: classifier(BatchDeviation()), labelled, mse, Kind.COUPLED_LAYER),
    Case("attention over rows", lambda: classifier(Across()), labelled, mse, Kind.COUPLED_LAYER),
    Case("codebook", lambda: classifier(Codebook()), labelled, mse, Kind.STATEFUL),
    Case("counter of forwards", lambda: classifier(Counted()), labelled, mse, Kind.STATEFUL),
    Case("spectral norm", spectral, labelled, mse, Kind.STATEFUL),
    Case("mixup", classifier, labelled, mixup, Kind.SHARED_RANDOMNESS),
    Case("depth drawn for all", lambda: classifier(SkippedForAll()), labelled, mse, Kind.SHARED_RANDOMNESS),
    Case("depth drawn by row", lambda: classifier(SkippedByRow()), labelled, mse, Kind.ROWS, "rows"),
    Case("dropout", lambda: classifier(nn.Dropout(0.4)), labelled, ce_sum, Kind.SUM, "sum"),
    Case("clamping hook", clamped, labelled, mse, Kind.GRADIENT_HOOK),
    Case("scaling hook", scaled, labelled, mse, Kind.ROWS, "rows"),
    Case("norms in a module's backward", clipped_inside, labelled, mse, Kind.GRADIENT_HOOK),
]


# ---- the judge -----------------------------------------------------------------------------------


def gradient(model: nn.Module, loss: Callable[[Any, Batch], Tensor], batch: Batch) -> Tensor:
    """The gradient in float64, computed by hand on a copy."""
    twin = copy.deepcopy(model).double()
    doubled = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
    loss(twin, doubled).backward()
    return torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])


def split_error(
    model: nn.Module,
    loss: Callable[[Any, Batch], Tensor],
    batch: Batch,
    count: Count,
    sizes: Sequence[int],
) -> float:
    """The relative error of the weighted sum of the parts' gradients against the whole batch's."""
    parts = split(batch, sizes)
    counts = [count(part) for part in parts]
    weights = [1.0 if c < 0 else c / sum(counts) for c in counts]
    whole = gradient(model, loss, batch)
    total = sum(w * gradient(model, loss, part) for w, part in zip(weights, parts, strict=True) if w)
    assert isinstance(total, Tensor)
    return float((total - whole).norm() / whole.norm())
