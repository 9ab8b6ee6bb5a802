"""A model under FSDP2 (``fully_shard``): its groups of parameters, what they weigh, and what is refused.

Note [Sharding]
 1. Each call of ``fully_shard`` makes a group: its parameters lie in pieces, one on each rank, all of the
    same size (padded), and are gathered as a whole while its module runs, forward or backward. The sharded
    parameters are ``DTensor``; their memory is that of their local part.
 2. What FSDP does in memory was read off torch 2.13 and checked against the CPU allocator with gloo:
    ``runtime/shadows.py`` does the same with blocks of no content, beside fakes.
 3. With several micro-batches gradients are reduced after *each* of them, and added up in pieces; or *once*,
    and added up whole on each rank until the last. The first takes less memory, the second less
    communication. A group is assumed to be reduced in 50 us and at 10 GB/s, overlapping nothing.
 4. FSDP takes the mean over the ranks, so each micro-batch weighs as many times more as there are ranks.
 5. What nobody could check here is refused by name (``check_sharding``), also what a recording would not see.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memfit.core.barriers import Stretch
from memfit.core.graph import Residents
from memfit.errors import UnsupportedModel
from memfit.runtime.compiled import compiled_part
from memfit.runtime.meter import resident_sizes
from memfit.runtime.modules import named_modules_of

ONCE = "once"
REDUCED_BYTES_PER_S = 10e9
LATENCY_S = 5e-5
_MOST_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are gathered and reduced together.

    Attributes:
        module: The one whose forward needs them.
        parameters: As they are in pieces.
        places: The module and name of each one that is trained.
        hooks: FSDP's own, before and after the forward.
        gathered_sizes: Bytes of each one gathered, with padding.
        reduced_sizes: Bytes of each one's gradient as it is reduced, with padding.
        piece_bytes: Of all gradients on one rank, with padding.
        is_freed: Whether what was gathered is freed between forward and backward.
        cast_bytes: Of the copy of the pieces that is gathered where parameters are cast; 0 elsewhere.
        dtype: What parameters are cast to; None: they are not.
        reduced_dtype: What gradients are reduced in.
        is_rounded: Whether that is another type than the pieces have.
        is_copied: Whether the backend copies what it gathers or reduces.
    """

    name: str
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    places: tuple[tuple[nn.Module, str], ...]
    hooks: tuple[RemovableHandle, ...]
    gathered_sizes: tuple[int, ...]
    reduced_sizes: tuple[int, ...]
    piece_bytes: int
    is_freed: bool
    ranks: int
    dtype: torch.dtype | None
    cast_inputs_to: torch.dtype | None
    cast_outputs_to: torch.dtype | None
    cast_bytes: int
    reduced_dtype: torch.dtype
    is_rounded: bool
    is_copied: bool

    @property
    def gathered_bytes(self) -> int:
        """Of all its parameters."""
        return sum(self.gathered_sizes)


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a model is sharded, and when gradients of micro-batches are reduced. See Note [Sharding] 3."""

    model: nn.Module
    groups: tuple[Group, ...]
    reduces_once: bool = False

    def __str__(self) -> str:
        """What a plan depends on, without tensors."""
        told = [
            f"{g.name or 'model'} of {g.gathered_bytes} B on {g.ranks}{', freed' * g.is_freed}"
            f"{', copied' * g.is_copied}, reduced in {g.reduced_dtype}"
            for g in self.groups
        ]
        return f"{'; '.join(told)}, reduced {ONCE if self.reduces_once else 'each time'}"

    @property
    def may_reduce_once(self) -> bool:
        """Whether whole gradients are added up as they are, in no less than float32."""
        return all(group.dtype is None and not group.is_rounded for group in self.groups)

    def free(self) -> None:
        """Frees parameters that a forward without backward has left gathered."""
        for state in _states(self.model).values():
            state._modules[0].reshard()

    def reduce_s(self, micro_batches: int) -> float:
        """Seconds of communication that depend on the choice."""
        sizes = [sum(group.reduced_sizes) for group in self.groups]
        each_s = len(sizes) * LATENCY_S + sum(sizes) / REDUCED_BYTES_PER_S
        return each_s * (1 if self.reduces_once else micro_batches)

    def residents(self, other: Residents, held_sizes: tuple[int, ...]) -> Residents:
        """What is alive throughout on this rank: pieces, where ``other`` counts whole parameters.

        Args:
            held_sizes: Bytes of other blocks.
        """
        sharded = [p for group in self.groups for p in group.parameters]
        parameter_sizes = resident_sizes([*map(local, sharded), *self.model.buffers()]) + held_sizes
        gradient_sizes = tuple(group.piece_bytes for group in self.groups if group.piece_bytes)
        whole_sizes = tuple(
            p.numel() * (group.dtype or p.dtype).itemsize
            for group in self.groups
            for p in group.parameters
            if p.requires_grad
        )
        return Residents(
            parameters_bytes=sum(parameter_sizes),
            gradients_bytes=sum(gradient_sizes),
            optimizer_bytes=other.optimizer_bytes,
            batch_bytes=other.batch_bytes,
            parameter_sizes=parameter_sizes,
            gradient_sizes=gradient_sizes,
            batch_sizes=other.batch_sizes,
            summed_bytes=sum(whole_sizes) if self.reduces_once else None,
            summed_sizes=whole_sizes if self.reduces_once else (),
        )


def _states(model: nn.Module) -> dict[str, Any]:
    """FSDP's state of each sharded module by its name; empty where nothing is sharded."""
    if "torch.distributed.fsdp" not in sys.modules:
        return {}
    from torch.distributed.fsdp import FSDPModule  # imported already by whoever sharded the model

    return {n: m._get_fsdp_state() for n, m in named_modules_of(model) if isinstance(m, FSDPModule)}


