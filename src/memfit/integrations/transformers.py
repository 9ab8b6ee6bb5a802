"""The Hugging Face Trainer, in one line before ``trainer.train()``.

    from memfit.integrations.transformers import fit

    print(fit(trainer, memory="20GiB"))
    trainer.train()

Note [Trainer]
 1. The effective batch is what the arguments say, ``per_device_train_batch_size`` times
    ``gradient_accumulation_steps``. The dataloader yields it as one batch and the loop sees one accumulation
    step, so schedule, step count, clipping, callbacks, evaluation, saving and resuming are the Trainer's own
    code, run as at that batch size. No row is joined or padded here: the collator sees the whole batch.
 2. ``compute_loss`` is where a batch becomes a loss. Called from ``training_step``, it runs the memfit step,
    which adds the gradients to ``.grad``, and returns the loss as a leaf: the backward of ``training_step``
    then ends where it begins. So a ``training_step`` of one's own still runs; evaluation calls the old one.
 3. Each micro-batch is given its own ``num_items_in_batch``, counted by the Trainer itself, so its loss is a
    function of the micro-batch alone, as ``memfit.fit`` wants it, whatever the head makes of that number. The
    weights are proved by the audit, and a batch that is kept whole gets the number that it always had.
 4. The arguments are the user's wherever the user can see them. Within the loop they are one step of the
    whole batch; callbacks, logs, evaluation and checkpoints are given what the user wrote.
 5. The trainer gets a subclass of its own class, as its callback handler does: nothing in its methods is
    patched, ``super()`` works, and taking the class back undoes it.
 6. What ``train()`` does to the model before the first step (autocast around its forward, NEFTune's noise) is
    done for the time of planning, and undone. The random streams and what accelerate keeps are put back, so
    that training begins as if nobody had looked.
 7. The optimizer is made as ``train()`` would make it, and kept: the plan holds its state. If ``train()``
    makes another model (``model_init``) or somebody another optimizer, the step is made again from the
    profile.
 8. On several processes ``train()`` trains a DistributedDataParallel around the model. ``fit`` makes it as
    ``train()`` would, plans for it, and hands it over when ``train()`` asks for one, so there is never a
    second set of buckets. The effective batch is that of all processes, and so is what the loss is a mean
    over (``average_tokens_across_devices``): ``memfit.fit`` sees to that, a micro-batch's loss meets nobody.
"""

from __future__ import annotations

import copy
import functools
import logging
import random
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.trainer_callback import CallbackHandler

import memfit
from memfit.api import Plan, Profile, Step, Verdict
from memfit.errors import UnsupportedModel
from memfit.runtime.ranks import Ranks

_log = logging.getLogger("memfit")

_ENGINES: Final = ("NO", "MULTI_CPU", "MULTI_GPU")  # of accelerate.DistributedType: one process, or DDP
_SAMPLES_ITSELF: Final = {
    *("GRPOTrainer", "RLOOTrainer", "PPOTrainer", "OnlineDPOTrainer", "XPOTrainer", "NashMDTrainer"),
    *("GKDTrainer", "GOLDTrainer", "MiniLLMTrainer", "DistillationTrainer"),
}
_SAMPLING: Final = ("_generate_and_score_completions", "_buffered_inputs", "num_generations")
_OWN_LOOP: Final = ("train", "_inner_training_loop", "_run_epoch", "get_batch_samples")
_REPLACED: Final = ("compute_loss", "training_step", "get_train_dataloader", "_maybe_log_save_evaluate")


