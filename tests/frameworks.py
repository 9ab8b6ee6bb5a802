"""What tests of Accelerate, the Trainer and Lightning run on each rank; see ``tests/processes.py``.

With ``ranks`` of 1 the same functions train in this process on the whole batch, without memfit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import TrainerCallback

import trainers
from memfit.integrations import accelerate as with_accelerate
from memfit.integrations import transformers as with_trainer
from ranked import counted

ROWS = 12  # of a rank, in one step


class Course(NamedTuple):
    """What a training came to; ``reduced`` is how many all-reduces each step took."""

    losses: list[float]
    weights: list[Tensor]
    reduced: list[int]
    seen: dict[str, Any]


def everything(rank: int, folder: str) -> dict[str, Any]:
    """All of it, for processes take long to start, and these frameworks longer."""
    warnings.filterwarnings(
        "ignore", message=r".*LeafSpec|.*_dataloader' does not have many workers|.*No device"
    )
    for name, number in (("RANK", rank), ("WORLD_SIZE", dist.get_world_size())):  # as torchrun does
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(number)
    return {
        "loop": looped(2),
        "trainer": trained(2, folder, "llama", {"even_batches": False}),
        "trainer, filled": trained(2, folder, "words", {}),
        "resumed": resumed(folder),
        "refusals": refusals(rank, folder),
        "lightning": module_trained(2),
    }


def watched(ddp: Any, reduced: list[int]) -> Callable[[], None]:
    """Call it after each step: how many buckets were reduced in it."""
    seen: list[int] = []
    assert isinstance(ddp, DistributedDataParallel)
    ddp.register_comm_hook(None, counted(seen))

    def ended() -> None:
        assert sorted(seen) == list(range(len(seen)))
        reduced.append(len(seen))
        seen.clear()

    return ended


# ---- Accelerate -------------------------------------------------------------------------------------


def numbers(rows: int) -> TensorDataset:
    """Rows and labels; most of the first labels of a batch do not count."""
    made = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (rows,), generator=made)
    labels[torch.arange(rows) % (2 * ROWS) < ROWS // 2] = -100
    return TensorDataset(torch.randn(rows, 8, generator=made), labels)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def accelerator() -> Accelerator:
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))


def looped(ranks: int) -> Course:
    """Two epochs of a loop with Accelerate; the last batch of each is short."""
    manager = accelerator()
    model: Any = network()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    data = numbers(2 * ROWS * 2 + 19)
    loader: Any = DataLoader(data, batch_size=ROWS * 2 // ranks)
    model, optimizer, loader = manager.prepare(model, optimizer, loader)
    step: Any = None
    losses, reduced = [], list[int]()
    if ranks > 1:
        ended = watched(model, reduced)
        step = with_accelerate.fit(
            manager,
            model,
            loss_of,
            next(iter(loader)),
            memory="1MiB",
            optimizer=optimizer,
            micro_batch_size=5,
        )
    for batch in [batch for _ in range(2) for batch in loader]:
        if step is None:
            loss = loss_of(model, batch)
            manager.backward(loss)
        else:
            loss = step(batch)
            ended()
        manager.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    AcceleratorState._reset_state(True)
    return Course(losses, [p.detach() for p in model.parameters()], reduced, {})


# ---- the Trainer ------------------------------------------------------------------------------------


class Words(trainers.Small):
    """Its loss is a mean over labels, which the Trainer does not know."""


def rows_of(kind: str) -> tuple[nn.Module, list[Any]]:
    if kind == "llama":
        return trainers.llama(layers=1), trainers.texts()
    data = trainers.numbers()
    for number, row in enumerate(data):
        row["labels"] = (
            torch.tensor(-100) if number % ROWS < 5 and number % (2 * ROWS) < ROWS else row["labels"]
        )
    return Words(), data


def trainer_of(
    ranks: int, folder: str, kind: str, config: dict[str, Any], **more: Any
) -> tuple[trainers.Run, dict[str, Any]]:
    """A trainer of three steps an epoch, the last one short, or filled up with the first rows again."""
    AcceleratorState._reset_state(True)
    model, data = rows_of(kind)
    if ranks == 1 and "even_batches" not in config:
        data = data + data[: 6 * ROWS - len(data)]
    arguments = {
        "max_steps": 6,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.5,
        "save_strategy": "steps" if kind == "llama" else "no",
        "save_steps": 3,
        "accelerator_config": config,
    }
    batch = (4, ROWS // 4) if ranks > 1 else (2 * ROWS, 1)
    run = trainers.made(Path(folder, kind), model, data, batch, arguments=arguments | more)
    return run, {"memory": "1MiB", "micro_batch_size": 5}


def course_of(run: trainers.Run, reduced: list[int]) -> Course:
    state = run.trainer.state
    seen = {
        "logged": run.logged("learning_rate", "epoch"),
        "norms": [norm for (norm,) in run.logged("grad_norm")],
        "events": run.listener.events,
        "steps": state.global_step,
        "arguments": run.listener.arguments,
    }
    return Course(run.losses.tolist(), [*run.weights.values()], reduced, seen)


def trained(ranks: int, folder: str, kind: str, config: dict[str, Any]) -> Course:
    """Six steps; the reductions that each of them took."""
    run, options = trainer_of(ranks, folder, kind, config)
    reduced: list[int] = []
    if ranks > 1:
        fitted = with_trainer.fit(run.trainer, **options)
        ended = watched(fitted.trained_model, reduced)
        run.trainer.add_callback(_AtEnd(ended))
    run.trainer.train()
    if ranks > 1:
        assert fitted.verdict is not None
        assert fitted.verdict.held
        assert run.trainer.model_wrapped is fitted.trained_model
    return course_of(run, reduced)


class _AtEnd(TrainerCallback):  # type: ignore[misc,unused-ignore]
    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._ended()


def resumed(folder: str) -> Course:
    """The last three steps, from a checkpoint of the training before."""
    run, options = trainer_of(2, folder, "llama", {"even_batches": False})
    model = with_trainer.fit(run.trainer, **options).trained_model
    assert with_trainer.fit(run.trainer, **options).trained_model is model  # whose buckets are there once
    run.trainer.train(resume_from_checkpoint=str(Path(folder, "llama", "checkpoint-3")))
    return course_of(run, [])


# ---- what goes wrong --------------------------------------------------------------------------------


def refusals(rank: int, folder: str) -> dict[str, str]:
    """What each rank hears where something is wrong, on one of them or on all."""
    found: dict[str, str] = {}

    def heard(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    def fit(memory: str = "1MiB", **more: Any) -> Any:
        run, _ = trainer_of(2, folder, "words", {}, **more)
        return run, with_trainer.fit(run.trainer, memory=memory)

    heard("budget", lambda: fit("1MiB" if rank == 0 else "1KiB"))
    heard("mean of means", lambda: fit(average_tokens_across_devices=False))

    def collates() -> None:
        run, _ = trainer_of(2, folder, "words", {})
        own = run.trainer.data_collator

        def collator(rows: Any) -> Any:
            if rank == 1:
                raise ValueError("this row is broken")
            return own(rows)

        run.trainer.data_collator = collator
        with_trainer.fit(run.trainer, memory="1MiB")

    heard("collator", collates)

    def steps() -> None:
        run, _ = fit()
        model = run.trainer.model

        def forward(numbers: Tensor, labels: Tensor) -> Any:
            if rank == 1 and run.trainer.state.global_step == 2:
                raise ValueError("a label is 12, and there are 3 classes")
            return type(model).forward(model, numbers, labels)

        model.forward = forward
        run.trainer.train()

    heard("step", steps)

    def apart() -> None:
        manager, model = accelerator(), network()
        with_accelerate.fit(manager, model, loss_of, numbers(4)[:], memory="1MiB")

    heard("not prepared", apart)
    AcceleratorState._reset_state(True)
    return found


# ---- Lightning --------------------------------------------------------------------------------------


def module_trained(ranks: int) -> Course:
    """Two epochs of a LightningModule; the last batch of each is short."""
    from lightning import pytorch as pl
    from torchmetrics import Accuracy

    from memfit.integrations.lightning import MemfitCallback

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.accuracy = Accuracy("multiclass", num_classes=3, ignore_index=-100)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self.net(batch[0])
            loss = nn.functional.cross_entropy(scores, batch[1])
            self.accuracy(scores, batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            self.log("labels", (batch[1] >= 0).sum().float(), reduce_fx="sum", sync_dist=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)

    reduced: list[int] = []
    losses: list[float] = []
    seen: dict[str, Any] = {"labels": [], "accuracy": [], "of_rank": []}

    class Watch(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if ranks > 1:
                self.ended = watched(trainer.strategy.model, reduced)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            right = float(trainer.callback_metrics["accuracy_step"]) * int((batch[1] >= 0).sum())
            seen["of_rank"].append(right)
            losses.append(float(trainer.callback_metrics["loss_step"]))
            seen["labels"].append(float(trainer.callback_metrics["labels"]))
            if ranks > 1:
                self.ended()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen["accuracy"].append(float(trainer.callback_metrics["accuracy_epoch"]))
            seen["steps"] = trainer.global_step

    task = Task()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    shared = {"devices": 2, "strategy": "ddp"} if ranks > 1 else {"devices": 1}
    callback = MemfitCallback("1MiB", micro_batch_size=5)
    callbacks: list[Any] = [Watch(), callback] if ranks > 1 else [Watch()]
    options: dict[str, Any] = {
        "logger": False,
        "max_epochs": 2,
        "gradient_clip_val": 0.1,
        "use_distributed_sampler": False,
        **quiet,
        **shared,
    }
    data = numbers(2 * ROWS * 2 + 14)
    sampler: Any = (
        DistributedSampler(data, shuffle=False) if ranks > 1 else None
    )  # Lightning's own would shuffle
    loader = DataLoader(data, batch_size=ROWS * 2 // ranks, sampler=sampler)
    pl.Trainer(accelerator="cpu", callbacks=callbacks, **options).fit(task, loader)
    assert ranks == 1 or (callback.step is not None and callback.step.plan.gradient_accumulation_steps == 3)
    return Course(losses, [p.detach() for p in task.parameters()], reduced, seen)