def _groups_of(state: Any) -> list[Any]:
    """FSDP's groups of parameters of a state."""
    return list(state._fsdp_param_groups)


def sharded_modules(model: nn.Module) -> dict[nn.Module, Stretch]:
    """The modules that gather parameters for their forward, and the stretch that each begins.

    See ``core/barriers.py``.
    """
    return {
        module: (name,) if any(g._reshard_after_forward for g in _groups_of(state)) else ()
        for name, state in _states(model).items()
        for module in state._modules
    }


def is_sharded(model: nn.Module) -> bool:
    """Whether something of a model went through ``fully_shard``."""
    return bool(_states(model))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank: all of it, unless it is a ``DTensor``."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def sharding_of(model: nn.Module) -> Sharding | None:
    """How a model is sharded; None where it is not. Parameters that a forward has gathered are freed.

    Raises:
        UnsupportedModel: In a way that memfit cannot plan.
    """
    states = _states(model)
    if not states:
        return None
    compiled = compiled_part(model)
    if compiled is not None:
        raise _unsupported(compiled, "torch.compile hides it", "leave torch.compile out")
    if "" not in states:
        raise _unsupported("the model itself", "only parts of it are under fully_shard", "shard it last")
    states[""]._lazy_init()
    for name, state in states.items():
        _check_state(name or "model", state)
        state._modules[0].reshard()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not hasattr(parameter, "_local_tensor"):
            raise _unsupported(name, "it is left out of fully_shard", "shard it, or freeze it")
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            cure = "keep float32 and give fully_shard mp_policy=MixedPrecisionPolicy(param_dtype=...)"
            raise _unsupported(name, f"its pieces are in {parameter.dtype}", cure)
    return Sharding(model, tuple(_group(name, state) for name, state in states.items() if _groups_of(state)))


def _group(name: str, state: Any) -> Group:
    """What memfit knows of a group."""
    from torch import distributed

    (group,) = _groups_of(state)
    ranks = group.mesh_info.shard_mesh_size
    policy = state._mp_policy
    trained = [p for p in group.fsdp_params if p.sharded_param.requires_grad]
    numels = {p: p.padded_sharded_param_size.numel() for p in group.fsdp_params}
    reduced = next((p.reduce_dtype or p.param_dtype or p.orig_dtype for p in trained), torch.float32)
    own = {p: p.param_dtype or p.orig_dtype for p in group.fsdp_params}
    return Group(
        name=name,
        module=state._modules[0],
        parameters=tuple(p.sharded_param for p in group.fsdp_params),
        gathered_sizes=tuple(n * ranks * own[p].itemsize for p, n in numels.items()),
        reduced_sizes=tuple(numels[p] * ranks * (p.reduce_dtype or own[p]).itemsize for p in trained),
        piece_bytes=sum(numels[p] * p.orig_dtype.itemsize for p in trained),
        is_freed=group._reshard_after_forward,
        ranks=ranks,
        dtype=group.fsdp_params[0].param_dtype,
        cast_inputs_to=policy.param_dtype if policy.cast_forward_inputs else None,
        cast_outputs_to=policy.output_dtype,
        cast_bytes=sum(n * own[p].itemsize for p, n in numels.items() if p.param_dtype is not None),
        places=tuple((p._module_info.module, p._module_info.param_name) for p in trained),
        hooks=(state._pre_forward_hook_handle, state._post_forward_hook_handle),
        reduced_dtype=reduced,
        is_rounded=any(p.orig_dtype != reduced for p in trained),
        is_copied=distributed.get_backend(group._all_gather_process_group) == "gloo",
    )