class Fit:
    """A trainer's plan; made by :func:`fit`. ``print`` it to see what training will do.

    Attributes:
        step: The :class:`memfit.Step` that runs each batch.
        kind: The trainer's class as it was.
    """

    def __init__(self, trainer: Trainer, step: Step, make: _Make) -> None:
        self.step = step
        self.kind = _kind(trainer)
        self._make = make
        self._is_handed_over = not isinstance(make.model, DistributedDataParallel)
        self._trained = _Trained(make.model, _raw(trainer.optimizer))
        self._is_due = False  # a training step has begun, and its loss has not been asked for
        self._written: dict[str, int] | None = None  # the user's arguments, within the training loop

    @property
    def plan(self) -> Plan:
        """What is recomputed, and in which micro-batches."""
        return self.step.plan

    @property
    def trained_model(self) -> nn.Module:
        """The model, in DDP on several processes."""
        return self._trained.model

    @property
    def verdict(self) -> Verdict | None:
        """What the allocator said of the last measured step."""
        return self.step.verdict

    def __str__(self) -> str:
        """The plan, and the verdict once there is one."""
        return "\n".join(str(line) for line in (self.plan, self.verdict) if line is not None)

    @contextmanager
    def whole_batches(self, trainer: Trainer) -> Iterator[None]:
        """The arguments are one step of the whole effective batch. See Note [Trainer] 4."""
        if self._written is not None:
            yield
            return
        args = trainer.args
        rows = trainer._train_batch_size * args.gradient_accumulation_steps
        self._written = {name: getattr(args, name) for name in _batch_arguments(0)}
        try:
            with _set(args, _batch_arguments(rows)), _set(trainer, {"_train_batch_size": rows}):
                yield
        finally:
            self._written = None

    @contextmanager
    def as_written(self, args: Any) -> Iterator[None]:
        """The arguments are those that the user wrote."""
        with _set(args, self._written or {}):
            yield

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """The next loss that is asked for is the one to train on.

        Raises:
            UnsupportedModel: None was asked for, so the trainer has gone backward through something else.
        """
        self._is_due = True
        try:
            yield
            if self._is_due:
                raise UnsupportedModel(
                    f"{self.kind.__name__}.training_step did not call compute_loss, where memfit runs the "
                    "batch: let it call super().training_step(...), or train without memfit",
                    owner="training_step",
                )
        finally:
            self._is_due = False

    def wrapped(self, trainer: Trainer, model: nn.Module) -> nn.Module | None:
        """What ``train()`` is to train; None where that is the Trainer's to say. See Note [Trainer] 8."""
        ours = self._trained.model
        if self._is_handed_over or getattr(ours, "module", None) is not model:
            return None
        self._is_handed_over = True
        # as accelerate would before it makes DDP: autocast, where there is one
        trainer.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return ours

    def is_due(self) -> bool:
        """Whether a loss is the one to train on; true once for each training step."""
        was_due, self._is_due = self._is_due, False
        return was_due

    def run(self, trainer: Trainer, model: nn.Module, inputs: Any) -> Tensor:
        """The loss of the whole batch; gradients are in place. See Note [Trainer] 2."""
        now = _Trained(model, _raw(trainer.optimizer))
        if now.model is not self._trained.model or now.optimizer is not self._trained.optimizer:
            with (
                warnings.catch_warnings()
            ):  # of a profile that does not fit this model: then there is a new one
                warnings.filterwarnings("ignore", "the stored profile is not used")
                self.step = self._make._replace(model=model).step(trainer, inputs, self.step.profile)
            self._trained = now
            _log.info("train() made another model or optimizer, so the step was planned again: %s", self.plan)
        return self.step(inputs).requires_grad_()


