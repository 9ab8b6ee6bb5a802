"""The Trainer with memfit against the plain Trainer at the whole batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import memfit
import trainers
from memfit.integrations.transformers import fit
from trainers import (
    Small,
    bert,
    classified,
    fitted,
    llama,
    lora,
    made,
    numbers,
    padded,
    plain,
    ragged,
    tagged,
    tagger,
    texts,
)

WHOLE = {"micro_batch_size": 16}
SHORT = {"max_steps": 6}
LISTED = ("learning_rate", "epoch")


class Weighted(Trainer):
    """A loss of one's own, and a training step that looks at the gradients."""

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs["logits"], inputs["labels"], reduction="none")
        return loss.square().mean()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        assert isinstance(self.model, nn.Module)
        assert all(p.grad is not None for p in self.model.parameters())
        return loss


class GRPOTrainer(Trainer):
    """By its name, one that samples its batches."""


class OwnStep(Trainer):
    """Goes backward through something else than its loss."""

    def training_step(self, model: nn.Module, inputs: Any, *_: Any) -> Tensor:
        loss: Tensor = model(**inputs)["loss"]
        return loss.detach()


class CachedLoss(nn.Module):
    """By its name, one that splits its batch."""


def mean_of_words(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """A loss function of one's own that is told the number of labels."""
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert num_items_in_batch is not None
    return nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def shallow() -> nn.Module:
    """One layer, which is planned sooner."""
    return llama(layers=1)


@pytest.mark.parametrize(
    ("model", "data", "options"),
    [
        (llama, texts, None),
        (llama, texts, WHOLE | {"memory": "640KiB"}),
        (bert, classified, None),
        (bert, classified, WHOLE | {"memory": "380KiB"}),
    ],
    ids=["llama in parts", "llama recomputing", "bert in parts", "bert recomputing"],
)
def test_a_training_is_the_plain_one_at_the_whole_batch(
    tmp_path: Path, model: Any, data: Any, options: dict[str, Any] | None
) -> None:
    arguments = {"max_grad_norm": 0.05, "eval_strategy": "steps", "eval_steps": 10, "warmup_steps": 5}
    given = {"arguments": arguments, "eval_dataset": data(2)}
    expected = plain(tmp_path, model(), data(), **given)
    run = fitted(tmp_path, model(), data(), options, **given)
    assert run.fitted is not None
    assert run.fitted.plan.gradient_accumulation_steps == (6 if options is None else 1)
    assert bool(run.fitted.plan.recompute) == (options is not None)
    assert run.fitted.verdict is not None
    assert run.fitted.verdict.held
    assert len(run.losses) == run.trainer.state.global_step == 30
    assert min(norm for (norm,) in run.logged("grad_norm")) > 0.05  # it clips
    assert run.logged(*LISTED) == expected.logged(*LISTED)
    torch.testing.assert_close(run.losses, expected.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(run.logged("eval_loss"), expected.logged("eval_loss"), rtol=1e-5, atol=0)
    torch.testing.assert_close(run.logged("grad_norm"), expected.logged("grad_norm"), rtol=1e-5, atol=0)
    assert trainers.worst_weight(run, expected) < (1e-5 if options is None else 1e-12)
    assert run.listener.events == expected.listener.events


def test_with_dropout_and_one_micro_batch_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    options, arguments = WHOLE | {"memory": "400KiB"}, SHORT | {"neftune_noise_alpha": 5.0}
    expected = plain(tmp_path, bert(dropout=0.2), classified(), arguments=arguments)
    run = fitted(tmp_path, bert(dropout=0.2), classified(), options, arguments=arguments)
    assert run.fitted is not None
    assert run.fitted.plan.recompute
    assert run.logged("loss", "grad_norm") == expected.logged("loss", "grad_norm")
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in run.weights.items())


def test_a_head_that_plain_accumulation_scales_wrongly_comes_out_right(tmp_path: Path) -> None:
    expected = plain(tmp_path, tagger(), tagged(), arguments=SHORT)
    accumulated = made(tmp_path, tagger(), tagged(), arguments=SHORT)
    accumulated.trainer.train()
    run = fitted(tmp_path, tagger(), tagged(), arguments=SHORT)
    assert (
        accumulated.losses / expected.losses
    ).min() > 1.9  # four means are added up, two in the short step
    torch.testing.assert_close(run.losses, expected.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(run.logged("grad_norm"), expected.logged("grad_norm"), rtol=1e-5, atol=0)


# peft asks transformers by a name that transformers gives up in v6
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("model", "data", "given"),
    [
        (lambda: lora(layers=1), texts, {"arguments": {"label_smoothing_factor": 0.1}}),
        (shallow, ragged, {"data_collator": padded, "compute_loss_func": mean_of_words}),
        (Small, numbers, {"kind": Weighted}),
        (Small, numbers, {"arguments": {"bf16": True}}),
        (Small, lambda: trainers.Stream(numbers()), {}),
        (None, numbers, {"model_init": lambda: Small()}),
    ],
    ids=["lora, smoothed", "ragged rows, loss function", "own loss", "bfloat16", "stream", "model_init"],
)
def test_what_else_people_give_a_trainer(
    tmp_path: Path, model: Callable[[], nn.Module] | None, data: Any, given: dict[str, Any]
) -> None:
    given = given | {"arguments": {"max_steps": 5, "seed": 3} | given.get("arguments", {})}
    expected = plain(tmp_path, model and model(), data(), **given)
    run = fitted(tmp_path, model and model(), data(), **given)
    tolerance = 1e-3 if given["arguments"].get("bf16") else 1e-5
    torch.testing.assert_close(run.losses, expected.losses, rtol=tolerance, atol=0)
    assert run.logged(*LISTED) == expected.logged(*LISTED)
    assert set(run.weights) == set(expected.weights)
    assert run.fitted is not None
    assert run.fitted.verdict is not None
    assert run.fitted.verdict.held
    assert run.fitted.verdict.attempts == 1  # what was planned before train() is what runs in it


def test_a_training_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = fitted(tmp_path, Small(), numbers(), arguments=saving)
    again = made(tmp_path, Small(seed=7), numbers(), arguments=saving)
    fit(again.trainer, "1GiB", micro_batch_size=3)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.logged("loss", "learning_rate", "epoch") == whole.logged("loss", "learning_rate", "epoch")
    assert all(torch.equal(tensor, whole.weights[name]) for name, tensor in again.weights.items())
    stored = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert (stored.per_device_train_batch_size, stored.gradient_accumulation_steps) == trainers.BATCH


def test_the_trainer_is_the_users_before_and_after(tmp_path: Path) -> None:
    run = made(tmp_path, Small(), numbers(), arguments=SHORT)
    trainer, state = run.trainer, torch.get_rng_state()
    before = {name: value for name, value in vars(trainer).items() if name != "optimizer"}
    accelerated = dict(vars(trainer.accelerator))
    assert isinstance(trainer.model, nn.Module)
    names = set(trainer.model.state_dict())
    with pytest.raises(memfit.InfeasibleBudget) as refused:
        fit(trainer, "10KiB")
    assert type(trainer) is Trainer
    assert vars(trainer) == before | {"optimizer": None, "_signature_columns": trainer._signature_columns}
    assert vars(trainer.accelerator) == accelerated
    assert not vars(trainer.model).keys() & {"forward", "_is_accelerate_prepared"}
    handle = fit(trainer, refused.value.needed_bytes)
    assert "budget" in str(handle) or "peak" in str(handle)
    handle = fit(trainer, refused.value.needed_bytes, profile=handle.step.profile)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(trainer, Trainer)
    assert type(trainer).__mro__.count(Trainer) == 1
    assert len(type(trainer).__mro__) == len(Trainer.__mro__) + 2
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 6
    assert run.listener.arguments == {trainers.BATCH}
    assert set(trainer.model.state_dict()) == names
    assert handle.verdict is not None
    assert handle.verdict.held


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        ({"gradient_checkpointing": True}, "set activation_checkpointing=False"),
        ({"auto_find_batch_size": True}, "set auto_find_batch_size=False"),
        ({"torch_compile": True}, "set torch_compile=False"),
        ({"use_liger_kernel": True}, "before the trainer is made"),
        ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw' does not"),
        ({"optim": "lomo"}, "optim='adafactor' does not"),
    ],
)
def test_arguments_that_do_not_go_with_memfit_are_refused(
    tmp_path: Path, arguments: dict[str, Any], cure: str
) -> None:
    trainer = made(tmp_path, llama(), texts()).trainer
    for name, value in arguments.items():
        setattr(trainer.args, "activation_checkpointing" if "checkpointing" in name else name, value)
    with pytest.raises(memfit.UnsupportedModel, match=re.escape(cure)):
        fit(trainer, "1GiB")
    assert type(trainer) is Trainer


