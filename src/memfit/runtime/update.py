"""Records ``optimizer.step()``: on fakes for its bytes, really on a few parameters for what fakes hide.

Note [Update]
 1. Two steps of a twin of the optimizer: the first makes the state, the second has it. State that the real
    one has already is there from the start.
 2. The twin runs as it would on the device: on CUDA ``foreach``, which holds temporaries for all parameters
    at once.
 3. A number that an optimizer reads off a tensor (``.item()`` of a counter or a norm) is small in the first
    step on fakes, and large later: it decides values, and whether a warm-up is over (RAdam), not shapes.
 4. Several optimizers step one after the other in one recording, for their states are all there at once.
 5. One that calls the loss itself (LBFGS) keeps copies while it does, so what it takes is assumed: two for
    each entry of its history, and as many as a line search has beside them.
 6. Seconds and temporaries inside ops come from the same steps of a real twin that has one clone of each
    shape of parameter, as far as memory allows. Ops that look alike share them; the seconds of others
    are scaled like the sum.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.optim import optimizer as _optimizer

from memfit.core.costs import costs_alike, with_costs_alike
from memfit.core.devices import Roofline
from memfit.core.graph import EMPTY_GRAPH, LogEntry, LogKind, Op, OpKey, StepGraph, Storage
from memfit.runtime.job import Optimizers, each_optimizer, optimizer_state
from memfit.runtime.meter import resident_bytes
from memfit.runtime.precision import empty_gradient, set_gradient
from memfit.runtime.probe import OpCost, Probe, RooflineProbe, probe_for
from memfit.runtime.record import Recording, record_update
from memfit.runtime.sharding import local

_log = logging.getLogger("memfit")

_MOST_CLONED_BYTES = 64 << 20
_COPIES = 8  # of a parameter: itself, its gradient, up to three states and as many temporaries
_REPEATS = 3
_EARLY, _LATE = 2, 1000  # not 1: NAdam divides by one less
_ASSUMED = ("assumed",)
_READ = torch.ops.aten._local_scalar_dense.default


class Update(NamedTuple):
    """The first ``optimizer.step()``, in which the state is born, every later one, and all of that state."""

    first: Recording = Recording(EMPTY_GRAPH, (), ())
    later: Recording = Recording(EMPTY_GRAPH, (), ())
    state_bytes: int = 0


class _UpdateProbe(RooflineProbe):
    """The roofline, and an answer where a fake has none. See Note [Update] 3."""

    def __init__(self, device: Roofline, number: int) -> None:
        super().__init__(device)
        self._number = number

    def call(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one op on fakes and estimates it."""
        if func is not _READ:
            return super().call(func, args, kwargs)
        self._costs.append(OpCost(0.0, None))
        dtype = args[0].dtype
        return float(self._number) if dtype.is_floating_point else self._number


def record_optimizer(
    optimizer: Optimizers, make: Callable[[Tensor], Tensor], device: Roofline, *, for_cuda: bool
) -> Update:
    """Both steps of all optimizers on fakes.

    Args:
        make: The fake of a tensor.
        for_cuda: It is to run on CUDA, wherever its parameters are now.
    """
    optimizers = each_optimizer(optimizer)
    twins = [_twin(one, make, for_cuda=for_cuda) for one in optimizers]
    for parameter in _parameters(twins):
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = empty_gradient(parameter)
    try:
        first, later = (_step(twins, _UpdateProbe(device, number)) for number in (_EARLY, _LATE))
        return Update(first, later, resident_bytes(_state(twins)))
    except Exception as error:  # an optimizer of the user's own may do what fakes cannot
        name, copies = " and ".join(type(one).__name__ for one in optimizers), _assumed_copies(optimizers)
        warnings.warn(
            f"{name} cannot be recorded ({error}): memfit assumes {copies} states and a copy of the "
            "parameters for its step, and does not measure it",
            stacklevel=2,
        )
        return _assumed(name, copies, resident_bytes(_parameters(twins)))


def with_real_costs(update: Update, optimizer: Optimizers, free_bytes: int | None) -> Update:
    """The same with the seconds and inner temporaries of real steps. See Note [Update] 6."""
    optimizers = each_optimizer(optimizer)
    chosen = _one_of_each(_parameters(optimizers), free_bytes)
    if not chosen or not update.later.graph.ops or _ASSUMED in update.later.signatures:
        return update
    clones: dict[int, Tensor] = {}

    def make(tensor: Tensor) -> Tensor:
        if id(tensor) not in clones:
            copied = local(tensor).detach().clone()
            clones[id(tensor)] = nn.Parameter(copied) if isinstance(tensor, nn.Parameter) else copied
            if isinstance(tensor, nn.Parameter):
                set_gradient(clones[id(tensor)], None, tensor.grad_dtype)
        return clones[id(tensor)]

    try:
        twins = [_twin(one, make, only=chosen) for one in optimizers]
        for parameter in _parameters(twins):
            parameter.grad = torch.rand_like(parameter, dtype=parameter.grad_dtype) * 1e-3
        place = chosen[0].device
        runs = [_step(twins, probe_for(place)()) for _ in range(1 + _REPEATS)]
    except Exception as error:  # one of the user's own may not take clones
        _log.info("optimizer.step() cannot be measured: %s", error)
        return update
    known = costs_alike(runs[1:])
    first = with_costs_alike(update.first, known | costs_alike(runs[:1]))
    later = with_costs_alike(update.later, known)
    return update._replace(first=update.first._replace(graph=first), later=update.later._replace(graph=later))


