"""What every command prints: JSON with a schema, one line when quiet, no colours in a pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memfit.cli import main
from memfit.cli.ending import PIPED_WIDTH, show_json
from memfit.core.plan import Plan
from memfit.report.reading import read_source

Captured = pytest.CaptureFixture[str]
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    out = tmp_path_factory.mktemp("output") / "run"
    assert main(["train", "jobs:tiny", "--memory", "1GiB", "--steps", "2", "--out", str(out)]) == 0
    return out


def arguments_of(command: str, run: Path, out: Path) -> list[str]:
    """A call of a command that works."""
    return {
        "train": ["train", "jobs:tiny", "--memory", "1GiB", "--steps", "2", "--out", str(out / "new")],
        "plan": ["plan", "jobs:tiny", "--memory", "1GiB"],
        "frontier": ["frontier", "jobs:tiny", "--plans", "2"],
        "report": ["report", str(run), "--out", str(out / "page.html")],
        "profile": ["profile", "jobs:tiny"],
        "audit": ["audit", "jobs:tiny"],
        "compare": ["compare", "jobs:tiny", "--memory", "1GiB", "--steps", "1"],
        "doctor": ["doctor"],
    }[command]


COMMANDS = ("train", "plan", "frontier", "report", "profile", "audit", "doctor")


# ---- data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*COMMANDS, "compare"])
def test_json_is_one_object_with_its_schema(
    command: str, run: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert main([*arguments_of(command, run, tmp_path), "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    data = json.loads(shown.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert list(data)[:2] == ["schema", "schema_version"]
    assert (data["schema"], data["schema_version"]) == (f"memfit/{command}", 1)
    assert shown.err == ""
    if command == "plan":
        assert Plan.from_json(shown.out).budget_bytes == 2**30
        (chosen,) = (size for size in data["candidates"] if not size["why_not"])
        assert chosen["micro_batch_size"] == data["micro_batch_size"]


def test_what_is_no_number_is_null(capsys: Captured) -> None:
    show_json("test", {"a": float("nan"), "b": [float("inf"), {"c": 1.5}], "d": (1, "x", None, True)})
    data = json.loads(capsys.readouterr().out)
    assert data == {
        "schema": "memfit/test",
        "schema_version": 1,
        "a": None,
        "b": [None, {"c": 1.5}],
        "d": [1, "x", None, True],
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_is_the_verdict_alone_which_is_the_last_line_otherwise(
    command: str, run: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert main([*arguments_of(command, run, tmp_path), "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert len(quiet.out.splitlines()) == 1
    (tmp_path / "again").mkdir()
    assert main(arguments_of(command, run, tmp_path / "again")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    figures = re.compile(r"[0-9.]+ (times|ms|us|s)\b|/again")  # what two runs may measure differently
    assert figures.sub("", last) == figures.sub("", quiet.out.strip())


def test_errors_are_said_even_when_quiet(capsys: Captured) -> None:
    assert main(["plan", "jobs:tiny", "--memory", "1KiB", "--quiet"]) == 3
    shown = capsys.readouterr()
    assert "no plan fits" in shown.err
    assert shown.out == ""


# ---- terminals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "frontier"])
def test_what_is_piped_has_no_colours_and_a_fixed_width(
    command: str, run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(arguments_of(command, run, tmp_path)) == 0
        shown.append(capsys.readouterr())
    for text in (shown[0].out, shown[0].err):
        assert "\x1b" not in text
        assert "\x1b[" not in text
    widths = [max(len(line.rstrip()) for line in each.out.splitlines() if "  " in line) for each in shown]
    assert widths[0] == widths[1] <= PIPED_WIDTH


IN_A_TERMINAL = """
import os, pty, sys
child, fd = pty.fork()
if child == 0:
    os.execvp(sys.executable, [sys.executable, "-m", "memfit", *sys.argv[1:]])
text = b""
while True:
    try:
        some = os.read(fd, 65536)
    except OSError:
        break
    if not some:
        break
    text += some
sys.stdout.buffer.write(text)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_terminal_that_is_told_to_has_no_colours() -> None:
    """The colours themselves: tests/test_terminal.py."""
    call = [sys.executable, "-c", IN_A_TERMINAL, "plan", "jobs:tiny", "--memory", "1GiB"]
    unset = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    kept |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=TESTS, env=kept | {"NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b[1m" in done.stdout  # it is a terminal
    assert not re.search(r"\x1b\[[0-9;]*3[0-8]", done.stdout)
    assert "P parameters" in re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


def test_completion_knows_commands_and_options_and_runs_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\ndef workload(): ...\n")
    told = {}
    for words in ("memfit pl", "memfit plan --mem", f"memfit plan {trap}:workload --exp"):
        ask = {
            "_MEMFIT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        code = "import sys; from memfit.cli import main; main([]); "
        done = subprocess.run(
            [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"],
            capture_output=True,
            text=True,
            env=os.environ | ask,
        )
        assert done.returncode == 0, done.stderr
        told[words] = done.stdout.split()
    assert list(told.values()) == [["plan"], ["--memory"], ["--export"]]
    assert not (tmp_path / "sprung").exists()


# ---- the command that made a run -------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "said"), [(1, False), (2, True)])
def test_the_page_says_how_many_processes_made_the_run(
    run: Path, tmp_path: Path, processes: int, said: bool
) -> None:
    stored = json.loads((run / "run.json").read_text())
    assert stored["processes"] == 1
    (tmp_path / "run.json").write_text(json.dumps(stored | {"processes": processes}))
    assert ("--nproc 2" in read_source(tmp_path).command) == said
