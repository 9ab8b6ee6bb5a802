"""Splits a nested batch along its rows, as views, and refuses by name where that would be a guess.

A batch is any nesting of mappings, sequences, named tuples and dataclasses. Its leaves are:

Rule 1. A tensor is split along its first dimension, which must be the same in all tensors.
Rule 2. A plain value outside a sequence (a number, text, ``None``, an enum, a dtype...) belongs to every row.
Rule 3. A list or tuple without tensors is one entry per row if it is as long as the batch; otherwise
        it is refused, since it could be anything.
Rule 4. Anything else may hide tensors and is refused.

What this module cannot see: a tensor that happens to have as many rows as the batch but belongs to all of it
(class weights, say). Such a tensor is better closed over in ``loss_fn``.

Nothing is copied and the batch of the caller is never written to.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections import Counter, UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from memfit.errors import InexactAccumulation

_ROOT: Final = "batch"
_OUTPUTS: Final = "outputs"
_PLAIN_TYPES: Final = (
    type(None),
    str,
    bytes,
    bool,
    int,
    float,
    complex,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.Size,  # a tuple, but never one entry per row
)


def rows_of(batch: object) -> int:
    """Returns the number of rows of ``batch``: the first dimension that its tensors share.

    Raises:
        InexactAccumulation: The tensors disagree, or one has no rows that could be counted.
        ValueError: There is no tensor with rows, or there are no rows in it.
    """
    _refuse_packed(_ROOT, batch)
    leaves = [(path, tensor) for path, tensor in tensors_of(batch) if tensor.dim() > 0]
    if not leaves:
        raise ValueError(
            f"{_ROOT} ({type(batch).__name__}) holds no tensor with rows, so there is nothing to split: "
            "pass the tensors of the effective batch in a dict, list, tuple or dataclass"
        )
    for path, tensor in leaves:
        _refuse_tensor(path, tensor)  # a nested tensor has no shape to count
    # The majority is taken as right, so that the odd one out is the one that is named.
    (rows, _), *others = Counter(tensor.shape[0] for _, tensor in leaves).most_common()
    if others:
        owner, odd = next(leaf for leaf in leaves if leaf[1].shape[0] != rows)
        reference = next(path for path, tensor in leaves if tensor.shape[0] == rows)
        raise InexactAccumulation(
            f"{owner} has {odd.shape[0]} rows where {reference} has {rows}, so the batch cannot be split by "
            f"rows: give it {rows} rows, or close over it in loss_fn if it belongs to every row",
            owner=owner,
        )
    if rows == 0:
        raise ValueError(f"{leaves[0][0]} has 0 rows: leave empty batches out (drop_last=True, or skip them)")
    return rows


def split(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Returns the parts of ``batch`` with ``sizes`` rows each, in order, of the same type and nesting.

    The tensors of the parts are views. One size means that nothing is to be split: then the batch itself
    is the only part, whatever it is.

    Args:
        batch: The effective batch.
        sizes: Rows of each part, each at least 1, together all rows of the batch.

    Raises:
        InexactAccumulation: A leaf cannot be split without guessing; the error names it and the cure.
        ValueError: The sizes are not positive or do not add up to the rows, or the batch has no rows.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"each part needs at least 1 row, and the sizes are {list(sizes)}")
    if len(sizes) == 1:
        return [batch]
    rows = rows_of(batch)
    if sum(sizes) != rows:
        raise ValueError(f"the sizes {list(sizes)} add up to {sum(sizes)} rows, and the batch has {rows}")
    starts = accumulate(sizes[:-1], initial=0)
    return _split(_ROOT, batch, rows, [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)])


def join(parts: Sequence[Any]) -> Any:
    """Returns the batch, or the outputs, whose rows are those of ``parts``, in order: what ``split`` undoes.

    The tensors are new. Plain values are those of the first part.

    Args:
        parts: At least one, of the same nesting; what holds no tensor must be equal in all.

    Raises:
        InexactAccumulation: A tensor has no rows, or the parts differ in something else than their rows.
    """
    return _join(_OUTPUTS, parts)


def tensors_of(batch: object) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor of ``batch`` with its path, such as ``batch['images'][0]``, in order.

    Objects that are no container are not looked into.
    """
    for path, leaf in _leaves(_ROOT, batch):
        if isinstance(leaf, Tensor):
            yield path, leaf


