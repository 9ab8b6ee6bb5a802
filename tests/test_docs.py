"""What the documents show is what the project does. How they are run: ``tests/pages.py``."""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import memfit
import pages

ROOT = Path(__file__).parents[1]
SOURCE = Path(memfit.__file__).parent
sys.path.insert(0, str(ROOT / "docs" / "extensions"))
command_line: Any = importlib.import_module("command_line")

pytestmark = [
    # Lightning's own:
    pytest.mark.filterwarnings(r"ignore:.*`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(
        "ignore:The number of training batches .* is smaller than the logging interval"
    ),
    # Dynamo's and inductor's own:
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    """Accelerate keeps what the first Accelerator was made with."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


# ---- blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, tmp_path, monkeypatch, with_commands=page not in pages.SLOW)


@pytest.mark.tutorial
@pytest.mark.parametrize("page", sorted(pages.SLOW))
def test_the_commands_of_a_slow_page_print_what_it_shows(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, tmp_path, monkeypatch, with_commands=True)


def run_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_commands: bool) -> None:
    """Runs the blocks of a page in order, and compares what they print with what it shows."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    printed: str | None = ""
    exit_code, number, names = 0, 0, dict[str, Any]()
    found = pages.blocks(page)
    with pages.surroundings(page):
        for block, below in zip(found, [*found[1:], None], strict=False):
            is_shown = below is not None and below.is_output
            if block.file is not None:
                (tmp_path / block.file).write_text(block.text)
            if block.language == "python":
                names |= pages.given(page, number, tmp_path)
                if (page, number) not in pages.RUN_ELSEWHERE:
                    printed, exit_code = run_python(block.text, names), 0
                number += 1
            elif is_shown and with_commands:
                printed, exit_code = run_commands(pages.commands(block))
            elif is_shown:
                printed = None
            elif block.is_output and printed is not None:
                assert exit_code == block.code, printed
                assert pages.alike(block.text, printed, exact=block.is_exact), printed
        pages.check_after(page, names)


def run_python(code: str, names: dict[str, Any]) -> str:
    """Runs a block and returns what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue()


def run_commands(commands: list[list[str]]) -> tuple[str, int]:
    """Runs command lines; returns what they printed for people, and the last exit code."""
    printed, code = "", 0
    for words in commands:
        assert words[0] == "memfit", words
        done = subprocess.run(
            [sys.executable, "-m", *words], capture_output=True, text=True, timeout=120, check=False
        )
        printed, code = printed + done.stdout + (done.stderr if done.returncode else ""), done.returncode
    return printed, code


@pytest.mark.parametrize("page", [*pages.PAGES, *pages.TRANSLATED])
def test_the_commands_of_a_page_are_understood(page: str) -> None:
    for block in pages.blocks(page):
        for words in pages.commands(block):
            pages.refuse_unknown(words)


@pytest.mark.parametrize(
    "line", ["memfit train --oops --out x", "memfit nothing", "make nothing", "pip install memfit[nothing]"]
)
def test_a_command_that_is_not_there_would_be_found(line: str) -> None:
    (words,) = pages.commands(pages.Block("sh", line, ""))
    with pytest.raises(Exception):  # noqa: B017, the parser's own
        pages.refuse_unknown(words)


def test_output_is_compared_but_for_what_is_the_machines() -> None:
    assert pages.alike("peak 3 MiB, step 4.1 ms", "peak 3 MiB, step 90 ms", exact=True)
    assert not pages.alike("peak 3 MiB", "peak 4 MiB", exact=True)
    assert pages.alike("peak 3 MiB", "peak 4.5 GiB", exact=False)
    assert not pages.alike("budget held", "budget BROKEN", exact=False)


@pytest.mark.parametrize("page", [*pages.PAGES, *pages.TRANSLATED])
def test_links_to_files_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", pages.TRANSLATED)
def test_a_translation_has_the_code_of_the_page_it_translates(page: str) -> None:
    own, other = pages.blocks(page), pages.blocks(pages.TRANSLATED[page])
    for number, (one, two) in enumerate(zip(own, other, strict=False)):
        assert one[:2] == two[:2], f"block {number} of {page}: copy it from {pages.TRANSLATED[page]}"
    assert len(own) == len(other), f"{page} has {len(own)} blocks, {pages.TRANSLATED[page]} {len(other)}"


@pytest.mark.parametrize("page", pages.TRANSLATED)
def test_a_translation_has_the_sections_of_the_page_it_translates(page: str) -> None:
    own, other = (
        re.findall(
            r"^#+", re.sub(r"^```.*?^```$", "", (ROOT / p).read_text(), flags=re.DOTALL | re.MULTILINE), re.M
        )
        for p in (page, pages.TRANSLATED[page])
    )
    assert own == other, f"translate the sections of {pages.TRANSLATED[page]} that {page} lacks"


# ---- the README --------------------------------------------------------------------------------------


def test_the_example_of_the_readme_is_the_one_that_runs() -> None:
    first = next(block for block in pages.blocks("README.md") if block.language == "python")
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    assert first.text.strip() in quickstart.replace("  # noqa: E731", "")


def test_the_picture_of_the_readme_can_be_drawn_and_the_example_holds_its_budget() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "timeline.py")], capture_output=True, text=True, check=True
    )
    assert "budget 128.0 MiB held" in done.stdout
    told = re.findall(
        r"^live bytes, (\w+): peak (\d+\.\d MiB), .+\n((?:[ ▁-█]{1,96}\n){2,4})", done.stdout, re.MULTILINE
    )
    assert [name for name, _, _ in told] == ["plain", "memfit"]
    shown = (ROOT / "README.md").read_text()
    assert all(f"live bytes, {name}: peak {peak}" in shown for name, peak, _ in told)


def test_the_tables_of_figures_are_made_from_the_newest_results() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "render.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---- errors, options, the build ---------------------------------------------------------------------


def classes_of_errors() -> list[str]:
    """Every exception that memfit defines for others to see."""
    trees = (ast.parse(path.read_text("utf-8")) for path in SOURCE.rglob("*.py"))
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found, known = list[str](), {"Exception"}
    known |= {name for name in vars(builtins) if name.endswith("Error")}
    while True:
        new = [
            node.name
            for node in classes
            if node.name not in known and any(isinstance(b, ast.Name) and b.id in known for b in node.bases)
        ]
        if not new:
            return sorted(name for name in found if not name.startswith("_"))
        found, known = found + new, known | set(new)


def test_every_error_has_an_entry() -> None:
    headings = re.findall(r"^### `(\w+)`$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert sorted(headings) == classes_of_errors(), "docs/errors.md: one heading for each class"


def test_every_exit_code_has_an_entry() -> None:
    named = {
        int(n) for p in SOURCE.rglob("*.py") for n in re.findall(r"^EXIT_\w+ = (\d+)", p.read_text(), re.M)
    }
    assert len(named) >= 5
    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert {int(code) for code in table} == named | {0, 1, 2}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as HTML; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "-n",
        "-q",
        "-b",
        "html",
        str(ROOT / "docs"),
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_option_is_in_the_documentation(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "commands.html").read_text("utf-8"))
    for words, command in command_line.commands():
        assert f"memfit {words}" in page
        for option in command_line.options(command):
            assert option in page, (words, option)


def test_every_public_name_is_in_the_documentation(site: Path) -> None:
    page = (site / "api.html").read_text("utf-8")
    for name in memfit.__all__:
        assert f'id="memfit.{name}"' in page, f"name memfit.{name} in docs/api.md"


def test_the_documentation_asks_no_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"(https?:[^\"]+)", page.read_text("utf-8")
        )
        assert not loaded, page.name


def test_pictures_are_small() -> None:
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 200_000, picture.name


def test_the_names_of_the_options_stay() -> None:
    found = {words: " ".join(command_line.options(command)) for words, command in command_line.commands()}
    assert found == FROZEN, "an option is a promise: add new ones to FROZEN, rename none"


FROZEN = {
    "train": (
        "--out --memory --batch-size --steps --seed --resume --micro-batch-size "
        "--plain --hard-cap --save-every --device --nproc --json --quiet -q"
    ),
    "plan": ("--memory --batch-size --micro-batch-size --seed --device --profile --export --json --quiet -q"),
    "frontier": "--batch-size --micro-batch-size --plans --seed --device --profile --json --quiet -q",
    "profile": "--out --batch-size --seed --device --real --json --quiet -q",
    "audit": "--batch-size --seed --device --json --quiet -q",
    "report": "--profile --out --png --svg --snapshot --trace --csv --data --json --quiet -q",
    "compare": "--memory --steps --batch-size --seed --device --hard-cap --json --quiet -q",
    "doctor": "--json --quiet -q",
}
