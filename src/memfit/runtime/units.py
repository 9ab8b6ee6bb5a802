"""Every count of a micro-batch that a mean loss may be over: rows, labels, masks, class weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import tensors_of
from memfit.runtime.count import IGNORED, Counter, labels, labels_of, one, rows, shifted_labels
from memfit.runtime.micro import LossFn

_DEEPEST = 3  # functions within functions
_MOST_VALUES = 4
_NO_FUNCTION = (Tensor, nn.Module, type)


def known_counters(model: nn.Module, loss_fn: LossFn, batch: Any) -> dict[str, Counter]:
    """The counters worth trying, the simplest first, by the name that an audit gives them.

    Class weights are those that ``loss_fn`` closes over or that a loss module of the model holds.
    """
    found: dict[str, Counter] = {"rows": rows, "sum": one, "labels": labels, "shifted_labels": shifted_labels}
    class_weights = [*_class_weights(model, loss_fn)]
    ignored = (IGNORED, -1, 0, *ignored_values(model, loss_fn))
    named = _labels_or_none(batch)
    for path, leaf in tensors_of(batch):
        if leaf.dim() == 0 or leaf.is_complex():
            continue
        if _may_be_weights(leaf):
            found[f"sum of {path}"] = functools.partial(_sum, path, 0)
            if leaf.dim() >= 2:
                found[f"sum of {path}[:, 1:]"] = functools.partial(_sum, path, 1)
        if not leaf.is_floating_point() and leaf.dtype != torch.bool:
            is_known = leaf is named and leaf.dim() <= 2  # what is not -100 there has a name
            values = ignored[1:] if is_known else ignored
            found.update(_counters_of_labels(path, leaf, class_weights, values))
    return found


def _labels_or_none(batch: Any) -> Tensor | None:
    """The leaf called labels, where there is one."""
    try:
        return labels_of(batch)
    except InexactAccumulation:
        return None


def ignored_values(model: nn.Module, loss_fn: LossFn) -> tuple[int, ...]:
    """Numbers besides -100, -1 and 0 that a loss may ignore: for padding, for pixels without a class."""
    found = [getattr(getattr(model, "config", None), "pad_token_id", None)]
    for name, value in [("loss_fn", loss_fn), ("model", model), *_reachable(loss_fn)]:
        code = getattr(value, "__code__", None)
        if isinstance(value, nn.Module):
            found += [getattr(module, "ignore_index", None) for module in value.modules()]
        elif code is not None and any("ignore_index" in c for c in code.co_consts if isinstance(c, tuple)):
            found += code.co_consts  # names of keywords stand among the constants
        elif "pad" in name.lower() or "ignore" in name.lower():
            found.append(value)
    return tuple(dict.fromkeys(v for v in found if type(v) is int and v > 0))[:_MOST_VALUES]


def _counters_of_labels(
    path: str, leaf: Tensor, class_weights: list[tuple[str, Tensor]], ignored: tuple[int, ...]
) -> dict[str, Counter]:
    """What can be counted in a leaf of whole numbers."""
    found: dict[str, Counter] = {}
    for value in ignored:
        found[f"entries of {path} that are not {value}"] = functools.partial(_valid, path, 0, value)
        if leaf.dim() >= 2:
            name = f"entries of {path}[:, 1:] that are not {value}"
            found[name] = functools.partial(_valid, path, 1, value)
    found[f"entries of {path} above 0"] = functools.partial(_above, path)
    for name, weight in class_weights:
        if int(leaf.max()) < len(weight):
            found[f"sum of {name}[{path}]"] = functools.partial(_weighed, path, 0, weight)
            if leaf.dim() >= 2:
                found[f"sum of {name}[{path}[:, 1:]]"] = functools.partial(_weighed, path, 1, weight)
    return found


def _leaf(path: str, part: Any, first: int) -> Tensor:
    """A leaf of a micro-batch, without the first ``first`` entries of each row."""
    found = next((tensor for name, tensor in tensors_of(part) if name == path), None)
    if found is None:
        raise InexactAccumulation(
            f"the batch has no {path}, by which micro-batches are weighted: give batches of one form, or say "
            "with count= what the loss is a mean over",
            owner=path,
        )
    return found[:, first:] if first else found


def _sum(path: str, first: int, part: Any) -> float:
    """The sum of a mask or of weights."""
    return float(_leaf(path, part, first).double().sum())


def _valid(path: str, first: int, ignored: int, part: Any) -> float:
    """The entries that are not ``ignored``."""
    return float((_leaf(path, part, first) != ignored).sum())


def _above(path: str, part: Any) -> float:
    """The entries above 0: objects, where 0 is the background."""
    return float((_leaf(path, part, 0) > 0).sum())


def _weighed(path: str, first: int, weight: Tensor, part: Any) -> float:
    """The class weights of the labels that are not negative (ignored)."""
    found = _leaf(path, part, first)
    return float(weight.detach().double()[found[found >= 0].to(weight.device)].sum())


def _may_be_weights(leaf: Tensor) -> bool:
    """Whether a leaf is a mask, or numbers of which none is negative."""
    if leaf.is_floating_point():
        return bool((leaf >= 0).all())
    return leaf.dtype == torch.bool or bool(((leaf == 0) | (leaf == 1)).all())


def _class_weights(model: nn.Module, loss_fn: LossFn) -> Iterator[tuple[str, Tensor]]:
    """Vectors that may be class weights: in the loss's closure, globals, defaults, or buffers of a module."""
    for name, value in _reachable(loss_fn):
        if isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point():
            yield name, value
        if isinstance(value, nn.Module):
            yield from _vectors_of(name, value)
    yield from _vectors_of("model", model)


