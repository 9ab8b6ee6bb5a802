"""A loss that couples the rows is exact in micro-batches too, when it is given apart from the outputs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memfit
from memfit.core.batching import parts_for
from memfit.errors import InexactAccumulation
from memfit.runtime.job import optimizer_state
from memfit.runtime.meter import PeakMeter, resident_bytes
from memfit.runtime.rehearse import _made_up

ROWS, LENGTH, WIDTH, WORDS = 7, 6, 16, 23
PLENTY = "1GiB"
Batch = dict[str, Tensor]


class Encoder(nn.Module):
    """An attention block; a temperature that only the loss uses, and one parameter that nobody does."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout, batch_first=True) for _ in range(1)
        )
        self.head = nn.Linear(WIDTH, WIDTH)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        first: Tensor = self.head(hidden[:, 0])
        return first


def encoder(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Encoder:
    torch.manual_seed(5)
    return Encoder(dropout).to(dtype)


def pairs(rows: int = ROWS) -> Batch:
    """Two views of each row, a number to be learned, and a class."""
    torch.manual_seed(9)
    numbers = {"reward": torch.randn(rows, dtype=torch.float64), "kind": torch.randint(0, 3, (rows,))}
    return {name: torch.randint(0, WORDS, (rows, LENGTH)) for name in ("left", "right")} | numbers


def both(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The outputs of both views, and things that are no numbers to be differentiated."""
    left, right = model(batch["left"]), model(batch["right"])
    return {"views": (left, right), "best": left.argmax(-1), "name": "pairs", "none": None}


# ---- losses that couple the rows ---------------------------------------------------------------------


def contrastive(model: Encoder) -> Callable[[Any, Batch], Tensor]:
    def loss(outputs: Any, batch: Batch) -> Tensor:
        left, right = (F.normalize(view, dim=-1) for view in outputs["views"])
        scores = left @ right.T * model.temperature.exp()
        return F.cross_entropy(scores, torch.arange(len(scores)))

    return loss


def batch_dice(outputs: Any, batch: Batch) -> Any:
    shown, wanted = outputs["views"][0].sigmoid(), (outputs["views"][1].detach() > 0).double()
    return 1 - 2 * (shown * wanted).sum() / (shown.sum() + wanted.sum())


def normalised_advantage(outputs: Any, batch: Batch) -> Any:
    reward = batch["reward"]
    advantage = (reward - reward.mean()) / reward.std()
    return -(advantage * outputs["views"][0].log_softmax(-1)[:, 0]).mean()


def covariance(outputs: Any, batch: Batch) -> Any:
    left = outputs["views"][0] - outputs["views"][0].mean(0)
    spread = left.T @ left / (len(left) - 1)
    return spread.square().sum() - spread.diagonal().square().sum() + F.relu(1 - left.std(0)).mean()


def root_of_the_mean(outputs: Any, batch: Batch) -> Any:
    return (outputs["views"][0] - outputs["views"][1]).square().mean().sqrt()


def hardest_triplet(outputs: Any, batch: Batch) -> Any:
    distances = torch.cdist(outputs["views"][0], outputs["views"][1])
    own = distances.diagonal()
    others = distances + torch.eye(len(own)) * 1e3
    return F.relu(own - others.amin(1) + 0.5).mean()


def some_terms(outputs: Any, batch: Batch) -> dict[str, Tensor]:
    kinds = torch.where(batch["kind"] > 0, batch["kind"], -100)
    return {
        "classes": F.cross_entropy(outputs["views"][0][:, :3], kinds),
        "spread": covariance(outputs, batch),
        "size": outputs["views"][1].square().mean(),
    }


COUPLED: dict[str, Callable[[Encoder], Callable[[Any, Batch], Any]]] = {
    "contrastive": contrastive,
    "batch_dice": lambda model: batch_dice,
    "normalised_advantage": lambda model: normalised_advantage,
    "covariance": lambda model: covariance,
    "root_of_the_mean": lambda model: root_of_the_mean,
    "hardest_triplet": lambda model: hardest_triplet,
    "some_terms": lambda model: some_terms,
}


def in_parts(model: nn.Module, loss_fn: Any, batch: Batch, size: int, memory: Any = PLENTY) -> memfit.Step:
    """A step of two passes."""
    return memfit.fit(
        model, loss_fn, batch, memory=memory, micro_batch_size=size, outputs_fn=both, count="coupled"
    )


def total(loss: Any) -> Tensor:
    """The loss, whether or not it has terms."""
    return sum(loss.values(), torch.zeros((), dtype=torch.float64)) if isinstance(loss, dict) else loss


def by_parts(model: nn.Module, loss_fn: Callable[[Any, Batch], Any], batch: Batch, micro: int) -> Tensor:
    """The judge: forwards part by part as random numbers come, all in one graph, one loss, one backward."""
    sizes = parts_for(len(batch["left"]), micro)
    parts = zip(*(value.split(sizes) for value in batch.values()), strict=True)
    found = [both(model, dict(zip(batch, part, strict=True))) for part in parts]
    views = tuple(torch.cat([one["views"][i] for one in found]) for i in range(2))
    loss = total(loss_fn({"views": views}, batch))
    loss.backward()
    return loss.detach()


def worst_error(one: nn.Module, other: nn.Module) -> float:
    """The largest error of a parameter's gradient, relative to the mean norm of all: one may be zero."""
    errors, norms = [0.0], [0.0]
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            errors.append(float((p.grad - q.grad).norm()))
            norms.append(float(q.grad.norm()))
    return max(errors) * len(norms) / sum(norms)


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_loss_has_the_gradient_of_the_whole_batch(name: str) -> None:
    model, batch = encoder(), pairs()
    twin = copy.deepcopy(model)
    loss_fn = COUPLED[name]
    step = in_parts(model, loss_fn(model), batch, 3)
    found = step(batch)
    plain = total(loss_fn(twin)(both(twin, batch), batch))
    plain.backward()
    assert step.plan.is_two_pass
    assert step.plan.gradient_accumulation_steps == 3
    assert abs(float(found - plain.detach())) <= 1e-12 * abs(float(plain.detach()))
    assert worst_error(model, twin) <= 1e-12


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_random_numbers_are_those_of_the_forwards_in_order_and_end_where_they_would(micro: int) -> None:
    model, batch = encoder(dropout=0.3), pairs()
    twin = copy.deepcopy(model)
    step = in_parts(model, contrastive(model), batch, micro)
    torch.manual_seed(1)
    found = step(batch)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    plain = by_parts(twin, contrastive(twin), batch, micro)
    assert torch.equal(state, torch.get_rng_state())
    assert abs(float(found - plain)) <= 1e-12 * abs(float(plain))
    assert worst_error(model, twin) <= 1e-12


def test_recomputation_inside_the_second_pass_changes_no_bit() -> None:
    batch, outcomes = pairs(24), []
    for share in (2.0, 0.8):
        model = encoder(dropout=0.2, dtype=torch.float32)
        profile = memfit.profile(model, contrastive(model), batch, micro_batch_size=8, outputs_fn=both)
        most_bytes = memfit.find_plan(profile, memory=PLENTY).predicted_peak_bytes
        step = in_parts(model, contrastive(model), batch, 8, int(share * most_bytes))
        torch.manual_seed(3)
        loss = step(batch)
        outcomes.append((step.plan.recomputes, loss, [p.grad for p in model.parameters()]))
    (nothing, plain, expected), (recomputed, loss, found) = outcomes
    assert nothing == 0 < recomputed
    assert torch.equal(plain, loss)
    assert all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(expected, found, strict=True)
    )


@pytest.mark.parametrize("share", [1.0, 0.85])
def test_the_peak_of_two_passes_is_what_the_allocator_counts_or_hardly_more(share: float) -> None:
    model, batch = encoder(dropout=0.1, dtype=torch.float32), pairs(40)
    loss_fn = contrastive(model)
    optimizer = torch.optim.AdamW(model.parameters())
    profile = memfit.profile(model, loss_fn, batch, optimizer=optimizer, micro_batch_size=5, outputs_fn=both)
    memory = int(share * memfit.find_plan(profile, memory=PLENTY).predicted_peak_bytes)
    step = memfit.fit(
        model,
        loss_fn,
        batch,
        memory=memory,
        optimizer=optimizer,
        micro_batch_size=5,
        outputs_fn=both,
        count="coupled",
    )
    for first in (True, False):
        state = optimizer_state(optimizer)
        resident = resident_bytes([*model.parameters(), *batch.values(), *state])
        with PeakMeter("cpu") as meter:
            step(batch)
        events = memfit.simulate(step.profile, step.plan, first_step=first).events
        promised = max(event.total_bytes for event in events if event.phase != "update")
        assert resident + meter.peak_bytes <= promised <= memory
        # Outputs without a gradient, the whole numbers here, count as held all the same.
        assert promised - resident - meter.peak_bytes <= 256 + 8 * 40
        optimizer.step()
        optimizer.zero_grad()


def test_the_loss_of_all_outputs_can_be_the_peak_and_is_named() -> None:
    """A wide head of which only the loss sees all rows at once: no recomputation helps there."""
    model = nn.Linear(WIDTH, 8)
    batch = {"x": torch.randn(600, WIDTH)}

    def all_with_all(outputs: Tensor, batch: Batch) -> Tensor:
        return torch.cdist(outputs, outputs).exp().sum().log()

    def outputs_fn(model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(batch["x"])
        return found

    profile = memfit.profile(model, all_with_all, batch, micro_batch_size=10, outputs_fn=outputs_fn)
    with pytest.raises(memfit.InfeasibleBudget, match="loss of all") as refused:
        memfit.find_plan(profile, memory="1MiB")
    plan = memfit.find_plan(profile, memory=refused.value.needed_bytes)
    top = memfit.simulate(profile, plan).peak
    assert top.phase == "loss of all"
    assert top.total_bytes == plan.predicted_peak_bytes
    resident = resident_bytes([*model.parameters(), batch["x"]])
    step = memfit.fit(
        model,
        all_with_all,
        batch,
        memory=plan.predicted_peak_bytes,
        micro_batch_size=10,
        outputs_fn=outputs_fn,
    )
    with PeakMeter("cpu") as meter:
        step(batch)
    assert 0 <= plan.predicted_peak_bytes - resident - meter.peak_bytes <= 256


def test_a_loss_that_adds_up_needs_no_second_pass() -> None:
    def mean_square(outputs: Any, batch: Batch) -> Any:
        return outputs["views"][0].square().mean()

    step = memfit.fit(encoder(), mean_square, pairs(), memory=PLENTY, micro_batch_size=3, outputs_fn=both)
    assert not step.plan.is_two_pass
    assert "two passes" not in str(step.plan)
    assert step.audit is not None
    assert step.audit.counter == "rows"


def test_one_micro_batch_needs_no_second_pass_and_is_the_plain_step_to_the_bit() -> None:
    model, batch = encoder(dropout=0.2, dtype=torch.float32), pairs()
    twin = copy.deepcopy(model)
    step = memfit.fit(model, contrastive(model), batch, memory=PLENTY, outputs_fn=both)
    torch.manual_seed(1)
    found = step(batch)
    torch.manual_seed(1)
    plain = contrastive(twin)(both(twin, batch), batch)
    plain.backward()
    assert not step.plan.is_two_pass
    assert torch.equal(found, plain.detach())
    assert worst_error(model, twin) == 0.0


def test_a_plan_of_two_passes_is_stored_and_read_and_says_so() -> None:
    model = encoder()
    step = in_parts(model, contrastive(model), pairs(), 2)
    assert memfit.Plan.from_json(step.plan.to_json()) == step.plan
    assert memfit.Profile.from_json(step.profile.to_json()) == step.profile
    assert "two passes" in str(step.plan)


def test_the_second_forward_and_the_loss_between_are_priced() -> None:
    model = encoder()
    step = in_parts(model, contrastive(model), pairs(), 2)
    graph = step.profile.graph(2)
    forward_s = graph.forward_s * ROWS / graph.rows
    alone = dataclasses.replace(step.profile, graphs=(dataclasses.replace(graph, held_bytes=0),))
    once = memfit.find_plan(alone, memory=PLENTY)
    between_s = step.profile.loss_of_all.seconds
    assert forward_s > 0 < between_s
    assert step.plan.predicted_step_s == pytest.approx(once.predicted_step_s + forward_s + between_s)


def test_a_coupled_loss_is_run_in_two_passes_without_being_told() -> None:
    model = encoder()
    step = memfit.fit(model, contrastive(model), pairs(), memory=PLENTY, micro_batch_size=3, outputs_fn=both)
    assert step.plan.is_two_pass


def test_a_later_batch_of_another_size_is_as_exact() -> None:
    model = encoder()
    step = in_parts(model, contrastive(model), pairs(), 3)
    for rows in (11, 4, 2):
        twin = copy.deepcopy(model)
        batch = pairs(rows)
        step(batch)
        by_parts(twin, contrastive(twin), batch, rows)
        assert worst_error(model, twin) <= 1e-12
        model.zero_grad()


def test_gradients_are_added_to_those_there_are() -> None:
    model, batch = encoder(), pairs()
    step = in_parts(model, contrastive(model), batch, 3)
    step(batch)
    once = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    step(batch)
    for p, g in zip(model.parameters(), once, strict=True):
        assert (p.grad is None) == (g is None)
        if p.grad is not None and g is not None:
            torch.testing.assert_close(p.grad, 2 * g, rtol=1e-12, atol=1e-15)


# ---- refusals ----------------------------------------------------------------------------------------


def refusal(model: nn.Module, loss_fn: Any, outputs_fn: Any, batch: Any = None) -> InexactAccumulation:
    """Why two passes are refused."""
    with pytest.raises(InexactAccumulation) as refused:
        memfit.fit(
            model,
            loss_fn,
            pairs() if batch is None else batch,
            memory=PLENTY,
            micro_batch_size=3,
            outputs_fn=outputs_fn,
            count="coupled",
        )
    return refused.value


def test_outputs_that_compare_rows_are_refused_by_name() -> None:
    def similarities(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"scores": model(batch["left"]) @ model(batch["right"]).T}

    def loss_fn(outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs["scores"], torch.arange(len(batch["left"])))

    assert "two passes are not exact" in str(refusal(encoder(), loss_fn, similarities))
    with pytest.raises(InexactAccumulation, match=r"outputs\['scores'\] .*not their similarities"):
        memfit.profile(encoder(), loss_fn, pairs(), micro_batch_size=3, outputs_fn=similarities)


def test_outputs_without_rows_are_refused_by_name() -> None:
    def with_a_mean(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        found = model(batch["left"])
        return {"found": found, "mean": found.mean()}

    with pytest.raises(InexactAccumulation, match=r"outputs\['mean'\].*one row a row"):
        memfit.profile(encoder(), lambda o, b: o["mean"], pairs(), micro_batch_size=3, outputs_fn=with_a_mean)
    assert refusal(encoder(), lambda o, b: o["mean"], with_a_mean).owner == "outputs['mean']"


def test_a_layer_that_mixes_rows_is_refused_by_name() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()
            self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64)

        def forward(self, tokens: Tensor) -> Tensor:
            found: Tensor = self.norm(self.inner(tokens))
            return found

    error = refusal(Normed(), covariance, both)
    assert "norm" in error.owner
    assert "two passes" in str(error)


def test_outputs_that_are_centred_over_the_batch_are_not_split_silently() -> None:
    def centred(model: nn.Module, batch: Batch) -> dict[str, Any]:
        found = model(batch["left"])
        return {"views": (found - found.mean(0), found)}

    assert "two passes" in str(refusal(encoder(), covariance, centred))


def test_a_forward_that_cannot_be_repeated_is_refused_before_its_gradient() -> None:
    """A generator of its own gives other masks in the second pass."""
    generator = torch.Generator().manual_seed(0)
    is_noisy = False

    def noisy(model: nn.Module, batch: Batch) -> dict[str, Any]:
        found = both(model, batch)
        noise = torch.rand(len(batch["left"]), WIDTH, generator=generator, dtype=torch.float64)
        return {"views": tuple(view * (noise if is_noisy else 1.0) for view in found["views"])}

    model = encoder()
    step = memfit.fit(model, contrastive(model), pairs(), memory=PLENTY, micro_batch_size=3, outputs_fn=noisy)
    is_noisy = True
    with pytest.raises(InexactAccumulation, match="second time"):
        step(pairs())
    assert all(p.grad is None or p is model.temperature for p in model.parameters())


def test_coupled_without_outputs_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="outputs_fn"):
        memfit.fit(encoder(), lambda m, b: m(b["left"]).mean(), pairs(), memory=PLENTY, count="coupled")


# ---- where fakes do not do ---------------------------------------------------------------------------


def reads_its_data(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Fails on fake tensors."""
    assert bool((batch["left"] >= 0).all())
    return both(model, batch)


def goes_another_way_on_fakes(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Does less on fake tensors."""
    found = both(model, batch)
    extra = type(batch["left"]) is Tensor
    return {"views": tuple(view.exp().log() if extra else view for view in found["views"])}


@pytest.mark.parametrize("outputs_fn", [reads_its_data, goes_another_way_on_fakes])
def test_two_passes_are_recorded_really_where_fakes_do_not_do(outputs_fn: Any) -> None:
    model, batch = encoder(dtype=torch.float32), pairs(24)
    profile = memfit.profile(model, contrastive(model), batch, micro_batch_size=6, outputs_fn=outputs_fn)
    assert profile.graph(6).held_bytes > 0
    assert profile.loss_of_all.ops
    step = memfit.fit(
        model,
        contrastive(model),
        batch,
        memory=PLENTY,
        micro_batch_size=6,
        outputs_fn=outputs_fn,
        count="coupled",
    )
    promised = step.plan.predicted_peak_bytes
    step(batch)
    assert step.verdict is not None
    assert step.verdict.measured_peak_bytes <= promised == step.verdict.predicted_peak_bytes


# ---- at the seams ------------------------------------------------------------------------------------


class Baseline(nn.Module):
    """An encoder with a moving mean that the loss writes, and a norm that the loss runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()
        self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Any:
        return self.inner(tokens)


def with_a_baseline(model: Any) -> Callable[[Any, Batch], Tensor]:
    def loss(outputs: Any, batch: Batch) -> Tensor:
        left = model.norm(outputs["views"][0]) - model.mean
        found: Tensor = (left @ left.T).logsumexp(1).mean()
        with torch.no_grad():
            model.mean.mul_(0.5).add_(outputs["views"][1].mean(0), alpha=0.5)
        return found

    return loss


@pytest.mark.parametrize("batch_norm", ["exact", "frozen", "ghost"])
def test_what_the_loss_writes_to_buffers_stays_and_its_norm_is_as_was_said(batch_norm: str) -> None:
    torch.manual_seed(3)
    model, batch = Baseline(), pairs()
    twin = copy.deepcopy(model)
    loss_fn = with_a_baseline(model)
    step = memfit.fit(
        model,
        loss_fn,
        batch,
        memory=PLENTY,
        micro_batch_size=3,
        outputs_fn=both,
        count="coupled",
        batch_norm=batch_norm,
    )
    if batch_norm == "frozen":
        twin.norm.eval()
    for _ in range(3):
        step(batch)
        with_a_baseline(twin)(both(twin, batch), batch).backward()
        assert worst_error(model, twin) <= 1e-11
    for (name, found), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("count", ["auto", "coupled"])
def test_gradient_hooks_do_not_hinder_two_passes_and_run_once(count: str) -> None:
    model, batch = encoder(), pairs()
    twin = copy.deepcopy(model)
    calls: list[nn.Module] = []

    def clamped(net: nn.Module, gradient: Tensor) -> Tensor:
        calls.append(net)
        return gradient.clamp(-1e-3, 1e-3)

    for net in (model, twin):
        net.head.weight.register_hook(functools.partial(clamped, net))
    step = memfit.fit(
        model,
        contrastive(model),
        batch,
        memory=PLENTY,
        micro_batch_size=3,
        outputs_fn=both,
        count=count,
    )
    assert not calls
    step(batch)
    contrastive(twin)(both(twin, batch), batch).backward()
    assert worst_error(model, twin) <= 1e-12
    assert calls == [model, twin]
    assert step.audit is not None
    assert step.audit.is_exact


def test_a_loss_that_needs_all_its_rows_is_left_whole_without_an_error() -> None:
    def of_seven(outputs: Any, batch: Batch) -> Any:
        if len(outputs["views"][0]) != ROWS:
            raise ValueError("seven rows are needed")
        return outputs["views"][0].square().mean()

    step = memfit.fit(encoder(), of_seven, pairs(), memory=PLENTY, outputs_fn=both)
    assert step.plan.gradient_accumulation_steps == 1
    step(pairs())


@pytest.mark.parametrize("pinned", [None, 512])
def test_a_loss_that_takes_all_rows_or_none_is_measured_in_every_op(pinned: int | None) -> None:
    """Few rows alone cannot be run: the second pass of few is, or the whole batch."""
    rows = 512
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    batch = torch.randn(rows, 8)

    def outputs_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return F.normalize(model(batch))

    def loss_fn(outputs: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(20 * outputs @ outputs.T, torch.arange(rows))

    found = memfit.profile(model, loss_fn, batch, outputs_fn=outputs_fn, micro_batch_size=pinned)
    assert re.fullmatch(r"measured at \d+ and \d+ rows", found.source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_made_up_outputs_are_as_long_as_embeddings_and_between_0_and_1(
    dtype: torch.dtype,
) -> None:
    """A softmax of large products leaves denormal numbers, which take CPUs ten times as long."""
    for shape in ((50,), (50, 64), (50, 8, 8)):
        found = _made_up(torch.zeros(2, *shape[1:], dtype=dtype), shape)
        assert (found.shape, found.dtype) == (shape, dtype)
        numbers = torch.view_as_real(found) if dtype.is_complex else found
        assert 0 <= numbers.min() < numbers.max() <= 1
        if len(shape) > 1:
            assert 0.3 < found.abs().float().flatten(1).norm(dim=1).max() < 1.5


def test_a_batch_pinned_whole_may_be_said_to_be_coupled_and_a_larger_one_is_run_in_parts() -> None:
    model = encoder()
    step = in_parts(model, contrastive(model), pairs(), ROWS)
    assert not step.plan.is_two_pass
    twin, batch = copy.deepcopy(model), pairs(17)
    step(batch)
    by_parts(twin, contrastive(twin), batch, ROWS)
    assert worst_error(model, twin) <= 1e-12


def test_a_stored_profile_of_two_passes_is_used_without_another_audit() -> None:
    model, batch, runs = encoder(), pairs(), torch.zeros(())

    def counted(net: nn.Module, part: Batch) -> dict[str, Any]:
        runs.add_(1)
        return both(net, part)

    loss_fn = contrastive(model)
    first = memfit.fit(model, loss_fn, batch, memory=PLENTY, micro_batch_size=3, outputs_fn=counted)
    runs.zero_()
    stored = memfit.Profile.from_json(first.profile.to_json())
    again = memfit.fit(
        model, loss_fn, batch, memory=PLENTY, micro_batch_size=3, outputs_fn=counted, profile=stored
    )
    assert runs == 0
    assert again.plan.is_two_pass
    assert again.audit == first.audit
