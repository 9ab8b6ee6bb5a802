"""The blocks of a step against the one definition of its peak, and what an allocator makes of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from itertools import accumulate, groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memfit
from memfit.cli import main
from memfit.core.allocator import Memory
from memfit.core.graph import EMPTY_GRAPH, Level, Profile, Residents, StepGraph
from memfit.core.plan import Planner, find_plan, simulate
from memfit.core.reserved import moves, predict_cuda_memory
from memfit.core.timeline import run
from memfit.runtime.fake import fake_tensors
from strategies import Piece, build, chains, choices, flat_update, graphs_and_choices, profiles

MIB = 1 << 20


def check(graph: StepGraph, dropped: Mapping[int, Level], alignment_bytes: int) -> None:
    """Levels, peak and lives of the moves are those of the run."""
    found = moves(graph, dropped, alignment_bytes=alignment_bytes)
    levels = [0, *accumulate(size for _, size in found)]
    simulated = run(graph, dropped, alignment_bytes=alignment_bytes)
    assert max(levels) == simulated.peak.total_bytes
    # Every moment is a level, in the same order; a block of no bytes makes a moment and no move.
    rest = iter(levels)
    assert all(total in rest for total, _ in groupby(moment.total_bytes for moment in simulated.moments))
    live: dict[Hashable, int] = {}
    for block, size_bytes in found:
        if size_bytes > 0:
            assert block not in live
            live[block] = size_bytes
        else:
            assert live.pop(block) == -size_bytes
    align = alignment_bytes
    persisting = [-(-s.size_bytes // align) * align for s in graph.storages if s.persists and s.size_bytes]
    assert sorted(live.values()) == sorted(persisting)


@settings(max_examples=100)
@given(graphs_and_choices(), st.sampled_from([1, 8]))
def test_the_moves_of_a_micro_batch_add_up_to_every_moment_of_its_run(
    drawn: tuple[StepGraph, frozenset[int]], alignment_bytes: int
) -> None:
    graph, dropped = drawn
    check(graph, dict.fromkeys(dropped, Level()), alignment_bytes)


@settings(max_examples=10)
@given(chains(), st.integers(0, 100))
def test_so_they_do_where_values_are_made_in_levels(profile: Profile, share: int) -> None:
    planner = Planner(profile)
    least, most = planner.lowest().predicted_peak_bytes, run(profile.graphs[0]).peak.total_bytes
    plan = planner.fastest(least + (most - least) * share // 100) or planner.lowest()
    graph = profile.graphs[0]
    keys = {graph.value_key(value): value for value in graph.produced()}
    levels = plan.levels or [Level()] * len(plan.recompute)
    check(graph, {keys[key]: level for key, level in zip(plan.recompute, levels, strict=True)}, 1)


@given(profiles(tidy=True), st.data())
def test_a_plan_requests_its_predicted_peak(profile: Profile, data: st.DataObject) -> None:
    """To the byte, when blocks are not rounded and no seed is late: steps peak where the timeline says."""
    exact = replace(profile, alignment_bytes=1)
    graph = data.draw(st.sampled_from(exact.graphs))
    dropped = data.draw(choices(graph))
    free = find_plan(exact, memory=1 << 40, micro_batch_size=graph.rows)
    plan = replace(free, recompute=tuple(sorted(graph.value_key(value) for value in dropped)))
    found = predict_cuda_memory(exact, plan, expandable_segments=data.draw(st.booleans()))
    late_bytes = sum(op.seed_bytes for op in graph.ops) if dropped else 0
    assert 0 <= found.requested_bytes - simulate(exact, plan).peak_bytes <= late_bytes
    assert found.requested_bytes <= found.allocated_bytes <= found.reserved_bytes


# ---- by hand --------------------------------------------------------------------------------------------


def test_a_replayed_write_in_place_hands_its_block_on() -> None:
    """a = 10 is made and overwritten by b, which is saved: the replays of both are one block of 10."""
    write = Piece(reads=(0,), writes_in_place=True, saves_outputs=(0,))
    graph = build((Piece(sizes=(10,)), write, Piece(reads=(0,), sizes=(1,), frees=(0,))))
    replayed = [move for move in moves(graph, dict.fromkeys((0, 1), Level())) if "REPLAYED" in str(move)]
    assert [size for _, size in replayed] == [10, -10]
    assert replayed[0].block == replayed[1].block


def step_of(piece: Piece, residents: Residents) -> Profile:
    """One op and its node, all rows at once."""
    return Profile(1, (build((piece,), resident=False),), residents)


def test_the_state_of_the_first_update_makes_the_second_step_reserve_more() -> None:
    """12 MiB of state take the block of 12 MiB that the activations of the first step had; the second step,
    which a count of live bytes puts at 24 MiB, needs one more of each: 12 MiB, and 2 for what is small.
    """
    piece = Piece(sizes=(12 * MIB,), saves_outputs=(0,))
    profile = step_of(piece, Residents(0, 0, 12 * MIB, 0))
    profile = replace(profile, first_update=flat_update(0, state_bytes=12 * MIB))
    plan = find_plan(profile, memory="1GiB")
    assert predict_cuda_memory(profile, plan).reserved_bytes == 26 * MIB
    stateless = replace(profile, residents=Residents(0, 0, 0, 0), first_update=EMPTY_GRAPH)
    assert predict_cuda_memory(stateless, plan).reserved_bytes == 14 * MIB


def test_gradients_go_at_the_end_of_a_step() -> None:
    """12 MiB of gradient, and 2 for what is small, however many steps there are."""
    piece = Piece(sizes=(1,), saves_outputs=(0,), gradient_bytes=12 * MIB)
    profile = step_of(piece, Residents(0, 12 * MIB, 0, 0))
    assert predict_cuda_memory(profile, find_plan(profile, memory="1GiB")).reserved_bytes == 14 * MIB


def test_expandable_segments_reserve_whole_pages() -> None:
    piece = Piece(sizes=(15 * MIB,), saves_outputs=(0,))
    profile = step_of(piece, Residents(15 * MIB, 0, 0, 0))
    plan = find_plan(profile, memory="1GiB")
    usual, expandable = (predict_cuda_memory(profile, plan, expandable_segments=e) for e in (False, True))
    # 1 MiB of each segment of 16 is not split off, so that it counts as allocated.
    assert usual == Memory(30 * MIB + 2, 32 * MIB + 1024, 34 * MIB)
    assert expandable == Memory(30 * MIB + 2, 30 * MIB + 1024, 42 * MIB)


def test_the_optimizer_states_of_a_real_job_are_known_block_by_block() -> None:
    """Adam has two states of each parameter's size and a counter of four bytes."""
    model = torch.nn.Linear(3, 5)
    batch = (torch.randn(4, 3), torch.randn(4, 5))
    optimizer = torch.optim.Adam(model.parameters())
    found = memfit.profile(
        model, lambda m, b: torch.nn.functional.mse_loss(m(b[0]), b[1]), batch, optimizer=optimizer
    )
    residents = found.residents
    assert residents.parameter_sizes == residents.gradient_sizes == (60, 20)
    assert residents.batch_sizes == (48, 80)
    born = [storage.size_bytes for storage in found.first_update.storages if storage.persists]
    assert sorted(born) == sorted([60, 60, 4, 20, 20, 4])
    assert sum(born) == residents.optimizer_bytes
    assert memfit.Profile.from_json(found.to_json()) == found