def _check_state(name: str, state: Any) -> None:
    """Refuses a way of sharding that memfit does not know. See Note [Sharding] 5."""
    from torch import distributed

    if len(state._modules) > 1 or len(_groups_of(state)) > 1:
        raise _unsupported(name, "several modules or meshes share a call of fully_shard", "give each its own")
    if state._states_to_forward_prefetch or state._states_to_backward_prefetch:
        raise _unsupported(name, "it prefetches explicitly", "leave set_modules_to_*_prefetch out")
    for group in _groups_of(state):
        if type(group.mesh_info).__name__ != "FSDPMeshInfo":
            raise _unsupported(name, "its mesh replicates or has two dimensions", "give a 1-D mesh")
        if group.mesh_info.shard_mesh_size != distributed.get_world_size():
            raise _unsupported(name, "its mesh leaves ranks out", "shard over all ranks")
        if group._use_post_forward_mesh:
            cure = "give reshard_after_forward=True or False"
            raise _unsupported(name, "reshard_after_forward is a number", cure)
        if any(p.offload_to_cpu for p in group.fsdp_params):
            raise _unsupported(name, "it is offloaded to the CPU", "leave offload_policy out")
        if any(p.is_dtensor for p in group.fsdp_params):
            raise _unsupported(
                name, "its parameters are DTensor before fully_shard", "use no tensor parallelism"
            )
        if any(p.fsdp_placement.dim or hasattr(p, "_extensions_data") for p in group.fsdp_params):
            raise _unsupported(name, "its pieces are not rows of plain tensors", "shard dimension 0")
        if _is_changed(group):
            cure = "leave FSDP's set_* methods for gradients, unsharding and communication alone"
            raise _unsupported(name, "FSDP is set to communicate in another way than it does by itself", cure)


def _is_changed(group: Any) -> bool:
    """Whether a setting of FSDP moves gradients or memory in a way that is not predicted."""
    return (
        not (group.reduce_grads and group.reshard_after_backward and group.unshard_in_backward)
        or group.unshard_async_op
        or group.gradient_divide_factor is not None
        or group._all_reduce_hook is not None
        or group.comm_ctx.reduce_scatter_max_input_buffers != 1
        or getattr(group, "reduce_scatter_unused_params", False)
        or type(group._all_gather_comm).__name__ != "DefaultAllGather"
        or type(group._reduce_scatter_comm).__name__ != "DefaultReduceScatter"
    )


def _unsupported(owner: str, why: str, cure: str) -> UnsupportedModel:
    """The refusal."""
    return UnsupportedModel(
        f"memfit cannot plan '{owner}' under fully_shard: {why}. Cure: {cure}", owner=owner
    )


@contextmanager
def gradients_kept_whole(sharding: Sharding | None, *, is_last: bool) -> Iterator[None]:
    """A micro-batch whose gradients are not reduced yet, if that is chosen and it is not the last."""
    if sharding is None or is_last or not sharding.reduces_once:
        yield
        return
    model: Any = sharding.model
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextmanager
def settled(sharding: Sharding | None) -> Iterator[None]:
    """In the body every collective has let go of its buffers when it returns.

    Gloo's thread may hold them for some microseconds more, and what it then releases last is not seen by a
    ``PeakMeter`` (``runtime/meter.py``, Rule 4).
    """
    states = {} if sharding is None or not sharding.groups[0].is_copied else _states(sharding.model)
    groups = [group for state in states.values() for group in _groups_of(state)]
    former = [(group, group._all_gather_comm, group._reduce_scatter_comm) for group in groups]
    try:
        for group, gather, reduce in former:
            group._all_gather_comm, group._reduce_scatter_comm = _Settled(gather), _Settled(reduce)
        yield
    finally:
        for group, gather, reduce in former:
            group._all_gather_comm, group._reduce_scatter_comm = gather, reduce


class _Settled:
    """A collective of FSDP that waits until nobody else holds its buffers."""

    def __init__(self, communicate: Any) -> None:
        self._communicate = communicate
        self.allocate = communicate.allocate

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **settings: Any) -> Any:
        """The same, a moment later."""
        buffers = [tensor.untyped_storage() for tensor in (output_tensor, input_tensor)]
        before = [_holders(buffer) for buffer in buffers]
        done = self._communicate(output_tensor=output_tensor, input_tensor=input_tensor, **settings)
        until_s = time.perf_counter() + _MOST_WAIT_S
        while [_holders(buffer) for buffer in buffers] > before and time.perf_counter() < until_s:
            time.sleep(0)
        return done


def _holders(buffer: torch.UntypedStorage) -> int:
    """How many hold a storage."""
    return int(torch._C._storage_Use_Count(buffer._cdata))