def _step(optimizers: Sequence[torch.optim.Optimizer], probe: Probe) -> Recording:
    """One recorded step."""

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    parameters = _parameters(optimizers)
    there = [*parameters, *(p.grad for p in parameters if p.grad is not None), *_state(optimizers)]
    with _without_global_hooks():
        return record_update(step, there, probe, lambda: _state(optimizers))


def _parameters(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """All they step."""
    return [p for one in optimizers for group in one.param_groups for p in group["params"]]


def _state(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """Their state on the device of the parameters."""
    place = _parameters(optimizers)[0].device
    return [t for t in optimizer_state(optimizers) if t.device == place]


def _assumed_copies(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Copies of the parameters to assume as the state of an optimizer. See Note [Update] 5."""
    histories = [
        group["history_size"] for one in optimizers for group in one.param_groups if "history_size" in group
    ]
    return _COPIES + 2 * max(histories) if histories else 2


def _one_of_each(parameters: list[Tensor], free_bytes: int | None) -> list[Tensor]:
    """One parameter of each shape, the largest first, of which copies fit."""
    left_bytes = _MOST_CLONED_BYTES if free_bytes is None else min(_MOST_CLONED_BYTES, free_bytes // _COPIES)
    unlike = {(p.shape, p.dtype): p for p in parameters if p.requires_grad}
    chosen = []
    for parameter in sorted(unlike.values(), key=lambda p: -p.numel()):
        if parameter.nbytes <= left_bytes:
            chosen.append(parameter)
            left_bytes -= parameter.nbytes
    return chosen


def _twin(
    optimizer: torch.optim.Optimizer,
    make: Callable[[Tensor], Tensor],
    *,
    for_cuda: bool = False,
    only: list[Tensor] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer of the same kind and state over other parameters, its hooks left out."""
    wanted = None if only is None else {id(p) for p in only}
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))  # copy.copy() drops attributes of its own
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)  # a scheduler wraps it with a counter
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    twin.param_groups = []
    twin.state = defaultdict(dict)
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if wanted is None or id(p) in wanted]
        if kept:
            made = {key: _own(value, make) for key, value in group.items() if key != "params"}
            made["params"] = [make(p) for p in kept]
            twin.param_groups.append(made | _as_on_device(group, for_cuda))
        for parameter in kept:
            if parameter in optimizer.state:
                state = optimizer.state[parameter].items()
                twin.state[make(parameter)] = {key: _own(value, make) for key, value in state}
    return twin


def _own(value: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """What a twin may change without changing the optimizer's."""
    if isinstance(value, Tensor):
        return make(value)
    return copy.deepcopy(value) if isinstance(value, (list, dict, set)) else value


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Hooks that the user has put on every optimizer's step do not see a twin's."""
    tables: tuple[Any, ...] = (
        _optimizer._global_optimizer_pre_hooks,
        _optimizer._global_optimizer_post_hooks,
    )
    before = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.update(hooks)


def _as_on_device(group: dict[str, Any], for_cuda: bool) -> dict[str, Any]:
    """The implementation torch would choose for real parameters: ``foreach`` on CUDA, which fakes miss."""
    on_cuda = for_cuda or all(p.is_cuda for p in group["params"])
    undecided = "foreach" in group and group["foreach"] is None and not group.get("fused")
    return {"foreach": True} if on_cuda and undecided else {}


def _assumed(name: str, copies: int, parameters_bytes: int) -> Update:
    """So many states and a copy of the parameters."""
    op = Op(OpKey("", name, 0), temporary_bytes=parameters_bytes)
    later = replace(EMPTY_GRAPH, ops=(op,), log=(LogEntry(LogKind.OP, 0),))
    state = Storage(copies * parameters_bytes, persists=True)
    first = replace(later, ops=(replace(op, allocates=(0,)),), storages=(state,))
    return Update(_unlike(first), _unlike(later), copies * parameters_bytes)


def _unlike(graph: StepGraph) -> Recording:
    """A recording of one op that looks like no other."""
    return Recording(graph, (_ASSUMED,), (None,))
