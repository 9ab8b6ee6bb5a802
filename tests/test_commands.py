"""`memfit profile`, `audit`, `compare` and `doctor`: what they print, their JSON, errors and exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import jobs
import memfit
from memfit.cli import main
from memfit.compare import Comparison, End, Outcome, Request, Way, run_way
from memfit.core.breakdown import breakdown
from memfit.core.graph import Profile
from memfit.core.machine import Finding, Level
from memfit.doctor import Diagnosis, check
from memfit.report.tables import compare_table, compare_verdict
from memfit.runtime.machine import cpu_memory, machine

Captured = pytest.CaptureFixture[str]
COMMANDS = ("train", "plan", "frontier", "profile", "audit", "report", "compare", "doctor")


def run(capsys: Captured, *arguments: object) -> tuple[int, str, str]:
    """Runs the command line in this process; returns the exit code, stdout and stderr."""
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return code, told.out, " ".join(told.err.split())


def data(text: str, kind: str) -> Any:
    """The object that --json printed."""
    found = json.loads(text)
    assert found["schema"] == f"memfit/{kind}"
    assert found["schema_version"] == 1
    return found


# ---- help ----------------------------------------------------------------------------------------


def test_each_help_has_an_example_and_imports_no_torch() -> None:
    code = (
        "import sys; from memfit.cli import main\n"
        f"for name in {COMMANDS}: assert main([name, '--help']) == 0; print('=====')\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, text in zip(COMMANDS, done.stdout.split("====="), strict=False):
        assert f"Example: memfit {name}" in " ".join(text.split())


# ---- profile -------------------------------------------------------------------------------------


def test_profile_says_where_the_plain_peak_goes(capsys: Captured) -> None:
    code, out, _ = run(capsys, "profile", "jobs:wide_and_blocked", "--batch-size", 4, "--json")
    found = data(out, "profile")
    assert code == 0
    assert found["rows"] == found["effective_rows"] == 4
    assert sum(found["peak"]["by_category"].values()) == found["peak"]["total_bytes"]
    assert sum(entry["total_bytes"] for entry in found["kept"]) == found["kept_bytes"]
    sizes = [entry["total_bytes"] for entry in found["kept"]]
    assert sizes == sorted(sizes, reverse=True)
    assert found["kept"][0] == {
        "module": "*.*",
        "op": "tanh",
        "tensors": 8,
        "total_bytes": 4 * 4 * 320 * 4096,
    }


def test_what_is_kept_is_what_autograd_saves() -> None:
    """The judge is torch's own hook of saved tensors, on a real forward."""
    work = jobs.wide_and_blocked(batch_size=2)
    batch = next(work.batches_from(0))
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = work.loss_fn(work.model, batch)
    given = {t.untyped_storage().data_ptr() for t in (*work.model.parameters(), *batch.values())}
    made = [t.untyped_storage().nbytes() for at, t in saved.items() if at not in given]
    found = breakdown(memfit.profile(work.model, work.loss_fn, batch, micro_batch_size=2))
    assert loss.requires_grad  # type: ignore[union-attr]
    assert found.kept_bytes == sum(made)
    assert sum(entry.tensors for entry in found.kept) == len(made)


def test_a_stored_profile_gives_the_plan_the_frontier_and_the_report_of_its_target(
    capsys: Captured, tmp_path: Path
) -> None:
    target = ["jobs:wide_and_blocked", "--batch-size", 4]
    stored, plan = tmp_path / "stored.json", tmp_path / "plan.json"
    code, out, said = run(capsys, "profile", *target, "--out", stored)
    assert (code, str(stored) in said) == (0, True)
    assert "K activations kept" in out
    assert "tanh" in out
    assert "peaks at" in out.splitlines()[-1]
    _, of_target, _ = run(capsys, "plan", *target, "--memory", "10MiB", "--json")
    code, of_file, _ = run(capsys, "plan", "--profile", stored, "--memory", "10MiB", "--json")
    assert code == 0
    mine, its = data(of_file, "plan"), data(of_target, "plan")
    assert {k: v for k, v in mine.items() if k != "advice"} == {k: v for k, v in its.items() if k != "advice"}
    code, out, _ = run(capsys, "frontier", "--profile", stored, "--plans", 2, "--json")
    assert (code, len(data(out, "frontier")["plans"])) == (0, 2)
    plan.write_text(of_file)
    code, out, _ = run(capsys, "report", plan, "--profile", stored)
    assert code == 0
    assert Path(out.strip()).stat().st_size > 10_000