class _Trained(NamedTuple):
    """What a step was made for."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


class _Make(NamedTuple):
    """How the step of a trainer is made."""

    model: nn.Module
    memory: str | int | None
    options: Mapping[str, Any]

    def step(self, trainer: Trainer, batch: Any, profile: Profile | None) -> Step:
        """The step for batches like this one."""
        return memfit.fit(
            self.model,
            _loss_of(trainer),
            batch,
            memory=self.memory,
            optimizer=_raw(trainer.optimizer),
            scaler=trainer.accelerator.scaler,
            profile=profile,
            **self.options,
        )


class _Fitted(Trainer):
    """Stands before a trainer's own class. See Note [Trainer]."""

    _memfit: Fit

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._memfit.whole_batches(self):
            return super()._inner_training_loop(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        with self._memfit.whole_batches(self):
            return super().get_train_dataloader()

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        ours = self._memfit.wrapped(self, model) if training else None
        found: nn.Module = super()._wrap_model(model, training, *args, **kwargs) if ours is None else ours
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._memfit.training_step():
            loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._memfit.is_due():
            return super().compute_loss(model, inputs, *args, **kwargs)
        if kwargs.get("return_outputs") or (args and args[0]):
            raise UnsupportedModel(
                f"{self._memfit.kind.__name__}.training_step asks compute_loss for the outputs of the whole "
                "batch, which memfit never holds at once: read them in compute_loss, or in a callback",
                owner="training_step",
            )
        return self._memfit.run(self, model, inputs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._memfit.as_written(self.args):
            return super()._maybe_log_save_evaluate(*args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModel(
            "hyperparameter_search changes batch and model from trial to trial: search without memfit, and "
            "fit the trainer of the best trial",
            owner="hyperparameter_search",
        )


class _Events(CallbackHandler):
    """Stands before the class of a callback handler: callbacks see the arguments as the user wrote them."""

    _memfit: Fit

    def call_event(self, event: str, args: Any, *rest: Any, **kwargs: Any) -> Any:
        with self._memfit.as_written(args):
            return super().call_event(event, args, *rest, **kwargs)  # type: ignore[no-untyped-call]


def fit(
    trainer: Trainer,
    memory: str | int | None = None,
    *,
    batch: Any = None,
    micro_batch_size: int | None = None,
    count: str | Callable[[Any], float] = "auto",
    batch_norm: str = "exact",
    profile: Profile | None = None,
) -> Fit:
    """Lets ``trainer.train()`` run its effective batch within ``memory``; returns the plan.

    The effective batch is ``per_device_train_batch_size * gradient_accumulation_steps``, times the number of
    processes. All else is as the plain Trainer would do with that batch size at once.
    If anything is raised, the trainer is as it was.
    A second call plans anew.

    Args:
        trainer: A ``transformers.Trainer`` or one of a subclass; under torchrun (DDP) in each process.
        memory: ``"20GiB"``, ``"80%"`` of the device, or bytes: the peak of everything on the device. On CUDA
            it may be left out: what is free.
        batch: An example of the effective batch, as the collator makes it; best the longest that will come.
            By default the first that the trainer's own dataloader yields. A longer one that comes later is
            measured and, if need be, planned again.
        micro_batch_size, count, batch_norm, profile: As in :func:`memfit.fit`.

    Raises:
        UnsupportedModel: The trainer, or one of its arguments, does not go with memfit; says what to set.
        InfeasibleBudget: No plan fits; says the smallest memory that works.
        ValueError: There is no batch to plan for.
        TypeError: ``trainer`` is no ``transformers.Trainer``.
        MemfitError: As in :func:`memfit.fit`.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer is a {type(trainer).__name__}: give a transformers.Trainer")
    ranks = _ranks(trainer)
    with ranks.together():
        for refusal in _refusals(trainer):
            raise UnsupportedModel(f"{refusal.owner}: {refusal.reason}", owner=refusal.owner)
    options = {"micro_batch_size": micro_batch_size, "count": count, "batch_norm": batch_norm}
    before = trainer.optimizer
    try:
        with _as_in_training(trainer) as model:
            make = _Make(model, memory, options)
            with ranks.together():
                trainer.create_optimizer()
                example = trainer._prepare_inputs(_first_batch(trainer) if batch is None else batch)
            fitted = Fit(trainer, make.step(trainer, example, profile), make)
    except BaseException:
        trainer.optimizer = before
        raise
    _install(trainer, fitted)
    return fitted


def _install(trainer: Trainer, fitted: Fit) -> None:
    """Puts the step in the trainer's way. See Note [Trainer] 5."""
    handler = trainer.callback_handler
    owners: tuple[tuple[Any, type], ...] = ((trainer, _Fitted), (handler, _Events))
    for owner, before in owners:
        kind = type(owner)
        if not isinstance(owner, before):
            names = {
                "__module__": kind.__module__,
                "__qualname__": kind.__qualname__,
                "__doc__": kind.__doc__,
            }
            owner.__class__ = type(kind.__name__, (before, kind), names)
        owner._memfit = fitted


def _kind(trainer: Trainer) -> type[Trainer]:
    """The trainer's class, were it not for memfit."""
    return trainer._memfit.kind if isinstance(trainer, _Fitted) else type(trainer)


def _loss_of(trainer: Trainer) -> Callable[[nn.Module, Any], Tensor]:
    """The trainer's loss of a batch. What it depends on stands beside it, for profiles that are stored."""
    facts = (
        trainer.compute_loss_func,
        trainer.args.label_smoothing_factor,
        trainer.model_accepts_loss_kwargs,
    )
    compute_loss: Callable[..., Any] = _kind(trainer).compute_loss
    return functools.partial(_loss, _Hidden(trainer), compute_loss, facts)


class _Hidden:
    """A trainer, without its plain attributes, which change as it trains; and no cycle through it."""

    __slots__ = ("_reference",)

    def __init__(self, trainer: Trainer) -> None:
        self._reference = weakref.ref(trainer)

    def __call__(self) -> Trainer:
        """The trainer."""
        trainer = self._reference()
        assert trainer is not None
        return trainer


def _loss(
    hidden: _Hidden, compute_loss: Callable[..., Any], facts: object, model: nn.Module, batch: Any
) -> Tensor:
    """The loss of a batch or of a part of it. See Note [Trainer] 3 and 8."""
    trainer = hidden()
    with _set(trainer.args, {"average_tokens_across_devices": False}):
        items = trainer._get_num_items_in_batch([batch], trainer.args.device)
        # compute_loss takes labels out of what it is given
        loss: Tensor = compute_loss(trainer, model, copy.copy(batch), num_items_in_batch=items)
    return loss


def _first_batch(trainer: Trainer) -> Any:
    """The first batch that training will see, the whole effective one, on the host.

    Raises:
        ValueError: There is none, or looking at it would take it away.
    """
    dataset = trainer.train_dataset
    if isinstance(dataset, IterableDataset) and iter(dataset) is iter(dataset):
        raise ValueError(
            "train_dataset can be read once only, so looking at its first batch would take that away: give "
            "fit(..., batch=) an example of the effective batch"
        )
    rows = _batch_arguments(trainer._train_batch_size * trainer.args.gradient_accumulation_steps)
    with _set(trainer.args, rows), _set(trainer, {"_train_batch_size": rows["per_device_train_batch_size"]}):
        loader = trainer.get_train_dataloader()
        # accelerate's loader would count itself as the one in use
        for batch in getattr(loader, "base_dataloader", loader):
            return batch
    raise ValueError("the trainer's dataloader yields no batch, so there is nothing to plan for")


@contextmanager
def _as_in_training(trainer: Trainer) -> Iterator[nn.Module]:
    """The model is as ``train()`` will have it, for a while; what that trains. See Note [Trainer] 6, 8."""
    model, accelerator = _model(trainer), trainer.accelerator
    with ExitStack() as undo:
        undo.enter_context(_random_state_kept())
        kept = ("_models", "_dataloaders")
        undo.enter_context(_set(accelerator, {name: [*getattr(accelerator, name)] for name in kept}))
        for module in model.modules():
            undo.enter_context(_set(module, {"training": module.training}))
        model.train()
        if trainer.neftune_noise_alpha is not None:
            undo.enter_context(_noise(trainer))
        undo.enter_context(_entries_kept(model, "forward", "_original_forward", "_is_accelerate_prepared"))
        trained = _wrapped(trainer, model)
        vars(model)["_is_accelerate_prepared"] = True
        undo.enter_context(trainer.compute_loss_context_manager())
        yield trained


def _wrapped(trainer: Trainer, model: nn.Module) -> nn.Module:
    """The model with autocast around its forward, and in DDP where there are several processes."""
    is_alone, earlier = trainer.args.world_size == 1, _ddp(trainer)
    if not is_alone:
        _kind(trainer)._wrap_model(trainer, model)  # some transformers tell accelerate DDP's arguments here
    found: nn.Module = trainer.accelerator.prepare_model(
        model, device_placement=False, evaluation_mode=is_alone or earlier is not None
    )
    return found if earlier is None else earlier


def _ddp(trainer: Trainer) -> DistributedDataParallel | None:
    """The one around the trainer's model that an earlier training or ``fit`` has made."""
    made = (trainer.model_wrapped, trainer._memfit.trained_model if isinstance(trainer, _Fitted) else None)
    of_this = (
        ddp for ddp in made if isinstance(ddp, DistributedDataParallel) and ddp.module is trainer.model
    )
    return next(of_this, None)


@contextmanager
def _noise(trainer: Trainer) -> Iterator[None]:
    """NEFTune's hook on the embeddings."""
    handle = activate_neftune(trainer.model, trainer.neftune_noise_alpha, trainer.accelerator)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        deactivate_neftune(trainer.model, handle, trainer.accelerator)  # type: ignore[no-untyped-call]


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """The random streams of Python, NumPy and torch are afterwards what they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def _entries_kept(module: nn.Module, *names: str) -> Iterator[None]:
    """These plain attributes are afterwards what they were, or not there."""
    entries = vars(module)
    before = {name: entries[name] for name in names if name in entries}
    try:
        yield
    finally:
        for name in names:
            entries.pop(name, None)
        entries.update(before)


@contextmanager
def _set(owner: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """These attributes have these values in the body."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _batch_arguments(rows: int) -> dict[str, int]:
    """The arguments that say: so many rows, at once."""
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}


def _ranks(trainer: Trainer) -> Ranks:
    """The processes that train together."""
    return Ranks() if trainer.args.world_size == 1 else Ranks.of(None, trainer.args.device)


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within accelerate's."""
    is_wrapped = hasattr(optimizer, "accelerator_state") and hasattr(optimizer, "optimizer")
    raw: torch.optim.Optimizer = optimizer.optimizer if is_wrapped else optimizer
    return raw


def _model(trainer: Trainer) -> nn.Module:
    """The model."""
    assert trainer.model is not None  # the Trainer has made sure
    return trainer.model


# ---- what is refused --------------------------------------------------------------------------------


class _Refusal(NamedTuple):
    """What of a trainer cannot be combined with memfit, why, and what to do."""

    owner: str
    reason: str


def _refusals(trainer: Trainer) -> Iterator[_Refusal]:
    """Yields everything that stands against fitting a trainer."""
    yield from _of_processes(trainer)
    yield from _of_arguments(trainer.args)
    yield from _of_kind(trainer)
    yield from _of_model(trainer)


def _of_processes(trainer: Trainer) -> Iterator[_Refusal]:
    """Processes that come together in another way than DDP's, or more than one device in one."""
    engine = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    if trainer.is_deepspeed_enabled:
        yield _Refusal(
            "deepspeed", "its engine owns the backward: leave deepspeed= out, which trains with DDP"
        )
    if trainer.is_fsdp_enabled:
        cure = (
            "leave fsdp= out, which trains with DDP, or shard in a loop of your own: fully_shard, memfit.fit"
        )
        yield _Refusal("fsdp", f"memfit knows FSDP2 outside of the Trainer only: {cure}")
    elif engine not in _ENGINES:
        yield _Refusal(
            "world_size",
            f"{trainer.args.world_size} processes of {engine}, and memfit knows {', '.join(_ENGINES)}: "
            "start one, with gradient_accumulation_steps as many times larger for the same effective batch",
        )
    if trainer.args.world_size > 1 and not trainer.args.average_tokens_across_devices:
        yield _Refusal(
            "average_tokens_across_devices",
            "False makes each process a mean over its own labels, and memfit's is over those of all: leave "
            "it at True",
        )
    if trainer.args.n_gpu > 1:
        yield _Refusal(
            "n_gpu", f"{trainer.args.n_gpu} devices in a process: name one in CUDA_VISIBLE_DEVICES"
        )


def _of_arguments(args: Any) -> Iterator[_Refusal]:
    """Arguments that do what memfit does, or what it cannot see."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, False):
            yield _Refusal(name, f"memfit chooses what to recompute: set {name}=False")
    if args.auto_find_batch_size:
        cure = "memfit finds the micro-batch: set auto_find_batch_size=False"
        yield _Refusal("auto_find_batch_size", f"it would change the effective batch, and {cure}")
    if args.torch_compile:
        cure = "and would choose its micro-batch only: set torch_compile=False"
        yield _Refusal("torch_compile", f"memfit cannot look into a compiled model, {cure}")
    if getattr(args, "use_liger_kernel", False):
        cure = "set use_liger_kernel=False, and apply Liger's kernels before the trainer is made"
        yield _Refusal("use_liger_kernel", f"train() would change the model after it was planned: {cure}")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim.endswith(("layerwise", "lomo")):
        cure = optim.removesuffix("_layerwise") if optim.endswith("layerwise") else "adafactor"
        yield _Refusal(
            "optim",
            f"{optim!r} steps each parameter within the backward, before the batch is complete: "
            f"optim={cure!r} does not",
        )


def _of_kind(trainer: Trainer) -> Iterator[_Refusal]:
    """Trainers with a loop or batches of their own."""
    kind = _kind(trainer)
    names = {base.__name__ for base in kind.__mro__}
    if names & _SAMPLES_ITSELF or any(hasattr(trainer, name) for name in _SAMPLING):
        cure = "set per_device_train_batch_size and gradient_accumulation_steps by hand, without memfit"
        yield _Refusal(kind.__name__, f"it makes its batches itself, and splits them: {cure}")
    for loss in _losses(trainer):
        if type(loss).__name__.startswith("Cached"):
            cure = "give the loss without 'Cached' (memfit recomputes), or train without memfit"
            yield _Refusal(type(loss).__name__, f"it splits the batch itself: {cure}")
    for name in _OWN_LOOP:
        if getattr(kind, name, None) is not getattr(Trainer, name, None):
            yield _Refusal(f"{kind.__name__}.{name}", "memfit needs the Trainer's own: train without memfit")
    for name in _REPLACED:
        if name in vars(trainer):
            yield _Refusal(
                f"trainer.{name}", "it was replaced on this one trainer: override it in a subclass"
            )


def _losses(trainer: Trainer) -> list[nn.Module]:
    """The losses that a trainer of sentence-transformers has, those within others too."""
    loss = getattr(trainer, "loss", None)
    held = list(loss.values()) if isinstance(loss, Mapping) else [loss]
    return [module for one in held if isinstance(one, nn.Module) for module in one.modules()]


def _of_model(trainer: Trainer) -> Iterator[_Refusal]:
    """Models that recompute on their own, or are elsewhere than they train."""
    model = _model(trainer)
    kind, place = type(model).__name__, next(model.parameters()).device
    target = torch.empty(0, device=trainer.args.device).device  # accelerate says cpu:0 where tensors say cpu
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        cure = "call model.gradient_checkpointing_disable()"
        yield _Refusal(kind, f"it checkpoints already, and memfit chooses what to recompute: {cure}")
    if place != target:
        cure = f"call model.to('{target}') before fit"
        yield _Refusal(kind, f"it is on {place}, and will train on {target}: {cure}")
