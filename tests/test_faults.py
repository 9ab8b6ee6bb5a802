"""A few of the cases of each part of ``make faults``, and that its judges would hear of a broken promise."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import commands
import memfit
from hostile import BAD_NAMES, KINDS, Files, Watch, assert_harmless, wrong_gradients
from memfit.cli.ending import interruptible
from memfit.core.graph import OpKey
from memfit.core.outline import outline
from memfit.core.stored import read
from memfit.runtime.folder import LossLog
from memfit.runtime.meter import PeakMeter
from memfit.runtime.state import replace_text
from outages import Job, Outage, undisturbed
from steady import Mine, broken, in_threads, least_peak, levels

HERE = Path(__file__).parent
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def watch(files: Files) -> Watch:
    """There is one for all tests: the interpreter keeps audit hooks to its end."""
    return Watch(files.folder.parent)


@pytest.fixture(scope="module")
def in_parts() -> Job:
    return Job.named("in parts")


# ---- kills and disks ------------------------------------------------------------------------------------

CHILD = """
import json, sys
from pathlib import Path
import disks
import torch._dynamo
from kills import kill_again_and_again
from memfit.train import TrainOptions

folder = Path(sys.argv[1])
options = TrainOptions("jobs:tiny", "1GiB", 6, folder, save_every=1)
tally = kill_again_and_again(folder, options, 3, seed=3)
closed = folder / "closed"
closed.mkdir()
shut = disks.read_only(closed, 1, seed=1)
print(json.dumps([tally.kills, tally.wrong, shut.trials, shut.wrong]))
"""


def test_killed_trainings_resume_to_the_bit_and_closed_folders_are_left_alone(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(HERE), str(Path(memfit.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [3, [], 1, []]


def test_a_line_of_losses_that_is_written_in_pieces_is_whole(tmp_path: Path) -> None:
    class Short:
        """A file of a disk that takes seven bytes at a time."""

        def __init__(self) -> None:
            self.taken = b""

        def write(self, content: bytes) -> int:
            self.taken += content[:7]
            return len(content[:7])

        def close(self) -> None:
            pass

    short = Short()
    with LossLog(tmp_path) as log:
        log._file.close()
        log._file = short  # type: ignore[assignment]
        log.add(3, 0.1, 0.25)
    assert json.loads(short.taken) == {"step": 3, "loss": 0.1, "seconds": 0.25}


def test_a_file_that_cannot_be_written_is_named_and_nothing_stays_of_it(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(OSError, match=r"plan\.json"):
        replace_text(tmp_path / "plan.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


# ---- hostile files --------------------------------------------------------------------------------------


def test_hostile_files_are_refused_or_taken_and_nothing_else_happens(files: Files, watch: Watch) -> None:
    files.outcomes.clear()

    @settings(max_examples=80, database=None)
    @given(st.sampled_from(KINDS), st.integers(0, 2**64))
    def hostile(kind: str, seed: int) -> None:
        with watch:
            files.case(kind, seed)

    hostile()
    assert watch.heard == []
    assert files.strangers() == []
    assert all(files.outcomes[f"{kind} refused"] for kind in KINDS)


@pytest.mark.parametrize("seed", range(2))
def test_a_page_escapes_the_names_of_modules(files: Files, watch: Watch, seed: int) -> None:
    with watch:
        files.names(seed)
    assert watch.heard == []


@pytest.mark.parametrize("name", [BAD_NAMES[0], BAD_NAMES[2]])
def test_a_page_that_does_not_escape_them_would_be_seen(name: str) -> None:
    with pytest.raises(AssertionError):
        assert_harmless(f'<script id="data">{name}</script>')


def test_what_is_run_unpickled_or_written_elsewhere_would_be_heard(watch: Watch, tmp_path: Path) -> None:
    import pickle

    with watch:
        (tmp_path / "elsewhere").write_text("")
        pickle.loads(pickle.dumps(Counter))
        subprocess.run(["true"], check=True)
    kinds = {entry.split()[0] for entry in watch.heard}
    watch.heard.clear()
    assert {"open", "pickle.find_class", "subprocess.Popen"} <= kinds


def test_training_with_a_changed_profile_gives_the_right_gradient(files: Files) -> None:
    with pytest.warns(UserWarning, match="stored profile is not used"):
        wrong = wrong_gradients(lambda draw: files._text(files.texts["profile"], draw), range(6))
    assert wrong == []


@pytest.mark.parametrize("text", ["\x1b[2J", "\x00", "\x9b31m", "\r"])
def test_a_stored_text_cannot_steer_a_terminal(text: str) -> None:
    with pytest.raises(ValueError, match="steer a terminal"):
        read(OpKey, ["block", text, 0], "a name")


def test_a_plan_of_a_million_micro_batches_is_drawn_with_few(in_parts: Job) -> None:
    plan = memfit.find_plan(in_parts.profile, memory="1GiB", micro_batch_size=in_parts.micro_batch_size)
    data = json.loads(plan.to_json()) | {"rows": 10**9, "gradient_accumulation_steps": 10**6}
    found = outline(in_parts.profile, memfit.Plan.from_json(json.dumps(data)))
    assert len(found.points) <= 300
    assert found.peak.event.total_bytes == outline(in_parts.profile, plan).peak.event.total_bytes


@pytest.mark.parametrize("memory", ["9" * 5000 + "GiB", "8388608TiB", str(2**63) + "B"])
def test_an_amount_that_no_machine_has_is_refused_at_once(memory: str) -> None:
    with pytest.raises(ValueError, match=r"any machine has|no machine has"):
        memfit.find_plan(Job.named("in parts").profile, memory=memory)


# ---- long, doubled and broken trainings -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the stored profile is not used")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["whole", "in parts"])
def test_an_error_in_the_users_code_leaves_everything_as_it_was(name: str) -> None:
    job, seen = Job.named(name), Counter[str]()
    expected, _ = undisturbed(job, 8)
    assert broken(job, 1, 8, expected, seen) == []
    assert len(seen) > 2


def test_a_step_that_the_user_breaks_off_does_not_count_as_measured(in_parts: Job) -> None:
    training = in_parts.start()
    step = training.step
    with pytest.raises(Mine), Outage({10: Mine()}):
        step(in_parts.batch_at(0))
    verdicts = []
    for number in range(3):
        training.run(number)
        verdicts.append(step.verdict)
    assert verdicts[0] is not None
    assert verdicts[1] is not verdicts[0]
    assert verdicts[2] is verdicts[1]


def test_where_memory_runs_out_in_planning_again_the_same_plan_runs_once_more(
    in_parts: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*given: Any) -> Iterator[memfit.Plan]:
        raise MemoryError("Unable to allocate 93.8 KiB for an array")
        yield

    monkeypatch.setattr("memfit.runtime.step.fallbacks", starved)
    training = in_parts.start()
    training.run(0, Outage({30: torch.OutOfMemoryError("CUDA out of memory")}))
    training.run(1)
    assert training.losses == undisturbed(in_parts, 2)[0].losses
    assert [rescue.attempts for rescue in training.step.rescues] == [1]


def test_a_training_holds_no_more_after_many_steps_than_after_few(in_parts: Job) -> None:
    memory = least_peak(in_parts.profile, in_parts.micro_batch_size)
    first, *_, last = levels(in_parts, 40, 10, memory)
    assert last.live_bytes <= first.live_bytes + 4096
    assert last.objects <= first.objects + 8  # the levels themselves


def test_two_models_in_two_threads_are_trained_as_each_alone() -> None:
    assert in_threads(1, 8) == []


def test_meters_of_two_threads_wait_for_each_other() -> None:
    peaks: list[int] = []

    def measure() -> None:
        for _ in range(5):
            with PeakMeter("cpu") as meter:
                torch.ones(1000)
            peaks.append(meter.peak_bytes)

    threads = [threading.Thread(target=measure) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peaks == [4000] * 15


# ---- the command line -----------------------------------------------------------------------------------


def test_generated_command_lines_end_with_documented_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = commands.commands()
    quick = {name: known[name] for name in known if name not in ("doctor", "compare")}
    monkeypatch.setattr(commands, "commands", lambda: quick)
    monkeypatch.chdir(tmp_path)  # an odd word may be taken for the name of a new folder
    commands.prepare(tmp_path)
    found = [commands.problem(commands.arguments(random.Random(seed), tmp_path)) for seed in range(14)]
    assert [what for _, what in found if what] == []
    assert {code for code, _ in found} >= {0, 2, 5}


def test_an_exit_code_that_is_not_documented_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[Callable[[object], int]] = [lambda given: 70, lambda given: 1 // 0]
    for end in ends:
        monkeypatch.setattr(commands, "main", end)
        assert commands.problem(["plan"])[1]


def test_an_interrupted_command_speaks_of_a_checkpoint_only_where_there_is_one(capsys: Captured) -> None:
    for left in ("", "The last checkpoint stays."):
        with pytest.raises(Exception, match="130"), interruptible(left):
            raise KeyboardInterrupt
        assert capsys.readouterr().err == f"Interrupted. {left}".rstrip() + "\n"