def refuse_graphs(batch: object) -> None:
    """Refuses a batch that was computed with gradients: the first micro-batch would free what all go through.

    Raises:
        InexactAccumulation: One of its tensors has a graph of its own; the error names it.
    """
    for path, tensor in tensors_of(batch):
        if tensor.grad_fn is not None:
            raise InexactAccumulation(
                f"{path} was computed with gradients, and its graph serves one backward only: compute it in "
                "loss_fn, or detach it",
                owner=path,
            )


def detached(batch: Any) -> Any:
    """The batch with leaves of its own where tensors require a gradient: nothing of the caller's gets one."""
    if not any(tensor.requires_grad for _, tensor in tensors_of(batch)):
        return batch
    return map_tensors(batch, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad))


def is_plain(batch: object) -> bool:
    """Whether ``batch`` holds only plain values (Rule 2): no tensor, and nothing that may hide one."""
    return all(isinstance(leaf, _PLAIN_TYPES) for _, leaf in _leaves(_ROOT, batch))


def map_tensors(batch: Any, fn: Callable[[Tensor], Any]) -> Any:
    """Returns ``batch`` with ``fn`` applied to each tensor, of the same type and nesting.

    What holds no tensor is the same object as before.

    Raises:
        TypeError: A container that holds tensors cannot be built again with other contents.
    """
    if isinstance(batch, Tensor):
        return fn(batch)
    children = _children(batch)
    if children is None or not _holds_tensors(batch):
        return batch
    return _rebuild(batch, [map_tensors(child, fn) for _, child in children])


def _split(path: str, node: Any, rows: int, cuts: list[slice]) -> list[Any]:
    """Returns the part of ``node`` for each of ``cuts``."""
    if isinstance(node, Tensor):
        _refuse_tensor(path, node)
        return [node.narrow(0, cut.start, cut.stop - cut.start) for cut in cuts]
    if isinstance(node, _PLAIN_TYPES):
        return [node] * len(cuts)
    children = _children(node)
    if children is None:
        raise InexactAccumulation(
            f"{path} is of type {type(node).__name__}, which may hold anything: pass its tensors in a dict, "
            "list, tuple or dataclass, or close over it in loss_fn",
            owner=path,
        )
    if _is_sequence(node) and not _holds_tensors(node):
        return _split_plain_sequence(path, node, rows, cuts)
    columns = [_split(path + step, child, rows, cuts) for step, child in children]
    try:
        return [_rebuild(node, [column[part] for column in columns]) for part in range(len(cuts))]
    except TypeError as error:
        raise InexactAccumulation(f"{path} cannot be split: {error}", owner=path) from error


def _join(path: str, nodes: Sequence[Any]) -> Any:
    """Returns the node whose rows are those of ``nodes``."""
    first = nodes[0]
    if isinstance(first, Tensor) and all(isinstance(node, Tensor) for node in nodes):
        return _join_tensors(path, nodes)
    children = [_children(node) for node in nodes]
    if any(
        (own is None) != (children[0] is None) or len(own or []) != len(children[0] or []) for own in children
    ):
        raise InexactAccumulation(
            f"{path} is another thing in each micro-batch, so it cannot be joined: return the same nesting "
            "for all of them",
            owner=path,
        )
    if children[0] is None:
        return first
    joined = [
        _join(path + step, [(own or [])[number][1] for own in children])
        for number, (step, _) in enumerate(children[0])
    ]
    return _rebuild(first, joined) if _holds_tensors(first) else first


def _join_tensors(path: str, tensors: Sequence[Tensor]) -> Tensor:
    """Returns the tensors, one below the other."""
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if tensors[0].dim() == 0 or len(shapes) > 1:
        told = (
            "no rows (it is a 0-dim tensor)"
            if tensors[0].dim() == 0
            else "rows of another shape in each micro-batch"
        )
        raise InexactAccumulation(
            f"{path} has {told}, so the outputs of all cannot be joined: return from outputs_fn "
            "only what has one row a row of the batch, and compute the rest in loss_fn",
            owner=path,
        )
    return torch.cat(list(tensors))


