"""Training runs end to end: killed, interrupted and resumed, they give the losses of an undisturbed run."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memfit.cli import main
from test_state import largest_file

Captured = pytest.CaptureFixture[str]
MEMFIT = ("--memory", "1GiB", "--micro-batch-size", "4")
KINDS = pytest.mark.parametrize("kind", [("--plain",), MEMFIT], ids=["plain", "memfit"])


def train(out: Path, *more: object, target: str = "jobs:tiny", steps: int = 12) -> int:
    arguments = ["train", target, "--out", out, "--steps", steps, *more]
    return main([str(argument) for argument in arguments])


def losses(out: Path) -> list[tuple[int, str]]:
    """The step and the exact loss of each line."""
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return [(line["step"], float(line["loss"]).hex()) for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / (out / "latest").read_text() / "model.safetensors")


def assert_same_run(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    expected = weights(one)
    assert expected
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(two).items())


def child_run(arguments: Sequence[str]) -> None:
    """The body of a child process."""
    raise SystemExit(main(arguments))


def run_and_kill(arguments: Sequence[str], watched: Path, lines: int, delay_s: float) -> int | None:
    """Starts a run in a child and kills it some time after ``lines`` losses; returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memfit.train"])  # torch is imported once, not once for each child
    child = context.Process(target=child_run, args=(arguments,))
    child.start()
    while child.is_alive() and (not watched.exists() or watched.read_bytes().count(b"\n") < lines):
        time.sleep(0.001)
    time.sleep(delay_s)
    child.kill()
    child.join()
    return child.exitcode


@KINDS
def test_a_run_killed_again_and_again_gives_the_losses_of_an_undisturbed_one(
    tmp_path: Path, kind: tuple[str, ...]
) -> None:
    assert train(tmp_path / "whole", *kind, "--save-every", 2, steps=40) == 0
    killed, draw = tmp_path / "killed", random.Random(1)
    arguments = ["train", "jobs:tiny", "--out", str(killed), "--steps", "40", "--save-every", "2", *kind]
    kills = 0
    for lines in (1, 8, 15, 22, 29):
        code = run_and_kill(arguments, killed / "losses.jsonl", lines, draw.random() * 0.02)
        kills += code == -9
        arguments = [*arguments, "--resume"] if "--resume" not in arguments else arguments
    assert kills >= 3  # a child may have been done before it was killed
    assert train(killed, *kind, "--save-every", 2, "--resume", steps=40) == 0
    assert_same_run(tmp_path / "whole", killed)


@KINDS
@pytest.mark.parametrize("target", ["jobs:tiny", "jobs:shuffled"])
def test_a_run_stopped_and_resumed_gives_the_same_losses(
    tmp_path: Path, kind: tuple[str, ...], target: str
) -> None:
    assert train(tmp_path / "whole", *kind, target=target) == 0
    assert train(tmp_path / "parts", *kind, target=target, steps=5) == 0
    assert train(tmp_path / "parts", *kind, "--resume", target=target, steps=12) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_ctrl_c_saves_the_step_in_progress_and_ends_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    target = "jobs:interrupts_itself_at_step_4"
    assert train(tmp_path / "whole", "--plain", target=target) == 0
    with monkeypatch.context() as patch:
        patch.setenv("MEMFIT_TEST_INTERRUPT", "yes")
        assert train(tmp_path / "parts", "--plain", target=target) == 130
    assert "Interrupted after step 4, which is saved" in capsys.readouterr().err
    assert (tmp_path / "parts" / "latest").read_text() == "step-00000004"
    assert train(tmp_path / "parts", "--plain", "--resume", target=target) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_ctrl_c_before_the_first_step_runs_none_and_the_run_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    target = "jobs:interrupts_itself_before_step_1"
    assert train(tmp_path / "whole", "--plain", target=target) == 0
    with monkeypatch.context() as patch:
        patch.setenv("MEMFIT_TEST_INTERRUPT", "yes")
        assert train(tmp_path / "parts", "--plain", target=target) == 130
    assert "Interrupted before step 1: go on with --resume" in capsys.readouterr().err
    assert losses(tmp_path / "parts") == []
    assert train(tmp_path / "parts", "--plain", "--resume", target=target) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_full_disk_is_bad_input_and_the_run_goes_on_afterwards(tmp_path: Path, capsys: Captured) -> None:
    assert train(tmp_path / "whole", "--plain", "--save-every", 3) == 0
    assert train(tmp_path / "full", "--plain", "--save-every", 3, steps=3) == 0
    with largest_file(1500):
        assert train(tmp_path / "full", "--plain", "--save-every", 3, "--resume") == 5
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert "go on with --resume" in said
    assert train(tmp_path / "full", "--plain", "--save-every", 3, "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "full")


def test_a_step_that_finds_no_memory_is_run_again_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    target = "jobs:finds_no_memory_once_at_step_4"
    assert train(tmp_path / "whole", *MEMFIT, target=target, steps=6) == 0
    assert "out of memory" not in capsys.readouterr().err
    monkeypatch.setenv("MEMFIT_TEST_OUTAGE", "yes")
    assert train(tmp_path / "outage", *MEMFIT, target=target, steps=6) == 0
    assert "(std::bad_alloc); the batch was run again from its start" in capsys.readouterr().err
    assert_same_run(tmp_path / "whole", tmp_path / "outage")


def test_an_update_that_finds_no_memory_is_not_saved(tmp_path: Path, capsys: Captured) -> None:
    target = "jobs:update_finds_no_memory_at_step_4"
    assert train(tmp_path / "whole", *MEMFIT, target=target, steps=3) == 0
    assert train(tmp_path / "run", *MEMFIT, "--save-every", 1, target=target, steps=6) == 4
    said = capsys.readouterr().err
    assert "Out of memory in optimizer.step()" in said
    assert "go on from it with --resume" in said
    assert "Traceback" not in said
    assert (tmp_path / "run" / "latest").read_text() == "step-00000003"
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resuming_a_run_that_is_done_changes_nothing(tmp_path: Path) -> None:
    assert train(tmp_path / "run", *MEMFIT, steps=4) == 0
    before = losses(tmp_path / "run"), weights(tmp_path / "run")
    assert train(tmp_path / "run", *MEMFIT, "--resume", steps=4) == 0
    assert losses(tmp_path / "run") == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in weights(tmp_path / "run").items())


