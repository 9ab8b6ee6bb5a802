"""Training under Lightning with memfit is the plain training of the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

import memfit
from lightning_jobs import Record, Small, Task, bert, fitted, llama, rows, sentences, train, worst_difference
from memfit.errors import InexactAccumulation, UnsupportedModel
from memfit.integrations.lightning import MemfitCallback

pytestmark = [  # all of them are Lightning's own
    pytest.mark.filterwarnings(r"ignore:.*`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(
        "ignore:The number of training batches .* is smaller than the logging interval"
    ),
]

MODELS = {"bert": (bert, "1.2MiB", 5), "llama": (llama, "1.6MiB", 5)}


def pair(net: nn.Module, **options: Any) -> tuple[Task, Task]:
    """Two tasks that start alike."""
    torch.manual_seed(0)
    task = Task(net, **(options or {"lr": 0.1, "momentum": 0.9}))
    return task, copy.deepcopy(task)


def small_pair(dropout: float = 0.0) -> tuple[Small, Small]:
    """The same of the small network."""
    torch.manual_seed(0)
    task = Small(dropout)
    return task, copy.deepcopy(task)


def no_or(callbacks: list[Any]) -> tuple[list[Any], list[Any]]:
    """No callbacks, and some."""
    return [], callbacks


def assert_same_course(found: Record, plain: Record, tolerance: float) -> None:
    """Every hook in the same order; whatever was logged, returned or counted alike."""
    assert found.events == plain.events
    assert len(found.batches) == len(plain.batches)
    for batch, expected in zip(found.batches, plain.batches, strict=True):
        assert batch == pytest.approx(expected, rel=tolerance, abs=tolerance)


def bits(task: nn.Module) -> list[bytes]:
    """All that a module holds."""
    return [t.detach().numpy().tobytes() for t in task.state_dict().values()]


# ---- the same training ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_train_as_the_whole_batch_does(name: str) -> None:
    make, memory, size = MODELS[name]
    options: dict[str, Any] = (
        {"lr": 1e-3, "optimizer": "AdamW"} if name == "bert" else {"lr": 0.1, "momentum": 0.9}
    )
    task, twin = pair(make(), **options)
    data = sentences(16 * 9 + 7, causal=name == "llama")  # ten batches, the last one short
    settings: dict[str, Any] = {"max_epochs": 3, "gradient_clip_val": 0.5}
    plain = train(twin, data, **settings)
    callback = fitted(memory, micro_batch_size=size)
    found = train(task, data, callback, **settings)
    assert callback.step is not None
    assert callback.step.plan.gradient_accumulation_steps == 4
    assert callback.step.verdict is not None
    assert callback.step.verdict.held
    assert len(plain.batches) == 30
    assert plain.batches[-1]["step"] == 30
    assert_same_course(found, plain, 1e-6)
    assert worst_difference(task, twin) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_with_dropout_is_the_plain_training_bit_for_bit(name: str) -> None:
    make, memory, _ = MODELS[name]
    task, twin = pair(make(dropout=0.1))
    data = sentences(16 * 4 + 7, causal=name == "llama")
    callback = fitted(memory, micro_batch_size=16)
    courses: list[Any] = []
    for one, callbacks in zip((twin, task), no_or([callback]), strict=True):
        torch.manual_seed(1)
        courses.append(train(one, data, *callbacks, max_epochs=2))
    assert callback.step is not None
    assert callback.step.plan.recomputes > 0
    assert callback.step.plan.gradient_accumulation_steps == 1
    assert_same_course(courses[1], courses[0], 0.0)
    assert bits(task) == bits(twin)


@pytest.mark.parametrize("size", [16, 5])
def test_bfloat16_autocast_is_lightnings(size: int) -> None:
    task, twin = small_pair()
    data = rows(16 * 2 + 7)
    options: dict[str, Any] = {"max_epochs": 2, "precision": "bf16-mixed"}
    plain = train(twin, data, **options)
    found = train(task, data, fitted("1MiB", micro_batch_size=size), **options)
    assert_same_course(found, plain, 0.0 if size == 16 else 1e-2)
    assert bits(task) == bits(twin) if size == 16 else worst_difference(task, twin) < 1e-2


def test_the_scaler_of_float16_scales_micro_batches_too() -> None:
    task, twin = small_pair()
    data = rows(16 * 2 + 7)
    ends: list[Any] = []
    for one, callbacks in zip((twin, task), no_or([fitted("1MiB", micro_batch_size=16)]), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        course = train(one, data, *callbacks, max_epochs=2, plugins=[plugin], gradient_clip_val=0.1)
        ends.append((course, scaler.state_dict()))
    assert ends[1][1] == ends[0][1]
    assert_same_course(ends[1][0], ends[0][0], 0.0)
    assert bits(task) == bits(twin)


def test_the_module_of_pytorch_lightning_trains_too() -> None:
    import pytorch_lightning

    class Line(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 3)

        def training_step(self, batch: Any) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ends: list[Any] = []
    for callbacks in no_or([fitted("1MiB", micro_batch_size=5)]):
        torch.manual_seed(0)
        line = Line()
        quiet: dict[str, Any] = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, callbacks=callbacks, **quiet
        )
        trainer.fit(line, torch.utils.data.DataLoader(rows(23), batch_size=16))  # type: ignore[arg-type]
        ends.append((line, float(trainer.callback_metrics["loss"])))
    assert worst_difference(ends[1][0], ends[0][0]) < 1e-5
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-6)


# ---- what is logged ------------------------------------------------------------------------------


class Seen(DummyLogger):
    """A logger that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "at": float(step or 0)})