def test_trainers_that_do_not_go_with_memfit_are_refused(tmp_path: Path) -> None:
    sampling = made(tmp_path, llama(), texts(), kind=GRPOTrainer).trainer
    with pytest.raises(memfit.UnsupportedModel, match="GRPOTrainer: it makes its batches itself"):
        fit(sampling, "1GiB")
    caching = made(tmp_path, llama(), texts()).trainer
    vars(caching)["loss"] = {"one": nn.Sequential(CachedLoss())}
    with pytest.raises(memfit.UnsupportedModel, match="CachedLoss: it splits the batch itself"):
        fit(caching, "1GiB")
    patched = made(tmp_path, llama(), texts()).trainer
    vars(patched)["compute_loss"] = lambda *args, **kwargs: None
    with pytest.raises(memfit.UnsupportedModel, match=r"trainer.compute_loss: it was replaced"):
        fit(patched, "1GiB")
    model = llama()
    vars(model.get_submodule("model.layers.0"))["gradient_checkpointing"] = True  # as its own switch does
    with pytest.raises(memfit.UnsupportedModel, match="gradient_checkpointing_disable"):
        fit(made(tmp_path, model, texts()).trainer, "1GiB")
    with pytest.raises(TypeError, match=r"give a transformers\.Trainer"):
        fit(llama(), "1GiB")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="can be read once only"):
        fit(made(tmp_path, Small(), trainers.Once(numbers())).trainer, "1GiB")


def test_a_training_step_that_asks_for_no_loss_is_an_error(tmp_path: Path) -> None:
    trainer = made(tmp_path, Small(), numbers(), kind=OwnStep).trainer
    fit(trainer, "1GiB")
    with pytest.raises(memfit.UnsupportedModel, match=r"OwnStep\.training_step did not call compute_loss"):
        trainer.train()
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (4, 4)