def _vectors_of(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The vectors called weight among a module's buffers."""
    for path, buffer in module.named_buffers():
        if buffer.dim() == 1 and buffer.is_floating_point() and path.endswith(("weight", "weights")):
            yield f"{name}.{path}", buffer


def _reachable(loss_fn: Any) -> Iterator[tuple[str, Any]]:
    """What a loss function may use by name: its closure, globals, defaults, bound and partial arguments.

    Functions among these are looked into as well, for a loss is often wrapped.
    """
    level, seen = [loss_fn], {id(loss_fn)}
    for _ in range(_DEEPEST):
        found = [entry for function in level for entry in _held(function)]
        yield from found
        level = [v for _, v in found if id(v) not in seen and callable(v) and not isinstance(v, _NO_FUNCTION)]
        seen.update(map(id, level))


def _held(loss_fn: Any) -> Iterator[tuple[str, Any]]:
    """What one function or callable object holds."""
    if dataclasses.is_dataclass(loss_fn) and not isinstance(loss_fn, type):
        yield from ((field.name, getattr(loss_fn, field.name)) for field in dataclasses.fields(loss_fn))
        return
    if isinstance(loss_fn, functools.partial):
        yield from loss_fn.keywords.items()
        yield from ((f"argument {i}", value) for i, value in enumerate(loss_fn.args))
        yield "function", loss_fn.func
        return
    owner = getattr(loss_fn, "__self__", loss_fn)
    if isinstance(owner, nn.Module):
        yield "loss_fn", owner
    elif owner is not loss_fn:
        yield from getattr(owner, "__dict__", {}).items()
    code = getattr(loss_fn, "__code__", None)
    if code is None:
        yield from getattr(loss_fn, "__dict__", {}).items()
        return
    for name, cell in zip(code.co_freevars, loss_fn.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for name in code.co_names:
        if name in loss_fn.__globals__:
            yield name, loss_fn.__globals__[name]
    yield from (loss_fn.__kwdefaults__ or {}).items()
    yield from ((f"default {i}", value) for i, value in enumerate(loss_fn.__defaults__ or ()))
