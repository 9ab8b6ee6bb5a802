"""Small models that each show one thing a replay must get right, and helpers that run and compare a step.

A case is a function ``body(m, x)`` over named children; its loss is the mean square of what it returns.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memfit.core.batching import parts_for
from memfit.core.devices import Roofline
from memfit.core.graph import Level, Profile, Residents, StepGraph, ValueKey
from memfit.core.plan import find_plan
from memfit.core.timeline import droppable
from memfit.core.timeline import run as simulate_run
from memfit.errors import InfeasibleBudget
from memfit.runtime import count, handles
from memfit.runtime.batch import split
from memfit.runtime.meter import PeakMeter, resident_bytes
from memfit.runtime.micro import Weighed
from memfit.runtime.probe import RooflineProbe
from memfit.runtime.record import record
from memfit.runtime.replay import Replayer, decisions_of

WIDTH = 12
ROWS = 6

LossFn = Callable[[Any, Any], Tensor]


class Net(nn.Module):
    """A model whose forward is a plain function over named children."""

    def __init__(self, body: Callable[[Any, Any], Any], **children: Any) -> None:
        super().__init__()
        self.body = body
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Any) -> Tensor:
        """Runs the body."""
        out: Tensor = self.body(self, x)
        return out


class UNet(nn.Module):
    """Skips across the whole depth, which a chain of blocks does not have."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        widths = [3, *(width << level for level in range(depth))]
        self.down = nn.ModuleList(_twice(a, b) for a, b in pairwise(widths))
        self.middle = _twice(widths[-1], 2 * widths[-1])
        self.widen = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:0:-1])
        self.up = nn.ModuleList(_twice(2 * w, w) for w in widths[:0:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Down, across and up."""
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for widen, block in zip(self.widen, self.up, strict=True):
            x = block(torch.cat([widen(x), skips.pop()], dim=1))
        return x


def _twice(inputs: int, outputs: int) -> nn.Module:
    """Two convolutions, normalised."""
    one, two = (nn.Conv2d(width, outputs, 3, padding=1) for width in (inputs, outputs))
    return nn.Sequential(one, nn.GroupNorm(8, outputs), nn.SiLU(), two, nn.GroupNorm(8, outputs), nn.SiLU())


@dataclass(frozen=True)
class Case:
    """A model, its batch and its loss. ``replays`` is False where nothing of it can be replayed."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: LossFn
    replays: bool = True


CASES: dict[str, Case] = {}


def square_loss(model: Any, batch: Any) -> Tensor:
    """A loss that uses every element."""
    loss: Tensor = model(batch).float().square().mean()
    return loss


def floats() -> Tensor:
    """A batch of rows of numbers."""
    return torch.randn(ROWS, WIDTH)


def images() -> Tensor:
    """A batch of small images."""
    return torch.randn(ROWS, 3, 8, 8)


def tokens() -> Tensor:
    """A batch of token numbers."""
    return torch.randint(0, 20, (ROWS, 7))


def linear() -> nn.Linear:
    """A layer that keeps the width."""
    return nn.Linear(WIDTH, WIDTH)


def case(
    batch: Callable[[], Any] = floats, loss: LossFn = square_loss, replays: bool = True, **children: Any
) -> Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]:
    """Registers a body as a case; children are factories."""

    def register(body: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def build() -> nn.Module:
            return Net(body, **{name: make() for name, make in children.items()})

        CASES[body.__name__] = Case(body.__name__, build, batch, loss, replays)
        return body

    return register


# ---- in-place writes ---------------------------------------------------------------------------------


@case(lin=linear, out=linear)
def in_place_chain(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    mask = torch.empty_like(h).bernoulli_(0.7).div_(0.7)
    h = (h * mask).add_(1.0).mul_(0.5).relu_()
    copied = torch.zeros_like(h).copy_(h)
    return m.out(copied.sub_(0.1).sin().sigmoid_())


@case(lin=linear, out=linear)
def partial_writes_through_views(m: Any, x: Tensor) -> Any:
    h = m.lin(x) * 2
    h[:, :3].mul_(0.5)
    h[1:3].copy_(x[1:3])
    h.view(-1)[5:9].zero_()
    h.t()[4].add_(h.detach()[:, 0])
    return m.out(torch.exp(h * 0.1) * h)


@case(lin=linear)
def argument_overwritten_while_a_record_waits(m: Any, x: Tensor) -> Any:
    scale = m.lin.weight.detach() * 0.5
    first = torch.sin(x @ scale)
    scale.mul_(3.0)
    second = torch.cos(x @ scale)
    scale[0].zero_()
    return torch.tanh(m.lin(first) * second + x @ scale)


@case(lin=linear)
def the_batch_is_overwritten_in_the_forward(m: Any, x: Tensor) -> Any:
    x = x.clone()
    first = torch.sin(x * 2)
    x.relu_()
    return m.lin(first) * torch.exp(x * 0.1) * first


@case(lin=linear)
def out_variants(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        buffer = torch.empty_like(x)
        torch.mul(x, 2.0, out=buffer)
        grown = torch.empty(0)
        torch.add(buffer, 1.0, out=grown)
    return m.lin(x) * torch.sin(grown) * buffer


@case(lin=linear)
def write_ops_of_tensors(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    index = torch.arange(ROWS).flip(0)
    h = h.index_put((index[:2],), x[:2]).masked_fill(x > 1, 0.3)
    filled = torch.full_like(h, 0.5)
    filled[index[:3]] = 2.0
    filled.scatter_(1, torch.zeros(ROWS, 1, dtype=torch.long), 3.0)
    filled.masked_fill_(x < -1, 0.1)
    return torch.where(x > 0, h * filled, h.clamp(min=-0.5)).index_select(0, index).cumsum(0)


# ---- norms and random numbers ------------------------------------------------------------------------


@case(images, conv=lambda: nn.Conv2d(3, 6, 3), norm=lambda: nn.BatchNorm2d(6))
def batch_norm_module(m: Any, x: Tensor) -> Any:
    return torch.relu_(m.norm(m.conv(x))).tanh()


@case(lin=linear, norm=lambda: nn.BatchNorm1d(WIDTH, momentum=None), twice=lambda: nn.BatchNorm1d(WIDTH))
def batch_norm_called_twice(m: Any, x: Tensor) -> Any:
    return m.norm(m.twice(m.norm(m.lin(x))).sin()) * m.twice(x)


@case(
    lin=linear,
    mean=lambda: nn.Buffer(torch.zeros(WIDTH)),
    variance=lambda: nn.Buffer(torch.ones(WIDTH)),
)
def batch_norm_functional(m: Any, x: Tensor) -> Any:
    trained = F.batch_norm(m.lin(x), m.mean, m.variance, training=True, momentum=0.3)
    return F.batch_norm(trained.exp(), m.mean, m.variance, training=False).sin()


@case(lin=linear, norm=lambda: nn.BatchNorm1d(WIDTH))
def statistics_read_before_they_are_written(m: Any, x: Tensor) -> Any:
    h = m.lin(x) * m.norm.running_var.exp()
    early = F.batch_norm(h.sin(), m.norm.running_mean, m.norm.running_var, training=False).cos()
    return m.norm(h.tanh()) * early.exp()


@case(images, norm=lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
def instance_norm(m: Any, x: Tensor) -> Any:
    return m.norm(x).sigmoid().square()


@case(images, norm=lambda: nn.GroupNorm(3, 3), plain=lambda: nn.LayerNorm(8, elementwise_affine=False))
def norms_with_none_arguments(m: Any, x: Tensor) -> Any:
    return m.plain(m.norm(x).sin()) * F.layer_norm(x, (8,))


@case(lin=linear, drop=lambda: nn.Dropout(0.3), alpha=lambda: nn.AlphaDropout(0.2))
def dropout_everywhere(m: Any, x: Tensor) -> Any:
    h = m.drop(m.lin(x))
    h = F.dropout(h.tanh(), 0.4, training=True)
    h = m.alpha(h) * F.dropout(h, 0.1, training=True, inplace=False)
    return F.feature_alpha_dropout(h.sin()[..., None], 0.2, training=True)[..., 0]


@case(lin=linear)
def random_ops(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    noise = torch.randn_like(h) * torch.rand(h.shape) + torch.normal(h.detach(), 0.1)
    picked = torch.multinomial(h.detach().softmax(-1), 3, replacement=True)
    order = torch.randperm(ROWS)
    h = F.gumbel_softmax(h + noise, tau=0.8) * F.rrelu(h[order], training=True)
    coin = torch.rand(ROWS, WIDTH).uniform_(-1, 1).exponential_()
    return h.gather(1, picked).tanh() * coin[:, :3] * torch.bernoulli(h.detach().sigmoid())[:, :3]


@case(lin=linear)
def random_ops_with_a_generator_of_their_own(m: Any, x: Tensor) -> Any:
    generator = torch.Generator().manual_seed(3)
    h = m.lin(x) * torch.rand(x.shape, generator=generator)
    h = h * torch.empty_like(h).normal_(generator=generator)
    return torch.sin(h) * torch.bernoulli(h.detach().sigmoid(), generator=generator)


# ---- precision ---------------------------------------------------------------------------------------


def autocast_loss(model: Any, batch: Any) -> Tensor:
    """The forward in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch)
    loss: Tensor = out.float().square().mean()
    return loss


@case(loss=autocast_loss, lin=linear, drop=lambda: nn.Dropout(0.2), out=linear)
def autocast_inside(m: Any, x: Tensor) -> Any:
    h = m.lin(m.lin(x).relu_())
    return m.out(F.gelu(m.drop(h)).float() @ m.lin.weight)


@case(lin=linear)
def dtype_views_and_complex(m: Any, x: Tensor) -> Any:
    h = m.lin(x).sin()
    bits = h.detach().clone().view(torch.int32)
    h = h * (bits & 1)
    z = torch.fft.rfft(h) * torch.polar(x[:, :7].abs(), x[:, :7])
    z = torch.view_as_complex(torch.view_as_real(z * z.conj() + z).tanh())
    return torch.fft.irfft(z.conj() * 2).exp() * z.abs().sum() + z.imag.square().sum() + z.real.sin().sum()


# ---- views, many outputs, lists ----------------------------------------------------------------------


@case(lin=linear)
def views_smaller_than_their_base(m: Any, x: Tensor) -> Any:
    h = m.lin(x).exp()
    small = h[:, 2:5]
    mixed = small.t().reshape(3, 2, 3).transpose(0, 2) * 2
    wide = h[:, :1].expand(-1, 4) * h.diagonal()[:, None]
    seen = h.unfold(1, 4, 2).sin()
    return (mixed * mixed).sum() + (wide.tanh() * wide).sum() + seen.square().sum() * small.detach()


@case(lin=linear)
def many_outputs_and_lists(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    a, b, c = h.chunk(3, dim=1)
    parts = torch.split(torch.cat([a * b, torch.stack([b, c]).sin().prod(0)], 1), 2, dim=1)
    top, where = h.topk(4, dim=1)
    ordered, _ = h.tanh().sort(dim=1)
    deviation, mean = torch.std_mean(ordered * h, dim=1, keepdim=True)
    largest, _ = (h * deviation).max(dim=1, keepdim=True)
    return torch.einsum("ni,nj->ij", top * where, ordered) * (largest.sum() + mean.sum() + parts[1].sum())


@case(lin=linear)
def saved_inputs_and_outputs(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    h = torch.tanh(h) * torch.sigmoid(h) + torch.exp(-h) * torch.rsqrt(h.square() + 1)
    return torch.log_softmax(h, -1) * torch.softmax(h * h, -1) / (h.norm() + 1)


@case(lin=linear)
def detach_and_alias(m: Any, x: Tensor) -> Any:
    h = m.lin(x).sin()
    cut = h.detach()
    same = torch.ops.aten.alias(h)
    return same * cut.exp() * h.data.cos() + torch.ops.aten.alias(cut) * h.view_as(h)


@case(lin=linear)
def regions_without_gradients(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        teacher = m.lin(x).softmax(-1) * 2
        with torch.enable_grad():
            inner = m.lin(x).sin()
        teacher = teacher * inner
    return m.lin(x).log_softmax(-1) * teacher.exp() + inner


# ---- structure ---------------------------------------------------------------------------------------


@case(first=linear, second=linear)
def tied_weights(m: Any, x: Tensor) -> Any:
    return F.linear(m.first(x).tanh(), m.first.weight).exp() * 0.01 * m.second(m.second(x).sin())


@case(block=lambda: nn.Sequential(linear(), nn.Dropout(0.2), nn.GELU(), nn.BatchNorm1d(WIDTH)))
def module_called_three_times(m: Any, x: Tensor) -> Any:
    return m.block(m.block(m.block(x)))


@case(tokens, embed=lambda: nn.Embedding(20, 8), rnn=lambda: nn.LSTM(8, 8, 2, batch_first=True, dropout=0.3))
def lstm(m: Any, x: Tensor) -> Any:
    out, (h, c) = m.rnn(m.embed(x).tanh())
    return (out.sin() * out).sum() + (h * c).sum()


@case(
    tokens,
    embed=lambda: nn.Embedding(20, 8),
    rnn=lambda: nn.GRU(8, 8, bidirectional=True),
    cell=lambda: nn.LSTMCell(16, 8),
)
def gru_and_cells(m: Any, x: Tensor) -> Any:
    out, _ = m.rnn(m.embed(x))
    state = None
    for step in out.sin():
        state = m.cell(step, state)
    assert state is not None
    return state[0].exp() * state[1]


@case(tokens, embed=lambda: nn.Embedding(20, WIDTH, sparse=True, padding_idx=0), lin=linear)
def sparse_embedding(m: Any, x: Tensor) -> Any:
    return m.lin(m.embed(x).sin()).tanh()


@case(tokens, embed=lambda: nn.Embedding(20, WIDTH, max_norm=1.0), bag=lambda: nn.EmbeddingBag(20, WIDTH))
def embedding_that_writes_its_weight(m: Any, x: Tensor) -> Any:
    return m.embed(x).sin().sum(1) * m.bag(x).exp()


@case(
    images,
    conv=lambda: nn.Conv2d(3, 8, 3, bias=False).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    up=lambda: nn.ConvTranspose2d(8, 3, 2, stride=2),
)
def channels_last_conv(m: Any, x: Tensor) -> Any:
    h = m.conv(x.to(memory_format=torch.channels_last)).relu_()
    pooled = F.max_pool2d(h, 2) + F.adaptive_avg_pool2d(h, 3)
    return m.up(pooled).tanh() * F.interpolate(pooled, 6, mode="bilinear")[:, :3]


@case(
    images,
    conv=lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
    lin=lambda: nn.Linear(6, 6),
)
def parametrized_weights(m: Any, x: Tensor) -> Any:
    return m.lin(m.conv(x).sin()).exp()


@case(
    attend=lambda: nn.MultiheadAttention(WIDTH, 3, dropout=0.2, batch_first=True),
    block=lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True),
)
def attention(m: Any, x: Tensor) -> Any:
    h = x.view(2, 3, WIDTH)
    h, weights = m.attend(h, h, h)
    return m.block(h) * weights.sum()


@case(lin=linear, average=lambda: nn.Buffer(torch.zeros(WIDTH)), count=lambda: nn.Buffer(torch.tensor(0)))
def buffers_written_by_hand(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    before = torch.sin(h + m.average)
    m.count += 1
    m.average.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return before * torch.cos(h - m.average) / m.count


# ---- autograd of the user's own ----------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """Saves tensors and sets attributes of the context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """x * sin(x) * factor."""
        waves = torch.sin(x)
        ctx.save_for_backward(x, waves)
        ctx.factor = factor
        ctx.waves_squared = waves * waves
        return x * waves * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Uses all that was kept."""
        x, waves = ctx.saved_tensors
        cosine = (1 - ctx.waves_squared).clamp(min=0).sqrt() * torch.cos(x).sign()
        return grads[0] * (waves + x * cosine) * ctx.factor, None


@case(lin=linear)
def custom_function(m: Any, x: Tensor) -> Any:
    return torch.tanh(m.lin(Scaled.apply(m.lin(x), 0.5)))  # type: ignore[no-untyped-call]


class Invisible(torch.autograd.Function):
    """Computes where no dispatch mode sees it, as a kernel of the user's own does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """exp(x), written by NumPy."""
        out = make(x)
        out.numpy()[...] = x.detach().exp().numpy()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """exp again."""
        (out,) = ctx.saved_tensors
        return grads[0] * out, None


@case(lin=linear)
def invisible_write_into_empty(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    for make in (torch.empty_like, torch.zeros_like, _new_empty, _resized):
        h = Invisible.apply(h.tanh(), make).sin()  # type: ignore[no-untyped-call]
    return h


@case(lin=linear)
def invisible_write_after_a_visible_one(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    for make in (_filled, _emptied):
        h = Invisible.apply(h.tanh(), make).sin()  # type: ignore[no-untyped-call]
    return h


def _new_empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _resized(x: Tensor) -> Tensor:
    return torch.empty(0).resize_(x.shape)


def _filled(x: Tensor) -> Tensor:
    return torch.empty_like(x).fill_(2.0)


def _emptied(x: Tensor) -> Tensor:
    return torch.empty_like(x).zero_()


def penalty_loss(model: Any, batch: Any) -> Tensor:
    """A gradient penalty: a backward inside the forward, of which the backward goes backward again."""
    x = batch.detach().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    loss: Tensor = out.square().mean() + slope.norm(dim=1).sub(1).square().mean()
    return loss


@case(loss=penalty_loss, lin=linear, out=linear)
def gradient_penalty_inside(m: Any, x: Tensor) -> Any:
    return m.out(F.dropout(m.lin(x).tanh(), 0.2).sin())


@case(block=lambda: nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.3)), lin=linear)
def nested_checkpoint(m: Any, x: Tensor) -> Any:
    h = checkpoint(m.block, m.lin(x).sin(), use_reentrant=False)
    assert h is not None
    h = checkpoint(
        lambda y: checkpoint(m.block, y.exp(), use_reentrant=False) * y, h.tanh(), use_reentrant=False
    )
    return m.lin(h.cos())


@case(block=lambda: nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.3)), lin=linear)
def reentrant_checkpoint(m: Any, x: Tensor) -> Any:
    return m.lin(checkpoint(m.block, m.lin(x).sin(), use_reentrant=True).cos())


# ---- control flow that looks at the data -------------------------------------------------------------


@case(gate=lambda: nn.Linear(WIDTH, 4), experts=lambda: nn.ModuleList(linear() for _ in range(4)))
def mixture_of_experts(m: Any, x: Tensor) -> Any:
    scores = m.gate(x).softmax(-1)
    best, chosen = scores.max(-1)
    out = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        rows = (chosen == number).nonzero()[:, 0]
        if len(rows):
            out = out.index_add(0, rows, expert(x[rows]).relu() * best[rows, None])
    return out.sin() * x


@case(blocks=lambda: nn.ModuleList(nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.1)) for _ in range(5)))
def skipped_layers(m: Any, x: Tensor) -> Any:
    for number, block in enumerate(m.blocks):
        if int(x.sum() * 7) % (number + 2):
            x = x + block(x).exp() * 0.1
    return x


# ---- running and comparing ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """All that a step leaves behind."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    random_state: Tensor


def outcome_of(model: nn.Module, loss: Tensor) -> Outcome:
    """Reads what a step left behind."""
    gradients = {
        name: None if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad
        for name, p in model.named_parameters()
    }
    return Outcome(loss.detach(), gradients, dict(model.named_buffers()), torch.get_rng_state())


def differences(one: Outcome, other: Outcome) -> list[str]:
    """The names of what is not the same to the bit; NaN equals NaN."""
    found = [] if _same(one.loss, other.loss) else ["loss"]
    for kind, a, b in (("grad", one.gradients, other.gradients), ("buffer", one.buffers, other.buffers)):
        if a.keys() != b.keys():
            found.append(f"{kind} names")
        found += [f"{kind} {name}" for name in a.keys() & b.keys() if not _same(a[name], b[name])]
    return found if torch.equal(one.random_state, other.random_state) else [*found, "random state"]


def assert_same(one: Outcome, other: Outcome) -> None:
    """Loss, every gradient, every buffer and the random stream are the same to the bit."""
    assert differences(one, other) == []


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal in type, shape and every bit that counts."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))


def step_outcome(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    recompute: Iterable[ValueKey] | None = None,
    levels: Collection[Level] = (),
    seed: int = 11,
    saved_in: frozenset[str] | None = None,
) -> Outcome:
    """Forward and backward on a copy of the model: plain, or with the named values replayed."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    mode: Any = contextlib.nullcontext()
    if recompute is not None:
        mode = Replayer(model, decisions_of(recompute, levels, saved_in))
    with mode:
        loss = loss_fn(model, batch)
    loss.backward()
    return outcome_of(model, loss)


def recorded(model: nn.Module, loss_fn: LossFn, batch: Any) -> StepGraph:
    """The graph of a real step of a copy of the model."""
    model = copy.deepcopy(model)
    torch.manual_seed(11)
    tensors = [batch] if isinstance(batch, Tensor) else list(batch.values())
    return record(
        model,
        lambda: Weighed(loss_fn(model, batch).reshape(()), {}),
        [*model.parameters(), *model.buffers(), *tensors],
        RooflineProbe(Roofline()),
        rows=len(tensors[0]),
        gradients_resident=False,
    ).graph


def keys(graph: StepGraph, values: Iterable[int]) -> list[ValueKey]:
    """The names of values."""
    return sorted(graph.value_key(value) for value in values)


def closed(graph: StepGraph, values: Iterable[int]) -> set[int]:
    """The values with every overwritten value that making them again needs."""
    found: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            inputs = graph.ops[graph.values[value].producer].inputs
            stack.extend(v for v in inputs if graph.values[v].is_overwritten)
    return found


def profile_of(graph: StepGraph) -> Profile:
    """A profile that holds one graph and nothing beside it."""
    return Profile(graph.rows, (graph,), Residents(0, 0, 0, 0))


def planned(graph: StepGraph, share: float) -> list[ValueKey]:
    """The plan between the least memory (0) and no recomputation (1)."""
    most = simulate_run(graph).peak.total_bytes
    try:
        least = find_plan(profile_of(graph), memory=1).predicted_peak_bytes
    except InfeasibleBudget as refused:
        least = refused.needed_bytes
    return list(find_plan(profile_of(graph), memory=int(least + share * (most - least))).recompute)


def levels_of(graph: StepGraph) -> Iterator[dict[int, Level]]:
    """Values to drop with levels of every kind: all in passing, mixed, without any order."""
    possible = sorted(droppable(graph))
    draw = random.Random(7)
    parts = 4

    def segment(value: int) -> int:
        return graph.values[value].producer * parts // graph.forward_ops

    yield {v: Level(segment(v), segment(v)) for v in possible}
    for _ in range(2):
        yield {v: Level(segment(v), draw.randint(segment(v), parts)) for v in possible}
        some = closed(graph, [v for v in possible if draw.random() < 0.6])
        yield {v: Level(draw.randint(0, 2), draw.randint(0, 2)) for v in sorted(some)}


def plans_of(graph: StepGraph) -> Iterator[tuple[str, list[ValueKey]]]:
    """Plans of every kind, the useless ones too: any plan must be correct."""
    possible = sorted(droppable(graph))
    yield "everything", keys(graph, possible)
    draw = random.Random(5)
    for share in (0.2, 0.5, 0.8):
        chosen = [v for v in possible if draw.random() < share]
        yield f"{share:.0%} closed", keys(graph, closed(graph, chosen))
        yield f"{share:.0%} not closed", keys(graph, chosen)
    yield "every value, replayable or not", keys(graph, graph.produced())
    for share in (0.0, 0.5):
        yield f"planned at {share:.0%}", planned(graph, share)


def count_replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the name of every op that is replayed."""
    seen: list[str] = []
    run = handles.Record.run

    def counted(self: handles.Record, passing: Counter[handles.Handle] | None) -> None:
        seen.append(str(self.func))
        run(self, passing)

    monkeypatch.setattr(handles.Record, "run", counted)
    return seen


# ---- the zoo ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZooCase:
    """A real model in small. ``count`` is None where micro-batches would change the loss."""

    name: str
    build: Callable[[int], nn.Module]
    batch: Callable[[int, int], Any]
    loss: LossFn
    count: str | None
    rows: int


def _own_loss(model: Any, batch: Any) -> Tensor:
    """The loss a transformers model computes itself."""
    loss: Tensor = model(**batch).loss
    return loss


def _text(rows: int, scale: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (rows, 32 * scale))
    labels = ids.clone()
    labels[:, ::3] = -100
    return {"input_ids": ids, "labels": labels}


def _pictures(rows: int, scale: int) -> dict[str, Tensor]:
    side = 32 * scale
    return {"pixel_values": torch.randn(rows, 3, side, side), "labels": torch.randint(0, 10, (rows,))}


def _gpt2(scale: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2 * scale, n_embd=48 * scale, n_head=4, vocab_size=96, n_positions=32 * scale, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config)


def _llama(scale: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=2 * scale, hidden_size=48 * scale, intermediate_size=128 * scale, vocab_size=96,
        num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.1, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _bert(scale: int) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        num_hidden_layers=2 * scale, hidden_size=48 * scale, intermediate_size=128 * scale, vocab_size=96,
        num_attention_heads=4, max_position_embeddings=32 * scale,
    )  # fmt: skip
    return BertForMaskedLM(config)


def _vit(scale: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=2 * scale, hidden_size=48 * scale, intermediate_size=128 * scale,
        num_attention_heads=4, image_size=32 * scale, patch_size=4, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    config.num_labels = 10
    return ViTForImageClassification(config)


def _resnet(scale: int) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16 * scale, 32 * scale], depths=[2, 2 * scale], layer_type="basic",
    )  # fmt: skip
    config.num_labels = 10
    return ResNetForImageClassification(config)


def _convnet(scale: int) -> nn.Module:
    """Convolution, BatchNorm, in-place ReLU, dropout of channels, pooling."""
    width = 16 * scale
    block = [
        layer
        for _ in range(2)
        for layer in (
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
        )
    ]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3), *block, nn.MaxPool2d(2), *head)


