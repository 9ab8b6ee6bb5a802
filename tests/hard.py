"""Models with hard control flow, state, and unusual autograd: what a replay is most likely to get wrong.

Each is larger than the cases of ``models.py``, so that budgets differ, and is judged at real budgets by the
allocator and by the plain step (``judged.py``). A body is a function over named children.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from models import LossFn, Net, square_loss

ROWS, WIDTH, TOKENS, WORDS = 24, 32, 9, 50

Children = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Hard:
    """One hard model.

    Attributes:
        raises: What the plain step itself raises, so that memfit must raise it too.
        count: How micro-batches are weighted; None where they would change the loss.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: LossFn
    raises: str | None = None
    count: str | None = None


HARD: dict[str, Hard] = {}


def floats() -> Tensor:
    """Rows of numbers."""
    return torch.randn(ROWS, WIDTH)


def images() -> Tensor:
    """Small pictures."""
    return torch.randn(ROWS, 3, 12, 12)


def tokens() -> Tensor:
    """Rows of token numbers."""
    return torch.randint(0, WORDS, (ROWS, TOKENS))


def linear(width: int = WIDTH) -> nn.Linear:
    """A layer that keeps the width."""
    return nn.Linear(width, width)


def tanh_block() -> nn.Sequential:
    """A small block with dropout."""
    return nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.1), linear(), nn.GELU())


def blocks(number: int = 4) -> nn.ModuleList:
    """Some of them."""
    return nn.ModuleList(tanh_block() for _ in range(number))


def hard(
    batch: Callable[[], Any] = floats,
    loss: LossFn = square_loss,
    raises: str | None = None,
    count: str | None = None,
    **children: Any,
) -> Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]:
    """Registers a body; children are factories."""

    def register(body: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def build() -> nn.Module:
            return Net(body, **{name: make() for name, make in children.items()})

        HARD[body.__name__] = Hard(body.__name__, build, batch, loss, raises, count)
        return body

    return register


# ---- control flow that depends on data -------------------------------------------------------------------


@hard(blocks=lambda: blocks(6), head=lambda: nn.Linear(WIDTH, 5))
def early_exit_of_the_batch(m: Any, x: Tensor) -> Any:
    for number, block in enumerate(m.blocks):
        x = x + block(x)
        if number > 1 and m.head(x).softmax(-1).max(-1).values.mean().item() > 0.3:
            break
    return m.head(x)


@hard(blocks=lambda: blocks(5), gate=lambda: nn.Linear(WIDTH, 1))
def early_exit_of_each_row(m: Any, x: Tensor) -> Any:
    done = torch.zeros(len(x), dtype=torch.bool)
    out = torch.zeros_like(x)
    for block in m.blocks:
        active = (~done).nonzero()[:, 0]
        if not len(active):
            break
        x = x.index_copy(0, active, x[active] + block(x[active]))
        leaving = active[m.gate(x[active])[:, 0] > 0.1]
        out = out.index_add(0, leaving, x[leaving])
        done[leaving] = True
    return out + x[~done].sum() * 0.1


@hard(block=tanh_block, halt=lambda: nn.Linear(WIDTH, 1))
def adaptive_computation_time(m: Any, x: Tensor) -> Any:
    budget, out, steps = torch.ones(len(x), 1), torch.zeros_like(x), 0
    while bool((budget > 0.05).any()) and steps < 8:
        share = torch.minimum(m.halt(x).sigmoid() * 0.6, budget)
        x = m.block(x) + x
        out, budget, steps = out + share * x, budget - share, steps + 1
    return out


@hard(experts=lambda: blocks(8), gate=lambda: nn.Linear(WIDTH, 8))
def experts_of_which_some_are_empty(m: Any, x: Tensor) -> Any:
    scores = m.gate(x) + torch.tensor([9.0, 9, 0, 0, -9, -9, -9, -9])
    weights, chosen = scores.softmax(-1).topk(2)
    out = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):  # also with no rows at all, as many implementations do
        rows, place = torch.where(chosen == number)
        out = out.index_add(0, rows, expert(x[rows]) * weights[rows, place, None])
    return out


@hard(experts=lambda: blocks(4), gate=lambda: nn.Linear(WIDTH, 4))
def experts_by_sorting_and_splitting(m: Any, x: Tensor) -> Any:
    weights, chosen = m.gate(x).softmax(-1).max(-1)
    order = chosen.argsort(stable=True)
    sizes = chosen.bincount(minlength=4).tolist()
    parts = x[order].split(sizes)
    made = torch.cat([expert(part) for expert, part in zip(m.experts, parts, strict=True)])
    return torch.zeros_like(x).index_copy(0, order, made) * weights[:, None]


