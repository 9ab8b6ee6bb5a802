"""Small training jobs that the tests name as TARGET, the good ones and the bad ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from memfit.workload import Workload

Batch = dict[str, torch.Tensor]


class TinyModel(nn.Module):
    """An embedding tied to its head, dropout and a layer between."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.layer = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(torch.relu(self.layer(self.embed(tokens))))
        logits: torch.Tensor = self.head(hidden)
        return logits


def tiny_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


def tiny_batch(batch_size: int, seed: int, index: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * seed + index)
    tokens = torch.randint(0, 32, (batch_size, 8), generator=generator)
    return {"tokens": tokens, "labels": (tokens + 1) % 32}


def job(
    *,
    batch: Callable[[int], Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] = tiny_loss,
    model: nn.Module | None = None,
    batch_size: int = 6,
    seed: int = 0,
) -> Workload:
    model = TinyModel() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Workload(model, optimizer, loss_fn, batch or (lambda index: tiny_batch(batch_size, seed, index)))


def tiny(batch_size: int = 6, seed: int = 0) -> Workload:
    return job(batch_size=batch_size, seed=seed)


def shuffled() -> Workload:
    """A DataLoader that shuffles with the global generator, shorter than a run."""
    tokens = torch.arange(24 * 8).reshape(24, 8) % 32
    loader = DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True)

    def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        return tiny_loss(model, {"tokens": batch[0], "labels": (batch[0] + 1) % 32})

    made = job(loss_fn=loss_fn)
    return Workload(made.model, made.optimizer, loss_fn, loader)


def interrupts_itself_at_step_4(at: int = 3) -> Workload:
    """Sends this process a Ctrl-C while batch 3 is made, so during the fourth step."""

    def batch(index: int) -> Batch:
        if index == at and "MEMFIT_TEST_INTERRUPT" in os.environ:
            os.kill(os.getpid(), signal.SIGINT)
        return tiny_batch(6, 0, index)

    return job(batch=batch)


def interrupts_itself_before_step_1() -> Workload:
    """Sends this process a Ctrl-C while its first batch is made."""
    return interrupts_itself_at_step_4(at=0)


def too_large_to_run_at_once(batch_size: int = 64) -> Workload:
    """A step that keeps 24 MiB for each row."""
    layers = [nn.Sequential(nn.Linear(1024, 1024), nn.Tanh()) for _ in range(6)]

    def batch(index: int) -> Batch:
        return {"x": torch.ones(batch_size, 512, 1024)}

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        rows: torch.Tensor = model(batch["x"]).square().mean(dim=(1, 2))
        return rows.mean()

    return job(batch=batch, loss_fn=loss_fn, model=nn.Sequential(*layers))


# From here on: what must be refused.


def raises() -> Workload:
    raise ValueError("the data is gone")


def returns_a_number() -> int:
    return 3


def needs_a_path(path: str) -> Workload:
    return tiny()


def bad_model() -> Workload:
    made = tiny()
    return Workload("model", made.optimizer, made.loss_fn, made.batches)  # type: ignore[arg-type]


def bad_optimizer() -> Workload:
    made = tiny()
    return Workload(made.model, 0.1, made.loss_fn, made.batches)  # type: ignore[arg-type]


def bad_loss() -> Workload:
    made = tiny()
    return Workload(made.model, made.optimizer, None, made.batches)  # type: ignore[arg-type]


def bad_batches() -> Workload:
    made = tiny()
    return Workload(made.model, made.optimizer, made.loss_fn, 3)  # type: ignore[arg-type]


def one_shot_batches() -> Workload:
    made = tiny()
    return Workload(made.model, made.optimizer, made.loss_fn, iter([tiny_batch(6, 0, 0)]))


def no_batches() -> Workload:
    made = tiny()
    return Workload(made.model, made.optimizer, made.loss_fn, [])


def empty_batch() -> Workload:
    return job(
        batch=lambda index: {"tokens": torch.zeros(0, 8, dtype=torch.int64), "labels": torch.zeros(0, 8)}
    )


def batch_without_tensors() -> Workload:
    return job(batch=lambda index: {})


def rows_that_differ() -> Workload:
    def batch(index: int) -> Batch:
        return {**tiny_batch(6, 0, index), "other": torch.zeros(5, 2)}

    return job(batch=batch)


def loss_of_many_values() -> Workload:
    return job(loss_fn=lambda model, batch: model(batch["tokens"]))


def loss_without_a_graph() -> Workload:
    return job(loss_fn=lambda model, batch: tiny_loss(model, batch).detach())


def loss_that_is_a_number() -> Workload:
    return job(loss_fn=lambda model, batch: 1.5)  # type: ignore[arg-type,return-value]


def frozen_model() -> Workload:
    made = tiny()
    made.model.requires_grad_(False)
    return made


def two_devices() -> Workload:
    model = TinyModel()
    model.layer.to("meta")
    return job(model=model)


NOT_A_FUNCTION = 3


def finds_no_memory_once_at_step_4() -> Workload:
    """Memory runs out once in the forward of the fourth step, if the environment says so."""
    outages = [MemoryError("std::bad_alloc")] if "MEMFIT_TEST_OUTAGE" in os.environ else []
    at = {"step": 0}

    def batch(index: int) -> Batch:
        at["step"] = index + 1
        return tiny_batch(6, 0, index)

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = tiny_loss(model, batch)
        if at["step"] == 4 and outages:
            raise outages.pop()
        return loss

    return job(batch=batch, loss_fn=loss_fn)


class OutOfMemoryAtStep4(torch.optim.SGD):
    """Its fourth update finds no memory half-way."""

    def step(self, closure: Any = None) -> Any:
        self.updates = getattr(self, "updates", 0) + 1
        if self.updates == 4:
            self.param_groups[0]["params"][0].data.zero_()
            raise RuntimeError("CUDA error: out of memory")
        return super().step(closure)


def update_finds_no_memory_at_step_4() -> Workload:
    """The update of the fourth step is left half done."""
    made = job()
    return Workload(made.model, OutOfMemoryAtStep4(made.model.parameters(), lr=0.1), tiny_loss, made.batches)


def wide_and_blocked(batch_size: int = 16) -> Workload:
    """Blocks of which each keeps 3 MiB for each row: checkpointing saves most of it."""
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh()) for _ in range(4)]

    def batch(index: int) -> Batch:
        return {"x": torch.full((batch_size, 1024, 64), 0.1 * (index % 3))}

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = model(batch["x"]).square().mean()
        return loss

    return job(batch=batch, loss_fn=loss_fn, model=nn.Sequential(*blocks))


def coupled(batch_size: int = 6) -> Workload:
    """A loss that looks at all rows at once."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        outputs = model(batch["tokens"]).mean(dim=1)
        return nn.functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    return job(loss_fn=loss_fn, batch_size=batch_size)


def coupled_in_two_passes(batch_size: int = 6) -> Workload:
    """The same with its outputs given apart."""
    made = job(batch_size=batch_size)

    def outputs_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        outputs: torch.Tensor = model(batch["tokens"]).mean(dim=1)
        return outputs

    def loss_fn(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    return Workload(made.model, made.optimizer, loss_fn, made.batches, outputs_fn=outputs_fn)


def looks_at_its_data() -> Workload:
    """A loss that fake tensors cannot run."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = tiny_loss(model, batch)
        return loss * (2.0 if batch["tokens"].sum().item() > 0 else 1.0)

    return job(loss_fn=loss_fn)