def _classify(model: Any, batch: Any) -> Tensor:
    """Cross entropy over pictures."""
    return F.cross_entropy(model(batch["pixel_values"]), batch["labels"])


class _Recurrent(nn.Module):
    """Embedding, LSTM, a tied output layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, width)
        self.rnn = nn.LSTM(width, width, 2, batch_first=True, dropout=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of each position."""
        out, _ = self.rnn(self.embed(ids))
        return F.linear(out.tanh(), self.embed.weight)


def _sequence_loss(model: Any, batch: Any) -> Tensor:
    """Cross entropy over labels."""
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


class _Block(nn.Module):
    """A transformer block with attention of torch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block under a checkpoint of its own."""
        out: Tensor = checkpoint(self.block, x, use_reentrant=False, preserve_rng_state=False)
        return out


def _encoder(scale: int) -> nn.Module:
    width = 48 * scale
    middle = [
        nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True) for _ in range(2)
    ]
    return nn.Sequential(nn.Embedding(96, width), *middle, _Block(width), nn.Linear(width, 96))


ZOO = {
    zoo.name: zoo
    for zoo in (
        ZooCase("gpt2", _gpt2, _text, _own_loss, "shifted_labels", 12),
        ZooCase("llama", _llama, _text, _own_loss, "shifted_labels", 12),
        ZooCase("bert", _bert, _text, _own_loss, "labels", 12),
        ZooCase("vit", _vit, _pictures, _own_loss, "rows", 12),
        ZooCase("resnet", _resnet, _pictures, _own_loss, None, 12),
        ZooCase("convnet", _convnet, _pictures, _classify, None, 12),
        ZooCase("recurrent", lambda scale: _Recurrent(48 * scale), _text, _sequence_loss, "labels", 12),
        ZooCase("encoder", _encoder, _text, _sequence_loss, "labels", 12),
    )
}


