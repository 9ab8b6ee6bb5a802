"""Lightning: the batch of the DataLoader runs within a stated memory, under an unchanged ``Trainer``.

    Trainer(callbacks=[memfit.integrations.lightning.MemfitCallback(memory="8GiB")])

Works for ``lightning.pytorch`` and for ``pytorch_lightning``; importing this file imports one of them.

Note [Closure]
 1. Automatic optimization hands the optimizer a closure: ``training_step``, ``zero_grad``, ``backward``. The
    callback gives the loop another closure: ``zero_grad``, a memfit step of the whole batch (which calls
    ``training_step`` once a micro-batch), and a backward of the loss as a leaf of its own. So everything
    around it stays Lightning's: the order of hooks, the scaler, clipping, schedulers, progress, checkpoints.
 2. The gradients are complete when ``on_before_backward`` is called, and gone when training starts a batch.
 3. The first batch is the example that is profiled and audited. ``training_step`` runs for that, on fake
    tensors and on a copy of the module, and nothing of it may stay: attributes and metrics are put back,
    ``self.log`` does nothing, and loggers are stand-ins.

Note [Logs]
 1. What ``training_step`` logs of micro-batches is logged once, for the whole batch: the loss is the exact
    loss; a sum, largest or smallest value is that of the parts; any other number is their mean, weighted by
    rows, or by the ``batch_size=`` that was given (so a mean over tokens says their number there).
 2. A metric of torchmetrics starts each batch empty and is merged with what it held before, so that its value
    ``on_step`` is that of the whole batch too. Metrics that cannot be merged (``full_state_update``) show
    their last micro-batch ``on_step``; their value ``on_epoch`` is right all the same.
 3. A batch may run again from its start (out of memory, a broken promise): then what its first run logged or
    counted is forgotten.
 4. On several processes the loss is logged as that of the batch of all. What else is logged is of the rows of
    one process, as Lightning has it, and comes together where ``sync_dist=`` or a metric says so.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from memfit import api
from memfit.core.graph import Profile
from memfit.errors import InexactAccumulation, UnsupportedModel
from memfit.runtime.batch import join, map_tensors, rows_of
from memfit.runtime.count import Counter
from memfit.runtime.fake import untouched
from memfit.runtime.step import Step

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback  # type: ignore[assignment,unused-ignore]

_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
_STEP = "training_step"
_COUNTERS = ("_update_count", "_computed", "_forward_cache")


class MemfitCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Runs each batch of automatic optimization within ``memory``, as if it were run whole.

    The DataLoader's batch is the effective batch, under DDP that of all processes: make it as large as the
    recipe wants, and leave ``accumulate_grad_batches`` at 1. The plan is made at the first batch.

    Args:
        memory, micro_batch_size, count, batch_norm: As :func:`memfit.fit` has them.

    Attributes:
        step: The :class:`memfit.Step` in use (its plan, verdict, audit); None before the first batch.

    Raises:
        UnsupportedModel: At the start of ``trainer.fit``: manual optimization, several optimizers, strategies
            other than one device and DDP, and whatever else would not be exact; says what to set instead.
        MemfitError: At the first batch, as :func:`memfit.fit` does.
    """

    def __init__(
        self,
        memory: str | int | None = None,
        *,
        micro_batch_size: int | None = None,
        count: str | Counter | Mapping[str, str | Counter] = "auto",
        batch_norm: str = "exact",
    ) -> None:
        super().__init__()
        self.step: Step | None = None
        self._options = {
            "memory": memory,
            "micro_batch_size": micro_batch_size,
            "count": count,
            "batch_norm": batch_norm,
        }
        self._profile: Profile | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes over the closure of automatic optimization."""
        refuse_unsupported(trainer, pl_module)
        self.step = None
        run = _Batches(trainer, pl_module)
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        loop._make_closure = functools.partial(self._closure, run, loop)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Gives it back."""
        trainer.fit_loop.epoch_loop.automatic_optimization.__dict__.pop("_make_closure", None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Gives it back."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The profile, so that a run that is resumed goes on under the same plan."""
        profile = self._profile if self.step is None else self.step.profile
        return {} if profile is None else {"profile": profile.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the profile of a checkpoint; one that no longer holds is made again, with a warning."""
        self._profile = Profile.from_json(state_dict["profile"])

    def _closure(self, run: _Batches, loop: Any, kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        """The closure of one batch. See Note [Closure]."""
        plain = type(loop)._make_closure(loop, kwargs, optimizer, batch_idx)
        refuse_accumulation(run.trainer)
        if plain._backward_fn is None:  # a pass without training, such as that for averaged BatchNorm
            return plain
        batch, *rest = kwargs.values()

        def step_fn() -> Any:
            if plain._zero_grad_fn is not None:
                plain._zero_grad_fn()
            if self.step is None:
                self.step = run.fit(batch, rest, optimizer, profile=self._profile, **self._options)
            output = run.run(self.step, batch, rest)
            plain._backward_fn(output["loss"].clone().requires_grad_())  # Lightning's hooks are around it
            return loop.output_result_cls.from_training_step_output(output)

        return type(plain)(step_fn)


# ---- what is not supported -----------------------------------------------------------------------


def refuse_unsupported(trainer: Any, module: Any) -> None:
    """Refuses what would not train as the plain ``Trainer`` does.

    Raises:
        UnsupportedModel: Says why, and what to set instead.
    """
    refuse_accumulation(trainer)
    for reason in _hindrances(trainer, module):
        raise UnsupportedModel(f"{reason}. Or train without MemfitCallback", owner=type(module).__name__)


def _hindrances(trainer: Any, module: Any) -> Iterator[str]:
    """Each reason why a module cannot be trained so, and what to do."""
    kind, package = type(module).__name__, _package(trainer)
    plugin, strategy = type(trainer.precision_plugin), type(trainer.strategy).__name__
    if not module.automatic_optimization:
        yield (
            f"{kind} optimizes manually, so memfit cannot tell what one batch is: return the loss from "
            "training_step and leave automatic_optimization on"
        )
    if len(trainer.optimizers) != 1:
        yield (
            f"configure_optimizers of {kind} gave {len(trainer.optimizers)} optimizers, and memfit plans a "
            "batch for one: put the parameters into groups of one optimizer"
        )
    if strategy not in _STRATEGIES:
        yield (
            f"the strategy is {strategy}, and memfit knows {' and '.join(_STRATEGIES)}: set "
            "Trainer(strategy='ddp'), or devices=1; to shard the module, call fully_shard and memfit.fit in "
            "a loop of your own"
        )
    if getattr(trainer.strategy, "_model_averager", None) is not None:
        yield (
            "DDPStrategy(model_averaging_period=) lets the processes drift apart for some steps, and memfit "
            "trains one model on the batch of all: leave it out"
        )
    if not _is_from(type(module).backward, package):
        yield (
            f"{kind} has a backward of its own, and memfit runs one for each micro-batch: leave it out, and "
            "change gradients in on_after_backward"
        )
    if not _is_from(plugin.backward, f"{package}.plugins.precision.precision"):
        yield f"{plugin.__name__} has a backward of its own: set precision= to one of 32, 64, bf16 and 16"
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield "training_step takes the dataloader_iter, so no batch can be split: take (batch, batch_idx)"
    if getattr(module, "_compiler_ctx", None) is not None:
        yield (
            f"{kind} is under torch.compile as a whole, which hides training_step: compile the network in "
            "it (self.net = torch.compile(net))"
        )


def refuse_accumulation(trainer: Any) -> None:
    """Refuses Lightning's own accumulation, which weights batches alike, whatever their loss is a mean over.

    Raises:
        UnsupportedModel: ``accumulate_grad_batches`` is not 1.
    """
    count = trainer.accumulate_grad_batches
    if count != 1:
        raise UnsupportedModel(
            f"accumulate_grad_batches is {count}, which counts every batch alike; memfit splits a batch "
            f"exactly: set it to 1 and the DataLoader's batch_size {count} times as large",
            owner="accumulate_grad_batches",
        )


def _package(trainer: Any) -> str:
    """``lightning.pytorch`` or ``pytorch_lightning``, whichever the trainer is of."""
    return type(trainer.fit_loop).__module__.rpartition(".loops")[0]


def _is_from(function: Any, package: str) -> bool:
    """Whether a method is the framework's own."""
    return str(function.__module__).startswith(package)


# ---- batches -------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """What ``training_step`` gave for one micro-batch."""

    rows: int
    loss: Tensor
    extra: dict[str, Any]
    logs: list[dict[str, Any]]


class _Batches:
    """Runs ``training_step`` for micro-batches, for those that nobody may see and for those that count."""

    def __init__(self, trainer: Any, module: Any) -> None:
        self.trainer = trainer
        self._module = module
        self._package = _package(trainer)
        self._rest: Sequence[Any] = ()
        self._logs: list[dict[str, Any]] = []
        self._parts: list[_Part] | None = None  # of the batch that runs; None: nobody may see it
        self._metrics: _Metrics | None = None

    def fit(self, batch: Any, rest: Sequence[Any], optimizer: Any, **options: Any) -> Step:
        """The step for batches like this one. See Note [Closure] 3."""
        self._rest = rest
        loss_fn: Any = functools.partial(self._loss, *_functions(self._module, self._package))
        loss_fn.on_batch_start = self._start
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        with self._rehearsal():
            model = self.trainer.strategy.model  # the module, in DDP on several processes
            return api.fit(model, loss_fn, batch, optimizer=optimizer, scaler=scaler, **options)

    def run(self, step: Step, batch: Any, rest: Sequence[Any]) -> dict[str, Any]:
        """Forward and backward of a batch: what its ``training_step`` would return, the loss detached."""
        self._rest, module = rest, self._module
        former, module._current_fx_name = module._current_fx_name, _STEP
        name = f"[Strategy]{type(self.trainer.strategy).__name__}.{_STEP}"
        self._metrics = _Metrics(module)
        try:
            with self.trainer.profiler.profile(name), self._logging(self._note):
                loss = step(batch)
                parts = self._parts or []
            self._metrics.finish()
            for arguments in _logs_of_batch(parts, loss):
                module.log(**arguments)
            return {**_extra_of_batch(parts), "loss": loss}
        finally:
            self._metrics, self._parts = None, None
            module._current_fx_name = former

    def _loss(self, *arguments: Any) -> Tensor:
        """The loss of a micro-batch. The first arguments are the module's code, for audits and profiles."""
        *_, model, part = arguments
        if model is not self._module and model._trainer is None:  # a copy
            model.trainer = self.trainer
        self._logs = []
        with self.trainer.precision_plugin.train_step_context():
            output = model.training_step(part, *self._rest)
        extra = dict(output) if isinstance(output, Mapping) else {"loss": output}
        loss = extra.pop("loss", None)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"training_step returned {'no loss' if loss is None else f'a {type(loss).__name__}'}: return "
                "the loss, or a dict with it as 'loss'. A micro-batch cannot be skipped: leave batches that "
                "do not train out of the DataLoader"
            )
        if self._parts is not None and model is self._module:
            extra = map_tensors(extra, torch.Tensor.detach)
            self._parts.append(_Part(rows_of(part), loss.detach(), extra, self._logs))
        return loss

    def _start(self) -> None:
        """A batch starts, perhaps not for the first time: what comes now counts."""
        if self._metrics is not None:
            self._parts = []
            self._metrics.start()

    def _note(self, *args: Any, **kwargs: Any) -> None:
        """Stands in for ``self.log``."""
        signature = inspect.signature(type(self._module).log)
        arguments = signature.bind(None, *args, **kwargs).arguments
        del arguments["self"]
        value = arguments["value"]
        arguments["value"] = value.detach() if isinstance(value, Tensor) else value
        self._logs.append(arguments)

    @contextmanager
    def _logging(self, log: Callable[..., None]) -> Iterator[None]:
        """``self.log`` is another function in the body; no method, or a copy of the module would copy us."""
        former = self._module.__dict__.get("log")
        self._module.log = lambda *args, **kwargs: log(*args, **kwargs)
        try:
            yield
        finally:
            del self._module.__dict__["log"]
            if former is not None:
                self._module.log = former

    @contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """Nothing that the body does with the module is seen afterwards, or by loggers."""
        loggers = self.trainer.loggers
        stand_in = importlib.import_module(f"{self._package}.loggers.logger").DummyLogger
        with untouched(self._module), self._logging(lambda *args, **kwargs: None):
            _copy_tensor_attributes(self._module)
            self.trainer.loggers = [stand_in() for _ in loggers]
            try:
                yield
            finally:
                self.trainer.loggers = loggers


def _functions(module: Any, package: str) -> list[Any]:
    """The functions of the user's own module, of which one is its ``training_step``."""
    kinds = [kind for kind in type(module).__mro__ if not _is_from(kind, package)]
    found = [
        f
        for kind in kinds
        if issubclass(kind, nn.Module) and kind is not nn.Module
        for f in vars(kind).values()
    ]
    return [function for function in found if inspect.isfunction(function)]


def _copy_tensor_attributes(module: nn.Module) -> None:
    """Puts copies in place of tensors that are neither parameter nor buffer: the states of metrics."""
    for part in module.modules():
        for name, value in part.__dict__.items():
            if isinstance(value, Tensor):
                part.__dict__[name] = value.clone() if value.grad_fn is None else value


# ---- what a batch logs and returns ------------------------------------------------------------------


def _logs_of_batch(parts: Sequence[_Part], loss: Tensor) -> Iterator[dict[str, Any]]:
    """The arguments of each ``self.log`` of the whole batch. See Note [Logs]."""
    calls: dict[tuple[str, int], list[tuple[_Part, dict[str, Any]]]] = {}
    for part in parts:
        seen: dict[str, int] = {}
        for arguments in part.logs:
            name = arguments["name"]
            seen[name] = seen.get(name, -1) + 1
            calls.setdefault((name, seen[name]), []).append((part, arguments))
    for group in calls.values():
        sizes = [arguments.get("batch_size") for _, arguments in group]
        given = [size for size in sizes if size is not None]
        found = dict(group[0][1], value=_value_of_batch(group, loss))
        if given:
            found["batch_size"] = sum(given)
        yield found


def _value_of_batch(group: Sequence[tuple[_Part, dict[str, Any]]], loss: Tensor) -> Any:
    """One logged value for the whole batch. See Note [Logs] 1."""
    values = [arguments["value"] for _, arguments in group]
    if isinstance(values[0], Metric):
        return values[0]
    numbers = _numbers(values)
    if torch.equal(numbers, _numbers([part.loss for part, _ in group])):
        return loss.clone()
    reduce_fx = group[0][1].get("reduce_fx", "mean")
    reduction = getattr(reduce_fx, "__name__", reduce_fx)
    if reduction in ("sum", "max", "min"):
        return _like(getattr(numbers, reduction)(), values[0])
    given = [(arguments.get("batch_size"), part.rows) for part, arguments in group]
    return _mean(values, [rows if size is None else size for size, rows in given])


def _extra_of_batch(parts: Sequence[_Part]) -> dict[str, Any]:
    """What ``training_step`` returned beside the loss: rows one below the other, numbers as their mean.

    Raises:
        InexactAccumulation: The parts of something cannot be put together.
    """
    if len(parts) == 1:
        return parts[0].extra
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part.extra):
        having = [part for part in parts if name in part.extra]
        values = [part.extra[name] for part in having]
        if all(isinstance(v, float) or (isinstance(v, Tensor) and v.dim() == 0) for v in values):
            found[name] = _mean(values, [part.rows for part in having])
            continue
        try:
            found[name] = join(values)
        except InexactAccumulation as error:
            raise InexactAccumulation(
                f"training_step returns {name!r}, whose micro-batches cannot be put together ({error}): "
                "return what has one row a row of the batch, or one number, or nothing but the loss",
                owner=name,
            ) from error
    return found


