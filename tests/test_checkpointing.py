"""What others do by hand: the simulated torch.utils.checkpoint against torch itself, and what is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import memfit
from memfit.core.costs import with_overhead
from memfit.core.graph import LogEntry, LogKind, Op, OpKey, Profile, StepGraph
from memfit.core.plan import Planner
from memfit.core.regions import Region, can_be_region, run_regions
from memfit.core.strategies import (
    CHECKPOINT,
    SELECTIVE,
    notable,
    repeated_blocks,
    saved_by_policy,
    strategies,
)
from memfit.core.sums import out_of_place
from memfit.core.timeline import run
from memfit.runtime.meter import PeakMeter
from memfit.runtime.opinfo import op_info
from memfit.runtime.record import CPU_SEED_BYTES
from memfit.workloads.images import ResNet
from models import profile_of, recorded
from strategies import graphs, profiles

ROWS, TOKENS, LAYERS = 4, 16, 3
MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
SAVED = {
    *MATMULS,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


@dataclass
class Case:
    """A model, its blocks and its loss. ``unread_bytes``: arguments of a block that no op reads."""

    model: Any
    blocks: list[nn.Module]
    batch: dict[str, Tensor]
    loss: Callable[[Any, Any], Tensor]
    unread_bytes: int = 0


def own_loss(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def gpt2() -> Case:
    config = GPT2Config(
        n_layer=LAYERS, n_embd=48, n_head=4, vocab_size=96, n_positions=TOKENS, bos_token_id=1,
        eos_token_id=2, use_cache=False,
    )  # fmt: skip
    config.loss_type = "ForCausalLM"
    model = GPT2LMHeadModel(config).train()
    return Case(model, list(model.transformer.h), text(), own_loss)


def llama() -> Case:
    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=48, intermediate_size=128, vocab_size=96, use_cache=False,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    return Case(model, list(model.model.layers), text(), own_loss, unread_bytes=TOKENS * 8)  # position_ids


def resnet() -> Case:
    model = ResNet(classes=4, width=8).train()
    batch = {"images": torch.randn(ROWS, 3, 16, 16), "labels": torch.randint(0, 4, (ROWS,))}
    return Case(model, list(model.blocks), batch, picture_loss)


def picture_loss(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["images"]), batch["labels"])


def text() -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (ROWS, TOKENS))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module", params=[gpt2, llama, resnet], ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest) -> tuple[Case, StepGraph]:
    """A model and its graph at ROWS rows, gradients resident."""
    torch.manual_seed(3)
    made: Case = request.param()
    twice = {name: torch.cat([part, part]) for name, part in made.batch.items()}
    profile = memfit.profile(made.model, made.loss, twice, micro_batch_size=ROWS)
    return made, profile.graphs[0]


class Counting(TorchDispatchMode):
    """Counts ops, as far as memfit counts them as ops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        info = op_info(func)
        if not info.is_view and not info.is_invisible:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def policy(half: bool) -> Callable[[], Any]:
    """Contexts that save matmuls, convolutions and attention, or leave out every second matmul."""

    def contexts() -> Any:
        seen = 0

        def is_saved(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
            nonlocal seen
            seen += op in MATMULS
            return op in SAVED and not (half and op in MATMULS and seen % 2 == 0)

        return create_selective_checkpoint_contexts(is_saved)

    return contexts


@contextmanager
def checkpointed(blocks: list[nn.Module], **options: Any) -> Iterator[None]:
    """Runs blocks under torch.utils.checkpoint."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def measured(case: Case) -> tuple[int, Counter[str]]:
    """The peak above the residents by the allocator, and what the backward runs."""
    for parameter in case.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with PeakMeter("cpu") as meter:
        case.loss(case.model, case.batch).backward()
    loss = case.loss(case.model, case.batch)
    with Counting() as counting:
        loss.backward()
    return meter.peak_bytes, counting.seen


def all_is_given_back(graph: StepGraph, regions: list[Region]) -> bool:
    """Whether nothing but the gradients of the plain step is alive after the last op."""
    last = LogEntry(LogKind.OP, len(graph.ops))
    longer = replace(graph, ops=(*graph.ops, Op(OpKey("", "look", 0))), log=(*graph.log, last))
    left = run_regions(longer, regions).moments[-1]
    return left.total_bytes == left.gradient_bytes == run(longer).moments[-1].gradient_bytes


@pytest.mark.parametrize(
    ("every", "options", "cached"),
    [
        (1, {}, None),
        (2, {}, None),
        (1, {"context_fn": policy(False)}, False),
        (1, {"context_fn": policy(True)}, True),
    ],
    ids=["every block", "every 2nd block", "matmuls saved", "half the matmuls"],
)
def test_torch_peaks_where_the_simulation_says_and_runs_the_same_ops_again(
    case: tuple[Case, StepGraph], every: int, options: dict[str, Any], cached: bool | None
) -> None:
    made, graph = case
    if options:
        graph = out_of_place(graph)  # selective checkpointing runs a mode
    found = next(iter(repeated_blocks(graph).values()))
    assert len(found) == len(made.blocks)
    regions = [
        Region(ops, frozenset() if cached is None else saved_by_policy(graph, ops, half=cached))
        for ops in found[::every]
    ]
    simulated = run_regions(graph, regions)
    _, plain = measured(made)
    with checkpointed(made.blocks[::every], **options):
        peak_bytes, again = measured(made)
    unknown_bytes = made.unread_bytes
    for region in regions:  # torch puts the generator's state aside also where nobody draws from it
        unknown_bytes += 0 if any(graph.ops[op].is_random for op in region.ops) else CPU_SEED_BYTES
    assert -256 <= peak_bytes - simulated.peak.total_bytes <= unknown_bytes + CPU_SEED_BYTES
    assert simulated.peak.total_bytes < run(graph).peak.total_bytes
    assert all_is_given_back(graph, regions)
    replayed = Counter(graph.ops[op].key.op for op in simulated.replayed_ops)
    del replayed["appears"]
    assert _out_of_place(again - plain) == _out_of_place(replayed)


def _out_of_place(ops: Counter[str]) -> Counter[str]:
    """Sums counted alike, whether or not they are in place."""
    found: Counter[str] = Counter()
    for name, times in ops.items():
        found[name.replace("add_.", "add.")] += times
    return found


# ---- any regions of any step -------------------------------------------------------------------------------


@st.composite
def graphs_and_regions(draw: st.DrawFn) -> tuple[StepGraph, list[Region]]:
    """A random step, some runs of its forward, and some cached ops in them."""
    graph = draw(graphs())
    cuts = sorted({0, graph.forward_ops, *draw(st.lists(st.integers(0, graph.forward_ops), max_size=4))})
    regions = []
    for start, stop in pairwise(cuts):
        ops = range(start, stop)
        if can_be_region(graph, ops) and draw(st.booleans()):
            free = [
                op
                for op in ops
                if not graph.ops[op].overwrites
                and not any(graph.values[v].is_overwritten for v in graph.ops[op].outputs)
            ]
            cached = draw(st.lists(st.sampled_from(free))) if free else []
            regions.append(Region(ops, frozenset(cached)))
    return graph, regions


@settings(max_examples=30)
@given(graphs())
def test_a_step_without_regions_is_the_plain_step(graph: StepGraph) -> None:
    assert run_regions(graph, [], alignment_bytes=8) == run(graph, alignment_bytes=8)


@settings(max_examples=50)
@given(graphs_and_regions())
def test_regions_give_all_their_memory_back(drawn: tuple[StepGraph, list[Region]]) -> None:
    assert all_is_given_back(*drawn)


@settings(max_examples=50)
@given(graphs_and_regions())
def test_a_region_runs_again_once_in_order_and_without_what_it_cached(
    drawn: tuple[StepGraph, list[Region]],
) -> None:
    graph, regions = drawn
    again = run_regions(graph, regions).replayed_ops
    assert len(again) == len(set(again))
    for region in regions:
        mine = [op for op in again if op in region.ops]
        assert mine == sorted(mine)
        assert mine == [op for op in region.ops if mine and op <= mine[-1] and op not in region.cached]


@settings(max_examples=50)
@given(graphs_and_regions())
def test_the_forward_never_holds_more_under_checkpoint_than_arguments_and_caches(
    drawn: tuple[StepGraph, list[Region]],
) -> None:
    graph, regions = drawn
    held = 0
    for region in regions:
        values = {
            v for op in region.ops for v in graph.ops[op].inputs if graph.values[v].producer not in region.ops
        }
        values |= {v for op in region.cached for v in graph.ops[op].outputs}
        held += sum(graph.size_bytes(v) for v in values) + max(graph.ops[op].seed_bytes for op in region.ops)
    plain, under = run(graph).moments, run_regions(graph, regions).moments
    for one, other in zip(plain[: graph.forward_ops], under, strict=False):
        assert other.total_bytes <= one.total_bytes + held


# ---- the named points --------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(profiles())
def test_plain_is_the_plan_under_plenty_of_memory(profile: Profile) -> None:
    fastest = strategies(profile)[: len(profile.graphs)]
    plenty = memfit.find_plan(profile, memory=1 << 50)
    assert min(s.predicted_step_s for s in fastest if s.name == "plain") == plenty.predicted_step_s
    for graph in profile.graphs:
        plain = strategies(profile, micro_batch_size=graph.rows)[0]
        plan = memfit.find_plan(profile, memory=1 << 50, micro_batch_size=graph.rows)
        assert (plain.name, plain.recompute_s) == ("plain", 0.0)
        assert (plain.predicted_peak_bytes, plain.predicted_step_s, plain.gradient_accumulation_steps) == (
            plan.predicted_peak_bytes,
            plan.predicted_step_s,
            plan.gradient_accumulation_steps,
        )


@pytest.mark.parametrize("make", [gpt2, llama])
def test_no_strategy_beats_the_plan_for_its_memory(make: Callable[[], Case]) -> None:
    made = make()
    profile = profile_of(recorded(made.model, made.loss, made.batch))
    planner = Planner(profile)
    for strategy in strategies(profile):
        if strategy.family in ("every block", "matmuls saved"):
            plan = planner.fastest(strategy.predicted_peak_bytes)
            assert plan is not None
            assert plan.predicted_step_s < strategy.predicted_step_s


def test_strategies_pay_for_their_python_by_the_op_and_by_the_region() -> None:
    made = gpt2()
    graph = recorded(made.model, made.loss, made.batch)
    found = {
        charge: {
            s.name: s for s in strategies(profile_of(with_overhead(graph, charge, is_asynchronous=False)))
        }
        for charge in (0.0, 1.0)
    }
    (blocks,) = repeated_blocks(graph).values()
    assert len(blocks) == LAYERS
    regions = [Region(ops) for ops in blocks]
    replayed = len(run_regions(graph, regions).replayed_ops)
    paid = {name: s.recompute_s - found[0.0][name].recompute_s for name, s in found[1.0].items()}
    assert paid["plain"] == 0
    plain, selective = CHECKPOINT, SELECTIVE
    by_blocks = plain.of_an_op * replayed + plain.of_a_region * LAYERS
    assert paid["every block"] == pytest.approx(by_blocks)
    all_ops = sum(len(ops) for ops in blocks)
    assert paid["matmuls saved"] == pytest.approx(
        selective.of_an_op * all_ops + selective.of_a_region * LAYERS
    )


def test_of_every_k_blocks_the_first_takes_less_memory_than_the_last() -> None:
    made = gpt2()
    graph = recorded(made.model, made.loss, made.batch)
    (blocks,) = repeated_blocks(graph).values()
    regions = [Region(ops) for ops in blocks]
    first, last = (run_regions(graph, some).peak.total_bytes for some in (regions[::2], regions[1::2]))
    assert first < last


def test_what_is_shown_is_what_no_other_beats_and_the_fastest_of_each_family() -> None:
    made = gpt2()
    found = strategies(profile_of(recorded(made.model, made.loss, made.batch)))
    shown = notable(found)
    assert {s.family for s in shown} == {s.family for s in found}
    assert [s.predicted_peak_bytes for s in shown] == sorted(s.predicted_peak_bytes for s in shown)
    slow = replace(found[0], family="every block", name="every block", predicted_step_s=1e9)
    assert notable([*found, slow]) == shown


# ---- blocks ------------------------------------------------------------------------------------------------


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh())


class Stages(nn.Module):
    """Lists in lists: unlike stages of alike layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*(layer() for _ in range(count))) for count in (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def names(model: Any, batch: Any, loss: Callable[[Any, Any], Tensor]) -> dict[str, int]:
    """How many blocks each list of modules has."""
    found = repeated_blocks(recorded(model, loss, batch))
    return {name: len(blocks) for name, blocks in found.items()}


def total(model: Any, batch: Any) -> Tensor:
    found: Tensor = model(batch).sum()
    return found


def test_blocks_are_the_outermost_modules_that_repeat() -> None:
    x = torch.randn(2, 8)
    assert names(Stages(), x, total) == {"stages.*": 5}
    assert names(nn.Sequential(layer(), layer(), nn.Linear(8, 1)), x, total) == {"model": 2}
    assert names(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), x, total) == {}
    twins = nn.Sequential(*(nn.Sequential(layer(), layer()) for _ in range(3)))
    assert names(twins, x, total) == {"model": 3, "*": 6}


def test_a_block_that_is_called_again_and_again_is_as_many_blocks() -> None:
    config = AlbertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        embedding_size=16,
    )  # fmt: skip
    found = names(AlbertForMaskedLM(config).train(), text(), own_loss)
    assert found == {"albert.encoder.albert_layer_groups": 4}


class Doubler(nn.Module):
    """Writes to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0)


def test_a_block_that_torch_refuses_to_checkpoint_is_none() -> None:
    blocks = [nn.Sequential(Doubler(), nn.Linear(8, 8)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(8, 8), *blocks)
    assert names(model, torch.randn(2, 8), total) == {}
    with checkpointed(list(blocks)), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total(model, torch.randn(2, 8)).backward()
