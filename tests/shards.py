"""What tests of FSDP2, and a benchmark of it and DDP, run on each rank; see ``tests/processes.py``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import memfit
from memfit.core.timeline import droppable
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.count import one
from memfit.runtime.meter import PeakMeter, resident_bytes
from memfit.runtime.replay import decisions_of
from memfit.runtime.sharding import settled, sharding_of

STEPS = 10
ROWS = 12
_WORDS, _WIDTH, _LENGTH = 30, 32, 24


class Block(nn.Module):
    """Attention-free, with dropout off, parameters of sizes that no number of ranks divides, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up = nn.Linear(_WIDTH, 75)
        self.down = nn.Linear(75, _WIDTH)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Words in, words out."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, _WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(_WIDTH, _WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x).clone()  # FSDP warns of views
        return out


def net(dtype: torch.dtype, kind: str = "net") -> Any:
    """A model of which the blocks are to be sharded; those of transformers tie their words to their head."""
    torch.manual_seed(0)
    if kind == "net":
        return Net().to(dtype)
    transformers: Any = importlib.import_module("transformers")  # not for the tests, which start less
    common: dict[str, Any] = {"vocab_size": _WORDS, "use_cache": False, "tie_word_embeddings": True}
    if kind == "llama":
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 86, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(num_attention_heads=4, **sizes, **common)
        return transformers.LlamaForCausalLM(config).to(dtype)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=_LENGTH, **off, **common)
    return transformers.GPT2LMHeadModel(config).to(dtype)


def blocks_of(model: Any) -> Any:
    """What repeats."""
    return {
        "Net": lambda: model.blocks,
        "LlamaForCausalLM": lambda: model.model.layers,
        "GPT2LMHeadModel": lambda: model.transformer.h,
    }[type(model).__name__]()


def sharded(dtype: torch.dtype, kind: str = "net", **settings: Any) -> nn.Module:
    model: nn.Module = net(dtype, kind)
    for block in blocks_of(model):
        fully_shard(block, **settings)
    fully_shard(model, **{k: v for k, v in settings.items() if k != "reshard_after_forward"})
    return model


def replicated(dtype: torch.dtype, kind: str = "net") -> nn.Module:
    return nn.parallel.DistributedDataParallel(net(dtype, kind))