def _mean(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The weighted mean of numbers; what is the same everywhere stays so to the bit."""
    numbers = _numbers(values)
    if bool((numbers == numbers[0]).all()):
        return values[0]
    weights = numbers.new_tensor(sizes if any(sizes) else [1] * len(sizes))
    return _like((numbers * weights).sum() / weights.sum(), values[0])


def _numbers(values: Sequence[Any]) -> Tensor:
    """Numbers, or tensors of one number, as one vector."""
    return torch.stack([torch.as_tensor(value).detach().double().reshape(()) for value in values]).cpu()


def _like(number: Tensor, example: Any) -> Any:
    """A number of the same kind as another one, but never cut to a whole one."""
    if not isinstance(example, Tensor):
        return float(number)
    return number.to(example.device, example.dtype if example.is_floating_point() else torch.float32)


# ---- metrics -------------------------------------------------------------------------------------


class _Held(NamedTuple):
    """What a metric held before a batch."""

    metric: Metric
    states: dict[str, Any]
    counters: dict[str, Any]

    def put_back(self) -> None:
        """Puts it back; what is held here stays as it is."""
        for name, value in {**_copied(self.states), **self.counters}.items():
            setattr(self.metric, name, value)


class _Metrics:
    """The metrics of a module while a batch runs in parts. See Note [Logs] 2."""

    def __init__(self, module: nn.Module) -> None:
        metrics = [m for m in module.modules() if isinstance(m, Metric) and m._defaults]
        self._held = [
            _Held(m, _copied(m.metric_state), {name: getattr(m, name) for name in _COUNTERS}) for m in metrics
        ]

    def start(self) -> None:
        """The batch starts, perhaps again."""
        for held in self._held:
            held.put_back()
            if _can_merge(held.metric):
                Metric.reset(held.metric)

    def finish(self) -> None:
        """The batch is done."""
        for held in self._held:
            metric = held.metric
            if not _can_merge(metric):
                continue
            if not metric._update_count:  # such as one for validation
                held.put_back()
                continue
            value = None if metric._forward_cache is None else _own_value(metric)
            metric._update_count = held.counters["_update_count"] + 1
            with torch.no_grad():
                metric._reduce_states(held.states)
            metric._computed, metric._forward_cache = None, value


def _own_value(metric: Metric) -> Any:
    """The value of what this process has seen, as ``on_step`` has it: the others come in at the epoch."""
    before, metric._to_sync = metric._to_sync, False
    try:
        return metric.compute()
    finally:
        metric._to_sync = before


def _can_merge(metric: Metric) -> bool:
    """Whether the state of two batches follows from the states of each."""
    return metric.full_state_update is False and not metric.dist_sync_on_step


def _copied(states: Mapping[str, Any]) -> dict[str, Any]:
    """The states of a metric; the tensors in a list are never written to."""
    return {name: s.clone() if isinstance(s, Tensor) else list(s) for name, s in states.items()}
