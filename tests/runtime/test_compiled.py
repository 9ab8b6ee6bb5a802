"""Compiled modules: opaque regions that are kept, while what is outside of them is planned.

The judges are the plain compiled step (bitwise), the allocator, and a backend that counts its runs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfit
from memfit.core.plan import Plan
from memfit.errors import InexactAccumulation, InfeasibleBudget, UnsupportedModel
from memfit.runtime.compiled import (
    compiled_regions,
    entered,
    hidden_function,
    replays_graphs,
    size_for_graphs,
)

# Dynamo's own: it looks at .grad of what it traces, and hides the warning only where warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

WIDTH, ROWS, LENGTH = 32, 16, 8
CUDA = torch.device("cuda")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.down(nn.functional.gelu(self.up(x))))
        return out


class Net(nn.Module):
    """Blocks with norms and activations between them; some blocks are compiled."""

    def __init__(self, compiled: Callable[[nn.Module], nn.Module] | None, places: tuple[int, ...] = (1, 2)):
        super().__init__()
        torch.manual_seed(0)
        blocks: list[nn.Module] = [Block() for _ in range(4)]
        for place in places if compiled is not None else ():
            assert compiled is not None
            blocks[place] = compiled(blocks[place])
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = nn.functional.gelu(norm(block(x)))
        out: Tensor = self.head(x)
        return out


def wrapped(backend: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda module: torch.compile(module, backend=backend)  # type: ignore


def in_place(backend: Any) -> Callable[[nn.Module], nn.Module]:
    def compile_it(module: nn.Module) -> nn.Module:
        module.compile(backend=backend)
        return module

    return compile_it


def forward_compiled(backend: Any) -> Callable[[nn.Module], nn.Module]:
    def compile_it(module: nn.Module) -> nn.Module:
        module.forward = torch.compile(module.forward, backend=backend)
        return module

    return compile_it


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out: Tensor = model(batch["x"])
    return out.square().mean()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fit(net: nn.Module, batch: Any, memory: int = 1 << 30, **more: Any) -> memfit.Step:
    return memfit.fit(net, loss, batch, memory=memory, **({"micro_batch_size": ROWS} | more))


def needed_bytes(profile: memfit.Profile) -> int:
    with pytest.raises(InfeasibleBudget) as refused:
        memfit.find_plan(profile, memory=1)
    return refused.value.needed_bytes


def run(net: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(7)
    value = call()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [value.detach(), *gradients]


def plain(net: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    def step() -> Tensor:
        value = loss(net, batch)
        value.backward()
        return value

    return run(net, step)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("compiled", "backend"),
    [(wrapped, "aot_eager"), (in_place, "eager")],
    ids=["wrapped", "in place"],
)
def test_what_is_outside_of_compiled_blocks_is_planned_and_nothing_changes(
    compiled: Callable[[Any], Callable[[nn.Module], nn.Module]], backend: str, batch: dict[str, Tensor]
) -> None:
    net = Net(compiled(backend))
    profile = memfit.profile(net, loss, batch, micro_batch_size=ROWS)
    low = needed_bytes(profile)
    free = memfit.find_plan(profile, memory=1 << 30).predicted_peak_bytes
    assert low < 0.8 * free
    for memory in (low, (low + free) // 2):
        step = fit(net, batch, memory=memory, profile=profile)
        expected, found = plain(net, batch), run(net, lambda step=step: step(batch))  # type: ignore[misc]
        assert same(expected, found)
        assert step.plan.recomputes > 0
        assert step.verdict is not None
        assert step.verdict.attempts == 1
        measured_bytes, predicted_bytes = step.verdict.measured_peak_bytes, step.verdict.predicted_peak_bytes
        assert measured_bytes <= predicted_bytes <= 1.02 * measured_bytes
        assert not any(key.frame.startswith(("blocks.1", "blocks.2")) for key in step.plan.recompute)


def test_a_planned_step_runs_the_compiled_code_and_never_replays_it(batch: dict[str, Tensor]) -> None:
    runs: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return called

    net = Net(wrapped(counting))
    profile = memfit.profile(net, loss, batch, micro_batch_size=ROWS)
    step = fit(net, batch, memory=needed_bytes(profile), profile=profile)
    assert step.plan.recomputes > 0
    runs.clear()
    plain(net, batch)
    once = len(runs)
    run(net, lambda: step(batch))
    assert (once, len(runs)) == (2, 4)


def test_micro_batches_go_through_compiled_blocks(batch: dict[str, Tensor]) -> None:
    net = Net(wrapped("aot_eager")).eval()  # no dropout: the parts' gradients add up to the whole one
    step = fit(net, batch, micro_batch_size=4)
    expected, found = plain(net, batch), run(net, lambda: step(batch))
    assert step.plan.gradient_accumulation_steps == 4
    assert step.verdict is not None
    assert step.verdict.held
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(expected, found, strict=True))


def test_the_plan_says_what_is_hidden_and_names_the_faults_of_the_knob(batch: dict[str, Tensor]) -> None:
    plan = fit(Net(wrapped("aot_eager")), batch).plan
    assert plan.hidden.modules == ("blocks.1", "blocks.2")
    block = ROWS * LENGTH * WIDTH * 4
    # Of its own each block saves at least gelu's input and output, 4 times as wide as the block.
    assert 2 * 8 * block <= plan.hidden.hidden_bytes <= 2 * 14 * block < plan.hidden.kept_bytes
    assert "torch.compile hides blocks.1, blocks.2" in str(plan)
    assert "activation_memory_budget" in str(plan)
    assert "pytorch#197838" in str(plan)
    assert "pytorch#190758" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan
    nothing = fit(Net(None), batch).plan
    assert nothing.hidden.modules == ()
    assert "torch.compile" not in str(nothing)


def test_a_block_that_writes_to_its_argument_hides_the_whole_model(batch: dict[str, Tensor]) -> None:
    class Writes(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2.0))

    net = Net(wrapped("aot_eager"))
    net.blocks[1] = torch.compile(Writes(), backend="aot_eager")  # type: ignore
    with pytest.warns(UserWarning, match=r"blocks\.1 is compiled"):
        step = fit(net, batch)
    assert "opaque" in step.profile.source
    assert same(plain(net, batch), run(net, lambda: step(batch)))


def test_a_batch_norm_in_a_compiled_block_keeps_the_batch_whole(batch: dict[str, Tensor]) -> None:
    net = Net(wrapped("aot_eager"))
    norm = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(WIDTH), nn.Unflatten(0, (-1, LENGTH)))
    net.blocks[1] = torch.compile(norm, backend="aot_eager")  # type: ignore
    with pytest.raises(InexactAccumulation, match=r"blocks\.1"):
        fit(net, batch, micro_batch_size=4, count="rows")
    assert fit(net, batch, micro_batch_size=None, count="rows").plan.micro_batch_size == ROWS


@torch.compile(backend="eager")
def compiled_square(x: Tensor) -> Tensor:
    return x * x


def loss_of_compiled_square(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return compiled_square(model(batch["x"])).mean()


def test_a_compiled_function_hides_the_whole_model(batch: dict[str, Tensor]) -> None:
    net = Net(None)
    assert hidden_function(net, [loss_of_compiled_square]) == "compiled_square"
    assert hidden_function(net, [loss]) is None
    with pytest.warns(UserWarning, match="compiled_square is compiled"):
        step = memfit.fit(net, loss_of_compiled_square, batch, memory=1 << 30, micro_batch_size=ROWS)
    assert step.plan.hidden.modules == ("compiled_square",)


class Squares:
    """Functions, as a module of them has."""

    square = staticmethod(compiled_square)
    plain = staticmethod(torch.square)


squares = types.ModuleType("squares")
squares.square, squares.plain = compiled_square, torch.square  # type: ignore[attr-defined]
squares.inner = Squares()  # type: ignore[attr-defined]


class Holds(nn.Module):
    """Has a compiled function among its attributes' attributes."""

    def __init__(self, squares: Any) -> None:
        super().__init__()
        self.squares = squares

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.squares.square(x)
        return found


