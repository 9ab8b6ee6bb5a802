"""Trainings under Lightning, with and without memfit: small BERT and Llama from configurations alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torchmetrics
import transformers
from lightning import pytorch as pl
from torch import Tensor, nn
from torch.utils.data import DataLoader

from memfit.integrations.lightning import MemfitCallback

WORDS, TOKENS = 256, 16
_SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
}


def bert(dropout: float = 0.0) -> nn.Module:
    """A classifier of sentences."""
    dropped = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(**_SMALL | dropped | {"num_labels": 3})
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def llama(dropout: float = 0.0) -> nn.Module:
    """A causal language model."""
    config = transformers.LlamaConfig(**_SMALL, attention_dropout=dropout, num_key_value_heads=1)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def sentences(rows: int, *, causal: bool) -> list[dict[str, Tensor]]:
    """Padded sentences of unequal length; the labels are classes, or the words themselves."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(rows):
        length = int(torch.randint(4, TOKENS + 1, (), generator=generator))
        words = torch.randint(1, WORDS, (TOKENS,), generator=generator)
        mask = (torch.arange(TOKENS) < length).long()
        words = words * mask
        labels = words.masked_fill(mask == 0, -100) if causal else words[0] % 3
        found.append({"input_ids": words, "attention_mask": mask, "labels": labels})
    return found


class Unmergeable(torchmetrics.SumMetric):
    """A metric that does not say how to merge two batches."""

    full_state_update = True


class Small(pl.LightningModule):
    """A small network for rows of 8 numbers, with metrics of its own and all that may be logged."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(dropout), nn.Linear(64, 3))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.f1 = torchmetrics.F1Score("multiclass", num_classes=3, average="macro")
        self.counted = Unmergeable()
        self.of_validation = torchmetrics.Accuracy("multiclass", num_classes=3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss and what it is made of."""
        rows, labels = batch
        scores = self.net(rows)
        loss = nn.functional.cross_entropy(scores, labels)
        both: dict[str, Any] = {"on_step": True, "on_epoch": True}
        self.log("loss", loss, **both)
        self.f1.update(scores, labels)
        self.log("f1", self.f1, on_epoch=True)
        self.counted.update(float(len(labels)))
        self.log("counted", self.counted, on_step=False, on_epoch=True)
        self.accuracy(scores, labels)
        self.log("accuracy", self.accuracy, **both)
        self.log_dict({"mean": scores.mean(), "largest": float(self.trainer.max_epochs or 0)}, **both)
        self.log("top", scores.max(), reduce_fx="max", **both)
        self.log("right", (scores.argmax(1) == labels).sum().float(), reduce_fx="sum", **both)
        self.log("of_ones", self._mean_of_ones(scores, labels), batch_size=int((labels == 1).sum()), **both)
        return {"loss": loss, "scores": scores, "spread": scores.detach().mean()}

    def _mean_of_ones(self, scores: Tensor, labels: Tensor) -> Tensor:
        """A mean over fewer than all rows."""
        ones = labels == 1
        return (scores[:, 1] * ones).sum() / ones.sum().clamp_min(1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """A metric that training does not touch."""
        self.of_validation(self.net(batch[0]), batch[1])
        self.log("validation", self.of_validation)

    def configure_optimizers(self) -> Any:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(count: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and their labels."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(count, 8, generator=generator)
    return list(zip(numbers, torch.randint(3, (count,), generator=generator), strict=True))


class Task(pl.LightningModule):
    """Trains a model of ``transformers`` by its own loss."""

    def __init__(self, net: nn.Module, optimizer: str = "SGD", **options: Any) -> None:
        super().__init__()
        self.net = net
        self._made_by = (optimizer, options)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss, logged at each step and over the epoch."""
        loss: Tensor = self.net(**batch).loss
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("index", float(batch_idx))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The loss of held out sentences."""
        self.log("val_loss", self.net(**batch).loss)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        """A hook of the module, in the order of the callbacks'."""
        trainer: Any = self.trainer
        trainer.callbacks[0].events.append("module zero_grad")

    def on_after_backward(self) -> None:
        """Another one, which sees the gradient before it is clipped."""
        norm = torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm()
        self.log("gradient", norm)

    def configure_optimizers(self) -> Any:
        """An optimizer, and a rate that warms up and falls."""
        name, options = self._made_by
        optimizer = getattr(torch.optim, name)(self.parameters(), **options)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=options["lr"], total_steps=60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class Record(pl.Callback):
    """Every hook that is called, and what can be seen at the end of each batch."""

    events: list[str] = field(default_factory=list)
    batches: list[dict[str, float]] = field(default_factory=list)

    def __hash__(self) -> int:
        return id(self)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            object.__getattribute__(self, "events").append(name)
        return object.__getattribute__(self, name)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes losses, rate and counts."""
        seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.batches.append(
            {**seen, "returned": float(outputs["loss"]), "rate": rate, "step": trainer.global_step}
        )


def train(
    task: pl.LightningModule,
    data: Sequence[Any],
    *callbacks: Any,
    batch_size: int = 16,
    resume: str | None = None,
    **options: Any,
) -> Record:
    """Trains on one CPU; the same batches at every call."""
    record = Record()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"logger": False, **quiet, **options}
    trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=[record, *callbacks], **options)
    loader = DataLoader(data, batch_size=batch_size)  # type: ignore[arg-type,var-annotated]
    held_out = DataLoader(data[:8], batch_size=4)  # type: ignore[arg-type,var-annotated]
    trainer.fit(task, loader, held_out, ckpt_path=resume, weights_only=True if resume else None)
    return record


def fitted(memory: str | int, **options: Any) -> MemfitCallback:
    """What goes into ``callbacks=``."""
    return MemfitCallback(memory, **options)


def worst_difference(task: nn.Module, other: nn.Module, *, key_biases: bool = False) -> float:
    """The largest relative difference of a parameter or buffer, by the norm of each tensor.

    The biases of BERT's keys are compared apart, if asked for: they shift all scores of a row alike, which
    softmax takes out, so their gradient is rounding alone, and AdamW makes whole steps of it.
    """
    pairs = zip(task.state_dict().items(), other.state_dict().values(), strict=True)
    found = [_relative(a, b) for (name, a), b in pairs if name.endswith("self.key.bias") == key_biases]
    return max(found, default=0.0)


def _relative(one: Tensor, other: Tensor) -> float:
    """The difference of two tensors by the norm of the second."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30))