@dataclass(frozen=True)
class Judged:
    """One budget of one model, judged by the allocator."""

    budget_bytes: int
    predicted_bytes: int
    measured_bytes: int
    differences: list[str]
    recomputes: int


def budgets_of(profile: Profile, number: int = 5) -> list[int]:
    """Budgets from the least memory to a little more than no recomputation takes."""
    try:
        least = find_plan(profile, memory=1).predicted_peak_bytes
    except InfeasibleBudget as refused:
        least = refused.needed_bytes
    most = find_plan(profile, memory=2**50).predicted_peak_bytes * 33 // 32
    return [least + (most - least) * i // (number - 1) for i in range(number)]


def accumulated(model: nn.Module, loss_fn: LossFn, parts: list[Any], shares: list[float] | None) -> Tensor:
    """The plain step over micro-batches, written by hand."""
    total: Tensor | None = None
    for number, part in enumerate(parts):
        loss = loss_fn(model, part)
        if shares is not None:
            loss = loss * shares[number]
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def judge(zoo: ZooCase, model: nn.Module, batch: Any, step: Any) -> Judged:
    """Runs a fitted step and the plain one at the same micro-batches; measures the peak of the former."""
    plan = step.plan
    counter = {"rows": count.rows, "labels": count.labels, "shifted_labels": count.shifted_labels}
    twin = copy.deepcopy(model)
    parts = split(batch, parts_for(plan.rows, plan.micro_batch_size))
    shares = None if len(parts) == 1 or zoo.count is None else count.shares(counter[zoo.count], parts)
    torch.manual_seed(11)
    plain = outcome_of(twin, accumulated(twin, zoo.loss, parts, shares))
    torch.manual_seed(11)
    resident = resident_bytes([*model.parameters(), *model.buffers(), *batch.values()])
    with PeakMeter("cpu") as meter:
        loss = step._run(batch)
    found = differences(plain, outcome_of(model, loss))
    return Judged(
        plan.budget_bytes, plan.predicted_peak_bytes, resident + meter.peak_bytes, found, plan.recomputes
    )