@hard(up=linear, down=linear, parameters_of=lambda: nn.Parameter(torch.randn(4, WIDTH, WIDTH) * 0.1))
def experts_with_a_capacity(m: Any, x: Tensor) -> Any:
    scores = m.up(x)[:, :4].softmax(-1)
    chosen = F.one_hot(scores.argmax(-1), 4)
    place = (chosen.cumsum(0) * chosen - 1).max(-1).values
    kept = place < 5  # rows beyond the capacity are dropped
    slots = torch.zeros(4, 5, WIDTH).index_put((chosen.argmax(-1)[kept], place[kept]), x[kept])
    made = torch.bmm(slots, m.parameters_of).relu()
    return m.down(made[chosen.argmax(-1), place.clamp(max=4)] * kept[:, None] * scores.amax(-1, keepdim=True))


@hard(lin=linear, out=linear)
def shapes_from_data(m: Any, x: Tensor) -> Any:
    h = m.lin(x).tanh()
    picked = h[h > 0.2]
    found, inverse = (h.detach() * 3).round().unique(return_inverse=True)
    table = torch.zeros(len(found)).index_add(0, inverse.flatten(), h.flatten().exp())
    spread = torch.repeat_interleave(h, (x[:, 0].abs() * 2).long(), dim=0)
    return m.out(h * table[inverse]) * picked.square().mean() + spread.sin().sum() * 0.01


@hard(block=tanh_block, leaf=linear, join=lambda: nn.Linear(2 * WIDTH, WIDTH))
def recursion_over_a_tree(m: Any, x: Tensor) -> Any:
    def node(rows: Tensor) -> Any:
        if len(rows) < 2 or float(rows.sum()) > 12:
            return m.leaf(rows).mean(0).tanh()
        half = len(rows) // 2
        return m.block(m.join(torch.cat([node(rows[:half]), node(rows[half:])])))

    return node(x)


@hard(tokens, embed=lambda: nn.Embedding(WORDS, WIDTH), cell=lambda: nn.GRUCell(WIDTH, WIDTH),
      head=lambda: nn.Linear(WIDTH, WORDS))  # fmt: skip
def scheduled_sampling(m: Any, x: Tensor) -> Any:
    state, word, out = torch.zeros(len(x), WIDTH), x[:, 0], []
    for place in range(TOKENS):
        state = m.cell(m.embed(word), state)
        out.append(m.head(state))
        word = x[:, place] if torch.rand(()) < 0.5 else out[-1].argmax(-1)
    return torch.stack(out, 1).log_softmax(-1)


@hard(blocks=lambda: blocks(6))
def layers_dropped_by_chance(m: Any, x: Tensor) -> Any:
    for block in m.blocks:
        if torch.rand(()) > 0.3:
            x = x + block(x)
    return x


@hard(field=tanh_block)
def steps_of_a_solver_chosen_by_its_error(m: Any, x: Tensor) -> Any:
    time, size = 0.0, 0.5
    for _ in range(20):
        first = m.field(x)
        second = m.field(x + size * first)
        error = float((second - first).detach().abs().max()) * size
        if error < 0.2:
            x, time = x + size * 0.5 * (first + second), time + size
        size = min(1.0 - time, max(0.05, size * (1.4 if error < 0.1 else 0.7)))
        if time >= 1.0 - 1e-6:
            break
    return x


# ---- recurrence and sharing ------------------------------------------------------------------------------


@hard(tokens, embed=lambda: nn.Embedding(WORDS, WIDTH), head=linear,
      rnn=lambda: nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True, proj_size=16))  # fmt: skip
def packed_lstm(m: Any, x: Tensor) -> Any:
    lengths = (x % 7).sum(1) % TOKENS + 1
    packed = pack_padded_sequence(m.embed(x), lengths, batch_first=True, enforce_sorted=False)
    out, (state, _) = m.rnn(packed)
    return m.head(pad_packed_sequence(out, batch_first=True)[0].tanh()).sin() * state.exp().mean()


@hard(tokens, embed=lambda: nn.Embedding(WORDS, WIDTH), rnn=lambda: nn.GRU(WIDTH, WIDTH, 2, dropout=0.2),
      plain=lambda: nn.RNN(WIDTH, WIDTH))  # fmt: skip
