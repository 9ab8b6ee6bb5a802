"""Trainers of Hugging Face on tiny models: plain ones, and ones that memfit has fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from memfit.integrations.transformers import Fit, fit

ROWS, LENGTH, WORDS, CLASSES = 70, 12, 61, 3
BATCH = (4, 4)  # per_device_train_batch_size, gradient_accumulation_steps: 16 rows a step, the last has 6


class Small(nn.Module):
    """A classifier of numbers that is planned quickly."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.first, self.second = nn.Linear(LENGTH, 32), nn.Linear(32, CLASSES)

    def forward(self, numbers: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, and the logits."""
        logits = self.second(nn.functional.gelu(self.first(numbers)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def numbers(seed: int = 1) -> list[dict[str, Tensor]]:
    """Rows for :class:`Small`."""
    rows = classified(seed)
    return [{"numbers": row["input_ids"] / WORDS, "labels": row["labels"]} for row in rows]


def llama(seed: int = 0, layers: int = 2) -> nn.Module:
    """A causal language model; it has no dropout."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def bert(kind: Any = BertForSequenceClassification, dropout: float = 0.0) -> nn.Module:
    """A classifier of texts, or of ``kind``."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config.num_labels = CLASSES
    model: nn.Module = kind(config)
    return model


def tagger() -> nn.Module:
    """A head whose loss takes no notice of the number of labels in the whole batch."""
    return bert(BertForTokenClassification)


def lora(layers: int = 2) -> nn.Module:
    """Frozen weights and two small matrices a projection."""
    torch.manual_seed(0)
    model: nn.Module = get_peft_model(
        llama(layers=layers), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    )
    return model


def texts(seed: int = 1, rows: int = ROWS) -> list[dict[str, Tensor]]:
    """Rows for a language model; the first labels of each are ignored, of some rows most."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(rows):
        words = torch.randint(WORDS, (LENGTH,), generator=draw)
        labels = words.clone()
        labels[: int(torch.randint(LENGTH - 2, (1,), generator=draw))] = -100
        found.append({"input_ids": words, "labels": labels})
    return found


def classified(seed: int = 1) -> list[dict[str, Tensor]]:
    """Rows with a class each."""
    return [row | {"labels": row["input_ids"][0] % CLASSES} for row in texts(seed)]


def tagged(seed: int = 1) -> list[dict[str, Tensor]]:
    """Rows with a class for each word; some are ignored."""
    return [
        row | {"labels": torch.where(row["labels"] < 0, -100, row["labels"] % CLASSES)} for row in texts(seed)
    ]


def ragged(seed: int = 1) -> list[dict[str, Tensor]]:
    """Rows of many lengths, for :func:`padded`."""
    rows = texts(seed)
    return [
        {name: t[: 4 + number % (LENGTH - 3)] for name, t in row.items()} for number, row in enumerate(rows)
    ]


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A collator that pads to the longest row."""
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    lengths = torch.tensor([len(row["labels"]) for row in rows])
    return batch | {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}


class Stream(IterableDataset[dict[str, Tensor]]):
    """Rows without a length."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self._rows)


class Once(Stream):
    """The same, which can be read only once."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._left = getattr(self, "_left", iter(self._rows))
        return self._left


class Listener(TrainerCallback):
    """Writes down every event, with the step and the arguments of the batch."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.arguments: set[tuple[int, int]] = set()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def heard(args: Any, state: Any, control: Any, **_: Any) -> None:
            self.events.append((name, state.global_step))
            self.arguments.add((args.per_device_train_batch_size, args.gradient_accumulation_steps))

        return heard


@dataclass(frozen=True)
class Run:
    """What a training left behind."""

    trainer: Trainer
    listener: Listener
    fitted: Fit | None = None

    def logged(self, *names: str) -> list[tuple[Any, ...]]:
        """These entries of the log, a step each."""
        history = self.trainer.state.log_history
        return [tuple(entry.get(name) for name in names) for entry in history if names[0] in entry]

    @property
    def losses(self) -> Tensor:
        """The logged losses."""
        return torch.tensor([loss for (loss,) in self.logged("loss")], dtype=torch.float64)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters."""
        assert self.trainer.model is not None
        return {name: p.detach() for name, p in self.trainer.model.named_parameters()}


def made(
    where: Path,
    model: nn.Module | None,
    data: Any,
    batch: tuple[int, int] = BATCH,
    kind: Callable[..., Trainer] = Trainer,
    arguments: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Run:
    """A trainer that has not trained yet."""
    given: dict[str, Any] = {
        "per_device_train_batch_size": batch[0],
        "gradient_accumulation_steps": batch[1],
        "max_steps": 30,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | (arguments or {})
    listener = Listener()
    settings = TrainingArguments(str(where), **given)
    trainer = kind(model, settings, train_dataset=data, callbacks=[listener], **kwargs)
    trainer.remove_callback(PrinterCallback)
    return Run(trainer, listener)


def plain(where: Path, model: nn.Module | None, data: Any, rows: int = 16, **kwargs: Any) -> Run:
    """A plain training at the full batch."""
    run = made(where, model, data, (rows, 1), **kwargs)
    run.trainer.train()
    return run


def fitted(
    where: Path, model: nn.Module | None, data: Any, options: dict[str, Any] | None = None, **kwargs: Any
) -> Run:
    """A training with memfit, micro-batches of 3 rows unless ``options`` say otherwise."""
    run = made(where, model, data, **kwargs)
    handle = fit(run.trainer, **({"memory": "1GiB", "micro_batch_size": 3} if options is None else options))
    run.trainer.train()
    return Run(run.trainer, run.listener, handle)


def worst_weight(one: Run, other: Run) -> float:
    """The largest relative difference of a parameter.

    Adding a number to all keys moves no attention, so the gradient of a key's bias is zero and what is
    computed is rounding alone, which Adam blows up to whole steps: these are left out.
    """
    names = [name for name in one.weights if not name.endswith("key.bias")]
    pairs = [(one.weights[name], other.weights[name]) for name in names]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)