def test_a_resumed_run_keeps_the_micro_batch_of_its_plan(tmp_path: Path) -> None:
    assert train(tmp_path / "run", *MEMFIT, steps=3) == 0
    assert train(tmp_path / "run", "--memory", "2GiB", "--resume", steps=6) == 0
    stored = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert stored["micro_batch_size"] == 3  # six rows in parts of at most four: two equal ones
    assert stored["budget_bytes"] == 2 * 2**30


def test_memfit_trains_to_the_losses_of_the_plain_run(tmp_path: Path) -> None:
    whole = ("--memory", "1GiB", "--micro-batch-size", "6")
    assert train(tmp_path / "plain", "--plain", "--batch-size", 6) == 0
    assert train(tmp_path / "memfit", *whole, "--batch-size", 6) == 0
    assert_same_run(tmp_path / "plain", tmp_path / "memfit")


def test_the_result_is_one_json_object_on_stdout(tmp_path: Path, capsys: Captured) -> None:
    assert train(tmp_path / "run", *MEMFIT, "--json", steps=4) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps_done"] == 4
    assert result["held"] is True
    assert 0 < result["measured_peak_bytes"] <= result["predicted_peak_bytes"] <= result["budget_bytes"]
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (result.pop("schema"), result.pop("schema_version")) == ("memfit/train", 1)
    assert stored["result"] == result
    assert stored["options"]["memory"] == "1GiB"


def test_progress_goes_to_stderr_and_the_summary_to_stdout(tmp_path: Path, capsys: Captured) -> None:
    assert train(tmp_path / "run", *MEMFIT, steps=3) == 0
    shown = capsys.readouterr()
    assert "step 3/3" in shown.err
    assert "tokens/s" in shown.err
    assert "step 3/3" not in shown.out
    assert "micro-batch" in shown.out
    assert "the promise held" in shown.out


def test_a_plan_is_printed_without_building_the_model(capsys: Captured) -> None:
    assert main(["plan", "jobs:tiny", "--memory", "1GiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget_bytes"] == 2**30
    assert main(["plan", "jobs:tiny", "--memory", "1GiB"]) == 0
    assert "fits into 1.00 GiB" in capsys.readouterr().out


def test_a_plan_keeps_the_batch_whole_where_a_layer_looks_across_its_rows(capsys: Captured) -> None:
    images = "memfit.workloads.images:workload"
    assert main(["plan", images, "--batch-size", "8", "--memory", "76MiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["micro_batch_size"] == 8
    assert plan["recompute"]
