"""What memfit costs beside the kernels in a step of a 12-layer GPT-2, beside checkpointing by hand.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py [--out FILE]

Forward and backward of a GPT-2 so narrow that its kernels cost next to nothing: plain, under the plan that
recomputes a tenth of the forward of a wide one (the same ops, so the same decisions), with checkpointing
around every block, and with selective checkpointing that keeps what matmuls and attention make. CPU seconds;
the variants run in turn in one process, and the median of the ratios counts. Then the bytes of Python
objects that the replay keeps alive between forward and backward (``tracemalloc``).
"""

from __future__ import annotations

import gc
import statistics
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from overhead import REPEATS, seconds
from provenance import publish
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import GPT2Config, GPT2LMHeadModel

import memfit
from memfit.core.graph import Profile
from memfit.core.plan import Plan
from memfit.runtime.replay import Decisions, decisions_of

LAYERS, ROWS, TOKENS, WIDE, NARROW = 12, 8, 128, 256, 32
SHARE = 0.10  # of the forward, that the plan recomputes
_MATMULS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})


def gpt2(width: int) -> nn.Module:
    """GPT-2 with its dropout, without a cache."""
    config = GPT2Config(
        n_layer=LAYERS,
        n_embd=width,
        n_head=8,
        vocab_size=512,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).train()


def text(rows: int, tokens: int) -> dict[str, Tensor]:
    """[rows, tokens]"""
    ids = torch.randint(0, 512, (rows, tokens))
    return {"input_ids": ids, "labels": ids}


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss."""
    loss: Tensor = model(**batch).loss
    return loss


def plan_of_a_tenth(profile: Profile) -> Plan:
    """The plan with the most memory that still recomputes ``SHARE`` of the forward, by bisection."""
    low, high = 1, plain_bytes(profile)
    while high - low > 1 << 16:
        middle = (low + high) // 2
        try:
            plan = memfit.find_plan(profile, memory=middle, micro_batch_size=ROWS)
        except memfit.InfeasibleBudget:
            low = middle
            continue
        low, high = (middle, high) if plan.recompute_s > SHARE * plan.forward_s else (low, middle)
    return memfit.find_plan(profile, memory=high, micro_batch_size=ROWS)


def plain_bytes(profile: Profile) -> int:
    """The peak of a step that recomputes nothing."""
    return memfit.find_plan(profile, memory=1 << 50, micro_batch_size=ROWS).predicted_peak_bytes


@contextmanager
def checkpointed(model: Any, **options: Any) -> Iterator[None]:
    """Every block under torch.utils.checkpoint while the body runs."""
    blocks = list(model.transformer.h)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keeps = op in _MATMULS or "attention" in str(op)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def step() -> dict[str, Any]:
    """CPU time of a whole step over that of the plain one, and the bytes held."""
    torch.manual_seed(0)
    wide, batch = gpt2(WIDE), text(2 * ROWS, TOKENS)
    profile = memfit.profile(wide, loss_fn, batch, micro_batch_size=ROWS, limit_bytes=1 << 40)
    plan = plan_of_a_tenth(profile)
    decisions = decisions_of(plan.recompute, plan.levels)
    model, tiny = gpt2(NARROW), text(1, 8)
    saved = partial(create_selective_checkpoint_contexts, _policy)
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "plain": nullcontext,
        "memfit": lambda: decisions.replayer(model),
        "every block checkpointed": lambda: checkpointed(model),
        "matmuls and attention saved": lambda: checkpointed(model, context_fn=saved),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            spent[name].append(seconds(partial(_step, model, tiny, way)))
    plain = spent.pop("plain")
    return {
        "share_of_forward": plan.recompute_s / plan.forward_s,
        "recomputed_tensors": plan.recomputes,
        "plain_s": statistics.median(plain),
        "grows_by": {
            name: statistics.median(s / p - 1 for s, p in zip(values, plain, strict=True))
            for name, values in spent.items()
        },
        "held_bytes": _held_bytes(wide, text(ROWS, TOKENS), decisions),
        "activation_bytes": plain_bytes(profile) - profile.residents.total_bytes,
    }


def _step(model: nn.Module, batch: Any, way: Callable[[], AbstractContextManager[Any]]) -> None:
    with way():
        loss = loss_fn(model, batch)
    loss.backward()
    model.zero_grad()


def _held_bytes(model: nn.Module, batch: Any, decisions: Decisions) -> int:
    """Bytes of Python objects alive after the forward that the plain forward does not leave."""
    alive = []
    ways: list[Callable[[], AbstractContextManager[Any]]] = [nullcontext, lambda: decisions.replayer(model)]
    for way in ways:
        _step(model, batch, way)  # what is made once and stays
        gc.collect()
        tracemalloc.start()
        with way():
            loss = loss_fn(model, batch)
        gc.collect()
        alive.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del loss
    return alive[1] - alive[0]


if __name__ == "__main__":
    publish(__doc__, step)
