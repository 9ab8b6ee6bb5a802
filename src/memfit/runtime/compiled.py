"""Which parts of a model torch.compile hides, and how memfit steps aside for them.

Note [Compiled regions]
 1. Under a dispatch mode dynamo runs a compiled module eagerly, whose last bits may differ from
    the compiled ones. So the mode that records leaves the stack for the call of a region and comes back after
    it; a replay, which has no mode, is told nothing meanwhile (``runtime/intercept.py``).
 2. Hooks of saved tensors stay: the region's autograd function saves through them. So a value from outside
    that a region saves can be recomputed; what the region itself has made is kept as it is.
    The hooks are marked as not to be traced: dynamo would compile them, for they run inside of its region.
 3. A region is entered where its compiled callable is called, in the dictionary of its module. Inside of it
    nothing is hooked: hooks would be traced into the graph.
 4. A compiled function that the model's or the loss's own code calls cannot be entered so. It is looked for
    behind the names that this code uses: globals, what a closure holds, attributes of either, such as a
    module's, and attributes of those; in what ``functools.partial`` holds too. It hides the whole model.
    Attributes are looked up without running anything. What those functions call in turn is not followed.
 5. CUDA graphs (``mode="reduce-overhead"``) hand out memory that their next replay overwrites, gradients
    included, so with them the batch stays whole. On a CPU the compiler makes none.
 6. A region that writes to an argument would do so unseen by what is to be replayed, so it is refused.
Source: ``torch/_dynamo/convert_frame.py``, ``torch/_functorch/_aot_autograd/runtime_wrappers.py`` (2.13).
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from memfit.errors import UnsupportedModel
from memfit.runtime.modules import named_modules_of

Around = Callable[["Region", Callable[..., Any]], Callable[..., Any]]


class Region(NamedTuple):
    """A compiled module, and the attribute its compiled callable is in."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def call(self) -> Callable[..., Any]:
        """The compiled callable."""
        found: Callable[..., Any] = getattr(self.module, self.attribute)
        return found


class HiddenWrite(UnsupportedModel):
    """A compiled region changes a tensor that it was given."""


def compiled_regions(model: nn.Module) -> list[Region]:
    """The outermost compiled modules; the name of the model itself is empty."""
    found: list[Region] = []
    for name, module in named_modules_of(model):
        attribute = _compiled_attribute(module)
        if attribute is not None and not any(_is_in(name, region.name) for region in found):
            found.append(Region(name, module, attribute))
    return found


def compiled_part(model: nn.Module) -> str | None:
    """The name of the first module under torch.compile, the model's class if it is the model itself."""
    for region in compiled_regions(model):
        return region.name or type(model).__name__
    return None


def hidden_function(model: nn.Module, functions: Iterable[object]) -> str | None:
    """The name of a compiled function that the model's forwards or other functions call. See Note 4."""
    inside = modules_inside(compiled_regions(model))
    for function in functions:
        for name in _compiled_names(function, None):
            return name
    for module in model.modules():
        if id(module) not in inside:
            for name in _compiled_names(module.forward, module):
                return name
    return None


def modules_inside(regions: Iterable[Region]) -> frozenset[int]:
    """The identities of all modules of which the forward is hidden, those of the regions included."""
    return frozenset(id(module) for region in regions for module in region.module.modules())


@contextmanager
def entered(regions: Iterable[Region], around: Around) -> Iterator[None]:
    """Calls of the regions in the body go through ``around``; afterwards the modules are as before."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for region in regions:
            table = region.module.__dict__
            before.append((table, region.attribute, table.get(region.attribute)))
            table[region.attribute] = around(region, region.call)
        yield
    finally:
        for table, attribute, former in before:
            if former is None:
                del table[attribute]
            else:
                table[attribute] = former


@contextmanager
def stepped_aside(mode: TorchDispatchMode) -> Iterator[None]:
    """The body runs without a mode, unless another one lies above it: then dynamo runs eagerly anyway."""
    if _get_current_dispatch_mode() is not mode:
        yield
        return
    TorchDispatchMode.__exit__(mode, None, None, None)
    try:
        yield
    finally:
        TorchDispatchMode.__enter__(mode)


def saves_through(
    regions: Collection[Region], pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> saved_tensors_hooks:
    """Hooks of saved tensors that the compiler leaves alone. See Note 2."""
    if regions:
        pack, unpack = torch.compiler.disable(pack), torch.compiler.disable(unpack)
    return saved_tensors_hooks(pack, unpack)


@contextmanager
def unwritten(region: Region, arguments: Iterable[Tensor]) -> Iterator[None]:
    """The body must leave the arguments of a region as they are.

    Raises:
        HiddenWrite: One of them has another version afterwards.
    """
    before = [(tensor, tensor._version) for tensor in arguments if not tensor.is_inference()]
    yield
    if any(tensor._version != version for tensor, version in before):
        raise HiddenWrite(
            f"'{region.name}' is compiled by torch.compile and writes to a tensor that it is given, which "
            "nothing outside can see: write out of place, or do not compile it",
            owner=region.name,
        )


def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors a region is called with."""
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def replays_graphs(regions: Iterable[Region]) -> str | None:
    """The name of a region that runs as CUDA graphs, if any (``mode="reduce-overhead"`` and its kin)."""
    for region in regions:
        config = getattr(region.call, "get_compiler_config", lambda: None)() or {}
        if config.get("triton.cudagraphs") or _inductor_graphs():
            return region.name or type(region.module).__name__
    return None