def made_by(square: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return square(model(batch["x"])).mean()

    return loss_of


def in_a_closure_within() -> Callable[..., Tensor]:
    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return torch.stack([squares.square(row) for row in model(batch["x"])]).mean()

    return loss_of


def of_the_module(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return squares.square(model(batch["x"])).mean()  # type: ignore[no-any-return]


def of_an_object_in_it(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return squares.inner.square(model(batch["x"])).mean()  # type: ignore[no-any-return]


def of_another(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    square = squares.plain(model(batch["x"]))
    return square.mean()  # type: ignore[no-any-return]


class CallableLoss:
    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return compiled_square(model(batch["x"])).mean()


@pytest.mark.parametrize(
    "function",
    [
        *(made_by(compiled_square), in_a_closure_within(), of_the_module, of_an_object_in_it, CallableLoss()),
        *(functools.partial(of_the_module), functools.partial(torch.mean, compiled_square)),
    ],
)
def test_a_compiled_function_is_found_behind_closures_and_attributes(function: Any) -> None:
    assert hidden_function(Net(None), [function]) in ("square", "compiled_square")
    assert hidden_function(Holds(squares), []) == "square"


@pytest.mark.parametrize("function", [made_by(torch.square), of_another, functools.partial(of_another)])
def test_a_function_of_the_same_name_that_is_not_compiled_hides_nothing(function: Any) -> None:
    assert hidden_function(Net(None), [function]) is None
    assert hidden_function(Holds(Squares.plain), []) is None


def test_a_disabled_function_is_not_compiled() -> None:
    net = Net(None)
    net.first.forward = torch.compiler.disable(net.first.forward)  # type: ignore[method-assign]
    assert compiled_regions(net) == []
    assert hidden_function(net, [torch.compiler.disable(loss)]) is None


def test_only_the_outermost_compiled_modules_are_regions() -> None:
    net = Net(in_place("eager"))
    block = net.blocks[1]
    assert isinstance(block, Block)
    block.up.compile(backend="eager")
    assert [region.name for region in compiled_regions(net)] == ["blocks.1", "blocks.2"]


@pytest.mark.parametrize("compiled", [wrapped, in_place, forward_compiled])
def test_modules_are_as_before_also_when_the_body_raises(compiled: Any) -> None:
    net = Net(compiled("eager"))
    before = [dict(module.__dict__) for module in net.modules()]
    with entered(compiled_regions(net), lambda _, call: lambda *args: call(*args)):
        assert [dict(module.__dict__) for module in net.modules()] != before
    with pytest.raises(KeyError), entered(compiled_regions(net), lambda _, call: call):
        raise KeyError
    assert [dict(module.__dict__) for module in net.modules()] == before


# Inductor's own, at its import.
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning")
def test_cuda_graphs_keep_the_batch_whole() -> None:
    graphs = Net(lambda module: torch.compile(module, mode="reduce-overhead"))  # type: ignore
    usual = Net(lambda module: torch.compile(module))  # type: ignore
    assert replays_graphs(compiled_regions(graphs)) == "blocks.1"
    assert replays_graphs(compiled_regions(usual)) is None
    assert size_for_graphs(graphs, CUDA, 8, None) == 8
    assert size_for_graphs(graphs, CUDA, 8, 8) == 8
    assert size_for_graphs(usual, CUDA, 8, None) is None
    assert size_for_graphs(graphs, torch.device("cpu"), 8, 2) == 2
    with pytest.raises(UnsupportedModel, match=r"blocks\.1.*CUDA graphs.*max-autotune-no-cudagraphs"):
        size_for_graphs(graphs, CUDA, 8, 2)
