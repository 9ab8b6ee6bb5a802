"""What memfit must know about an op before it may replay it, read off its schema once.

Sources: ``torch/_ops.py`` (schemas, tags), ``aten/src/ATen/native/native_functions.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

# Bookkeeping that appears or not depending on hooks and fake tensors: it never counts as an op.
_INVISIBLE = frozenset({"aten::detach", "aten::alias", "aten::lift_fresh"})

# Ops that update running statistics, declared in the schema or (the first three) not: positions of the
# statistics, and of the training flag (-1: always training). In training they are written and never
# read, so a replay may write to a scratch copy instead.
_STATISTICS: dict[str, tuple[tuple[int, ...], int]] = {
    "aten::native_batch_norm": ((3, 4), 5),
    "aten::cudnn_batch_norm": ((3, 4), 5),
    "aten::miopen_batch_norm": ((3, 4), 5),
    "aten::_native_batch_norm_legit": ((3, 4), 5),
    "aten::_batch_norm_with_update": ((3, 4), -1),
}

# Forward ops whose CUDA kernels add with atomics: a second run may differ in the last bits.
_ATOMIC_ON_CUDA = frozenset(
    f"aten::{name}"
    for name in (
        "index_add", "index_put", "_index_put_impl", "scatter_add", "scatter_reduce", "bincount", "histc",
        "cumsum", "kthvalue", "median", "grid_sampler_2d", "index_reduce", "_embedding_bag",
    )
)  # fmt: skip


# Ops whose result nobody has computed yet. What they hold when it is read may have been written where no
# dispatch mode sees it (NumPy, ctypes, a Triton kernel), so making it anew would give something else.
_BLANK = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "zeros",
        "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "fill_",
        "zero_",
    )
)  # fmt: skip

# In-place ops that write every element and read none of what was there.
_OVERWRITES_ALL = frozenset(
    f"aten::{name}_"
    for name in (
        "bernoulli", "normal", "uniform", "exponential", "random", "geometric", "cauchy", "log_normal",
        "copy", "fill", "zero",
    )
)  # fmt: skip

# They change what a storage is, not only what it holds.
_MOVES_STORAGE = frozenset({"aten::resize_", "aten::resize_as_", "aten::set_"})


@dataclass(frozen=True, slots=True)
class OpInfo:
    """Facts of one op overload, the same for every call of it."""

    name: str
    is_invisible: bool
    is_view: bool
    written: tuple[int, ...]
    written_names: tuple[str, ...]
    tensor_positions: tuple[int, ...]
    is_random: bool
    makes_blank: bool
    overwrites_all: bool
    may_replay: bool
    may_replay_on_cuda: bool


@cache
def op_info(func: OpOverload) -> OpInfo:
    """Reads the facts of an op off its schema and tags."""
    schema = func._schema
    arguments = schema.arguments
    written = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
    tags = set(func.tags)
    dynamic = bool(tags & {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})
    # Ops from elsewhere may draw random numbers, keep state or communicate without saying so.
    opaque = func.namespace not in {"aten", "prims"}
    may_replay = not dynamic and not opaque and schema.name not in _MOVES_STORAGE
    return OpInfo(
        name=schema.name,
        is_invisible=schema.name in _INVISIBLE or func.namespace in ("prim", "profiler"),
        is_view=bool(func.is_view),
        written=written,
        written_names=tuple(arguments[i].name for i in written),
        tensor_positions=tuple(i for i, a in enumerate(arguments) if str(a.type) == "Tensor"),
        is_random=torch.Tag.nondeterministic_seeded in tags,
        makes_blank=schema.name in _BLANK,
        overwrites_all=schema.name in _OVERWRITES_ALL,
        may_replay=may_replay,
        may_replay_on_cuda=may_replay and schema.name.rstrip("_") not in _ATOMIC_ON_CUDA,
    )


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors among an op's arguments or results, which nest at most lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)


def all_in(tree: Any) -> list[Tensor]:
    """The same as a list; quick where nothing nests, as is usual."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    if isinstance(tree, (list, tuple)):
        for item in tree:
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, (list, tuple)):
                found.extend(all_in(item))
    return found


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """An op's arguments with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(item, change) for item in tree)
    return tree


def declared_writes(info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors this call writes according to the schema, running statistics left out."""
    statistics, _ = _STATISTICS.get(info.name, ((), -1))
    found: list[Tensor] = []
    for position, name in zip(info.written, info.written_names, strict=True):
        if position not in statistics:
            argument = args[position] if position < len(args) else kwargs.get(name)
            found.extend(tensors_in(argument))
    return found


def number_bytes(info: OpInfo, args: tuple[Any, ...]) -> int:
    """Bytes of the 0-dim CPU tensors that stand for Python numbers where an op wants tensors: ``x * 0.5``."""
    numbers = (args[i] for i in info.tensor_positions if i < len(args))
    return sum(16 if isinstance(n, complex) else 8 for n in numbers if isinstance(n, (int, float, complex)))


def strides_of(tensor: Tensor) -> object:
    """Its strides, or, where it has none, its layout."""
    return tensor.stride() if tensor.layout is torch.strided else tensor.layout


def covers_storage(tensor: Tensor) -> bool:
    """Whether a tensor without overlaps is the whole of its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def makes_blank(info: OpInfo, written: list[Tensor]) -> bool:
    """Whether all that this call makes is blank: nobody has computed it yet."""
    return info.makes_blank and all(covers_storage(t) for t in written)


def overwrites_all(info: OpInfo, written: list[Tensor]) -> bool:
    """Whether nothing of what was in the storages this call writes is left or read."""
    return info.overwrites_all and all(covers_storage(t) for t in written)


def written_statistics(info: OpInfo, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Positions of the running statistics this call updates, whether the schema says so or not."""
    positions, _ = _STATISTICS.get(info.name, ((), -1))
    return tuple(i for i in positions if isinstance(args[i], Tensor)) if mixes_rows(info, args) else ()


def is_writer(schema: torch._C.FunctionSchema) -> bool:
    """Whether some call of an op writes to an argument."""
    return schema.is_mutable or schema.name in _STATISTICS


def all_writes(info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Every tensor this call writes, running statistics and undeclared ones too."""
    return [*declared_writes(info, args, kwargs), *(args[i] for i in written_statistics(info, args))]


def mixes_rows(info: OpInfo, args: tuple[Any, ...]) -> bool:
    """Whether this call lets one row of the batch change the result of another (BatchNorm in training)."""
    if info.name not in _STATISTICS:
        return False
    if args[0].shape[0] == 1 and args[3] is None:
        return False  # InstanceNorm folds the rows into the channels
    _, training = _STATISTICS[info.name]
    return training < 0 or bool(args[training])


def draws_random_numbers(
    info: OpInfo, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether this call consumes the generator: attention without dropout does not."""
    if not info.is_random:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            value = (
                args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            )
            return bool(value)
    return True


def has_own_generator(kwargs: dict[str, Any]) -> bool:
    """Whether the caller passed a generator, whose state memfit does not record."""
    return kwargs.get("generator") is not None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its strided storage and nothing else, so that a view of it can be made again."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and type(tensor) in _PLAIN_TYPES()
    )


@cache
def _PLAIN_TYPES() -> frozenset[type]:
    """Tensor types without behaviour of their own; fake ones stand for plain ones."""
    from torch._subclasses.fake_tensor import FakeTensor

    return frozenset({Tensor, torch.nn.Parameter, FakeTensor, torch.nn.Buffer})
