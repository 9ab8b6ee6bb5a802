"""What ``memfit train`` trains: model, optimizer, loss and batches, and how a TARGET names them.

Imports no torch: the command line must start at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

DEFAULT_TARGET = "memfit.workloads.text:workload"


class BadTarget(ValueError):
    """A TARGET that does not import, has no such function, fails, or returns the wrong thing."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One training job.

    Attributes:
        model: The module to train; its parameters are the ones ``optimizer`` updates.
        optimizer: Steps once per effective batch.
        loss_fn: ``loss_fn(model, batch) -> scalar Tensor``, the loss of a whole batch, or a mapping of terms.
        batches: Either a callable ``step index from 0 -> batch``, or an iterable that yields the same
            batches each time it is iterated; it starts again when it ends. Resuming relies on that.
        outputs_fn, count, batch_norm: As :func:`memfit.fit` has them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[[Any, Any], torch.Tensor | Mapping[str, torch.Tensor]]
    batches: Iterable[Any] | Callable[[int], Any]
    outputs_fn: Callable[[nn.Module, Any], Any] | None = None
    count: str | Callable[[Any], float] | Mapping[str, str | Callable[[Any], float]] = "auto"
    batch_norm: str = "exact"

    @property
    def betas(self) -> tuple[float, float] | None:
        """Adam's, if the optimizer has them as numbers."""
        match self.optimizer.param_groups[0].get("betas"):
            case (float(first), float(second)):
                return first, second
        return None

    def rows_per_epoch(self, rows: int) -> int | None:
        """Rows of an epoch whose batches have ``rows`` rows, the last maybe fewer; None where not known."""
        try:
            return None if callable(self.batches) else len(self.batches) * rows  # type: ignore[arg-type]
        except TypeError:  # it has no length, or its data has none
            return None

    def batches_from(self, start: int) -> Iterator[Any]:
        """Yields the batches from index ``start`` (0-based) on, without end.

        Raises:
            ValueError: The batches are none at all, or end and cannot be iterated again.
        """
        if callable(self.batches):
            index = start
            while True:
                yield self.batches(index)
                index += 1
        yield from _endless(self.batches, start)


def load_target(
    target: str,
    *,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str | None = None,
) -> Workload:
    """Returns the workload that ``package.module:function`` or ``file.py:function`` builds.

    The current folder is importable. The function is given those of ``batch_size``, ``seed`` and ``device``
    that it names as parameters and that are not ``None``.

    Raises:
        BadTarget: The text, the import, the function or what it returns is wrong; says which, and the cure.
    """
    function = _find_function(target)
    accepted = _accepted(target, function, {"batch_size": batch_size, "seed": seed, "device": device})
    try:
        workload = function(**accepted)
    except (ValueError, TypeError, OSError) as error:
        raise BadTarget(
            f"TARGET {target!r} failed while building the workload: {type(error).__name__}: {error}. "
            f"Call the function on its own in Python to see where."
        ) from error
    _check(target, workload)
    return workload  # type: ignore[no-any-return]


def _endless(batches: Iterable[Any], start: int) -> Iterator[Any]:
    """Yields the items of ``batches`` from index ``start`` on, iterating again whenever it ends."""
    to_skip = start
    while True:
        count = 0
        for batch in batches:
            count += 1
            if to_skip > 0:
                to_skip -= 1
                continue
            yield batch
        if count == 0:
            raise ValueError(
                "The workload's batches are empty, or cannot be iterated a second time. "
                "Return a list, a DataLoader, or a function from the step index to a batch."
            )


def _find_function(target: str) -> Callable[..., Any]:
    """Returns the function a TARGET names."""
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise BadTarget(
            f"TARGET {target!r} is not of the form package.module:function or file.py:function. "
            f"Write for example {DEFAULT_TARGET}."
        )
    module = _import(target, place)
    try:
        function = getattr(module, name)
    except AttributeError:
        public = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        known = ", ".join(public) or "none"
        raise BadTarget(
            f"TARGET {target!r}: {place} has no function {name!r}. Its functions are: {known}."
        ) from None
    if not callable(function):
        raise BadTarget(
            f"TARGET {target!r}: {name!r} is a {type(function).__name__}, not a function. "
            f"Name a function that returns a memfit.Workload."
        )
    return function  # type: ignore[no-any-return]


def _import(target: str, place: str) -> ModuleType:
    """Returns the module at ``place``, a dotted name or the path of a ``.py`` file."""
    path = Path(place)
    if path.suffix == ".py":
        if not path.is_file():
            raise BadTarget(
                f"TARGET {target!r}: there is no file {place}. Check the path; it is taken from {Path.cwd()}."
            )
        return _run_module(target, lambda: _import_file(path))
    return _run_module(target, lambda: _import_name(place))


def _run_module(target: str, load: Callable[[], ModuleType]) -> ModuleType:
    """Returns ``load()``, with whatever the module raises at import turned into a ``BadTarget``."""
    try:
        return load()
    except Exception as error:
        raise BadTarget(
            f"TARGET {target!r} does not import: {type(error).__name__}: {error}. "
            f"Importing it in Python must work first (the current folder is on the path)."
        ) from error


def _import_name(name: str) -> ModuleType:
    """Imports a dotted name with the current folder importable."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """Imports a file by its path; the modules beside it are importable."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Own namespace: a user's file called text.py or json.py must not replace the module of that name.
    name = f"memfit_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _accepted(target: str, function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Returns the offered keyword arguments that ``function`` takes; refuses a function that needs others."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for parameter in parameters.values():
        optional = parameter.default is not parameter.empty
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if not optional and not variadic and offered.get(parameter.name) is None:
            raise BadTarget(
                f"TARGET {target!r} needs an argument {parameter.name!r} that memfit does not give. "
                f"It may take batch_size, seed and device; give every other parameter a default."
            )
    return {
        key: value for key, value in offered.items() if value is not None and (takes_any or key in parameters)
    }


def _check(target: str, workload: object) -> None:
    """Refuses what is not a usable ``Workload``."""
    if not isinstance(workload, Workload):
        raise BadTarget(
            f"TARGET {target!r} returned a {type(workload).__name__}, not a memfit.Workload. "
            f"Return memfit.Workload(model, optimizer, loss_fn, batches)."
        )
    import torch

    for name, kind in (("model", torch.nn.Module), ("optimizer", torch.optim.Optimizer)):
        value = getattr(workload, name)
        if not isinstance(value, kind):
            raise BadTarget(
                f"TARGET {target!r}: the workload's {name} is a {type(value).__name__}, "
                f"not a torch {kind.__name__}. Return memfit.Workload(model, optimizer, loss_fn, batches)."
            )
    if not callable(workload.loss_fn):
        raise BadTarget(f"TARGET {target!r}: loss_fn is not callable. Give loss_fn(model, batch) -> Tensor.")
    if isinstance(workload.batches, Iterator):
        raise BadTarget(
            f"TARGET {target!r}: batches is a {type(workload.batches).__name__}, which can be read only "
            f"once, so a run could not be resumed. Give a list, a DataLoader, or a function from the step "
            f"index to a batch."
        )
    if not callable(workload.batches) and not isinstance(workload.batches, Iterable):
        raise BadTarget(
            f"TARGET {target!r}: batches is a {type(workload.batches).__name__}, which is neither iterable "
            f"nor callable. Give a list, a DataLoader, or a function from the step index to a batch."
        )
