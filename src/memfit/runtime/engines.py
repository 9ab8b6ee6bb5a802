"""Which engine brings the gradients of a model's ranks together, and what runs its steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memfit.errors import UnsupportedModel
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.job import Job, Optimizers, each_optimizer
from memfit.runtime.lockstep import Lockstep, Shards
from memfit.runtime.micro import LossFn
from memfit.runtime.replicas import Engine, Replicas
from memfit.runtime.sharding import is_sharded, sharding_of
from memfit.runtime.together import Together

_CURES = {  # of modules that communicate in ways of their own, by the name of their class
    "FullyShardedDataParallel": "use torch.distributed.fsdp.fully_shard",
    "DistributedDataParallel": "wrap the whole model, once, and compile it before that",
    "DataParallel": "use DistributedDataParallel, one process a device",
    "DeepSpeedEngine": "give memfit the plain module, and use fully_shard for many devices",
}


def engine_of(model: nn.Module) -> Engine:
    """The engine of a model as the user has it.

    Raises:
        UnsupportedModel: It synchronises in a way that micro-batches cannot wait for.
    """
    if not isinstance(model, nn.Module):
        return Engine(model)  # refused with other bad input
    if torch.distributed.is_available() and isinstance(model, nn.parallel.DistributedDataParallel):
        _refuse_other_engines(model.module)
        if is_sharded(model.module):
            raise UnsupportedModel(
                "the model in DistributedDataParallel is under fully_shard: use one of them", owner="model"
            )
        return Replicas(model)
    _refuse_other_engines(model)
    sharding = sharding_of(model)
    return Engine(model) if sharding is None else Shards(sharding)


def _refuse_other_engines(model: nn.Module) -> None:
    """Refuses a model that communicates in another way, or of which a part does."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _CURES:
            raise UnsupportedModel(
                f"'{name or kind}' is a {kind}, which communicates in a way that micro-batches cannot wait "
                f"for: {_CURES[kind]}",
                owner=name or kind,
            )


def job_of(engine: Engine, loss_fn: LossFn, batch: Any, optimizer: Optimizers, batch_norm: str) -> Job:
    """What is profiled: the module that runs without other ranks, and what the engine holds beside it."""
    return Job(
        engine.model,
        loss_fn,
        batch,
        each_optimizer(optimizer) or None,
        batch_norm,
        held_sizes=tuple(filter(None, (*engine.held_sizes, engine.ranks.message_bytes))),
        owns_gradients=engine.owns_gradients,
        sharding=engine.sharding,
    )


def together_of(run: Accumulation, engine: Engine) -> Together | None:
    """What runs a step on all ranks; None where there is one."""
    if engine.ranks.size == 1:
        return None
    return Together(run, engine) if engine.may_wait else Lockstep(run, engine)