def _split_plain_sequence(path: str, node: Any, rows: int, cuts: list[slice]) -> list[Any]:
    """Returns the slices of a sequence without tensors, which must have one entry per row. See Rule 3."""
    for leaf_path, leaf in _leaves(path, node):
        if not isinstance(leaf, _PLAIN_TYPES):
            _split(leaf_path, leaf, rows, cuts)  # refuses it by name
    if all(leaf is None for _, leaf in _leaves(path, node)):
        return [node] * len(cuts)
    if len(node) != rows:
        raise InexactAccumulation(
            f"{path} is a {type(node).__name__} of {len(node)} plain values where the batch has {rows} rows: "
            f"give it one entry per row, or close over it in loss_fn if it belongs to every row",
            owner=path,
        )
    return [_rebuild(node, node[cut]) for cut in cuts]


def _refuse_tensor(path: str, tensor: Tensor) -> None:
    """Raises if ``tensor`` has no rows of which a view could be taken."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise InexactAccumulation(
            f"{path} is a {kind} tensor, of which no rows can be viewed: pass a dense, padded tensor "
            "and a mask",
            owner=path,
        )
    if tensor.dim() == 0:
        raise InexactAccumulation(
            f"{path} has no rows (it is a 0-dim tensor): pass it as a Python number or close over it "
            "in loss_fn",
            owner=path,
        )


def _refuse_packed(path: str, batch: object) -> None:
    """Raises if ``batch`` holds a ``PackedSequence``, a tuple whose first dimension is not the rows."""
    if isinstance(batch, PackedSequence):
        raise InexactAccumulation(
            f"{path} is a PackedSequence, which mixes rows and time steps: pass the padded tensor and the "
            "lengths, and pack them in loss_fn",
            owner=path,
        )
    for step, child in _children(batch) or []:
        _refuse_packed(path + step, child)


def _leaves(path: str, node: object) -> Iterator[tuple[str, object]]:
    """Yields what is no container, with its path."""
    children = _children(node)
    if children is None:
        yield path, node
        return
    for step, child in children:
        yield from _leaves(path + step, child)


def _holds_tensors(node: object) -> bool:
    return any(isinstance(leaf, Tensor) for _, leaf in _leaves("", node))


def _is_sequence(node: object) -> bool:
    """Whether ``node`` is a list or tuple whose entries have no names."""
    return isinstance(node, (list, tuple)) and not hasattr(node, "_fields")


def _children(node: object) -> list[tuple[str, Any]] | None:
    """Returns the parts of a container with the step that leads to each, or None for a leaf."""
    if isinstance(node, (Tensor, torch.Size, type)):
        return None
    if isinstance(node, Mapping):
        return [(f"[{key!r}]", value) for key, value in node.items()]
    if isinstance(node, (list, tuple)):
        fields = getattr(node, "_fields", None)
        if fields is not None:
            return [(f".{name}", value) for name, value in zip(fields, node, strict=True)]
        return [(f"[{index}]", value) for index, value in enumerate(node)]
    if dataclasses.is_dataclass(node):
        return [(f".{field.name}", getattr(node, field.name)) for field in dataclasses.fields(node)]
    return None


def _rebuild(node: Any, values: Sequence[Any]) -> Any:
    """Returns a container like ``node`` that holds ``values``, in the order of its children."""
    if isinstance(node, Mapping):
        return _rebuild_mapping(node, dict(zip(node.keys(), values, strict=True)))
    if hasattr(node, "_make"):
        return node._make(values)
    if isinstance(node, (list, tuple)):
        return type(node)(values)
    # Not dataclasses.replace: __init__ and __post_init__ are the user's and may do more than store.
    clone = copy.copy(node)
    for field, value in zip(dataclasses.fields(node), values, strict=True):
        object.__setattr__(clone, field.name, value)  # also where it is frozen
    return clone


def _rebuild_mapping(node: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """Returns a mapping like ``node`` with other values for the same keys, attributes and all."""
    if type(node) is dict:
        return items
    if isinstance(node, (dict, UserDict)):
        clone = copy.copy(
            node
        )  # these two copy their own storage (transformers' BatchEncoding is a UserDict)
        for key, value in items.items():
            clone[key] = value
        return clone
    # A shallow copy of any other mapping may share its storage with the caller's: build it anew.
    constructor: Callable[[dict[Any, Any]], Mapping[Any, Any]] = type(node)
    return constructor(items)