def test_the_command_line_says_what_a_card_will_reserve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "jobs:tiny", "--device", "h100", "--memory", "1GiB"]) == 0
    assert "allocated (" in (said := capsys.readouterr().out)
    assert "reserved with expandable_segments:True" in said
    assert main(["plan", "jobs:tiny", "--memory", "1GiB"]) == 0
    assert "reserved" not in capsys.readouterr().out


def test_the_residents_of_a_card_are_rounded_as_its_allocator_rounds_them() -> None:
    """Ten parameters of 12 bytes take ten blocks of 512; so do their gradients, and Adam's two states."""
    with fake_tensors():
        model = torch.nn.Sequential(*(torch.nn.Linear(3, 1, bias=False) for _ in range(10)))
        optimizer = torch.optim.Adam(model.parameters())
        found = memfit.profile(
            model[0], lambda m, b: m(b).mean(), torch.zeros(4, 3), optimizer=optimizer, device="h100"
        )
    assert found.residents.parameters_bytes == found.residents.gradients_bytes == 512
    assert found.residents.optimizer_bytes == 10 * 2 * 512 + 10 * 512
    assert found.residents.batch_bytes == 512


def test_a_step_in_two_passes_holds_the_gradients_of_all_outputs_meanwhile() -> None:
    """Two megabytes are requested beside every micro-batch, and the loss between has a peak too."""
    graph = build((Piece(sizes=(1 << 20,)),))
    profile = Profile(rows=2, graphs=(replace(graph, rows=1),), residents=Residents(0, 0, 0, 0))
    held = replace(graph, rows=1, held_bytes=2 << 20)
    two = replace(profile, graphs=(held,), loss_of_all=build((Piece(sizes=(8 << 20,)),)))
    requested = [
        predict_cuda_memory(one, find_plan(one, memory="1GiB")).requested_bytes
        for one in (profile, replace(two, loss_of_all=graph), two)
    ]
    assert requested[1] == requested[0] + (2 << 20)
    assert requested[2] >= 8 << 20
