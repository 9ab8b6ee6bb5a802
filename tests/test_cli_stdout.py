"""What code in C prints while a command runs stays out of what the command prints."""

import subprocess
import sys

import pytest

_BODY = """
import ctypes, sys
from memfit.cli.stdout import own_stdout
c = ctypes.CDLL(None)
print("before")
c.puts(b"C before")
try:
    with own_stdout():
        print("ours")
        c.puts(b"C in the middle")
        {inside}
except {caught}:
    print("caught")
print("after")
c.puts(b"C after")
"""


def run(inside: str = "pass", caught: str = "ValueError") -> subprocess.CompletedProcess[str]:
    code = _BODY.format(inside=inside, caught=caught)
    return subprocess.run([sys.executable, "-c", code], text=True, check=True, capture_output=True)


def test_what_c_prints_in_the_body_goes_to_stderr_and_nothing_is_lost() -> None:
    done = run()
    assert sorted(done.stdout.split("\n")) == ["", "C after", "C before", "after", "before", "ours"]
    assert done.stderr == "C in the middle\n"


def test_after_an_error_stdout_is_as_it_was() -> None:
    done = run("raise ValueError")
    assert sorted(done.stdout.split("\n")) == ["", "C after", "C before", "after", "before", "caught", "ours"]


_UNREAD = """
import os, sys
from memfit.cli.stdout import own_stdout
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
os.close(writer)
try:
    with own_stdout():
        print("ours")
except BrokenPipeError:
    print("seen", end="", file=sys.stderr, flush=True)
    os._exit(0)
"""


def test_a_reader_that_has_gone_is_an_error_that_is_seen() -> None:
    done = subprocess.run([sys.executable, "-c", _UNREAD], text=True, capture_output=True, check=True)
    assert done.stderr == "seen"


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream_is_no_obstacle(closed: int) -> None:
    code = _BODY.format(inside="pass", caught="ValueError")
    call = f'"$0" -c "$1" {closed}>&-'
    done = subprocess.run(["sh", "-c", call, sys.executable, code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_where_stdout_is_not_that_of_the_process_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    from memfit.cli.stdout import own_stdout

    before = sys.stdout
    with own_stdout():
        assert sys.stdout is before
        print("ours")
    assert capsys.readouterr().out == "ours\n"