def batches(ranks: int = 1, rank: int = 0, steps: int = STEPS) -> list[dict[str, Tensor]]:
    """The rows of a rank; labels that do not count are more in the first rows, so that ranks differ."""
    made = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        words = torch.randint(0, _WORDS, (ROWS, _LENGTH), generator=made)
        labels = torch.randint(0, _WORDS, (ROWS, _LENGTH), generator=made)
        labels[: ROWS // 2, : _LENGTH // 2] = -100
        own = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        found.append({"words": words[own].clone(), "labels": labels[own].clone()})
    return found


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch["words"])
    logits = out if isinstance(out, Tensor) else out.logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def alone(dtype: torch.dtype, kind: str = "net", steps: int = STEPS) -> tuple[list[float], list[Tensor]]:
    """One process with the whole batch, by a plain loop."""
    model = net(dtype, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches(steps=steps):
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, [p.detach() for p in model.parameters()]


class Case(NamedTuple):
    """One way to be trained: a budget as a part of the way from the least to a plain step; None: no limit."""

    micro_batch_size: int
    share: float | None
    dtype: torch.dtype = torch.float32
    kind: str = "net"
    engine: str = "FSDP2"
    steps: int = STEPS


class Trained(NamedTuple):
    """What came out: predicted and measured peaks of each of the first steps, the update included."""

    losses: list[float]
    weights: list[Tensor]
    plan: memfit.Plan
    once: bool
    predicted_bytes: list[int]
    measured_bytes: list[int]
    attempts: int


def each_case(rank: int, ranks: int, cases: list[Case]) -> list[Trained]:
    """Trains once for each."""
    known: dict[Case, list[int]] = {}
    return [_trained(rank, ranks, case, known) for case in cases]


def _trained(rank: int, ranks: int, case: Case, known: dict[Case, list[int]]) -> Trained:
    is_sharded = case.engine == "FSDP2"
    model = sharded(case.dtype, case.kind) if is_sharded else replicated(case.dtype, case.kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = batches(ranks, rank, case.steps)
    step = memfit.fit(
        model,
        loss_of,
        data[0],
        memory=_budget(case, known, lambda: _bounds(rank, model, data[0], optimizer, case)),
        optimizer=optimizer,
        micro_batch_size=case.micro_batch_size,
        count="labels",
    )
    losses, predicted, measured = [], [], []
    for number, batch in enumerate(data):
        if number < 3:
            peaks: list[int] = []
            losses.append(_metered(model, optimizer, batch, step, peaks, is_own=number == 2))
            measured.append(max(peaks))
            predicted.append(step.plan.predicted_peak_bytes)
        else:
            losses.append(float(step(batch)))
            optimizer.step()
        optimizer.zero_grad()
    weights = [_whole(p).detach() for p in model.parameters()]
    sharding = step._accumulation.sharding
    assert (sharding is not None) is is_sharded
    once = sharding is None or sharding.reduces_once
    assert step.verdict is not None
    return Trained(losses, weights, step.plan, once, predicted, measured, step.verdict.attempts)


def _whole(tensor: Any) -> Tensor:
    """All of a sharded tensor."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def _budget(case: Case, known: dict[Case, list[int]], bounds: Callable[[], list[int]]) -> int:
    """A part of the way from the least memory to that of a plain step; the same on all ranks."""
    if case.share is None:
        return 1 << 40
    alike = case._replace(share=None)
    if alike not in known:
        known[alike] = bounds()
    least_bytes, most_bytes = known[alike]
    return int(least_bytes + case.share * (most_bytes - least_bytes))


def _bounds(rank: int, model: nn.Module, batch: Any, optimizer: Any, case: Case) -> list[int]:
    """The least memory and that of a plain step, as rank 0 finds them."""
    found = [0, 0]
    if rank == 0:
        size = case.micro_batch_size
        profile = memfit.profile(model, loss_of, batch, optimizer=optimizer, micro_batch_size=size)
        try:
            memfit.find_plan(profile, memory=1)
            raise AssertionError("a plan of one byte")
        except memfit.InfeasibleBudget as refused:
            found = [refused.needed_bytes, memfit.find_plan(profile, memory=1 << 40).predicted_peak_bytes]
    distributed.broadcast_object_list(found)
    return found


def _metered(
    model: nn.Module, optimizer: Any, batch: Any, step: memfit.Step, peaks: list[int], *, is_own: bool
) -> float:
    """A step whose peak is told by the meter of the step itself, or by one around it, and its update's."""
    state = [t for s in optimizer.state.values() for t in s.values()]
    level_bytes = resident_bytes([*model.parameters(), *model.buffers(), *state, *batch.values()])
    level_bytes += sum(step._engine.held_sizes)  # the buckets of DDP
    if is_own:
        with settled(sharding_of(model)), PeakMeter("cpu") as meter:
            loss = float(step(batch))
        peaks.append(level_bytes + meter.peak_bytes)
    else:
        loss = float(step(batch))
        assert step.verdict is not None
        peaks.append(step.verdict.measured_peak_bytes)
    level_bytes += resident_bytes(p.grad for p in model.parameters() if p.grad is not None)
    with PeakMeter("cpu") as meter:
        optimizer.step()
    peaks.append(level_bytes + meter.peak_bytes)
    return loss


def at_each_plan(rank: int) -> list[float]:
    """The worst relative error of gradients under plans of the model without FSDP: every value dropped."""
    plain, batch = net(torch.float64), batches(2, rank)[0]
    graph = memfit.profile(plain, loss_of, batch, micro_batch_size=ROWS // 2).graphs[0]
    everything = [graph.value_key(value) for value in droppable(graph)]
    errors = []
    for kept in ({}, {"reshard_after_forward": False}):
        settings: dict[str, Any] = dict(kept)
        model = sharded(torch.float64, **settings)
        run = Accumulation(model, loss_of, one, sharding=sharding_of(model))
        found = []
        for decisions in (decisions_of(()), decisions_of(everything)):
            run.run(batch, ROWS // 4, decisions)
            found.append([_whole(p.grad) for p in model.parameters()])
            model.zero_grad()
        errors.append(max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True)))
    return errors


def in_lower_precision(rank: int) -> list[tuple[int, int]]:
    """Predicted and measured peaks of whole batches in bfloat16, reduced in it and in float32."""
    found = []
    for reduced in (None, torch.float32):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduced)
        model, batch = sharded(torch.float32, mp_policy=policy), batches(2, rank)[0]
        step = memfit.fit(model, loss_of, batch, memory=1 << 40, micro_batch_size=2, count="rows")
        step(batch)
        assert step.verdict is not None
        found.append((step.plan.predicted_peak_bytes, step.verdict.measured_peak_bytes))
    return found


def refusals(rank: int) -> list[str]:
    """What each way of sharding that memfit does not know is told."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    part: Any = Net()
    quiet: Any = sharded(torch.float32)
    ahead: Any = sharded(torch.float32)
    fully_shard(part.blocks[0])
    quiet.set_requires_gradient_sync(False)
    ahead.blocks[0].set_modules_to_forward_prefetch([ahead.blocks[1]])
    models = [
        part,
        quiet,
        ahead,
        sharded(torch.bfloat16),
        sharded(torch.float32, mesh=mesh),
        sharded(torch.float32, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    ]
    found = []
    for model in models:
        try:
            sharding_of(model)
        except memfit.UnsupportedModel as error:
            found.append(str(error))
    model, batch = sharded(torch.float32), batches(2, rank)[0]
    nothing = batch | {"labels": torch.where(torch.arange(6)[:, None] > 2, batch["labels"], -100)}
    for given, counted in ((batch, "auto"), (nothing, "labels")):
        try:
            memfit.fit(model, loss_of, given, memory=1 << 40, micro_batch_size=3, count=counted)(given)
        except (memfit.InexactAccumulation, ValueError) as error:
            found.append(str(error))
    hidden: Any = torch.compile(loss_of, backend="eager")
    for ask in (
        lambda: memfit.fit(model, hidden, batch, memory=1 << 40, count="labels"),
        lambda: memfit.audit(model, loss_of, batch),
    ):
        try:
            ask()
        except memfit.UnsupportedModel as error:
            found.append(str(error))
    return found


def everything(rank: int, cases: list[Case]) -> Any:
    """All that two ranks are asked, in one start."""
    return each_case(rank, 2, cases), at_each_plan(rank), in_lower_precision(rank), refusals(rank)