def gru_then_rnn(m: Any, x: Tensor) -> Any:
    out, state = m.rnn(m.embed(x.t()))
    return m.plain(out.tanh())[0] * state[-1].exp()


@hard(tokens, embed=lambda: nn.Embedding(WORDS, WIDTH), cell=lambda: nn.LSTMCell(WIDTH, WIDTH),
      norm=lambda: nn.LayerNorm(WIDTH), head=lambda: nn.Linear(WIDTH, WORDS, bias=False))  # fmt: skip
def cells_in_a_loop_with_a_tied_head(m: Any, x: Tensor) -> Any:
    state, out = None, []
    for word in x.t():
        state = m.cell(m.embed(word), state)
        out.append(m.norm(state[0]))
    return F.linear(torch.stack(out), m.embed.weight).log_softmax(-1)


@hard(block=tanh_block)
def one_block_called_six_times(m: Any, x: Tensor) -> Any:
    for _ in range(6):
        x = x + m.block(x)
    return x


@hard(first=linear, second=linear, norm=lambda: nn.BatchNorm1d(WIDTH))
def weights_shared_across_layers(m: Any, x: Tensor) -> Any:
    for turn in range(4):
        weight = m.first.weight if turn % 2 else m.first.weight.t()
        x = m.norm(F.linear(x, weight, m.second.bias).relu()) + m.second(x)
    return x


class Stateful(nn.Module):
    """Carries its hidden state from step to step, as truncated backpropagation does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.register_buffer("state", torch.zeros(1, ROWS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """The states of each position."""
        out: Tensor
        out, state = self.rnn(self.embed(x), self.get_buffer("state"))
        self.register_buffer("state", state.detach())
        return out


HARD["state_carried_from_step_to_step"] = Hard(
    "state_carried_from_step_to_step", Stateful, tokens, square_loss
)


# ---- buffers and norms -----------------------------------------------------------------------------------


@hard(images, conv=lambda: nn.Conv2d(3, 8, 3), out=lambda: nn.Conv2d(8, 8, 3),
      mean=lambda: nn.Buffer(torch.zeros(8)), variance=lambda: nn.Buffer(torch.ones(8)))  # fmt: skip
def functional_batch_norm(m: Any, x: Tensor) -> Any:
    h = F.batch_norm(m.conv(x), m.mean, m.variance, training=True, momentum=0.2).relu_()
    h = F.batch_norm(m.out(h), m.mean, m.variance, training=True).sigmoid()
    return F.batch_norm(h, m.mean, m.variance, training=False)


@hard(images, conv=lambda: nn.Conv2d(3, 8, 3), norm=lambda: nn.BatchNorm2d(8, momentum=None),
      late=lambda: nn.InstanceNorm2d(8, track_running_stats=True))  # fmt: skip
def norms_in_a_loop(m: Any, x: Tensor) -> Any:
    h = m.conv(x)
    for _ in range(3):
        h = m.late(m.norm(h).relu_())
    return h


@hard(student=tanh_block, teacher=tanh_block)
def teacher_that_follows_in_the_forward(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        for old, new in zip(m.teacher.parameters(), m.student.parameters(), strict=True):
            old.lerp_(new, 0.01)
        target = m.teacher(x).softmax(-1)
    return m.student(x + 0.1 * torch.randn_like(x)).log_softmax(-1) * target


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


@hard(frozen=lambda: _frozen(tanh_block()), student=tanh_block)
def teacher_in_inference_mode(m: Any, x: Tensor) -> Any:
    with torch.inference_mode():
        target = m.frozen(x)
    return (m.student(x) - target.clone()).tanh()


@hard(enc=tanh_block, dec=tanh_block, codes=lambda: nn.Buffer(torch.randn(16, WIDTH)),
      counts=lambda: nn.Buffer(torch.ones(16)))  # fmt: skip
def vector_quantisation(m: Any, x: Tensor) -> Any:
    h = m.enc(x)
    with torch.no_grad():
        nearest = torch.cdist(h, m.codes).argmin(-1)
        counts = F.one_hot(nearest, 16).float().sum(0)
        m.counts.mul_(0.9).add_(counts, alpha=0.1)
        m.codes.index_add_(0, nearest, 0.01 * h.detach())
    quantised = m.codes[nearest]
    return m.dec(h + (quantised - h).detach()) + (h - quantised.detach()).square()


@hard(enc=tanh_block, queue=lambda: nn.Buffer(torch.randn(40, WIDTH)),
      place=lambda: nn.Buffer(torch.tensor(0)))  # fmt: skip
def queue_of_negatives(m: Any, x: Tensor) -> Any:
    h = F.normalize(m.enc(x), dim=-1)
    scores = h @ m.queue.clone().t()
    start = int(m.place) % 16
    m.queue[start : start + ROWS] = h.detach()
    m.place += ROWS
    return scores.logsumexp(-1) - (h * h.roll(1, 0)).sum(-1)


# ---- numbers of other kinds ------------------------------------------------------------------------------


@hard(weight=lambda: nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64)), lin=linear)
def complex_parameters_in_a_fourier_layer(m: Any, x: Tensor) -> Any:
    for _ in range(3):
        spectrum = torch.fft.rfft(x) * m.weight
        x = torch.fft.irfft(spectrum * spectrum.abs().sigmoid(), n=WIDTH).tanh() + m.lin(x)
    return x


@hard(weight=lambda: nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64) * 0.1))
def complex_matrices(m: Any, x: Tensor) -> Any:
    z = torch.complex(x, x.roll(1, -1))
    for _ in range(3):
        z = torch.polar(torch.tanh((z @ m.weight).abs()), (z @ m.weight.mH).angle())
    return torch.view_as_real(z * z.conj().resolve_conj()).sum(-1) + z.imag


@hard(tokens, embed=lambda: nn.Embedding(WORDS, WIDTH, sparse=True), block=tanh_block,
      bag=lambda: nn.EmbeddingBag(WORDS, WIDTH, mode="sum", sparse=True))  # fmt: skip
def sparse_gradients(m: Any, x: Tensor) -> Any:
    return m.block(m.embed(x)) * m.bag(x).tanh()[:, None] + m.embed(x.flip(1))


@hard(lin=linear, out=linear)
def sparse_matrices_inside(m: Any, x: Tensor) -> Any:
    edges = torch.stack([torch.arange(ROWS), torch.arange(ROWS).roll(1)])
    graph = torch.sparse_coo_tensor(edges, torch.full((ROWS,), 0.5), (ROWS, ROWS)).coalesce()
    h = torch.sparse.mm(graph, m.lin(x).relu())
    return torch.sparse.mm(graph, m.out(h).tanh()) + h


def half_loss(model: Any, batch: Any) -> Tensor:
    """The forward under autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch)
    loss: Tensor = out.float().square().mean()
    return loss