def test_logs_and_metrics_are_those_of_the_whole_batch() -> None:
    task, twin = small_pair()
    data, loggers, courses = rows(16 * 3 + 7), [Seen(), Seen()], []
    for one, logger, callbacks in (
        (twin, loggers[0], []),
        (task, loggers[1], [fitted("1MiB", micro_batch_size=5)]),
    ):
        options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1}
        courses.append(train(one, data, *callbacks, max_epochs=2, **options))
    assert_same_course(courses[1], courses[0], 1e-6)
    assert len(loggers[1].rows) == len(loggers[0].rows) > 8
    for row, expected in zip(loggers[1].rows, loggers[0].rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_batch_that_runs_out_of_memory_and_runs_again_is_logged_and_counted_once() -> None:
    task, twin = small_pair()
    data = rows(16 * 6)
    calls = [0]

    class Failing(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            calls[0] += batch_idx == 4
            if calls[0] == 2:  # the second micro-batch, once
                calls[0] += 1
                raise torch.OutOfMemoryError("injected")
            return output

    plain = train(twin, data, max_epochs=2)
    task.__class__ = Failing
    callback = fitted("1MiB", micro_batch_size=5)
    found = train(task, data, callback, max_epochs=2)
    assert callback.step is not None
    assert len(callback.step.rescues) == 1
    assert found.batches[-1]["counted"] == 96
    assert_same_course(found, plain, 1e-6)


def test_nothing_of_profile_and_audit_is_seen() -> None:
    class Noting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.notes: list[int] = []
            self.total = torch.zeros(())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.notes.append(len(batch[0]))
            self.total += len(batch[0])
            self.logger.log_metrics({"rows": float(len(batch[0]))})  # type: ignore[union-attr]
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    task, logger = Noting(), Seen()
    callback = fitted("1MiB", micro_batch_size=5)
    train(task, rows(32), callback, max_epochs=1, logger=logger, log_every_n_steps=1)
    assert callback.step is not None
    assert callback.step.audit is not None  # it was audited
    assert task.notes == [4, 4, 4, 4] * 2
    assert float(task.total) == 32
    assert [row["rows"] for row in logger.rows if "rows" in row] == [4.0] * 8
    assert "log" not in vars(task)


def test_what_training_step_returns_is_put_together() -> None:
    outputs: list[list[Any]] = [[], []]
    for index, callbacks in enumerate(no_or([fitted("1MiB", micro_batch_size=5)])):

        class Take(pl.Callback):
            def __init__(self, taken: list[Any]) -> None:
                self.taken = taken

            def on_train_batch_end(
                self, trainer: Any, pl_module: Any, out: Any, batch: Any, batch_idx: int
            ) -> None:
                self.taken.append(out)

        train(small_pair()[0], rows(23), Take(outputs[index]), *callbacks, max_epochs=1)
    for found, plain in zip(*outputs, strict=True):
        assert found.keys() == plain.keys()
        for name in plain:
            torch.testing.assert_close(found[name], plain[name].detach(), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_put_together_is_refused_by_name() -> None:
    class Odd(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {**super().training_step(batch, batch_idx), "odd": torch.ones(len(batch[0])).diag()}

    with pytest.raises(InexactAccumulation, match="training_step returns 'odd'"):
        train(Odd(), rows(23), fitted("1MiB", micro_batch_size=6), max_epochs=1)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")  # Lightning's own
def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    data = rows(16 * 3 + 7)
    whole, part = small_pair(dropout=0.2)

    class Seed(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            torch.manual_seed(trainer.global_step)  # Lightning does not store random states

    kept = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    first, again = (fitted("1MiB", micro_batch_size=5) for _ in range(2))
    straight = train(whole, data, Seed(), first, kept, max_epochs=2, enable_checkpointing=True)
    path = str(tmp_path / "epoch=0.ckpt")
    resumed = train(part, data, Seed(), again, max_epochs=2, resume=path)
    for batch, expected in zip(resumed.batches, straight.batches[4:], strict=True):
        assert batch.items() <= expected.items()  # what the first epoch ended with is no longer known
        assert {"loss", "accuracy_step", "rate", "step"} <= batch.keys()
    assert bits(part) == bits(whole)
    assert first.step is not None
    assert again.step is not None
    stored = torch.load(path, weights_only=True)["callbacks"]["MemfitCallback"]["profile"]
    assert again.step.profile.basis == memfit.Profile.from_json(stored).basis
    other = small_pair(dropout=0.2)[0]
    assert len(train(other, data, max_epochs=2, resume=path).batches) == 4  # the plain Trainer takes it up


def test_the_trainer_is_left_as_it_was_also_after_an_error() -> None:
    class Broken(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            self.loop = trainer.fit_loop.epoch_loop.automatic_optimization
            assert "_make_closure" in vars(self.loop)
            raise RuntimeError("on purpose")

    broken = Broken()
    with pytest.raises(RuntimeError, match="on purpose"):
        train(Small(), rows(16), fitted("1MiB", micro_batch_size=16), broken, max_epochs=1)
    assert "_make_closure" not in vars(broken.loop)


# ---- what is refused -----------------------------------------------------------------------------


class Manual(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Two(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # or Lightning refuses it itself

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters()), torch.optim.SGD(self.net[3].parameters())]


class Scaled(Small):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward()


class Iterating(Small):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return None


class Sharded(DDPStrategy):
    """By its name, one that memfit does not know."""


class Skipping(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")  # Lightning's own
@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Manual, {}, "Manual optimizes manually"),
        (Scaled, {}, "Scaled has a backward of its own"),
        (Iterating, {}, "takes the dataloader_iter"),
        (Small, {"accumulate_grad_batches": 4}, "batch_size 4 times as large"),
        (Small, {"strategy": Sharded()}, "the strategy is Sharded"),
    ],
)
def test_what_would_not_be_exact_is_refused_before_training(task: Any, options: Any, message: str) -> None:
    made = task()
    if "strategy" in options:
        trainer = pl.Trainer(accelerator="cpu", devices=2, logger=False, **options)
        trainer.strategy._optimizers = [torch.optim.SGD(made.parameters())]
        with pytest.raises(UnsupportedModel, match=message):
            MemfitCallback("1MiB").on_fit_start(trainer, made)
        return
    with pytest.raises(UnsupportedModel, match=message):
        train(made, rows(16), fitted("1MiB"), max_epochs=1, **options)


def test_several_optimizers_are_refused() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    task = Two()
    task.automatic_optimization = True
    trainer.strategy._optimizers = task.configure_optimizers()
    with pytest.raises(UnsupportedModel, match="configure_optimizers of Two gave 2 optimizers"):
        MemfitCallback("1MiB").on_fit_start(trainer, task)


def test_a_step_without_a_loss_is_refused() -> None:
    with pytest.raises(TypeError, match="training_step returned no loss"):
        train(Skipping(), rows(16), fitted("1MiB"), max_epochs=1)


def test_a_module_compiled_as_a_whole_is_refused() -> None:
    compiled: Any = torch.compile(Small(), backend="eager")
    with pytest.raises(UnsupportedModel, match="compile the network in it"):
        train(compiled, rows(16), fitted("1MiB"), max_epochs=1)
