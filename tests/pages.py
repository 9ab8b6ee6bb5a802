"""The documents as code that can be run: their blocks, what they take for granted, and what they print.

Note [Blocks]
 1. The ``python`` blocks of a page run in order in one namespace. What a page takes for granted (a model, a
    loader) is in ``GIVEN``; a page that is not there begins with nothing.
 2. A python block after "Save this as `name`:" is a file, for the commands that follow.
 3. ``sh`` blocks, and blocks without a language, hold commands: each is read by memfit's own parser, or must
    be a target of make, an example, or an extra that there is. One with its output below is run.
 4. A ``text`` block after a line that ends with "prints:" is what the block above it prints. Seconds and
    percentages are the machine's, and match any; after "prints about:" every number does.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from torch import nn

import memfit
from memfit.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
TRANSLATED = {"README.zh-CN.md": "README.md", "docs/zh/quickstart.md": "docs/quickstart.md"}

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MACHINE = re.compile(r"[-+]?[\d.,]+(e-?\d+)?(?= ?(%|(s|ms|us)\b))")
_NUMBER = re.compile(r"\d[\d.,]*(e-?\d+)?( (s|ms|us|B|KiB|MiB|GiB)\b)?")
Names = dict[str, Any]


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line above it."""

    language: str
    text: str
    above: str

    @property
    def file(self) -> str | None:
        """The file that a reader is to save it as."""
        found = re.search(r"[Ss]ave this as `(\S+)`:$", self.above)
        return found[1] if found else None

    @property
    def is_output(self) -> bool:
        """Whether it is what the block above it prints."""
        return self.language == "text" and self.above.endswith(("prints:", "prints about:"))

    @property
    def is_exact(self) -> bool:
        """Whether its numbers must be the same, but for those of the machine."""
        return self.above.endswith("prints:")

    @property
    def code(self) -> int:
        """The exit code that the line above it names."""
        found = re.search(r"exit code (\d+)", self.above)
        return int(found[1]) if found else 0


def blocks(page: str) -> list[Block]:
    """The blocks of a page in order; directives of Sphinx are none."""
    text = (ROOT / page).read_text("utf-8")
    found = []
    for match in _FENCE.finditer(text):
        if not match[1].startswith("{"):
            above = text[: match.start()].rstrip().rpartition("\n")[2]
            found.append(Block(match[1], match[2], above))
    return found


def commands(block: Block) -> list[list[str]]:
    """The command lines of a block, without comments."""
    if block.language not in ("", "sh"):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words and words[0] in _READERS and re.match("[a-z.-]", words[1])]


def refuse_unknown(words: list[str]) -> None:
    """Fails on a command that would not be understood.

    Raises:
        AssertionError: There is no such target, example or extra.
        Exception: What memfit's own parser raises.
    """
    _READERS[words[0]](words)


def alike(shown: str, printed: str, *, exact: bool) -> bool:
    """Whether a page shows what was printed. See Note [Blocks] 4."""
    return _normal(shown, exact=exact) == _normal(printed, exact=exact)


