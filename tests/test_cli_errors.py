"""Every bad input ends with its documented exit code, one clear message with the cure, and no traceback."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from memfit.cli import main

Captured = pytest.CaptureFixture[str]


def run(capsys: Captured, *arguments: object) -> tuple[int, str]:
    """Runs the command line in this process; returns the exit code and what it said on stderr."""
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return code, " ".join(said.split())


def train(capsys: Captured, out: Path, target: str, *more: object, memory: str = "1GiB") -> tuple[int, str]:
    return run(capsys, "train", target, "--memory", memory, "--out", out, "--steps", 2, *more)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--no-such-option"], "No such option"),
        (["train", "--memory", "1GiB"], "--out"),
        (["train", "--out", "x"], "--memory 400MiB"),
        (["train", "--out", "x", "--memory", "1GiB", "--steps", "0"], "--steps"),
        (["train", "--out", "x", "--memory", "1GiB", "--batch-size", "two"], "--batch-size"),
        (["plan"], "--memory 24GiB"),
        (["fit"], "No such command"),
    ],
)
def test_wrong_usage_ends_with_code_2(capsys: Captured, arguments: list[str], says: str) -> None:
    code, said = run(capsys, *arguments)
    assert code == 2
    assert says in said


@pytest.mark.parametrize("memory", ["12Gb", "0GiB", "many", "-3GiB", "", "7", "120%"])
@pytest.mark.parametrize("option", ["--memory", "--hard-cap"])
def test_memory_that_cannot_be_read_is_bad_input(
    capsys: Captured, tmp_path: Path, memory: str, option: str
) -> None:
    given = {"--memory": "1GiB", option: memory}
    options = [text for pair in given.items() for text in pair]
    code, said = run(capsys, "train", "jobs:tiny", "--out", tmp_path / "run", *options)
    assert code == 5
    assert "memfit:" in said
    assert "write" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("jobs", "package.module:function"),
        ("jobs:", "package.module:function"),
        ("jobs:1+1", "package.module:function"),
        ("no_such_module_here:f", "ModuleNotFoundError"),
        ("no_such_file.py:f", "there is no file"),
        ("jobs:no_such_function", "Its functions are"),
        ("jobs:NOT_A_FUNCTION", "not a function"),
        ("jobs:raises", "the data is gone"),
        ("jobs:returns_a_number", "not a memfit.Workload"),
        ("jobs:needs_a_path", "'path'"),
        ("jobs:bad_model", "model is a str"),
        ("jobs:bad_optimizer", "optimizer is a float"),
        ("jobs:bad_loss", "loss_fn(model, batch)"),
        ("jobs:bad_batches", "Give a list, a DataLoader"),
        ("jobs:one_shot_batches", "only once"),
        ("jobs:no_batches", "batches are empty"),
    ],
)
def test_a_wrong_target_is_bad_input_in_both_commands(
    capsys: Captured, tmp_path: Path, target: str, says: str
) -> None:
    code, said = train(capsys, tmp_path / "run", target)
    assert code == 5
    assert says in said
    code, said = run(capsys, "plan", target, "--memory", "1GiB")
    assert code == 5
    assert says in said


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("jobs:empty_batch", "batch"),
        ("jobs:batch_without_tensors", "batch"),
        ("jobs:rows_that_differ", "other"),
        ("jobs:loss_of_many_values", "one number"),
        ("jobs:loss_without_a_graph", "grad"),
        ("jobs:loss_that_is_a_number", "tensor"),
        ("jobs:frozen_model", "parameter"),
        ("jobs:two_devices", "device"),
    ],
)
def test_a_job_that_cannot_be_trained_is_bad_input(
    capsys: Captured, tmp_path: Path, target: str, says: str
) -> None:
    code, said = train(capsys, tmp_path / "run", target)
    assert code == 5, said
    assert says in said


def test_a_budget_below_the_parameters_ends_with_code_3_and_the_memory_needed(
    capsys: Captured, tmp_path: Path
) -> None:
    code, said = train(capsys, tmp_path / "run", "jobs:tiny", memory="1KiB")
    assert code == 3
    assert "1.0 KiB" in said


def test_a_plain_run_has_no_memory_option(capsys: Captured, tmp_path: Path) -> None:
    code, said = train(capsys, tmp_path / "run", "jobs:tiny", "--plain")
    assert code == 5
    assert "leave out --plain" in said


def test_a_folder_with_a_run_is_not_overwritten(capsys: Captured, tmp_path: Path) -> None:
    assert train(capsys, tmp_path, "jobs:tiny")[0] == 0
    before = (tmp_path / "losses.jsonl").read_bytes()
    code, said = train(capsys, tmp_path, "jobs:tiny")
    assert code == 5
    assert "Add --resume" in said
    assert (tmp_path / "losses.jsonl").read_bytes() == before


def test_a_folder_with_other_things_is_not_used(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    code, said = train(capsys, tmp_path, "jobs:tiny")
    assert code == 5
    assert "thesis.tex" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_out_that_is_a_file_is_refused(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, said = train(capsys, tmp_path / "file", "jobs:tiny")
    assert code == 5
    assert "is a file" in said


def test_an_out_that_cannot_be_made_is_refused(capsys: Captured, tmp_path: Path) -> None:
    code, said = train(capsys, Path("/proc/no/such/folder"), "jobs:tiny")
    assert code == 5
    assert "/proc/no" in said


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("run.json", None, "holds no run to resume"),
        ("run.json", "{", "run.json is damaged"),
        ("run.json", "{}", "was not written by memfit"),
        ("run.json", '{"format": "memfit-run"}', "run.json is damaged"),
        ("plan.json", "{}", "plan.json is damaged"),
        ("losses.jsonl", None, "losses.jsonl does not hold the 2 steps"),
        ("losses.jsonl", '{"step": 1}\nx\n', "losses.jsonl does not hold the 2 steps"),
        ("latest", "elsewhere", "does not name a checkpoint"),
        ("step-00000002/state.json", "{", "state.json is damaged"),
        ("step-00000002/model.safetensors", "short", "model.safetensors is damaged"),
    ],
)
def test_a_corrupt_or_foreign_run_is_refused_by_the_name_of_the_file(
    capsys: Captured, tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    assert train(capsys, tmp_path, "jobs:tiny")[0] == 0
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    code, said = train(capsys, tmp_path, "jobs:tiny", "--resume", "--steps", 4)
    assert code == 5
    assert says in said


@pytest.mark.parametrize("changed", [["--seed", "3"], ["--batch-size", "4"]])
def test_a_run_is_not_resumed_with_options_that_change_its_losses(
    capsys: Captured, tmp_path: Path, changed: list[str]
) -> None:
    assert train(capsys, tmp_path, "jobs:tiny")[0] == 0
    code, said = train(capsys, tmp_path, "jobs:tiny", "--resume", *changed)
    assert code == 5
    assert "was started with" in said


def capped_run(out: str) -> None:
    """Runs a plain step under a hard cap; for a process of its own, which the cap binds until it ends."""
    sys.stderr = open(f"{out}.stderr", "w", buffering=1)  # noqa: SIM115
    arguments = ["train", "jobs:too_large_to_run_at_once", "--plain", "--hard-cap", "300MiB", "--out", out]
    raise SystemExit(main(arguments))


def test_running_out_of_memory_is_one_message_that_says_how_much_was_asked_for(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=capped_run, args=(str(tmp_path / "run"),))
    child.start()
    child.join()
    said = Path(f"{tmp_path}/run.stderr").read_text()
    assert child.exitcode == 4, said
    assert "Out of memory under the hard cap of 300.0 MiB" in said
    assert "bytes" in said
    assert "Leave out --plain and give --memory" in said
    assert "Traceback" not in said


def test_help_and_version_do_not_import_torch() -> None:
    call = "import sys; from memfit.cli import main; code = main(sys.argv[1:])"
    code = f"{call}; sys.exit(code or 'torch' in sys.modules)"
    for arguments in (["--help"], ["--version"], ["train", "--help"], ["plan", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "memfit" in done.stdout
