"""Accelerate: a memfit step takes the place of ``accelerator.backward``; the rest of the loop stays.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = memfit.integrations.accelerate.fit(
        accelerator, model, loss_fn, next(iter(loader)), memory="8GiB", optimizer=optimizer
    )

A prepared model, optimizer and loader work with :func:`memfit.fit` as they are, also on several processes,
where accelerate puts the model in DistributedDataParallel. This adds what the accelerator knows: its gradient
scaler, and whether it would accumulate or train in a way that is not the whole batch's, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memfit import api
from memfit.errors import UnsupportedModel
from memfit.runtime.job import Optimizers
from memfit.runtime.micro import Loss, LossFn
from memfit.runtime.step import Step

_ALONE = "NO"  # of accelerate.DistributedType
_REPLICAS = ("MULTI_CPU", "MULTI_GPU")  # the model is in DistributedDataParallel


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    loss_fn: LossFn | Callable[[Any, Any], Loss],
    batch: Any,
    *,
    memory: str | int | None = None,
    optimizer: Optimizers = None,
    **options: Any,
) -> Step:
    """The step of a prepared model: call it in place of the forward and ``accelerator.backward``.

    Clip with ``accelerator.clip_grad_norm_``, step and save as ever.

    Args:
        accelerator: What prepared the model; ``gradient_accumulation_steps`` is 1.
        model, loss_fn, memory, optimizer, options: As :func:`memfit.fit` has them; ``scaler`` is the
            accelerator's.
        batch: An example of the effective batch: what the prepared loader yields. On several processes
            these are the rows of one, and the effective batch is that of all.

    Raises:
        UnsupportedModel: The accelerator accumulates, or shares the model in a way that memfit does not know;
            says what to set.
        MemfitError, ValueError, TypeError: As :func:`memfit.fit` does.
    """
    refuse_unsupported(accelerator, model)
    return api.fit(
        model, loss_fn, batch, memory=memory, optimizer=optimizer, scaler=accelerator.scaler, **options
    )


def refuse_unsupported(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuses an accelerator whose steps would not be those of the whole batch.

    Raises:
        UnsupportedModel: Says why, and what to set instead.
    """
    count = accelerator.gradient_accumulation_steps
    if count != 1:
        raise UnsupportedModel(
            f"the Accelerator has gradient_accumulation_steps={count}, which counts every batch alike and "
            "leaves out optimizer steps; memfit splits a batch exactly: set it to 1 and the DataLoader's "
            f"batch_size {count} times as large",
            owner="gradient_accumulation_steps",
        )
    kind, many = accelerator.distributed_type.value, accelerator.num_processes
    if kind not in (_ALONE, *_REPLICAS):
        raise UnsupportedModel(
            f"the Accelerator trains with {kind} in {many} processes, and memfit knows its DDP only "
            f"({', '.join(_REPLICAS)}): leave the plugin out; to shard the model, call "
            "torch.distributed.fsdp.fully_shard on it, then make the optimizer, and give both to memfit.fit",
            owner="distributed_type",
        )
    if many > 1 and not isinstance(model, DistributedDataParallel):
        raise UnsupportedModel(
            f"the Accelerator trains in {many} processes, and the model is a {type(model).__name__}, whose "
            "gradients would stay apart: give fit what accelerator.prepare(model) returned",
            owner="model",
        )
