"""Models of several blocks in a row: segments, their choices, and the way through the chain."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import memfit
from memfit.core.candidate import Candidate
from memfit.core.chain import Chain, Link, Way
from memfit.core.graph import Level, OpKey, Profile
from memfit.core.links import Choices, levels_of, read_links
from memfit.core.plan import Planner, find_plan, simulate
from memfit.core.segments import kept_after_forward, read_segments
from memfit.core.timeline import floors, run
from memfit.errors import InfeasibleBudget
from memfit.runtime.accumulate import Accumulation
from models import ZooCase, judge, profile_of, recorded
from reference import step_peak_bytes
from strategies import chains

FEW = settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
UNITS = 2000


def links_of(profile: Profile) -> tuple[Link, ...]:
    """The chain of a profile's only graph."""
    return read_links(profile.graphs[0], Choices(profile.alignment_bytes))


def chosen(links: tuple[Link, ...], picks: tuple[int, ...]) -> frozenset[int]:
    """The values of the whole graph that one choice a segment drops."""
    return frozenset(
        link.segment.values[value]
        for link, pick in zip(links, picks, strict=True)
        for value in link.choices[pick % len(link.choices)].dropped
    )


def seconds_of(profile: Profile, levels: Any) -> float:
    """Seconds of replay, by the simulation."""
    graph = profile.graphs[0]
    replayed = run(graph, levels).replayed_ops
    return sum(graph.ops[op].replay_s for op in replayed)


# ---- segments ----------------------------------------------------------------------------------------------


@FEW
@given(chains(), st.data())
def test_what_segments_keep_and_take_adds_up_to_the_step(profile: Profile, data: st.DataObject) -> None:
    graph, links = profile.graphs[0], links_of(profile)
    picks = tuple(data.draw(st.integers(0, 50)) for _ in links)
    kept_bytes, peaks = 0, []
    for link, pick in zip(links, picks, strict=True):
        choice, segment = link.choices[pick % len(link.choices)], link.segment
        peaks.append(kept_bytes + choice.peak_bytes + segment.backward_extra_bytes)
        peaks.append(kept_bytes + choice.forward_peak_bytes + segment.forward_extra_bytes)
        kept_bytes += choice.kept_bytes
    assert max(peaks) >= step_peak_bytes(profile, graph, chosen(links, picks))
    if not any(pick % len(link.choices) for link, pick in zip(links, picks, strict=True)):
        assert max(peaks) == step_peak_bytes(profile, graph, ())


@FEW
@given(chains())
def test_every_op_and_save_of_a_step_is_in_one_segment(profile: Profile) -> None:
    graph = profile.graphs[0]
    segments = read_segments(graph, alignment_bytes=1)
    assert len(segments) >= 3
    assert sum(s.graph.forward_ops - 2 for s in segments) == graph.forward_ops
    assert sum(len(s.graph.ops) - 3 for s in segments) == len(graph.ops)
    assert sum(len(s.graph.saves) for s in segments) == len(graph.saves)
    assert kept_after_forward(segments[0], run(segments[0].graph)) > 0


def test_a_model_without_blocks_is_no_chain() -> None:
    profile = _example()
    ops = tuple(
        replace(op, key=OpKey("all.in.one", op.key.op, i)) for i, op in enumerate(profile.graphs[0].ops)
    )
    assert read_segments(replace(profile.graphs[0], ops=ops), alignment_bytes=1) == ()


def _example() -> Profile:
    """One chain, the same in every run."""
    found: list[Profile] = []

    @settings(max_examples=1, database=None, derandomize=True)
    @given(chains())
    def draw(profile: Profile) -> None:
        found.append(profile)

    draw()
    return found[0]


# ---- the way through ---------------------------------------------------------------------------------------


@FEW
@given(chains(4), st.integers(0, 100))
def test_no_choice_of_the_segments_is_faster_than_the_bound(profile: Profile, percent: int) -> None:
    graph, links = profile.graphs[0], links_of(profile)
    few = [range(min(len(link.choices), 4)) for link in links]
    least = min(step_peak_bytes(profile, graph, chosen(links, picks)) for picks in itertools.product(*few))
    budget = least + (run(graph).peak.total_bytes - least) * percent // 100
    bound_s = Chain(links, budget, UNITS, bound=True).solve()[-1]
    for picks in itertools.product(*few):
        dropped = chosen(links, picks)
        if step_peak_bytes(profile, graph, dropped) <= budget:
            assert bound_s <= seconds_of(profile, dropped) + 1e-9


