"""The laws of planning, judged by the slow reference and by brute force, never by the simulation itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from memfit.core.graph import FORMAT, Profile, Residents, StepGraph, Storage, ValueKey
from memfit.core.milp import Program
from memfit.core.plan import Plan, dropped_values, find_plan, simulate
from memfit.core.timeline import base_bytes, droppable, floors
from memfit.errors import InfeasibleBudget
from reference import (
    Choice,
    all_choices,
    best_plan_by_brute_force,
    is_valid,
    live_bytes,
    peak_bytes,
    step_peak_bytes,
)
from strategies import Piece, build, choices, flat_update, profiles

# Each example plans several times or tries every choice there is.
FEW = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
MOST_BY_BRUTE_FORCE = 6  # droppable values: 64 choices
WORST_SHARE = 0.75  # of a forward, beyond the best of all choices
TOLERANCE_S = 1e-6  # of HiGHS, on seconds of the size of one


def attempt(profile: Profile, memory: int, micro_batch_size: int | None = None) -> Plan | InfeasibleBudget:
    """A plan, or the refusal."""
    try:
        return find_plan(profile, memory=memory, micro_batch_size=micro_batch_size)
    except InfeasibleBudget as refusal:
        return refusal


def plan_or_least(profile: Profile, memory: int) -> tuple[Plan, int]:
    """A plan and its budget: the one asked for, or else what the refusal says is needed."""
    found = attempt(profile, memory)
    if isinstance(found, Plan):
        return found, memory
    return find_plan(profile, memory=found.needed_bytes), found.needed_bytes


def refusal_of(profile: Profile, memory: int) -> InfeasibleBudget:
    """The refusal of a budget that is too small."""
    with pytest.raises(InfeasibleBudget) as caught:
        find_plan(profile, memory=memory)
    return caught.value


def top_bytes(profile: Profile) -> int:
    """A budget that binds at no size."""
    return max(step_peak_bytes(profile, graph, ()) for graph in profile.graphs)


def dropped_by(plan: Plan, graph: StepGraph) -> frozenset[int]:
    """The values a plan names; found here without the help of the code under test."""
    return frozenset(value for value in graph.produced() if graph.value_key(value) in set(plan.recompute))


@st.composite
def profiles_and_budgets(draw: st.DrawFn) -> tuple[Profile, int]:
    """A random profile and memory at which something changes: the peak of some choice, or a byte less."""
    profile = draw(profiles(6, tidy=True))
    graph = draw(st.sampled_from(profile.graphs))
    dropped = draw(choices(graph))
    return profile, max(1, step_peak_bytes(profile, graph, dropped) - draw(st.integers(0, 1)))


@st.composite
def solved(draw: st.DrawFn, *, tidy: bool) -> tuple[Profile, list[Choice], int]:
    """A profile of one size, all choices there are, and the peak of one: bytes at which something changes."""
    profile = draw(profiles(5, 1, tidy=tidy))
    assume(1 <= len(droppable(profile.graphs[0])) <= MOST_BY_BRUTE_FORCE)
    every = all_choices(profile, profile.graphs[0])
    return profile, every, draw(st.sampled_from(sorted({choice.peak_bytes for choice in every})))


# ---- laws -----------------------------------------------------------------------------------------------


@FEW
@given(profiles_and_budgets())
def test_a_plan_fits_by_the_reference_and_costs_what_it_says(drawn: tuple[Profile, int]) -> None:
    profile = drawn[0]
    plan, budget_bytes = plan_or_least(*drawn)
    graph = profile.graph(plan.micro_batch_size)
    dropped = dropped_by(plan, graph)
    assert is_valid(graph, dropped)
    assert len(dropped) == plan.recomputes
    assert step_peak_bytes(profile, graph, dropped) == plan.predicted_peak_bytes <= budget_bytes
    moments = live_bytes(graph, dropped, profile.alignment_bytes)
    again = sum(graph.ops[m.op].replay_s for m in moments if m.is_replay)
    steps = plan.gradient_accumulation_steps
    assert plan.recompute_s == pytest.approx(steps * again)
    assert plan.predicted_step_s == pytest.approx(steps * (graph.seconds + again) + profile.update_s)
    assert simulate(profile, plan).peak_bytes == plan.predicted_peak_bytes
    assert Plan.from_json(plan.to_json()) == plan


@FEW
@given(profiles(7))
def test_a_refusal_names_memory_that_works(profile: Profile) -> None:
    assume(floors(profile)[False].total_bytes > 1)
    refusal = refusal_of(profile, floors(profile)[False].total_bytes - 1)
    assert refusal.needed_bytes > refusal.budget_bytes == floors(profile)[False].total_bytes - 1
    plan = find_plan(profile, memory=refusal.needed_bytes)
    assert plan.predicted_peak_bytes <= refusal.needed_bytes
    for size in {graph.rows for graph in profile.graphs}:
        pinned = attempt(profile, refusal.budget_bytes, size)
        assert isinstance(pinned, InfeasibleBudget)
        assert pinned.needed_bytes >= refusal.needed_bytes


@FEW
@given(profiles(7), st.integers(0, 3))
def test_memory_that_does_not_bind_costs_nothing(profile: Profile, more: int) -> None:
    plan = find_plan(profile, memory=max(1, top_bytes(profile) + more))
    assert plan.recompute == ()
    assert (plan.recompute_s, plan.lower_bound_s, plan.optimality_gap) == (0.0, 0.0, 0.0)
    seconds = [-(-profile.rows // graph.rows) * graph.seconds + profile.update_s for graph in profile.graphs]
    assert plan.predicted_step_s == pytest.approx(min(seconds))


@FEW
@given(solved(tidy=False))
def test_the_lower_bound_is_never_above_the_best_choice(drawn: tuple[Profile, list[Choice], int]) -> None:
    profile, every, free_bytes = drawn
    graph = profile.graphs[0]
    alignment_bytes = profile.alignment_bytes
    program = Program(graph, alignment_bytes=alignment_bytes, window=10**6)
    best = best_plan_by_brute_force(every, free_bytes)
    assert best is not None
    bound_s = program.bound_s(free_bytes)
    assert bound_s is not None
    assert bound_s <= best.recompute_s + TOLERANCE_S
    plan = attempt(profile, max(1, base_bytes(profile, graph) + free_bytes))
    if isinstance(plan, Plan):
        assert plan.lower_bound_s <= best.recompute_s + TOLERANCE_S
        assert plan.recompute_s >= best.recompute_s - TOLERANCE_S


@FEW
@given(solved(tidy=True))
def test_a_plan_recomputes_at_most_a_share_more_than_the_best(
    drawn: tuple[Profile, list[Choice], int],
) -> None:
    profile, every, free_bytes = drawn
    graph = profile.graphs[0]
    base = base_bytes(profile, graph)
    plan, memory = plan_or_least(profile, max(base + free_bytes, floors(profile)[False].total_bytes))
    best = best_plan_by_brute_force(every, memory - base)
    assert best is not None
    assert plan.recompute_s - best.recompute_s <= WORST_SHARE * graph.forward_s


def scaled(profile: Profile, by: int) -> Profile:
    """The same profile with all bytes multiplied."""
    r = profile.residents
    return replace(
        profile,
        graphs=tuple(scaled_graph(graph, by) for graph in profile.graphs),
        residents=Residents(
            r.parameters_bytes * by, r.gradients_bytes * by, r.optimizer_bytes * by, r.batch_bytes * by
        ),
        first_update=scaled_graph(profile.first_update, by),
        update=scaled_graph(profile.update, by),
        alignment_bytes=profile.alignment_bytes * by,
        unexplained_bytes=profile.unexplained_bytes * by,
    )


def scaled_graph(graph: StepGraph, by: int) -> StepGraph:
    """The same graph with all bytes multiplied."""
    ops = tuple(
        replace(op, temporary_bytes=op.temporary_bytes * by, seed_bytes=op.seed_bytes * by)
        for op in graph.ops
    )
    return replace(
        graph, ops=ops, storages=tuple(Storage(s.size_bytes * by, s.persists) for s in graph.storages)
    )


@FEW
@given(profiles_and_budgets(), st.sampled_from([2, 3, 1024]))
def test_multiplying_all_bytes_changes_no_plan(drawn: tuple[Profile, int], by: int) -> None:
    # Thousands, because the planner takes whole bytes of half percents.
    profile, budget_bytes = scaled(drawn[0], 1000), drawn[1] * 1000
    one, other = attempt(profile, budget_bytes), attempt(scaled(profile, by), budget_bytes * by)
    if isinstance(one, Plan):
        assert isinstance(other, Plan)
        assert other.recompute_s == one.recompute_s
        assert other.predicted_step_s == one.predicted_step_s
    else:
        assert isinstance(other, InfeasibleBudget)
        assert other.needed_bytes == one.needed_bytes * by


@FEW
@given(profiles_and_budgets())
def test_a_plan_depends_on_nothing_but_profile_and_memory(drawn: tuple[Profile, int]) -> None:
    profile, budget_bytes = drawn
    again = Profile.from_json(profile.to_json())
    one, other = attempt(profile, budget_bytes), attempt(again, budget_bytes)
    assert one == other or str(one) == str(other)
    assert type(one) is type(other)


@FEW
@given(profiles_and_budgets())
def test_a_free_micro_batch_size_is_never_slower_than_a_pinned_one(drawn: tuple[Profile, int]) -> None:
    profile, budget_bytes = drawn
    free = attempt(profile, budget_bytes)
    for graph in profile.graphs:
        pinned = attempt(profile, budget_bytes, graph.rows)
        if isinstance(pinned, Plan):
            assert pinned.micro_batch_size == graph.rows
            assert isinstance(free, Plan)
            assert free.predicted_step_s <= pinned.predicted_step_s * (1 + 1e-9)


# ---- by hand --------------------------------------------------------------------------------------------

BLOCK = Piece(reads=(0,), sizes=(100,), seconds=1.0, saves_outputs=(0,), frees=(0,))
NOTHING = Residents(0, 0, 0, 0)


def chain(length: int, seconds: tuple[float, ...] = (), rows: int = 1) -> Profile:
    """A chain of ops that each save 100 bytes, then a loss of 1."""
    ops = [BLOCK._replace(seconds=seconds[i] if seconds else 1.0) for i in range(length)]
    graph = build((*ops, Piece(reads=(0,), sizes=(1,), seconds=0.0, frees=(0,))), rows=rows)
    return Profile(rows, (graph,), NOTHING)


@pytest.mark.parametrize(("budget_bytes", "recompute_s"), [(403, 0.0), (402, 1.0), (303, 1.0)])
def test_a_chain_of_four_replays_the_least_it_must(budget_bytes: int, recompute_s: float) -> None:
    """Four values, the loss and two gradients: 403. Without one of the first three: 303, for one second."""
    plan = find_plan(chain(4), memory=budget_bytes)
    assert plan.recompute_s == recompute_s
    assert plan.predicted_peak_bytes == (403 if recompute_s == 0 else 303)


def test_the_cheapest_of_equal_values_is_replayed() -> None:
    """Without the first or the second value 303 B do; the second takes a quarter of the time."""
    plan = find_plan(chain(4, (1.0, 0.25, 1.0, 1.0)), memory=303)
    assert plan.recompute == (ValueKey("block.0", "aten.op.default", 1, 0),)
    assert (plan.recompute_s, plan.recomputed_bytes) == (0.25, 100)


def test_the_lower_bound_lets_a_saved_value_go_when_it_is_released() -> None:
    """The first value (100 B) is saved by the loss, so it is gone when 150 B more are needed at the peak.

    The second op reads it too, but is only needed after the peak; it does not make the value live on.
    """
    reader = Piece(reads=(0,), sizes=(10,), saves_outputs=(0,))
    high = Piece((1,), is_replayable=False, saves_outputs=(0,), backward_sizes=(1, 150))
    loss = Piece((0,), saves_inputs=True, frees=(0, 0, 0))
    graph = build((Piece(sizes=(100,)), reader, high, loss, Piece((0,))))
    program = Program(graph, alignment_bytes=1, window=24)
    assert program.bound_s(peak_bytes(graph)) == 0.0


def test_memory_may_be_written_as_text() -> None:
    assert find_plan(chain(4), memory="303 B") == find_plan(chain(4), memory=303)
    with pytest.raises(ValueError, match="has no unit"):
        find_plan(chain(4), memory="303")


def test_a_micro_batch_size_that_was_not_recorded_is_refused() -> None:
    with pytest.raises(ValueError, match="no micro-batch of 2 rows"):
        find_plan(chain(4), memory=303, micro_batch_size=2)


def test_a_larger_recorded_size_is_not_taken_for_the_one_that_is_asked_for() -> None:
    small, large = (replace(graph, rows=rows) for rows in (2, 8) for graph in chain(4).graphs)
    profile = replace(chain(4), graphs=(large, small), rows=8)
    assert find_plan(profile, memory=303, micro_batch_size=2).micro_batch_size == 2
    with pytest.raises(ValueError, match="no micro-batch of 5 rows: it holds those of 2, 8"):
        find_plan(profile, memory=303, micro_batch_size=5)


def test_a_step_that_saves_nothing_is_refused_with_what_it_needs() -> None:
    """One op makes 10 bytes, beside them two gradients of 1 byte."""
    profile = Profile(1, (build((Piece(sizes=(10,)),)),), NOTHING)
    assert refusal_of(profile, 11).needed_bytes == 12
    assert find_plan(profile, memory=12).recompute == ()


def test_accumulation_is_chosen_where_it_is_faster_than_replaying() -> None:
    """Four rows at once take 12 s and 2 x 403 B and more; two at a time take 2 x 9 s."""
    large, small = (chain(4, rows=rows).graphs[0] for rows in (4, 2))
    profile = Profile(4, (large, small), NOTHING, update=flat_update(0, seconds=0.5))
    assert find_plan(profile, memory=4 * 403).gradient_accumulation_steps == 1
    plan = find_plan(profile, memory=2 * 403)
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.recompute) == (2, 2, ())
    assert plan.predicted_step_s == 2 * small.seconds + 0.5


def test_the_optimizer_step_can_be_the_peak() -> None:
    profile = replace(chain(4), residents=Residents(500, 300, 200, 0), update=flat_update(1000))
    assert find_plan(profile, memory=2000).peak_owner == "optimizer.step"
    refusal = refusal_of(profile, 1999)
    assert (refusal.needed_bytes, refusal.owner) == (2000, "optimizer.step")
    assert "an optimizer that holds less than 1000 B meanwhile: most have fused=True" in str(refusal)


# ---- what people read -----------------------------------------------------------------------------------


def test_a_refusal_has_the_number_the_owner_and_the_cure() -> None:
    refusal = refusal_of(replace(chain(4), residents=Residents(5000, 0, 0, 0)), 5150)
    assert (refusal.budget_bytes, refusal.needed_bytes) == (5150, 5203)
    assert refusal.owner.startswith(("forward, block.", "backward, block.", "recompute, block."))
    text = str(refusal)
    assert "no plan fits 5.0 KiB (5,150 B): the smallest memory that works is 5,203 B (5.1 KiB)" in text
    assert f"held by {refusal.owner};" in text
    assert "alone take 4.9 KiB" in text
    assert "Raise the memory by 53 B, or make the model, the rows or the optimizer state smaller." in text


def test_a_plan_says_what_it_does() -> None:
    text = str(find_plan(chain(4), memory=303)).splitlines()
    assert text[0] == "1 rows as 1 x 1"
    assert text[1].startswith("peak 303 B of 303 B, at ")
    assert text[2].startswith("step ")
    assert text[3].startswith("recomputes 1 tensors (100 B")
    assert "25.0% of a forward; at most " in text[3]
    assert str(find_plan(chain(4), memory=403)).endswith("recomputes nothing")


# ---- plans that do not belong here ----------------------------------------------------------------------

PLAN = find_plan(chain(4), memory=303)


def naming(*keys: ValueKey) -> Plan:
    """A plan that recomputes these."""
    return replace(PLAN, recompute=keys)


def test_a_plan_with_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block.7.*which this profile does not have; plan again"):
        simulate(chain(4), naming(ValueKey("block.7", "aten.op.default", 0, 0)))


def test_a_plan_with_a_tensor_that_cannot_be_replayed_is_refused() -> None:
    graph = build((BLOCK._replace(is_replayable=False), BLOCK))
    with pytest.raises(ValueError, match=r"block.0.*cannot be replayed; plan again"):
        dropped_values(graph, naming(ValueKey("block.0", "aten.op.default", 0, 0)))


def test_a_plan_that_needs_an_overwritten_tensor_but_does_not_replay_it_is_refused() -> None:
    graph = build((Piece(sizes=(100,)), BLOCK._replace(writes_in_place=True)))
    old, new = graph.value_key(0), graph.value_key(1)
    assert dropped_values(graph, naming(old, new)).keys() == {0, 1}
    with pytest.raises(ValueError, match=r"block.0.*overwritten in place and not recomputed; plan again"):
        dropped_values(graph, naming(new))


def test_a_plan_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="no micro-batch of 9 rows"):
        simulate(chain(4), replace(PLAN, micro_batch_size=9))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"plan"'])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a memfit plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("version", [FORMAT - 1, FORMAT + 1, None, str(FORMAT)])
def test_a_plan_of_another_version_is_refused(version: object) -> None:
    text = json.dumps(json.loads(PLAN.to_json()) | {"format": version})
    with pytest.raises(ValueError, match=f"not a memfit plan of format {FORMAT}; make it again"):
        Plan.from_json(text)


@pytest.mark.parametrize("change", ["lacks rows", "lacks recompute", "has more"])
def test_a_plan_with_other_fields_is_refused(change: str) -> None:
    data = json.loads(PLAN.to_json())
    if change == "has more":
        data["surprise"] = 1
    else:
        del data[change.removeprefix("lacks ")]
    with pytest.raises(ValueError, match="not a memfit plan"):
        Plan.from_json(json.dumps(data))
