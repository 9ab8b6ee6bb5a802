"""Recompute seconds against torch.utils.checkpoint around every block, at its own measured peak and above.

    OMP_NUM_THREADS=1 python benchmarks/recompute.py [--out FILE]

For each model: the plain step, every block under torch.utils.checkpoint (non-reentrant), and memfit plans
at the checkpointed step's measured peak and at 1.5, 2 and 3 times its activation bytes. Seconds of
recomputation are sums of measured op seconds, the same for both; what checkpointing runs again is counted
by a dispatch mode, so that ops its early stop leaves out are not charged to it. Peaks are the CPU
allocator's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from provenance import publish
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import memfit
from memfit.api import Step
from memfit.core.graph import Profile, StepGraph
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.count import shifted_labels
from memfit.runtime.meter import PeakMeter
from memfit.runtime.opinfo import op_info, tensors_in

ROWS, TOKENS, WIDTH, VOCABULARY = 8, 128, 256, 512
MODELS = (("gpt2", 12), ("llama", 12), ("gpt2", 32))
Signature = tuple[Any, ...]


def gpt2(layers: int) -> nn.Module:
    """GPT-2 with its dropout. Without a cache, which checkpointing would fill twice."""
    config = GPT2Config(
        n_layer=layers,
        n_embd=WIDTH,
        n_head=8,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).train()


def llama(layers: int) -> nn.Module:
    """Llama without a cache."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=WIDTH,
        intermediate_size=704,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss."""
    loss: Tensor = model(**batch).loss
    return loss


class Counting(TorchDispatchMode):
    """Counts ops by what they are called on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[Signature] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs and counts."""
        info = op_info(func)
        if not info.is_view and not info.is_invisible:
            self.seen[_signature(func, args)] += 1
        return func(*args, **(kwargs or {}))


def _signature(func: Any, args: Any) -> Signature:
    return (str(func), *((tuple(t.shape), str(t.dtype)) for t in tensors_in(list(args))))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks."""
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)  # type: ignore


def with_checkpointing(model: nn.Module) -> None:
    """Puts every block under torch.utils.checkpoint."""
    for block in blocks_of(model):
        forward = block.forward
        block.forward = _checkpointed(forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def without_checkpointing(model: nn.Module) -> None:
    """Undoes it."""
    for block in blocks_of(model):
        del block.__dict__["forward"]


def peak_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Peak above parameters, gradients and batch: gradients are there already, as from the second
    micro-batch on, so the peak is of activations and temporaries alone."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with PeakMeter("cpu") as meter:
        run()
    return meter.peak_bytes


def backward_ops(model: nn.Module, batch: Any) -> Counter[Signature]:
    """What the backward runs."""
    loss = loss_fn(model, batch)
    with Counting() as counting:
        loss.backward()
    return counting.seen


def forward_seconds(graph: StepGraph, model: nn.Module, batch: Any) -> dict[Signature, float]:
    """Seconds of each distinct op of the forward, from the profile: ops come in the order of the graph."""
    order: list[Signature] = []

    class Listing(Counting):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            info = op_info(func)
            if not info.is_view and not info.is_invisible:
                order.append(_signature(func, args))
            return func(*args, **(kwargs or {}))

    with Listing():
        loss_fn(model, batch)
    forward = [op for op in graph.ops[: graph.forward_ops] if op.key.frame and op.key.op.startswith("aten.")]
    if len(order) != len(forward):
        one, two = Counter(s[0] for s in order), Counter(op.key.op for op in forward)
        raise RuntimeError(f"the forward is not what was profiled: {one - two} {two - one}")
    return {signature: op.seconds for signature, op in zip(order, forward, strict=True)}


def compare(make: Callable[[int], nn.Module], layers: int) -> list[dict[str, Any]]:
    """One model: the rows of the table."""
    torch.manual_seed(0)
    model = make(layers)
    tokens = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
    batch = {"input_ids": tokens, "labels": tokens}
    twice = {name: torch.cat([part, part]) for name, part in batch.items()}
    profile = memfit.profile(model, loss_fn, twice, micro_batch_size=ROWS, limit_bytes=1 << 40)
    (graph,) = profile.graphs
    seconds = forward_seconds(graph, model, batch)
    plain_ops = backward_ops(model, batch)
    plain_bytes = peak_bytes(model, lambda: loss_fn(model, batch).backward())
    with_checkpointing(model)
    again = backward_ops(model, batch) - plain_ops
    blocks_bytes = peak_bytes(model, lambda: loss_fn(model, batch).backward())
    without_checkpointing(model)
    blocks_s = sum(seconds[signature] * count for signature, count in again.items() if signature in seconds)
    missed = [signature for signature in again if signature not in seconds]  # sums of gradients
    rows = []
    for factor in (1.0, 1.5, 2.0, 3.0):
        rows.append(plan_row(model, twice, profile, int(blocks_bytes * factor)))
        rows[-1] |= {
            "model": f"{make.__name__} {layers} layers",
            "factor": factor,
            "plain_bytes": plain_bytes,
            "blocks_bytes": blocks_bytes,
            "blocks_recompute_s": blocks_s,
            "ratio": rows[-1]["recompute_s"] / blocks_s,
            "not_found": sorted({str(signature[0]) for signature in missed}),
        }
    try:
        memfit.find_plan(profile, memory=1)
    except memfit.InfeasibleBudget as error:
        least = error.needed_bytes - profile.residents.total_bytes
        rows.append({"model": f"{make.__name__} {layers} layers", "least_over_blocks": least / blocks_bytes})
    return rows


def plan_row(model: nn.Module, batch: Any, profile: Profile, activation_bytes: int) -> dict[str, Any]:
    """memfit at a budget: predicted and measured."""
    resident = profile.residents.total_bytes
    budget_bytes = resident + activation_bytes
    plan = memfit.find_plan(profile, memory=budget_bytes)
    accumulation = Accumulation(model, loss_fn, shifted_labels)
    step = Step(accumulation, plan, profile, optimizer=None, find=lambda p: plan)
    step._unverified = 0
    measured = resident + peak_bytes(model, lambda: step(batch))
    return {
        "budget_bytes": budget_bytes,
        "predicted_bytes": plan.predicted_peak_bytes,
        "measured_bytes": measured,
        "recompute_s": plan.recompute_s / plan.gradient_accumulation_steps,
        "share_of_forward": plan.recompute_s / plan.forward_s,
        "gap_of_step": plan.optimality_gap,
    }


if __name__ == "__main__":
    made = {"gpt2": gpt2, "llama": llama}
    publish(__doc__, lambda: [row for name, layers in MODELS for row in compare(made[name], layers)])
