"""The shape of the package: which way imports point, how long functions are, what the door imports."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import memfit

SOURCE: Final = Path(memfit.__file__).parent
MODULES: Final = sorted(SOURCE.rglob("*.py"))
LONGEST_FUNCTION: Final = 60

# errors, units <- core <- runtime <- api <- train <- report <- cli, and beside them workload <- workloads.
# A room may import the rooms named here; "" is the door, `import memfit` itself, which leads to api.
FOUNDATION: Final = {"errors", "units", "core"}
MAY_IMPORT: Final[dict[str, set[str]]] = {
    "errors": set(),
    "units": {"errors"},
    "core": FOUNDATION,
    "runtime": {*FOUNDATION, "runtime"},
    "workload": {"errors", "units"},
    "workloads": {"errors", "units", "workload", "workloads"},
    "api": {*FOUNDATION, "runtime", "workload"},
    "train": {*FOUNDATION, "runtime", "workload", "api", ""},
    "compare": {*FOUNDATION, "runtime", "workload", "api", "train", ""},
    "doctor": {*FOUNDATION, "runtime", "api", ""},
    "integrations": {*FOUNDATION, "runtime", "workload", "api", ""},
    "report": {*FOUNDATION, "runtime", "workload", "api", "train", "compare", "doctor", "report", ""},
    "cli": {*FOUNDATION, "runtime", "workload", "api", "train", "compare", "doctor", "report", "cli", ""},
    "__init__": {"errors", "api"},
    "__main__": {"cli"},
}
# core decides by numbers that it is given: no device, no clock, no chance, no machine.
CORE_LIBRARIES: Final = {"numpy", "scipy"}
NOT_IN_CORE: Final = {
    *("ctypes", "datetime", "multiprocessing", "os", "platform", "random", "resource", "secrets"),
    *("signal", "socket", "subprocess", "tempfile", "threading", "time"),
}


def imports(code: str, package: str) -> Iterator[str]:
    """Yields the absolute name of everything that ``code`` in ``package`` imports, wherever in the file."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def wrong_imports(room: str, code: str, package: str) -> list[str]:
    """Returns the imports that ``code`` in ``room`` must not have."""
    wrong = []
    for name in imports(code, package):
        top, *rest = name.split(".")
        if top == "memfit":
            target = rest[0] if rest and (rest[0] in MAY_IMPORT) else ""
            if target not in MAY_IMPORT[room]:
                wrong.append(name)
        elif room in ("core", "errors", "units"):
            known = top in sys.stdlib_module_names or (room == "core" and top in CORE_LIBRARIES)
            if not known or top in NOT_IN_CORE:
                wrong.append(name)
    return wrong


def long_functions(code: str) -> list[str]:
    """Returns the functions of ``code`` with more than ``LONGEST_FUNCTION`` lines, docstring included."""
    functions = [
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in functions
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]


def room_of(path: Path) -> str:
    """Returns the room that a module of memfit belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def package_of(path: Path) -> str:
    """Returns the dotted name of the package that a module of memfit is in."""
    return ".".join(["memfit", *path.relative_to(SOURCE).parts[:-1]])


def imported_by(code: str) -> set[str]:
    """Returns the top-level modules that a fresh interpreter has imported after ``code``."""
    report = "\nimport sys; print('MODULES', *(name for name in sys.modules if '.' not in name))"
    child = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    return set(child.stdout.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(SOURCE)) for path in MODULES])
def test_imports_point_one_way(path: Path) -> None:
    assert wrong_imports(room_of(path), path.read_text(), package_of(path)) == []


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("core", "import torch"),
        ("core", "def f():\n    from torch.nn import Module"),
        ("core", "import time"),
        ("core", "import os.path"),
        ("core", "import rich"),
        ("core", "from memfit.runtime.meter import PeakMeter"),
        ("core", "from ..runtime import meter"),
        ("core", "import memfit"),
        ("core", "from memfit import runtime"),
        ("errors", "from memfit import core"),
        ("errors", "import numpy"),
        ("units", "import memfit.core.batching"),
        ("runtime", "from memfit.api import fit"),
        ("runtime", "import memfit.cli"),
        ("runtime", "from memfit.report import terminal"),
        ("runtime", "from .. import report"),
        ("api", "from memfit.cli import main"),
        ("workloads", "from memfit import cli"),
        ("train", "from memfit.report.terminal import TerminalWatcher"),
        ("report", "import memfit.cli"),
    ],
)
def test_a_turned_arrow_is_found(room: str, code: str) -> None:
    assert len(wrong_imports(room, code, f"memfit.{room}")) == 1


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("core", "import numpy as np\nfrom scipy.optimize import milp\nimport math, heapq, dataclasses"),
        ("core", "from memfit.core import graph\nfrom memfit.errors import MemfitError\nfrom . import plan"),
        ("runtime", "import torch, time\nfrom memfit.core.batching import parts_for\nfrom ..units import x"),
        ("cli", "from memfit import __version__, api"),
    ],
)
def test_the_right_arrows_are_allowed(room: str, code: str) -> None:
    assert wrong_imports(room, code, f"memfit.{room}") == []


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(SOURCE)) for path in MODULES])
def test_functions_fit_on_a_screen(path: Path) -> None:
    assert long_functions(path.read_text()) == []


def test_a_long_function_is_found() -> None:
    body = "        x = 1\n" * LONGEST_FUNCTION
    assert long_functions(f"class C:\n    def f(self):\n{body}") == ["f: 61 lines"]
    assert long_functions(f"class C:\n    def f(self):\n{body[14:]}") == []


def test_the_rooms_that_matter_are_read() -> None:
    assert {"errors", "units", "core", "runtime", "__init__"} <= {room_of(path) for path in MODULES}


def test_importing_memfit_does_not_import_torch() -> None:
    modules = imported_by("import memfit; memfit.InfeasibleBudget; dir(memfit)")
    assert "memfit" in modules
    assert modules.isdisjoint({"torch", "numpy", "scipy", "altair", "vl_convert"})


def test_asking_for_help_does_not_import_torch() -> None:
    run = "import runpy, sys\nsys.argv = ['memfit', '--help']\n"
    run += "try: runpy.run_module('memfit', run_name='__main__', alter_sys=False)\n"
    run += "except SystemExit as end: assert end.code in (0, None), end.code"
    modules = imported_by(run)
    assert "memfit" in modules
    assert modules.isdisjoint({"torch", "altair", "vl_convert"})


def test_an_import_of_torch_is_found() -> None:
    assert "torch" in imported_by("import memfit; from memfit.runtime import batch")


def test_the_door_is_sorted_and_small() -> None:
    assert len(memfit.__all__) == len(set(memfit.__all__)) <= 20
    assert dir(memfit) == sorted([*memfit.__all__, "__version__"])


@pytest.mark.parametrize("name", memfit.__all__)
def test_each_public_name_is_behind_the_door(name: str) -> None:
    home = importlib.import_module("memfit.errors" if name in dir(memfit.errors) else "memfit.api")
    assert getattr(memfit, name) is getattr(home, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'memfit' has no attribute 'no_such_name'"):
        getattr(memfit, "no_such_name")  # noqa: B009  (a type checker would refuse the plain look-up)