@FEW
@given(chains(6), st.integers(0, 100))
def test_a_way_costs_what_the_table_says_and_fits_what_it_was_given(profile: Profile, percent: int) -> None:
    graph, links = profile.graphs[0], links_of(profile)
    plain = run(graph).peak.total_bytes
    chain = Chain(links, plain, UNITS)
    table = chain.solve()
    least = int(np.flatnonzero(np.isfinite(table))[0])
    units = least + (UNITS - least) * percent // 100
    levels = levels_of(links, chain.ways(units))
    assert seconds_of(profile, levels) <= table[units] + 1e-9
    assert levels.keys() <= set(graph.produced())


@FEW
@given(chains(6))
def test_more_memory_is_never_slower_for_the_chain(profile: Profile) -> None:
    links = links_of(profile)
    plain = run(profile.graphs[0]).peak.total_bytes
    for bound in (False, True):
        table = Chain(links, plain, UNITS, bound=bound).solve()
        assert (table[1:] <= table[:-1]).all()
    assert table[-1] == 0.0  # as many units as the step takes, sizes rounded down


@FEW
@given(chains(6), st.integers(0, 100))
def test_a_plan_of_a_chain_fits_by_the_reference_or_is_in_levels(profile: Profile, percent: int) -> None:
    graph = profile.graphs[0]
    with pytest.raises(InfeasibleBudget) as refused:
        find_plan(profile, memory=1)
    needed = refused.value.needed_bytes
    plain = step_peak_bytes(profile, graph, ())
    plan = find_plan(profile, memory=needed + (plain - needed) * percent // 100)
    assert plan.predicted_peak_bytes <= plan.budget_bytes
    if not plan.levels:
        named = frozenset(v for v in graph.produced() if graph.value_key(v) in set(plan.recompute))
        assert step_peak_bytes(profile, graph, named) == plan.predicted_peak_bytes


class Forgetful(Choices):
    """Solves every segment anew."""

    def of(self, segment: Any) -> Any:
        self.by_class.clear()
        self.by_shape.clear()
        return super().of(segment)


@FEW
@given(chains(6), st.integers(0, 100))
def test_solving_alike_segments_once_gives_what_solving_all_gives(profile: Profile, percent: int) -> None:
    graph = profile.graphs[0]
    found = []
    for book in (Choices(1), Forgetful(1)):
        candidate = Candidate(profile, graph, book, floors(profile)[False])
        budget = candidate.plain_bytes * (100 + percent) // 200
        found.append((candidate.bound_s(budget), candidate.solve(budget)))
    assert found[0] == found[1]


def test_a_plan_found_for_less_memory_is_never_faster_than_one_for_more() -> None:
    torch.manual_seed(3)
    profile = profile_of(recorded(deep().train(), own_loss, tokens(ROWS)))
    planner = Planner(profile)
    low, high = planner.lowest().predicted_peak_bytes, find_plan(profile, memory=1 << 40).predicted_peak_bytes
    budgets = [low + (high - low) * i // 60 for i in range(61)]
    plans = [planner.fastest(budget) or planner.least(budget) for budget in budgets]
    for less, more in itertools.pairwise(plans):
        assert more.predicted_step_s <= less.predicted_step_s
        assert more.predicted_peak_bytes >= less.predicted_peak_bytes


# ---- real models -------------------------------------------------------------------------------------------


LAYERS, ROWS, TOKENS = 8, 4, 16


def deep(_: int = 1) -> nn.Module:
    """A GPT-2 of many thin layers, with its dropout."""
    return GPT2LMHeadModel(
        GPT2Config(n_layer=LAYERS, n_embd=16, n_head=2, vocab_size=17, n_positions=TOKENS, use_cache=False)
    )


def tokens(rows: int, _: int = 1) -> dict[str, Tensor]:
    """A batch of them."""
    ids = torch.arange(rows * TOKENS).reshape(rows, TOKENS) % 17
    return {"input_ids": ids, "labels": ids}


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss."""
    loss: Tensor = model(**batch).loss
    return loss


class Padded(nn.Module):
    """Writes into memory that cannot be made again, and reads it back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        padded = h.new_zeros(h.shape[0] + 1, h.shape[1])
        padded[1:] = h
        out: Tensor = x + self.narrow(nn.functional.gelu(self.wide(padded[:-1])))
        return out


def square_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean square of what comes out."""
    loss: Tensor = model(batch).square().mean()
    return loss


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
def test_a_plan_names_nothing_that_cannot_be_replayed(share: float) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(*(Padded() for _ in range(8)))
    profile = profile_of(recorded(model, square_loss, torch.randn(64, 16)))
    assert len(read_links(profile.graphs[0], Choices(1))) >= 8
    low = Planner(profile).lowest().predicted_peak_bytes
    high = find_plan(profile, memory=1 << 40).predicted_peak_bytes
    plan = find_plan(profile, memory=int(low + share * (high - low)))
    assert simulate(profile, plan).peak_bytes == plan.predicted_peak_bytes


def test_blocks_that_normalise_last_are_a_chain_too() -> None:
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(6)]
    graph = recorded(nn.Sequential(*layers).train(), square_loss, torch.randn(2, 8, 16))
    assert len(read_segments(graph, alignment_bytes=1)) == 6


class Parent(nn.Module):
    """Adds what numbered modules compute in the frame of their parent."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"a": nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), "b": nn.Tanh()}
            )
            for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = x + layer["b"](layer["a"](x))
        return x


def test_a_residual_stream_is_no_shared_value() -> None:
    graph = recorded(Parent(), square_loss, torch.randn(8, 16))
    segments = read_segments(graph, alignment_bytes=1)
    assert len(segments) >= 3
    cuts = list(itertools.accumulate(s.graph.forward_ops - 2 for s in segments))[:-1]
    forward = graph.ops[: graph.forward_ops]
    for cut, segment in zip(cuts, segments[1:], strict=True):
        read_later = {v for op in forward[cut:] for v in op.inputs}
        assert [v for v in read_later if graph.values[v].producer < cut] == [segment.values[0]]


DEEP = ZooCase("deep", deep, tokens, own_loss, None, ROWS)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_deep_model_keeps_every_promise_however_low_the_budget(share: float) -> None:
    torch.manual_seed(3)
    model, batch = deep().train(), tokens(ROWS)
    profile = memfit.profile(model, own_loss, batch, micro_batch_size=ROWS)
    assert len(read_segments(profile.graphs[0], alignment_bytes=1)) >= LAYERS
    with pytest.raises(InfeasibleBudget) as refused:
        find_plan(profile, memory=1)
    needed = refused.value.needed_bytes
    plain = find_plan(profile, memory=1 << 40).predicted_peak_bytes
    budget = int(needed + share * (plain - needed))
    step = memfit.fit(model, own_loss, batch, memory=budget + 2000, micro_batch_size=ROWS, profile=profile)
    found = judge(DEEP, model, batch, step)
    assert found.differences == []
    assert found.measured_bytes <= found.predicted_bytes <= found.budget_bytes
    assert found.predicted_bytes <= 1.01 * found.measured_bytes + 1000


def test_a_deep_model_recomputed_in_levels_is_the_plain_one_to_the_bit() -> None:
    torch.manual_seed(3)
    model, batch = deep().train(), tokens(ROWS)
    profile = memfit.profile(model, own_loss, batch, micro_batch_size=ROWS)
    links = read_links(profile.graphs[0], Choices(1))
    for halvings in (1, 2, 3):
        levels = levels_of(links, halved(links, halvings))
        assert any(level.retained_from > level.segment for level in levels.values())
        _judge_levels(model, batch, profile, levels)


def halved(links: tuple[Link, ...], halvings: int) -> list[Way]:
    """Only the first entry is kept; a stretch is run again for its last segment, then each of its halves."""
    last = len(links) - 1
    entries = {0: -1}
    stretches = [(0, last, halvings)]
    made_for: dict[int, int] = {}
    while stretches:
        s, t, left = stretches.pop()
        middle = (s + t + 1) // 2
        if left and s < middle <= t:
            entries[middle] = t
            stretches += [(s, middle - 1, left - 1), (middle, t, left - 1)]
        else:
            made_for |= dict.fromkeys(range(s, t + 1), t)
    return [
        Way(link.everything, made_for[i], entries[i] if i in entries else made_for[i])
        for i, link in enumerate(links)
    ]


def _judge_levels(model: nn.Module, batch: Any, profile: Profile, levels: dict[int, Level]) -> None:
    """The same gradients as the plain step, and the allocator's peak is the simulation's."""
    graph = profile.graphs[0]
    keys = [graph.value_key(value) for value in levels]
    simulated = run(graph, levels)
    plan = replace(
        find_plan(profile, memory=1 << 40),
        recompute=tuple(keys),
        levels=tuple(levels.values()),
        predicted_peak_bytes=profile.residents.total_bytes
        - profile.residents.gradients_bytes
        + profile.unexplained_bytes
        + simulated.peak.total_bytes,
        budget_bytes=1 << 40,
    )
    twin = copy.deepcopy(model)
    accumulation = Accumulation(twin, own_loss, None)
    step = memfit.Step(accumulation, plan, profile, optimizer=None, find=lambda p: plan)
    found = judge(DEEP, twin, batch, step)
    assert found.differences == []
    assert found.measured_bytes <= found.predicted_bytes <= 1.01 * found.measured_bytes + 1000