def _normal(text: str, *, exact: bool) -> list[str]:
    text = _MACHINE.sub("#", text) if exact else _NUMBER.sub("#", text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


# ---- commands ---------------------------------------------------------------------------------------


def _memfit(words: list[str]) -> None:
    program: Any = typer.main.get_command(app)
    if words[1:2] in (["--help"], ["--version"]):
        return
    program.commands[words[1]].make_context(words[1], words[2:])


def _python(words: list[str]) -> None:
    if words[1:3] == ["-m", "memfit"]:
        _memfit(words[2:])
    elif words[1] != "-m":
        assert (ROOT / words[1]).is_file(), words[1]


def _torchrun(words: list[str]) -> None:
    if "memfit" in words:
        _memfit(words[words.index("memfit") :])
    else:  # a script of the reader's own
        assert words[-1].endswith(".py"), words


def _make(words: list[str]) -> None:
    for target in words[1:]:
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def _pip(words: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert extra in known, extra


_READERS: dict[str, Callable[[list[str]], None]] = {
    "memfit": _memfit,
    "python": _python,
    "torchrun": _torchrun,
    "make": _make,
    "pip": _pip,
}


# ---- what pages take for granted --------------------------------------------------------------------


def _net() -> nn.Sequential:
    layers = [m for _ in range(6) for m in (nn.Linear(128, 128), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _parts(folder: Path) -> Names:
    """A small net with all that a loop has."""
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    batches = [(torch.randn(256, 128), torch.randint(10, (256,))) for _ in range(3)]
    data = torch.utils.data.TensorDataset(torch.randn(512, 128), torch.randint(10, (512,)))
    names: Names = {"torch": torch, "nn": nn, "memfit": memfit, "model": model, "loss_fn": _loss}
    names |= {"optimizer": optimizer, "schedule": schedule, "batches": batches, "batch": batches[0]}
    names |= {"loader": torch.utils.data.DataLoader(data, batch_size=256), "path": folder / "state.pt"}
    return names | {"average": torch.optim.swa_utils.AveragedModel(model)}


def _lightning(folder: Path) -> Names:
    import runpy

    from lightning import pytorch as pl

    shown = runpy.run_path(str(ROOT / "examples" / "lightning_loop.py"))
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return _parts(folder) | {"pl": pl, "module": shown["Classifier"](), "options": options}


def _accelerate(folder: Path) -> Names:
    from accelerate import Accelerator

    return _parts(folder) | {"Accelerator": Accelerator}


def _blocks(folder: Path) -> Names:
    """A model of blocks and layers, for pages that treat each by itself."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(2))
            self.head = nn.Linear(32, 10)

        @property
        def blocks(self) -> nn.ModuleList:
            return self.layers

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                rows = layer(rows)
            scores: torch.Tensor = self.head(rows)
            return scores

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["rows"]), batch["labels"])

    model = Layers()
    batch = {"rows": torch.randn(16, 32), "labels": torch.randint(10, (16,))}
    names: Names = {"torch": torch, "memfit": memfit, "model": model, "loss_fn": loss_fn, "batch": batch}
    names |= {"DistributedDataParallel": DistributedDataParallel, "fully_shard": fully_shard}
    return names | {"loader": [batch, batch], "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def _readme(folder: Path) -> Names:
    return {"torch": torch, "nn": nn, "memfit": memfit}


def _towers(folder: Path) -> Names:
    """What is missing for the contrastive loss of the README."""
    model = nn.Module()
    for tower in ("image", "text"):
        model.add_module(tower, nn.Sequential(nn.Linear(64, 2048), nn.GELU(), nn.Linear(2048, 32)))
    batch = {tower: torch.randn(1024, 64) for tower in ("image", "text")}
    return {"model": model, "batch": batch, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def _trainer(folder: Path) -> Names:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (8, 8))]
    options = {"use_cpu": True, "dataloader_pin_memory": False, "report_to": [], "max_steps": 1}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=4, **options)  # type: ignore
    return {"trainer": Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows)}


def _labelled(folder: Path) -> Names:
    """Micro-batches with labels for ``memfit.windows``."""
    names = _blocks(folder)
    names["model"] = nn.Sequential(nn.Linear(32, 32), *(nn.Sequential(nn.Linear(32, 32)) for _ in range(3)))
    return names | {"optimizer": torch.optim.SGD(names["model"].parameters(), lr=0.1)}


def _exports(folder: Path) -> Names:
    """The files that the command above the first block writes, of a small step."""
    from memfit.report.contents import contents
    from memfit.report.export import write_exports
    from memfit.report.reading import Source

    profile = memfit.profile(_net(), _loss, (torch.randn(64, 128), torch.randint(10, (64,))))
    source = Source("a plan", "memfit report", memfit.find_plan(profile, memory="1GiB"), profile)
    names = (
        ("snapshot", "step.pickle"),
        ("trace", "step.trace.json"),
        ("csv", "step.csv"),
        ("data", "step.json"),
    )
    write_exports(contents(source, plans=2), {kind: folder / name for kind, name in names})
    return {}


# By page, and by the number of the python block before which they are there.
GIVEN: dict[str, dict[int, Callable[[Path], Names]]] = {
    "README.md": {0: _readme, 1: _towers, 2: _trainer, 3: _labelled},
    "docs/plain_loop.md": {0: _parts},
    "docs/lightning.md": {0: _lightning},
    "docs/accelerate.md": {0: _accelerate},
    "docs/compile.md": {0: _blocks},
    "docs/export.md": {0: _exports},
    "docs/many_processes.md": {0: _blocks, 1: _blocks},
}
SLOW = {"docs/tutorial.md"}  # its commands are run by `make tutorial`
RUN_ELSEWHERE = {("README.md", 0)}  # it is examples/quickstart.py, which examples/timeline.py runs


def _after_readme(names: Names) -> None:
    step = names["step"]
    assert step.plan.is_two_pass
    step(_towers(Path())["batch"])
    assert step.verdict.held


def _after_lightning(names: Names) -> None:
    assert names["memfit_callback"].step.verdict.held


def _after_accelerate(names: Names) -> None:
    assert names["step"].verdict.held


def _after_plain_loop(names: Names) -> None:
    assert len(names["notes"]) == names["step"].plan.gradient_accumulation_steps


AFTER: dict[str, Callable[[Names], None]] = {
    "README.md": _after_readme,
    "docs/lightning.md": _after_lightning,
    "docs/accelerate.md": _after_accelerate,
    "docs/plain_loop.md": _after_plain_loop,
}


@contextmanager
def _one_process() -> Iterator[None]:
    """A process group of this process alone, as under torchrun."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def given(page: str, number: int, folder: Path) -> Names:
    """What is there before a python block of a page, beside what the page itself made."""
    make = GIVEN.get(page, {}).get(number)
    return {} if make is None else make(folder)


def check_after(page: str, names: Names) -> None:
    """What a page must have come to."""
    if page in AFTER:
        AFTER[page](names)


def surroundings(page: str) -> AbstractContextManager[None]:
    """What must be so while a page runs."""
    return _one_process() if page == "docs/many_processes.md" else nullcontext()
