"""Which engine brings the gradients of a model's ranks together, and what runs its steps."""

from __future__ import annotations

import torch
from torch import nn

from memfit.runtime.accumulate import Accumulation
from memfit.runtime.lockstep import Lockstep, Shards
from memfit.runtime.replicas import Engine, Replicas
from memfit.runtime.sharding import sharding_of
from memfit.runtime.together import Together


def engine_of(model: nn.Module) -> Engine:
    """The engine of a model as the user has it.

    Raises:
        UnsupportedModel: It synchronises in a way that micro-batches cannot wait for.
    """
    if torch.distributed.is_available() and isinstance(model, nn.parallel.DistributedDataParallel):
        return Replicas(model)
    sharding = sharding_of(model) if isinstance(model, nn.Module) else None
    return Engine(model) if sharding is None else Shards(sharding)


def together_of(run: Accumulation, engine: Engine) -> Together | None:
    """What runs a step on all ranks; None where there is one."""
    if engine.ranks.size == 1:
        return None
    return Together(run, engine) if engine.may_wait else Lockstep(run, engine)