def test_profile_records_really_where_fake_tensors_fail_or_it_is_asked_to(
    capsys: Captured, tmp_path: Path
) -> None:
    code, _, said = run(capsys, "profile", "jobs:looks_at_its_data", "--out", tmp_path / "p.json")
    assert code == 0
    assert "fake tensors fail here" in said
    assert "really" in said
    assert Profile.from_json((tmp_path / "p.json").read_text()).rows == 6
    code, out, said = run(capsys, "profile", "jobs:tiny", "--real", "--json")
    assert code == 0
    assert "fake" not in said
    assert "measured" in data(out, "profile")["source"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["plan", "--profile", "FILE", "--memory", "1GiB"], 5, "not a memfit profile"),
        (["frontier", "--profile", "FILE"], 5, "memfit profile TARGET --out"),
        (["frontier", "--profile", "no/such.json"], 5, "no/such.json"),
        (["plan", "--profile", "FILE", "--memory", "1GiB", "--device", "h100"], 2, "leave out --profile"),
        (["plan", "--profile", "FILE", "--memory", "80%"], 5, "share of an unknown total"),
        (["profile", "jobs:tiny", "--real", "--device", "h100"], 2, "fake tensors"),
        (["profile", "jobs:bad_model"], 5, "model is a str"),
        (["audit", "jobs:bad_model"], 5, "model is a str"),
        (["audit", "jobs:loss_of_many_values"], 5, "one number"),
        (["compare", "jobs:tiny"], 2, "--memory"),
        (["compare", "jobs:tiny", "--memory", "12Gb"], 5, "write"),
        (["compare", "jobs:tiny", "--memory", "1GiB", "--hard-cap", "many"], 5, "write"),
        (["compare", "jobs:bad_model", "--memory", "1GiB"], 5, "model is a str"),
    ],
)
def test_bad_input_ends_with_its_code_and_the_cure(
    capsys: Captured, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    (tmp_path / "other.json").write_text("{}")
    given = [str(tmp_path / "other.json") if each == "FILE" else each for each in arguments]
    found, _, said = run(capsys, *given)
    assert found == code, said
    assert says in said


# ---- 80% -----------------------------------------------------------------------------------------


def test_a_share_of_the_memory_is_of_the_device(capsys: Captured) -> None:
    _, out, _ = run(capsys, "plan", "jobs:tiny", "--memory", "80%", "--json")
    assert data(out, "plan")["budget_bytes"] == cpu_memory()[1] * 80 // 100
    _, out, _ = run(capsys, "plan", "jobs:tiny", "--memory", "50%", "--device", "h100", "--json")
    assert data(out, "plan")["budget_bytes"] == 40 * 2**30
    if not torch.cuda.is_available():
        code, _, said = run(capsys, "plan", "jobs:tiny", "--memory", "50%", "--device", "cuda")
        assert (code, "there is none" in said) == (5, True)


# ---- audit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "code", "kind", "says"),
    [
        ("jobs:tiny", 0, "UNITS", "is exact for jobs:tiny."),
        ("jobs:coupled", 7, "COUPLED_LOSS", "is NOT exact for jobs:coupled: loss_fn: loss couples the rows."),
        ("jobs:coupled_in_two_passes", 0, "COUPLED_LOSS", "in two passes"),
    ],
)
def test_audit_ends_with_code_7_where_accumulation_is_not_exact(
    capsys: Captured, target: str, code: int, kind: str, says: str
) -> None:
    found, out, _ = run(capsys, "audit", target, "--json")
    told = data(out, "audit")
    assert (found, told["is_exact"], told["kind"]) == (code, code == 0, kind)
    assert (told["two_passes"] is not None) == (target == "jobs:coupled_in_two_passes")
    found, out, said = run(capsys, "audit", target, "--quiet")
    assert (found, said) == (code, "")
    (line,) = out.splitlines()
    assert says in line


def test_audit_shows_class_weights_error_owner_and_cures(capsys: Captured) -> None:
    out = run(capsys, "audit", "jobs:coupled")[1]
    for name in ("class", "decided by", "worst relative error", "cure"):
        assert name in out
    assert "weights" in run(capsys, "audit", "jobs:tiny")[1]


# ---- compare -------------------------------------------------------------------------------------


def test_under_a_hard_cap_the_plain_run_dies_of_memory_and_memfit_does_not(capsys: Captured) -> None:
    target = ["jobs:wide_and_blocked", "--batch-size", 64]  # plain: about 700 MiB; memfit's libraries: 150
    options = ["--memory", "48MiB", "--steps", 1, "--hard-cap", "320MiB"]
    code, out, said = run(capsys, "compare", *target, *options, "--json")
    plain, _, fitted = data(out, "compare")["ways"]
    assert code == 0, said
    assert plain["end"] == "out of memory"
    assert "the step asked for another" in plain["detail"]
    assert plain["measured_peak_bytes"] is plain["median_step_s"] is None
    assert (fitted["end"], fitted["is_within"]) == ("done", True)
    assert 0 < fitted["measured_peak_bytes"] <= 48 * 2**20 == fitted["memory_bytes"]
    assert len(fitted["losses"]) == 5


