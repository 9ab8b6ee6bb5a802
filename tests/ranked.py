"""What tests of several ranks run there; see ``tests/processes.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import memfit
from memfit.runtime.meter import PeakMeter, resident_bytes

STEPS = 10
Batch = dict[str, Tensor]
Told = dict[str, Any]


def net(dtype: torch.dtype = torch.float64, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(40, width), nn.GELU(), nn.Linear(width, width), nn.Tanh()),
        *(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)),
    ).to(dtype)


def batches(rows: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Whole batches; most labels of the first rows do not count, and the last batch is short."""
    made = torch.Generator().manual_seed(1)
    found = []
    for step in range(STEPS):
        many = rows if step < STEPS - 1 else rows // 2
        labels = torch.randint(0, 10, (many,), generator=made)
        labels[: many // 3] = torch.where(
            torch.rand(many // 3, generator=made) < 0.7, -100, labels[: many // 3]
        )
        found.append({"inputs": torch.randn(many, 40, generator=made).to(dtype), "labels": labels})
    return found


def own(batch: Batch, rank: int, ranks: int) -> Batch:
    """Unequal shares: rank 0 has twice as many rows as the others."""
    rows = len(batch["labels"])
    cuts = [0, *(rows * (2 + rank) // (1 + ranks) for rank in range(ranks))]
    return {name: t[cuts[rank] : cuts[rank + 1]] for name, t in batch.items()}


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"])


def both(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Two terms: one is a mean over labels, one over rows."""
    scores = model(batch["inputs"])
    return {
        "labels": nn.functional.cross_entropy(scores, batch["labels"]),
        "rows": scores.square().mean(),
    }


def clipped(model: nn.Module) -> None:
    """A hook that is not linear: it must see the gradient of a rank, and once."""
    first = next(model.parameters())
    first.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


def trained(model: nn.Module, step: Any, data: list[Batch], optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for batch in data:
        loss = step(batch)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def plain(
    loss_fn: Callable[..., Any] = cross_entropy, dtype: torch.dtype = torch.float64, rows: int = 24
) -> tuple[list[float], list[Tensor]]:
    """One process, the whole batch, no memfit."""
    model = net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(batch: Batch) -> Tensor:
        loss = loss_fn(model, batch)
        total: Tensor = torch.stack([*loss.values()]).sum() if isinstance(loss, dict) else loss
        total.backward()
        return total.detach()

    losses = trained(model, step, batches(rows, dtype), optimizer)
    return losses, [p.detach() for p in model.parameters()]


def run(
    rank: int,
    *,
    loss_fn: Callable[..., Any] = cross_entropy,
    micro_batch_size: int | None = 3,
    dtype: torch.dtype = torch.float64,
    count: Any = "labels",
    rows: int = 24,
    **options: Any,
) -> Told:
    """Ten steps of DDP with memfit; the all-reduces that each of them took."""
    ranks = dist.get_world_size()
    model = net(dtype)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.02, **options)
    seen: list[int] = []
    ddp.register_comm_hook(None, counted(seen))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = [own(batch, rank, ranks) for batch in batches(rows, dtype)]
    step = memfit.fit(
        ddp,
        loss_fn,
        data[0],
        memory="64MiB",
        optimizer=optimizer,
        micro_batch_size=micro_batch_size,
        count=count,
    )
    reduced = []

    def watched(batch: Batch) -> Tensor:
        seen.clear()
        loss = step(batch)
        reduced.append(len(seen))
        assert sorted(seen) == list(range(len(seen)))
        return loss

    losses = trained(model, watched, data, optimizer)
    weights = [p.detach() for p in model.parameters()]
    assert step.verdict is not None
    return {
        "losses": losses,
        "weights": weights,
        "reduced": reduced,
        "plan": step.plan.to_json(),
        "profile": step.profile.to_json(),
        "verdict": step.verdict,
        "terms": sorted(step.terms),
    }


def counted(seen: list[int]) -> Callable[..., Any]:
    """A comm hook that does what DDP does, and notes the number of each bucket."""

    def hook(state: object, bucket: Any) -> Any:
        seen.append(bucket.index())
        buffer = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])

    hook.__annotations__.clear()  # DDP reads them, and finds the text of a type
    return hook


def everything(rank: int) -> Told:
    """All of it, for processes take long to start."""
    found: tuple[Callable[[int], Any], ...] = (
        *(same_as_one_process, hooked, in_bfloat16, nothing_to_count, alike_on_one, of_memory, rescued),
        refusals,
    )
    return {function.__name__: function(rank) for function in found}


def same_as_one_process(rank: int) -> dict[str, Told]:
    """Ways to run the same training."""
    return {
        "micro-batches": run(rank),
        "counted by the audit": run(rank, count="auto"),
        "whole batches": run(rank, micro_batch_size=None),
        "unused": run(rank, find_unused_parameters=True),
        "views": run(rank, gradient_as_bucket_view=True),
        "views, whole": run(rank, gradient_as_bucket_view=True, micro_batch_size=None),
        "terms": run(rank, loss_fn=both, count={"labels": "labels", "rows": "rows"}),
        "float32": run(rank, dtype=torch.float32),
    }


def four(rank: int) -> Told:
    """The same on more ranks."""
    return run(rank, count="auto", rows=40)


# ---- what DDP users rely on -----------------------------------------------------------------------


def hooked(rank: int) -> tuple[list[Tensor], list[Tensor], int]:
    """Gradients of plain DDP and of memfit where a hook changes them; how often memfit ran it."""
    found = []
    calls = [0]
    for is_ours in (False, True):
        model = net()
        ddp = DistributedDataParallel(model)
        batch = {"inputs": batches(24)[0]["inputs"][12 * rank :][:12], "labels": torch.arange(12) % 10}
        clipped(model)
        if is_ours:
            step = memfit.fit(ddp, cross_entropy, batch, memory="64MiB", micro_batch_size=5, count="labels")
            step._unverified = 0
            next(model.parameters()).register_hook(lambda _: calls.__setitem__(0, calls[0] + 1))
            step(batch)
        else:
            cross_entropy(ddp, batch).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    return found[0], found[1], calls[0]


def in_bfloat16(rank: int) -> tuple[list[Tensor], list[Tensor], set[torch.dtype]]:
    """The gradient of 64 micro-batches in bfloat16, that of float64, and the types of ``.grad``."""
    model = net(torch.bfloat16)
    data = batches(256, torch.bfloat16)[0]
    batch = {name: t[128 * rank : 128 * rank + 128] for name, t in data.items()}
    ddp = DistributedDataParallel(model)
    memfit.fit(ddp, cross_entropy, batch, memory="64MiB", micro_batch_size=2, count="labels")(batch)
    exact = net(torch.bfloat16).double()
    cross_entropy(exact, {"inputs": data["inputs"].double(), "labels": data["labels"]}).backward()
    ours = [p.grad for p in model.parameters() if p.grad is not None]
    return (
        [g.double() for g in ours],
        [p.grad for p in exact.parameters() if p.grad is not None],
        {g.dtype for g in ours},
    )


def nothing_to_count(rank: int) -> tuple[list[Tensor], list[Tensor], float, float]:
    """One rank has no valid label."""
    model, other = net(), net()
    whole = batches(24)[0]
    whole["labels"][12:] = -100
    batch = {name: t[12 * rank : 12 * rank + 12] for name, t in whole.items()}
    step = memfit.fit(
        DistributedDataParallel(model),
        cross_entropy,
        batch,
        memory="64MiB",
        count="labels",
        micro_batch_size=5,
    )
    loss = step(batch)
    expected = cross_entropy(other, whole)
    expected.backward()
    gradients = [[p.grad for p in m.parameters() if p.grad is not None] for m in (model, other)]
    return gradients[0], gradients[1], loss.item(), expected.item()


def alike_on_one(rank: int) -> tuple[float, float]:
    """Class weights that count like labels on rank 0, and are too few for the labels of rank 1."""
    weight = torch.ones(8)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) + 0.0 * weight.sum()

    model = net()
    whole = {"inputs": batches(24)[0]["inputs"], "labels": torch.arange(24) % 8}
    whole["labels"][-3:] = 9
    batch = own(whole, rank, 2)
    step = memfit.fit(DistributedDataParallel(model), loss_fn, batch, memory="64MiB", micro_batch_size=5)
    return step(batch).item(), cross_entropy(net(), whole).item()


def peaks(rank: int, options: dict[str, Any], micro_batch_size: int | None) -> tuple[int, list[int]]:
    """The promise, and what the allocator says of three steps with their updates."""
    model = net(torch.float32, width=192)
    ddp = DistributedDataParallel(model, **options)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = {"inputs": torch.randn(48, 40), "labels": torch.arange(48) % 10}
    step = memfit.fit(
        ddp,
        cross_entropy,
        batch,
        memory="256MiB",
        optimizer=optimizer,
        micro_batch_size=micro_batch_size,
        count="rows",
    )
    promised = step.plan.predicted_peak_bytes
    step._unverified, step._untimed = 0, False  # nobody but this test measures
    found = []
    for _ in range(3):
        state = [t for one in optimizer.state.values() for t in one.values()]
        resident = [*model.parameters(), *state, *batch.values()]
        level = resident_bytes(resident) + sum(p.nbytes for p in model.parameters())  # and the buckets
        step._engine.begin()  # DDP makes its buckets anew, once: outside, for the old ones go unseen
        begin = step._engine.begin
        step._engine.begin = lambda: None  # type: ignore[method-assign]
        with PeakMeter("cpu") as meter:
            step(batch)
            optimizer.step()
        step._engine.begin = begin  # type: ignore[method-assign]
        found.append(level + meter.peak_bytes)
        optimizer.zero_grad()
    return promised, found


def of_memory(rank: int) -> list[tuple[int, list[int]]]:
    views = {"gradient_as_bucket_view": True}
    return [peaks(rank, options, size) for options in ({}, views) for size in (None, 8)]


# ---- what goes wrong ------------------------------------------------------------------------------


def rescued(rank: int) -> tuple[list[float], int, int, list[Tensor], list[Tensor]]:
    """Memory runs out on rank 1 in the second micro-batch of the third step."""
    model, other = net(), net()
    calls = [0]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        if rank == 1 and calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return cross_entropy(model, batch)

    data = [own(batch, rank, 2) for batch in batches(24)]
    step = memfit.fit(
        DistributedDataParallel(model), loss_fn, data[0], memory="64MiB", micro_batch_size=4, count="labels"
    )
    losses = []
    for number, batch in enumerate(data[:4]):
        calls[0] = 0 if number == 2 else 100
        losses.append(step(batch).item())
    for whole in batches(24)[:4]:
        cross_entropy(other, whole).backward()
    gradients = [[p.grad for p in m.parameters() if p.grad is not None] for m in (model, other)]
    return losses, len(step.rescues), step.rescues[0].attempts, gradients[0], gradients[1]


def refusals(rank: int) -> dict[str, str]:
    """What each rank hears where something is wrong, on one of them or on all."""
    found: dict[str, str] = {}

    def heard(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    batch = own(batches(24)[0], rank, 2)

    def fit(model: nn.Module, loss_fn: Any = cross_entropy, **more: Any) -> Any:
        ddp = DistributedDataParallel(model, **more.pop("ddp", {}))
        settings = {"memory": "64MiB", "count": "labels"} | more
        return ddp, memfit.fit(ddp, loss_fn, batch, **settings)

    def fails_on_1(model: nn.Module, batch: Any) -> Tensor:
        if rank == 1:
            raise ValueError("a label is 12, and there are 10 classes")
        return cross_entropy(model, batch)

    def coupled(model: nn.Module, batch: Any) -> Tensor:
        scores: Tensor = model(batch["inputs"])
        return (scores @ scores.T).logsumexp(1).mean()

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
        found: Tensor = (losses * batch["w"]).sum() / batch["w"].sum()
        return found

    def unlike() -> None:
        """Weights, of which one is negative on rank 1 only: they are no counter there."""
        w = torch.rand(len(batch["labels"]), generator=torch.Generator().manual_seed(rank)).double()
        w[0] = -0.5 if rank else w[0]
        given = {"inputs": batch["inputs"], "labels": batch["labels"].clamp(min=0), "w": w}
        memfit.fit(DistributedDataParallel(net()), weighted, given, memory="64MiB", micro_batch_size=2)(given)

    _, step = fit(net(), fails_on_1)
    heard("one rank fails", lambda: step(batch))
    heard("again", lambda: step(batch))
    heard("no memory", lambda: fit(net(), memory=1000 + rank))
    heard("another budget", lambda: fit(net(), memory="64MiB" if rank == 0 else "1KiB"))
    heard("unlike", unlike)
    heard("coupled", lambda: fit(net(), coupled, count="auto"))
    batch_norm = nn.Sequential(nn.Linear(40, 10), nn.BatchNorm1d(10)).double()
    heard("batch norm", lambda: fit(batch_norm))
    heard("static", lambda: fit(net(), ddp={"static_graph": True}))
    _, good = fit(net())
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    heard("nothing to count", lambda: good(nothing))
    heard("bad batch", lambda: good({**batch, "labels": batch["labels"][:-rank]} if rank else batch))

    def joined() -> None:
        ddp, step = fit(net())
        ddp._join_config = ddp._join_config._replace(enable=True)  # as join() does; it meets the others
        step(batch)

    heard("join", joined)
    heard("whole again", lambda: found.__setitem__("loss", str(good(batch).item())))
    return found
