"""More memory is never slower; and how good plans are, judged by brute force over chains and by Checkmate."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import memfit
from checkmate import fastest_schedule_s
from memfit.core.chain import Chain, Link, Way
from memfit.core.costs import with_overhead
from memfit.core.frontier import frontier
from memfit.core.graph import Profile, Residents, StepGraph
from memfit.core.links import Choices, levels_of, read_links
from memfit.core.plan import Planner, find_plan
from memfit.core.timeline import run
from memfit.errors import InfeasibleBudget
from memfit.runtime.fake import fake_tensors
from models import UNet
from strategies import Piece, build, chains, profiles

FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
UNITS = 2000
TOLERANCE_S = 1e-6  # of HiGHS


def needed_bytes(profile: Profile) -> int:
    """What the refusal of a single byte says."""
    with pytest.raises(InfeasibleBudget) as refused:
        find_plan(profile, memory=1)
    return refused.value.needed_bytes


# ---- law 5 -------------------------------------------------------------------------------------------------


@FEW
@given(st.one_of(profiles(6, tidy=True), chains(5)), st.lists(st.integers(0, 1000), min_size=6, max_size=12))
def test_more_memory_is_never_slower_and_less_never_peaks_higher(profile: Profile, shares: list[int]) -> None:
    planner = Planner(profile)
    low = planner.lowest().predicted_peak_bytes
    high = max(low + 1, find_plan(profile, memory=1 << 40).predicted_peak_bytes)
    budgets = sorted({low + (high - low) * share // 1000 for share in [0, 1000, *shares]})
    plans = [planner.fastest(budget) or planner.least(budget) for budget in budgets]
    for less, more in pairwise(plans):
        assert more.predicted_step_s <= less.predicted_step_s
        assert more.predicted_peak_bytes >= less.predicted_peak_bytes
        assert more.predicted_peak_bytes <= more.budget_bytes


@FEW
@given(st.one_of(profiles(6, tidy=True), chains(5)), st.integers(0, 100))
def test_a_plan_does_not_depend_on_what_was_planned_before(profile: Profile, percent: int) -> None:
    planner = Planner(profile)
    low, high = planner.lowest().predicted_peak_bytes, find_plan(profile, memory=1 << 40).predicted_peak_bytes
    budget = max(1, low + (high - low) * percent // 100)
    for other in (high, (low + high) // 2, low):
        planner.fastest(other)
    again = planner.fastest(budget) or planner.least(budget)
    assert again == find_plan(profile, memory=budget)


@settings(FEW, max_examples=6)
@given(chains(4))
def test_each_plan_of_a_frontier_is_the_plan_for_its_memory(profile: Profile) -> None:
    for plan in frontier(profile, plans=4):
        found = find_plan(profile, memory=plan.predicted_peak_bytes)
        assert replace(found, lower_bound_s=plan.lower_bound_s) == plan


@FEW
@given(chains(6), st.integers(0, 3))
def test_the_memory_a_refused_chain_needs_is_enough(profile: Profile, more: int) -> None:
    needed = needed_bytes(profile)
    assert find_plan(profile, memory=needed + more).predicted_peak_bytes <= needed + more


# ---- brute force over chains -------------------------------------------------------------------------------

Passing = tuple[dict[int, tuple[int, int]], dict[int, int]]


def passings(links: tuple[Link, ...], s: int, t: int, is_first: bool) -> Iterator[Passing]:
    """Every way through a stretch: which choice and made for whom, by segment; for whom an entry, by segment.

    Note [The chain] in plain recursion.
    """
    target = -1 if is_first else t
    if s > t:
        yield {}, {}
        return
    last = links[s].choices.index(links[s].everything)
    if s == t and not is_first:
        yield {s: (last, t)}, {s: target}
        return
    for choice in range(len(links[s].choices)):
        for ways, entries in passings(links, s + 1, t, is_first):
            yield {s: (choice, target), **ways}, {**entries, s: target}
    for to in range(s + 1, t + 1):
        for inner, inner_entries in passings(links, s, to - 1, False):
            for rest, entries in passings(links, to, t, is_first):
                yield {**inner, **rest}, {**inner_entries, **entries, s: target}


def few_choices(link: Link) -> Link:
    """At most three of a link's choices: the fastest, one between, and the one that keeps least."""
    count = len(link.choices)
    picks = sorted({0, count // 2, link.choices.index(link.everything)})
    return replace(
        link,
        choices=tuple(link.choices[i] for i in picks),
        again_s=tuple(link.again_s[i] for i in picks),
    )


@settings(FEW, max_examples=10)
@given(chains(4))
def test_no_way_through_a_chain_is_faster_than_the_bound(profile: Profile) -> None:
    graph = profile.graphs[0]
    links = read_links(graph, Choices(profile.alignment_bytes))
    links = tuple(few_choices(link) for link in links)
    found = set()
    for ways, entries in passings(links, 0, len(links) - 1, True):
        way = [Way(links[s].choices[ways[s][0]], ways[s][1], entries[s]) for s in range(len(links))]
        simulated = run(graph, levels_of(links, way))
        seconds = sum(graph.ops[op].replay_s for op in simulated.replayed_ops)
        found.add((simulated.peak.total_bytes, seconds))
    plain = run(graph).peak.total_bytes
    bound = Chain(links, plain, UNITS, bound=True).solve()
    for budget in sorted({peak for peak, _ in found if peak <= plain}):
        best_s = min(seconds for peak, seconds in found if peak <= budget)
        units = -(-budget * UNITS // plain)
        assert bound[min(units, UNITS)] <= best_s + 1e-9


# ---- Checkmate ---------------------------------------------------------------------------------------------


@st.composite
def plain_steps(draw: st.DrawFn) -> Profile:
    """A step of ops with one output each that write nothing in place."""
    drawn = []
    for number in range(draw(st.integers(3, 6))):
        drawn.append(
            Piece(
                reads=(0,) if not number else tuple(draw(st.sets(st.integers(0, 2), min_size=1, max_size=2))),
                sizes=(draw(st.integers(1, 12)),),
                seconds=draw(st.integers(1, 16)) / 8,
                saves_inputs=draw(st.booleans()),
                saves_outputs=(0,) if draw(st.booleans()) else (),
                frees=(0,) if draw(st.booleans()) else (),
                temporary_bytes=draw(st.sampled_from([0, 0, 3])),
                backward_sizes=(draw(st.integers(1, 6)),),
            )
        )
    graph = build(tuple(drawn))
    graph = with_overhead(graph, 0.125, is_asynchronous=False)
    return Profile(1, (graph,), Residents(0, 0, 0, 0))


@settings(FEW, max_examples=25)
@given(plain_steps(), st.integers(0, 100))
def test_no_plan_is_faster_than_the_best_of_all_schedules(profile: Profile, percent: int) -> None:
    low, high = needed_bytes(profile), find_plan(profile, memory=1 << 40).predicted_peak_bytes
    assume(low < high)
    plan = find_plan(profile, memory=low + (high - low) * percent // 100)
    best_s = fastest_schedule_s(profile.graphs[0], plan.budget_bytes)
    assert best_s is not None
    assert best_s <= plan.recompute_s + TOLERANCE_S
    assert plan.lower_bound_s <= plan.recompute_s
    plenty = fastest_schedule_s(profile.graphs[0], high)
    assert plenty == pytest.approx(0.0, abs=TOLERANCE_S)


# ---- what the program holds --------------------------------------------------------------------------------


def test_a_key_value_cache_is_planned_within_half_a_percent_of_a_step() -> None:
    """The cache of all layers is there until the forward is over, whatever is dropped."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(n_layer=8, n_embd=32, n_head=2, vocab_size=17, n_positions=32)).train()
    ids = torch.arange(4 * 32).reshape(4, 32) % 17

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        found: Tensor = model(input_ids=batch, labels=batch).loss
        return found

    profile = memfit.profile(model, loss, ids, micro_batch_size=4)
    links = read_links(profile.graphs[0], Choices(profile.alignment_bytes))
    assert sum(link.held_bytes > 0 for link in links) == 8
    planner = Planner(profile)
    low, high = planner.lowest().predicted_peak_bytes, run(profile.graphs[0]).peak.total_bytes
    for percent in (0, 5, 10, 20, 40):
        budget = low + (high - low) * percent // 100
        plan = planner.fastest(budget) or planner.least(budget)
        assert plan.optimality_gap <= 0.005


# ---- what one run names works in the next ----------------------------------------------------------------


def at_other_speeds(profile: Profile, seed: int) -> Profile:
    """What a noisy machine would have measured."""
    noise = random.Random(seed)

    def again(graph: StepGraph) -> StepGraph:
        ops = (replace(op, seconds=op.seconds * noise.uniform(0.5, 2)) for op in graph.ops)
        return replace(graph, ops=tuple(ops))

    return replace(profile, graphs=tuple(again(graph) for graph in profile.graphs))


def test_the_memory_that_is_named_does_not_depend_on_measured_seconds() -> None:
    with fake_tensors():
        batch = torch.zeros(2, 3, 16, 16)
        profile = memfit.profile(
            UNet(width=8, depth=2), lambda m, x: m(x).square().mean(), batch, micro_batch_size=2
        )
    needed = needed_bytes(profile)
    again = at_other_speeds(profile, 3)
    assert needed_bytes(again) == needed
    assert find_plan(again, memory=needed).predicted_peak_bytes <= needed