def test_ways_that_run_the_batch_whole_have_the_same_losses_and_a_peak_above_is_shown() -> None:
    request = Request("jobs:wide_and_blocked", "12MiB", steps=1, batch_size=2)
    ends = [run_way(request, way) for way in Way]
    found = Comparison(tuple(end for end in ends if isinstance(end, Outcome)))
    plain, blocks, fitted = found.outcomes
    assert plain.losses == blocks.losses
    assert len(set(plain.losses)) == len(plain.losses) == 5
    assert (plain.is_within, fitted.is_within) == (False, True)
    console = Console(width=100, file=io.StringIO())
    console.print(compare_table(found, "it"))
    assert isinstance(console.file, io.StringIO)
    rows = {line.split("  ")[0]: line for line in console.file.getvalue().splitlines()}
    assert "reference" in rows["plain"]
    assert int(rows["plain"].split("%")[0].split()[-1]) > 100
    assert "same to the bit" in rows["every block"]
    assert int(rows["memfit"].split("%")[0].split()[-1]) <= 100
    assert compare_verdict(found, "it").endswith("which does not fit.")


def test_a_way_that_is_not_possible_says_why_and_a_budget_too_small_is_no_plan() -> None:
    blocks = run_way(Request("jobs:tiny", "1GiB", steps=1), Way.CHECKPOINTED)
    fitted = run_way(Request("jobs:tiny", "1KiB", steps=1), Way.MEMFIT)
    assert isinstance(blocks, Outcome)
    assert isinstance(fitted, Outcome)
    assert (blocks.end, fitted.end) == (End.NOT_POSSIBLE, End.NO_PLAN)
    assert "no list of repeated blocks" in blocks.detail


# ---- doctor --------------------------------------------------------------------------------------

Fit = Callable[..., Any]


class Perturbed:
    """A step whose gradients are off by the last bit of one number."""

    def __init__(self, step: memfit.Step, model: nn.Module) -> None:
        self._step, self._model = step, model

    def __call__(self, batch: Any) -> Tensor:
        loss = self._step(batch)
        gradient = next(self._model.parameters()).grad
        assert gradient is not None
        gradient[0] = torch.nextafter(gradient[0], torch.tensor(9.0))
        return loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def perturbed_fit(model: nn.Module, *given: Any, **options: Any) -> Any:
    return Perturbed(memfit.fit(model, *given, **options), model)


def blind_fit(*given: Any, **options: Any) -> memfit.Step:
    """Plans from a profile in which every op's own outputs take nine tenths of what they do."""

    def shrunk(profile: Profile) -> Profile:
        (graph,) = profile.graphs
        storages = tuple(replace(s, size_bytes=s.size_bytes * 9 // 10) for s in graph.storages)
        return replace(profile, graphs=(replace(graph, storages=storages),))

    options["profile"] = shrunk(options["profile"])
    return memfit.fit(*given, **options)


def failing_fit(*given: Any, **options: Any) -> memfit.Step:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("fit", "says"),
    [
        (perturbed_fit, "results differ from the plain loop, first the gradient of 0.norm.weight in step 1"),
        (blind_fit, "the promise was broken"),
        (failing_fit, "RuntimeError: no such kernel"),
    ],
)
def test_a_broken_installation_is_found(fit: Fit, says: str) -> None:
    problems = [finding for finding in check("cpu", fit=fit) if finding.level is Level.PROBLEM]
    assert len(problems) == 1
    assert says in problems[0].text
    assert problems[0].cure


def test_the_check_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check("cpu", fit=failing_fit)
    assert torch.equal(torch.get_rng_state(), before)


def test_doctor_finds_this_installation_sound(capsys: Captured) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    told = data(out, "doctor")
    assert (code, told["problems"]) == (0, 0), told["findings"]
    assert told["machine"]["torch"] == torch.__version__
    assert told["speeds"][0]["device"] == "cpu"
    checks = [each for each in told["findings"] if each["subject"].startswith("check on")]
    assert {each["level"] for each in checks} == {"ok"}
    assert len(checks) >= 2


@pytest.mark.parametrize(("subject", "code"), [("check on cpu", 4), ("torch", 5)])
def test_doctor_ends_with_a_code_that_says_what_is_wrong(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, subject: str, code: int
) -> None:
    finding = Finding(Level.PROBLEM, subject, "it is broken", "mend it")
    monkeypatch.setattr("memfit.doctor.examine", lambda: Diagnosis(machine(), (), (finding,)))
    found, out, _ = run(capsys, "doctor")
    assert found == code
    assert "it is broken" in out
    assert "-> mend it" in out
    assert "NOT" in out.splitlines()[-1]