def size_for_graphs(model: nn.Module, place: torch.device, rows: int, size: int | None) -> int | None:
    """The pinned micro-batch size: the whole batch where a region runs as CUDA graphs. See Note 5.

    Raises:
        UnsupportedModel: A smaller one is asked for.
    """
    name = replays_graphs(compiled_regions(model)) if place.type == "cuda" else None
    if name is None:
        return size
    if size is not None and size < rows:
        raise UnsupportedModel(
            f"{name} is compiled into CUDA graphs (mode='reduce-overhead'), whose next replay overwrites the "
            "gradients of the last, so micro-batches cannot be added up: compile it with mode='default' or "
            "'max-autotune-no-cudagraphs', or leave micro_batch_size out",
            owner=name,
        )
    return rows


def _inductor_graphs() -> bool:
    """Whether the compiler's own settings ask for CUDA graphs everywhere."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def _compiled_attribute(module: nn.Module) -> str | None:
    """Where a module's compiled callable is; None: it has none."""
    if module.__dict__.get("_compiled_call_impl") is not None:
        return "_compiled_call_impl"
    return "forward" if "_orig_mod" in module._modules or _is_compiled(module.forward) else None


def _is_compiled(function: object) -> bool:
    """Whether torch.compile has wrapped a function; ``torch.compiler.disable`` wraps in the same way."""
    wrapped = getattr(function, "_torchdynamo_orig_callable", None) is not None
    return wrapped and not getattr(function, "_torchdynamo_disable", False)


def _compiled_names(function: object, module: nn.Module | None) -> Iterator[str]:
    """The compiled functions that a function is, holds, or names in its code."""
    if _is_compiled(function):
        yield getattr(function, "__name__", "loss_fn")
    elif isinstance(function, partial):
        for held in (function.func, *function.args, *function.keywords.values()):
            if isinstance(held, (FunctionType, MethodType, partial)):
                yield from _compiled_names(held, module)
    else:
        plain = _plain(function)
        if isinstance(plain, FunctionType):
            owner = getattr(function, "__self__", function) if module is None else module
            yield from (
                name for name, found in _named(plain, owner) if callable(found) and _is_compiled(found)
            )


def _plain(function: object) -> object:
    """The function that a method is of, or that runs where an object is called."""
    if isinstance(function, (FunctionType, MethodType)):
        return getattr(function, "__func__", function)
    return inspect.getattr_static(type(function), "__call__", None)


def _named(function: FunctionType, owner: object) -> Iterator[tuple[str, object]]:
    """What a function's code names, with its name there; ``owner`` is what a method belongs to."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    known = function.__globals__ | {name: _content(cell) for name, cell in cells}
    yield from _named_in(function.__code__, known, owner)


def _named_in(code: CodeType, known: dict[str, object], owner: object) -> Iterator[tuple[str, object]]:
    """The same of some code; that of comprehensions and functions in it knows no more than it does."""
    own = dict.fromkeys(code.co_varnames) | dict.fromkeys(code.co_varnames[: min(code.co_argcount, 1)], owner)
    known = known | own
    found: object = None
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found = inspect.getattr_static(found, name, None)
            found = found.__func__ if isinstance(found, staticmethod) else found
        elif instruction.opname.startswith("LOAD_"):
            found = known.get(name) if isinstance(name, str) else None
        else:
            continue
        yield str(name), found
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _named_in(inner, known, None)


def _content(cell: CellType) -> object:
    """What a closure holds; None where that is not there yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_in(name: str, outer: str) -> bool:
    """Whether one module lies inside of another."""
    return not outer or name.startswith(f"{outer}.")
