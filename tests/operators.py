"""Every operator of PyTorch: samples of its own operator database, each in a step that recomputes all it can.

Note [Operators]
 1. The tensors of a sample become parameters. Each goes through a product that keeps its bits, so that what
    the operator is given is dropped, too; its results are squared and summed, so that they are saved.
 2. The plain step runs twice: what differs from itself says nothing.
 3. What the plain step refuses is no sample of a training step.
Source of the samples: ``torch/testing/_internal/common_methods_invocations.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from memfit.core.timeline import droppable
from models import Net, differences, keys, recorded, step_outcome

_BLANK = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted")
_AROUND = frozenset(f"aten.{name}" for name in ("mul.Tensor", "sin.default", "abs.default", "sum.default"))


@dataclass(frozen=True)
class Sample:
    """One call of an operator in a model; ``name`` says which variant and which sample."""

    operator: str
    name: str
    model: nn.Module
    batch: Tensor


@dataclass(frozen=True)
class Found:
    """What became of a sample.

    Attributes:
        status: "equal", "differs", "raises" (what the plain step does not), "no step" (the plain step
            raises) or "not repeatable" (it differs from itself).
        reason: What differs or was raised.
        recomputed: The kinds of aten ops that ran again, but for those of the model around the operator.
    """

    status: str
    reason: str = ""
    recomputed: frozenset[str] = frozenset()


def operators() -> list[Any]:
    """The operator database."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return list(op_db)


def samples_of(info: Any, most: int) -> Iterator[Sample]:
    """So many samples of an operator, as a function and in place."""
    name = f"{info.name}.{info.variant_test_name}".rstrip(".")
    for variant, call in (("", info.op), ("_", info.inplace_variant)):
        if call is None or info.name in _BLANK or torch.float32 not in info.supported_dtypes("cpu"):
            continue
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = list(islice(info.sample_inputs("cpu", torch.float32), most))
        for number, sample in enumerate(samples):
            model = _model(call, sample.input, sample.args, sample.kwargs)
            yield Sample(name, f"{name}{variant} #{number}", model, torch.ones(2))


def _model(call: Callable[..., Any], *arguments: Any) -> nn.Module:
    """A model that calls an operator with these arguments. See Note 1."""
    given = [leaf for leaf in tree_leaves(arguments) if _is_trained(leaf)]
    parameters = {f"given{i}": nn.Parameter(leaf.detach().clone()) for i, leaf in enumerate(given)}

    def body(m: Any, batch: Tensor) -> Tensor:
        made = iter([getattr(m, name) * m.one for name in parameters])
        first, rest, named = tree_map(lambda leaf: next(made) if _is_trained(leaf) else leaf, arguments)
        out = call(first, *rest, **named)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        squares = [(leaf * leaf).abs().sum() for leaf in results if leaf.is_floating_point() and leaf.numel()]
        return torch.stack([m.one.sin() * batch.sum(), *(s.reshape(()) for s in squares)]).sum()

    return Net(body, one=nn.Parameter(torch.ones(())), **parameters)


def _is_trained(leaf: Any) -> bool:
    """Whether an argument can be a parameter."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout is torch.strided


def _loss(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch)
    return loss


def judged(sample: Sample) -> Found:
    """The step that recomputes all it can, against the plain one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operators that are experimental, or deprecated
        return _judged(sample)


def _judged(sample: Sample) -> Found:
    try:
        plain, again = (step_outcome(sample.model, _loss, sample.batch) for _ in range(2))
    except Exception as error:
        return Found("no step", _first_line(error))
    if differences(plain, again):
        return Found("not repeatable")
    try:
        graph = recorded(sample.model, _loss, sample.batch)
        plan = keys(graph, droppable(graph))
        other = step_outcome(sample.model, _loss, sample.batch, plan)
    except Exception as error:
        return Found("raises", _first_line(error))
    differ = differences(plain, other)
    recomputed = frozenset(key.op for key in plan) - _AROUND
    return Found("differs" if differ else "equal", ", ".join(differ), recomputed)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160] or type(error).__name__
