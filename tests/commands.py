"""Command lines that nobody would type, made from the options that the commands have by now."""

from __future__ import annotations

import io
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import typer

from memfit.cli.app import app, main

DOCUMENTED = frozenset({0, 2, 3, 4, 5, 6, 7, 130})
_ODD = (
    *(
        "",
        " ",
        "-",
        "--",
        "-1",
        "0",
        "1",
        "2",
        "3.5",
        "1e9",
        "9" * 400,
        "nan",
        "1GiB",
        "1KiB",
        "64MiB",
        "80%",
    ),
    *(
        "9" * 5000 + "GiB",
        "1e400GiB",
        "\u202e\u0000x".replace("\x00", "\x01"),
        "日本語",
        "\U0001f4a3",
        "*",
        "~",
    ),
    *("cpu", "cuda", "h100", "transformers", "axolotl", "../..", "/proc/none", "/dev/null", "None", "[bold]"),
    *("jobs:tiny", "jobs:raises", "jobs:returns_a_number", "no.such:thing", "jobs", ":", "jobs:tiny:tiny"),
)
_NEVER = {"--nproc", "--install-completion", "--show-completion"}  # starts processes; changes the shell
_SELDOM = {"doctor": 1, "compare": 1}  # they take seconds; doctor has four command lines in all
# Whatever else is drawn: nothing long, no other process, no other target than a tiny one.
_FIRST = {"--steps": "1", "--memory": "1GiB", "--plans": "2", "--batch-size": "6"}
_WORDS = {"--device": "cpu", "--export": "transformers", "--hard-cap": "2GiB"}


def commands() -> dict[str, Any]:
    """The commands by name, as the program knows them."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def prepare(folder: Path) -> None:
    """What command lines may name: a run with its plan and profile, and a file that is neither."""
    (folder / "file").write_text("no run, no plan")
    words = ["--memory", "1GiB", "--out", str(folder / "good"), "--steps", "2", "--micro-batch-size", "3"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main(["train", "jobs:tiny", *words]) == 0


def arguments(draw: random.Random, folder: Path) -> list[str]:
    """One command line."""
    known = commands()
    name = draw.choices(sorted(known), [_SELDOM.get(name, 4) for name in sorted(known)])[0]
    places = [
        str(folder),
        str(folder / "new" / str(draw.randrange(10**9))),
        str(folder / "file"),
        str(folder / "good"),
    ]
    given: list[str] = []
    for parameter in known[name].params:
        is_argument = parameter.param_type_name == "argument"
        if not is_argument and set(parameter.opts) & _NEVER:
            continue
        always = parameter.required or (parameter.opts[0] == "--memory" and draw.random() < 0.9)
        if not is_argument and not always and draw.random() < 0.7:
            if parameter.opts[0] == "--steps":
                given += ["--steps", "1"]
            continue
        value = draw.choice([*_ODD, *places]) if draw.random() < 0.12 else _usual(parameter, draw, places)
        if is_argument:
            given.insert(0, value if draw.random() < 0.9 else f"--{value}")
            continue
        option = draw.choice(parameter.opts)
        if parameter.opts[0] in ("--steps", "--plans") and value.isdecimal():
            value = _FIRST[parameter.opts[0]]
        given += [option] if getattr(parameter, "is_flag", False) else [option, value]
    if draw.random() < 0.1:
        given.insert(draw.randrange(len(given) + 1), draw.choice(["--no-such", "-x", "stray", "\U0001f4a3"]))
    return [name if draw.random() < 0.97 else draw.choice(_ODD), *given]


def _usual(parameter: Any, draw: random.Random, places: list[str]) -> str:
    """A value that an option takes."""
    option = parameter.opts[0]
    if option in _FIRST:
        return _FIRST[option]
    if parameter.name == "run_or_plan" or option == "--profile":
        good = places[3] if parameter.name == "run_or_plan" else f"{places[3]}/profile.json"
        return draw.choice((good, good, *places[:3]))
    if option in ("--out", "--png", "--svg", "--csv", "--data", "--trace", "--snapshot"):
        return draw.choice((places[1], places[1], places[0], places[2]))
    return "jobs:tiny" if parameter.param_type_name == "argument" else _WORDS.get(option, draw.choice("123"))


def problem(given: list[str]) -> tuple[int | None, str | None]:
    """The exit code of a command line, and what is wrong with how it ends; None if nothing is."""
    said = io.StringIO()
    told = [text[:60] for text in given]
    try:
        with redirect_stdout(said), redirect_stderr(said):
            code = main(given)
    except BaseException as error:
        return None, f"{type(error).__name__}: {error!s:.300} for {told}"
    if "Traceback" in said.getvalue():
        return code, f"a traceback for {told}"
    return code, None if code in DOCUMENTED else f"exit code {code} for {told}"