@hard(loss=half_loss, blocks=blocks, norm=lambda: nn.LayerNorm(WIDTH))
def autocast_with_islands_of_float32(m: Any, x: Tensor) -> Any:
    for block in m.blocks:
        x = x + block(x)
        with torch.autocast("cpu", enabled=False):
            x = m.norm(x.float())
    return x


@hard(blocks=lambda: blocks().to(torch.bfloat16), lin=lambda: linear().double())
def layers_of_unlike_precision(m: Any, x: Tensor) -> Any:
    x = x.bfloat16()
    for block in m.blocks:
        x = x + block(x)
    return m.lin(x.double()).exp()


# ---- autograd of one's own -------------------------------------------------------------------------------


class Clipped(torch.autograd.Function):
    """Writes its input in place, keeps some of it in the context, hands out no gradient for one output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Any:
        """The clamped input, written in place, and which entries were."""
        outside = x.abs() > limit
        x.clamp_(-limit, limit)
        ctx.mark_dirty(x)
        ctx.mark_non_differentiable(outside)
        ctx.set_materialize_grads(False)
        ctx.outside = outside
        return x, outside

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """Nothing where it was clamped."""
        return None if grads[0] is None else grads[0].masked_fill(ctx.outside, 0.0), None


class Cubed(torch.autograd.Function):
    """With ``setup_context``, saving input and output."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """x cubed."""
        return x * x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Saves both."""
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The slope, from both."""
        x, cube = ctx.saved_tensors
        return grads[0] * torch.where(x.abs() > 1e-3, 3 * cube / x, 3 * x * x)


@hard(lin=linear, out=linear)
def functions_of_ones_own(m: Any, x: Tensor) -> Any:
    for _ in range(3):
        h, outside = Clipped.apply(m.lin(x) * 2, 0.7)  # type: ignore[no-untyped-call]
        x = Cubed.apply(m.out(h.sin())) + h * outside  # type: ignore[no-untyped-call]
    return x


class Reversible(torch.autograd.Function):
    """Keeps no activation: the backward runs the forward again with a graph of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Any, *weights: Tensor) -> Tensor:
        """The block, without a graph."""
        ctx.block, ctx.weights = block, weights
        ctx.save_for_backward(x)
        with torch.no_grad():
            out: Tensor = block(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of a second run."""
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            out = ctx.block(again)
        found = torch.autograd.grad(out, (again, *ctx.weights), grads[0])
        return found[0], None, *found[1:]


@hard(lin=linear, block=lambda: nn.Sequential(linear(), nn.Tanh(), linear()))
def function_that_runs_again_in_its_backward(m: Any, x: Tensor) -> Any:
    h = m.lin(x).sin()
    for _ in range(3):
        h = h + Reversible.apply(h, m.block, *m.block.parameters())  # type: ignore[no-untyped-call]
    return m.lin(h)


@hard(block=lambda: nn.Sequential(linear(), nn.Tanh(), linear()), lin=linear)
def fixed_point_with_an_implicit_gradient(m: Any, x: Tensor) -> Any:
    x = m.lin(x).tanh()
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(12):
            z = 0.3 * m.block(z) + x
    z = 0.3 * m.block(z) + x
    again = z.detach().requires_grad_()
    image = 0.3 * m.block(again) + x.detach()

    def solve(grad: Tensor) -> Tensor:
        found = grad
        for _ in range(8):
            found = grad + torch.autograd.grad(image, again, found, retain_graph=True)[0]
        return found

    if z.requires_grad:
        z.register_hook(solve)
    return z


def penalised(model: Any, batch: Any) -> Tensor:
    """A gradient penalty."""
    x = batch.detach().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    loss: Tensor = out.square().mean() + slope.norm(dim=1).sub(1).square().mean()
    return loss


@hard(loss=penalised, blocks=lambda: blocks(3))
def double_backward(m: Any, x: Tensor) -> Any:
    for block in m.blocks:
        x = x + block(x)
    return x


@hard(block=lambda: nn.Sequential(linear(), nn.Tanh(), linear()))
def inner_steps_of_meta_learning(m: Any, x: Tensor) -> Any:
    weights = dict(m.block.named_parameters())
    for _ in range(2):
        inner = torch.func.functional_call(m.block, weights, (x,)).sub(1).square().mean()
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        weights = {n: w - 0.1 * s for (n, w), s in zip(weights.items(), slopes, strict=True)}
    return torch.func.functional_call(m.block, weights, (x.flip(0),))


@hard(block=lambda: nn.Sequential(linear(), nn.Tanh(), linear()), lin=linear)
def transforms_of_torch_func(m: Any, x: Tensor) -> Any:
    h = m.lin(x).tanh()
    slopes = torch.func.vmap(torch.func.grad(lambda row: m.block(row).square().sum()))(h)
    tangent = torch.func.jvp(lambda y: m.block(y).sin(), (h,), (torch.ones_like(h),))[1]
    return slopes * tangent


# ---- hooks -----------------------------------------------------------------------------------------------


def _halved(module: nn.Module, grads: Any, _: Any) -> Any:
    return tuple(grad if grad is None else grad * 0.5 for grad in grads)


def _clamped(module: nn.Module, grads: Any) -> Any:
    return tuple(grad if grad is None else grad.clamp(-0.01, 0.01) for grad in grads)


class Hooked(nn.Module):
    """Hooks of every kind that change what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks()
        self.seen: list[float] = []
        for block in self.blocks.children():
            assert isinstance(block, nn.Sequential)
            block.register_forward_pre_hook(lambda _, args: (args[0] * 1.1,))
            block.register_forward_hook(lambda _, args, out: out + args[0].sin())
            block[0].register_full_backward_hook(_halved)
            block[3].register_full_backward_pre_hook(_clamped)

    def forward(self, x: Tensor) -> Tensor:
        """The blocks, with a hook on each tensor between them."""
        for block in self.blocks:
            x = block(x)
            x.register_hook(lambda grad: grad + 0.001)
            x.retain_grad()
        return x


HARD["hooks_that_change_what_passes"] = Hard("hooks_that_change_what_passes", Hooked, floats, square_loss)


@hard(blocks=blocks)
def saved_tensors_hooks_of_ones_own(m: Any, x: Tensor) -> Any:
    def pack(tensor: Tensor) -> Any:
        return tensor.to(torch.float16) if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor

    def unpack(packed: Any) -> Any:
        return packed.float() if packed.dtype == torch.float16 else packed

    for number, block in enumerate(m.blocks):
        if number % 2:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                x = x + block(x)
        else:
            x = block(x)
    return x


@hard(blocks=blocks)
def saved_on_the_cpu_by_the_user(m: Any, x: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        for block in m.blocks:
            x = x + block(x)
    return x


class Noting(nn.Module):
    """Keeps what it made, as models that collect attentions or activations do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks()
        self.notes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """The blocks, and a penalty on what was kept."""
        self.notes = []
        for block in self.blocks:
            x = x + block(x)
            self.notes.append(x)
        penalty = torch.stack([note.abs().mean() for note in self.notes]).sum()
        out: Tensor = x + penalty
        return out


HARD["activations_kept_on_the_module"] = Hard("activations_kept_on_the_module", Noting, floats, square_loss)


# ---- checkpointing by the user ---------------------------------------------------------------------------


@hard(blocks=blocks, outer=tanh_block)
def checkpoints_within_checkpoints(m: Any, x: Tensor) -> Any:
    def inner(y: Tensor) -> Tensor:
        for block in m.blocks:
            y = y + checkpoint(block, y, use_reentrant=False)
        out: Tensor = m.outer(y)
        return out

    h = checkpoint(inner, x.sin(), use_reentrant=False)
    return m.outer(checkpoint(inner, h, use_reentrant=False))


@hard(blocks=lambda: nn.Sequential(*blocks()), lin=linear)
def reentrant_and_sequential_checkpoints(m: Any, x: Tensor) -> Any:
    h = checkpoint_sequential(m.blocks, 2, m.lin(x), use_reentrant=False)
    return checkpoint(m.blocks, m.lin(h).sin(), use_reentrant=True)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@hard(blocks=blocks)
def selective_checkpoints(m: Any, x: Tensor) -> Any:
    for block in m.blocks:
        x = x + checkpoint(
            block,
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(_policy),
        )
    return x


# ---- memory formats --------------------------------------------------------------------------------------


@hard(images, net=lambda: nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=4),
    nn.GroupNorm(2, 8), nn.MaxPool2d(2), nn.Hardswish(inplace=True), nn.ConvTranspose2d(8, 4, 2, stride=2),
).to(memory_format=torch.channels_last))  # type: ignore[call-overload] # fmt: skip
def channels_last(m: Any, x: Tensor) -> Any:
    h = m.net(x.contiguous(memory_format=torch.channels_last))
    return h.sigmoid() * F.interpolate(h.mean((2, 3), keepdim=True), h.shape[-2:], mode="bilinear")


@hard(lambda: torch.randn(ROWS, 2, 4, 6, 6), net=lambda: nn.Sequential(
    nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.LeakyReLU(inplace=True), nn.Dropout3d(0.2),
    nn.AvgPool3d(2)).to(memory_format=torch.channels_last_3d))  # type: ignore[call-overload] # fmt: skip
def channels_last_of_volumes(m: Any, x: Tensor) -> Any:
    return m.net(x.contiguous(memory_format=torch.channels_last_3d)).tanh()


# ---- quantised -------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A frozen layer of int8 weights with a small trained one beside it, as in QLoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (WIDTH, WIDTH), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(WIDTH, 1) * 0.01)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        weight = self.get_buffer("weight").to(x.dtype) * self.get_buffer("scale")
        out: Tensor = F.linear(x, weight) + self.up(self.down(x))
        return out


@hard(blocks=lambda: nn.ModuleList(Int8Linear() for _ in range(4)), norm=lambda: nn.LayerNorm(WIDTH))
def int8_weights_with_adapters(m: Any, x: Tensor) -> Any:
    for block in m.blocks:
        x = m.norm(x + block(x).relu())
    return x


class Rounded(torch.autograd.Function):
    """Rounds forward, passes straight through backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        """To int8 and back."""
        return (x / scale).round().clamp(-127, 127).to(torch.int8).to(x.dtype) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Straight through."""
        return grads[0], None


@hard(blocks=blocks)
def rounding_with_a_straight_through_gradient(m: Any, x: Tensor) -> Any:
    for block in m.blocks:
        scale = x.detach().abs().amax(-1, keepdim=True) / 127
        x = x + block(Rounded.apply(x, scale))  # type: ignore[no-untyped-call]
    return x


class FakeQuantised(nn.Module):
    """Quantisation-aware training with the observers and fake quantisers of ``torch.ao``."""

    def __init__(self) -> None:
        super().__init__()
        from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver

        self.layers = nn.ModuleList(linear() for _ in range(3))
        self.acts = nn.ModuleList(FakeQuantize() for _ in range(3))
        self.weights = nn.ModuleList(
            FakeQuantize(
                MovingAveragePerChannelMinMaxObserver,
                dtype=torch.qint8, quant_min=-128, quant_max=127, qscheme=torch.per_channel_symmetric,
            )
            for _ in range(3)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Linear layers of fake-quantised weights between fake-quantised activations."""
        for layer, act, weight in zip(self.layers, self.acts, self.weights, strict=True):
            assert isinstance(layer, nn.Linear)
            x = act(F.linear(x, weight(layer.weight), layer.bias).relu())
        return x


HARD["fake_quantised_training"] = Hard("fake_quantised_training", FakeQuantised, floats, square_loss)


@hard(images, net=lambda: _quantisable())
def fused_fake_quantised_convolutions(m: Any, x: Tensor) -> Any:
    return m.net(x).flatten(1).sin()


def _quantisable() -> nn.Module:
    from torch.ao.nn.intrinsic.qat import ConvBnReLU2d
    from torch.ao.quantization import get_default_qat_qconfig

    config = get_default_qat_qconfig("x86")
    return nn.Sequential(*(ConvBnReLU2d(a, b, 3, qconfig=config) for a, b in ((3, 8), (8, 8))))


@hard(tail=tanh_block, features=lambda: _quantised())
def frozen_features_quantised_dynamically(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        h = m.features(x)
    return m.tail(h.sigmoid()) * h


def _quantised() -> nn.Module:
    layer = torch.ao.nn.quantized.dynamic.Linear(WIDTH, WIDTH)
    layer.set_weight_bias(
        torch.quantize_per_tensor(torch.randn(WIDTH, WIDTH), 0.02, 0, torch.qint8), torch.zeros(WIDTH)
    )
    return nn.Sequential(layer, nn.ReLU())


# ---- writes after saving ---------------------------------------------------------------------------------


@hard(lin=linear, out=linear, raises="modified by an inplace operation")
def activation_written_after_it_was_saved(m: Any, x: Tensor) -> Any:
    h = m.lin(x).exp()
    out = m.out(h)
    h.mul_(2)
    return out + h


@hard(lin=linear, out=linear, raises="modified by an inplace operation")
def activation_written_through_a_detached_view(m: Any, x: Tensor) -> Any:
    h = m.lin(x).tanh()
    h.detach()[:3].zero_()
    return m.out(h.sin()) * h


@hard(lin=linear, out=linear)
def activation_written_past_autograd(m: Any, x: Tensor) -> Any:
    h = m.lin(x).tanh()
    out = m.out(h.sin())
    h.data.mul_(0.5)  # autograd does not see it: tanh goes backward with what is there then
    return out + h.cos()


@hard(lin=linear, out=linear)
def residuals_written_in_place(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    for _ in range(4):
        h = h + 0
        h += m.out(h.relu()).sigmoid_()
        h[:, :4] *= 0.5
        h[h > 2] = 1.0
    return h


# ---- layers of torch -------------------------------------------------------------------------------------


@hard(tokens, embed=lambda: nn.Embedding(WORDS, WIDTH), net=lambda: nn.Transformer(
    WIDTH, 4, 2, 2, 48, batch_first=True))  # fmt: skip
def encoder_and_decoder_of_torch(m: Any, x: Tensor) -> Any:
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    padding = x == 0
    return m.net(m.embed(x), m.embed(x.flip(1)), tgt_mask=mask, src_key_padding_mask=padding)


@hard(conv=lambda: nn.utils.parametrizations.weight_norm(linear()),
      turn=lambda: nn.utils.parametrizations.orthogonal(linear()),
      even=lambda: nn.utils.parametrizations.spectral_norm(linear()))  # fmt: skip
def parametrised_weights(m: Any, x: Tensor) -> Any:
    for _ in range(2):
        x = m.even(m.turn(m.conv(x).relu()).sin())
    return x


@hard(lin=linear)
def linear_algebra(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    gram = h.t() @ h / ROWS + torch.eye(WIDTH)
    root = torch.linalg.cholesky(gram)
    solved = torch.linalg.solve_triangular(root, h.t(), upper=False)
    values = torch.linalg.eigvalsh(gram) + torch.linalg.svdvals(gram)
    return solved.t() * values.log() + torch.matrix_exp(-gram)[0] + torch.logdet(gram)


@hard(lin=linear, out=lambda: nn.Linear(WIDTH, 2))
def samples_of_distributions(m: Any, x: Tensor) -> Any:
    h = m.lin(x)
    normal = torch.distributions.Normal(h, F.softplus(h) + 0.1)
    gamma = torch.distributions.Gamma(F.softplus(h) + 0.5, torch.ones(()))
    drawn = normal.rsample() * gamma.rsample()
    chosen = torch.distributions.Categorical(logits=m.out(drawn.tanh()))
    action = chosen.sample()
    return -chosen.log_prob(action) * drawn.detach().mean(-1) + F.gumbel_softmax(h, hard=True).mean(-1)


@hard(lin=linear, message=lambda: nn.Linear(2 * WIDTH, WIDTH), update=lambda: nn.GRUCell(WIDTH, WIDTH))
def messages_on_a_graph(m: Any, x: Tensor) -> Any:
    start = torch.arange(ROWS).repeat(3)
    end = (start * 5 + torch.arange(len(start)) // ROWS) % ROWS
    h = m.lin(x)
    for _ in range(3):
        sent = m.message(torch.cat([h[start], h[end]], -1)).relu()
        received = torch.zeros_like(h).index_add_(0, end, sent)
        most = torch.zeros_like(h).scatter_reduce_(0, end[:, None].expand_as(sent), sent, "amax")
        h = m.update(received + most, h)
    return h


def spoken(model: Any, batch: Any) -> Tensor:
    """Connectionist temporal classification."""
    out = model(batch).log_softmax(-1).transpose(0, 1)
    targets = batch[:, :4] % (WORDS - 1) + 1
    return F.ctc_loss(out, targets, torch.full((len(batch),), TOKENS), torch.full((len(batch),), 4))


@hard(tokens, loss=spoken, embed=lambda: nn.Embedding(WORDS, WIDTH),
      conv=lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1), head=lambda: nn.Linear(WIDTH, WORDS))  # fmt: skip
def speech_loss(m: Any, x: Tensor) -> Any:
    return m.head(F.glu(torch.cat([m.conv(m.embed(x).transpose(1, 2))] * 2, 1), 1).transpose(1, 2))


@hard(images, conv=lambda: nn.Conv2d(3, 4, 3, padding=1), where=lambda: nn.Linear(432, 6))
def spatial_transformer(m: Any, x: Tensor) -> Any:
    grid = F.affine_grid(m.where(x.flatten(1)).view(-1, 2, 3), list(x.shape), align_corners=False)
    h = F.grid_sample(m.conv(x), grid, align_corners=False)
    return F.fold(F.unfold(h, 3).tanh(), 12, 3) + F.pixel_shuffle(h, 2).mean((2, 3))[..., None, None]


@hard(block=lambda: torch.jit.script(nn.Sequential(linear(), nn.Tanh(), linear())), lin=linear)
def scripted_block(m: Any, x: Tensor) -> Any:
    return m.block(m.lin(x).sin()) + m.block(x)


@hard(blocks=lambda: blocks(3), lin=linear)
def nested_tensors_of_unlike_lengths(m: Any, x: Tensor) -> Any:
    parts = [x[:3], x[3:10], x[10:]]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    h = m.lin(nested).tanh()
    return m.lin(h).sin().values()


class Scaled(Tensor):
    """A tensor with a scale of its own, as layers of mixed precision have: it computes as its product."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: float) -> Scaled:
        """Wraps."""
        made: Scaled = Tensor._make_wrapper_subclass(
            cls, data.shape, dtype=data.dtype, requires_grad=data.requires_grad
        )
        return made

    def __init__(self, data: Tensor, scale: float) -> None:
        self.held, self.factor = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        """What it is made of."""
        return ["held"], self.factor

    @staticmethod
    def __tensor_unflatten__(held: dict[str, Tensor], scale: float, *_: Any) -> Scaled:
        """Made again."""
        return Scaled(held["held"], scale)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Computes with the product."""
        plain = torch.utils._pytree.tree_map_only(Scaled, lambda t: t.held * t.factor, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


@hard(lin=linear, scaled=lambda: nn.Buffer(torch.randn(WIDTH, WIDTH)), out=linear)
def tensors_of_a_class_of_ones_own(m: Any, x: Tensor) -> Any:
    weight = Scaled(m.scaled, 0.1)
    return m.out(torch.mm(m.lin(x).tanh(), weight).sin())
