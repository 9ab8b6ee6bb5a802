"""Valid files, changed at random places into what nobody would write, and what reading them may come to.

A reader may take a file or refuse it with a ``MemfitError`` or a ``ValueError``; anything else is a bug.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memfit
from memfit.core.stored import sealed
from memfit.report.contents import contents
from memfit.report.export import KINDS as EXPORTS
from memfit.report.export import exported
from memfit.report.page import page
from memfit.report.reading import Source, read_source
from memfit.runtime.folder import check_resumable, cut_losses, read_plan, read_profile
from memfit.runtime.state import latest_checkpoint, load_checkpoint
from memfit.train import TrainOptions, _Silent, train

DEEP = "[" * 100_000 + "]" * 100_000
SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028"
JUNK: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 2**31, 2**53, 2**62, 2**63, 10**18, 10**400, -(10**400)),
    *(0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x" * 10_000,
        SCRIPT,
        "../../../outside",
        "/etc/passwd",
        "\ud800",
        "\x00",
        "\x1b[2J",
        "1e5",
        "__class__",
    ),
    *(
        None,
        True,
        False,
        [],
        {},
        [[]],
        {"a": {}},
        [0] * 10_000,
        [None],
        {"tensor": "../x"},
        {"dict": [[[], 1]]},
    ),
)
BYTES = (b"", b"\xff\xfe", b"\x80", b"{", b"[1", b'{"format": 3}', DEEP.encode(), b"1" * 100_000, b"null")
KINDS = ("plan", "profile", "run", "checkpoint")
# What an audit hook hears of what no reader may do.
_RUNS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
_CHANGES = (
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "shutil.rmtree",
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 1))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def example() -> Tensor:
    return torch.linspace(-1, 1, 24).reshape(6, 4)


def fitted(model: nn.Module, profile: memfit.Profile | None = None) -> memfit.Step:
    optimizer = torch.optim.AdamW(model.parameters())
    return memfit.fit(model, loss_fn, example(), memory="1GiB", optimizer=optimizer, profile=profile)


def changed(data: Any, draw: random.Random) -> Any:
    """A copy of JSON data with one to three places replaced, removed, doubled, swapped or added."""
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        holder, key = _place(data, draw)
        if holder is None:
            return draw.choice(JUNK)
        match draw.randrange(6):
            case 0 | 1:
                holder[key] = copy.deepcopy(draw.choice(JUNK))
            case 2:
                del holder[key]
            case 3 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case 4:
                other, at = _place(data, draw)
                if other is not None:
                    holder[key] = copy.deepcopy(other[at])
            case _ if isinstance(holder[key], bool | int | float):
                holder[key] = holder[key] + draw.choice((-1, 1, 10**6, -(10**12)))
            case _ if isinstance(holder, dict):
                holder[draw.choice(("extra", "__class__", "format", SCRIPT))] = draw.choice(JUNK)
    return data


def _place(data: Any, draw: random.Random) -> tuple[Any, Any]:
    """A random place within nested lists and objects."""
    holder, key = None, None
    while isinstance(data, (list, dict)) and data and (holder is None or draw.random() < 0.8):
        holder, key = data, draw.choice(list(data) if isinstance(data, dict) else range(len(data)))
        data = holder[key]
    return holder, key


def spoiled(text: str, draw: random.Random) -> bytes:
    """A file cut off, with bytes changed, or of other content."""
    raw = bytearray(text.encode())
    match draw.randrange(3):
        case 0:
            return bytes(raw[: draw.randrange(len(raw))])
        case 1:
            for _ in range(draw.randrange(1, 4)):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
            return bytes(raw)
    return draw.choice(BYTES)


class Watch:
    """Hears from the interpreter what is run, unpickled or changed outside of a folder, while it is on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_on = str(folder.resolve()), False
        self.heard: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event in _RUNS:
            self.heard.append(f"{event} {args!r:.100}")
        elif event in _CHANGES or (event == "open" and _writes(args)):
            path = os.path.realpath(os.fsdecode(args[0])) if isinstance(args[0], (str, bytes, Path)) else ""
            if not path.startswith(self.folder):
                self.heard.append(f"{event} {path}")

    def __enter__(self) -> Watch:
        self.is_on = True
        return self

    def __exit__(self, *error: object) -> None:
        self.is_on = False


def _writes(args: tuple[Any, ...]) -> bool:
    """Whether an "open" is not only for reading."""
    _, mode, flags = args
    is_new = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return is_new or (isinstance(mode, str) and any(sign in mode for sign in "wax+"))


class Files:
    """Valid files of every kind, in a folder, and one hostile case after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder / "inside", folder / "inside" / "run"
        self.folder.mkdir()
        step = fitted(net())
        self.texts = {"plan": step.plan.to_json(), "profile": step.profile.to_json()}
        options = TrainOptions("jobs:tiny", "1GiB", 2, self.run, micro_batch_size=3)
        self.options = options.as_json()
        train(options, _Silent())
        self.whole = folder / "whole"
        shutil.copytree(self.run, self.whole)
        self.before = self._outside(folder)
        self.outcomes: Counter[str] = Counter()

    def case(self, kind: str, seed: int) -> None:
        """One case; raises whatever is no clear refusal."""
        draw = random.Random(f"{kind} {seed}")
        try:
            getattr(self, f"_{kind}")(draw)
        except (memfit.MemfitError, ValueError) as error:
            told = str(error)
            self.outcomes[f"{kind} refused"] += 1
        else:
            told = ""
            self.outcomes[f"{kind} taken"] += 1
        assert len(told) < 2000, "an error of many lines is none"

    def _text(self, text: str, draw: random.Random) -> str:
        """A changed text; most carry their seal anew, as of somebody who knows how it is made."""
        if draw.random() < 0.2:
            return spoiled(text, draw).decode("utf-8")
        data = changed(json.loads(text), draw)
        if not isinstance(data, dict) or "seal" not in data or draw.random() < 0.3:
            return json.dumps(data)
        return sealed(data)

    def _plan(self, draw: random.Random) -> None:
        plan = memfit.Plan.from_json(self._text(self.texts["plan"], draw))
        assert memfit.Plan.from_json(plan.to_json()) == plan
        str(plan), str(plan.to("axolotl"))
        memfit.simulate(memfit.Profile.from_json(self.texts["profile"]), plan)

    def _profile(self, draw: random.Random) -> None:
        profile = memfit.Profile.from_json(self._text(self.texts["profile"], draw))
        assert memfit.Profile.from_json(profile.to_json()) == profile
        plan = memfit.find_plan(profile, memory=2**62)
        memfit.simulate(profile, plan)
        try:
            memfit.find_plan(profile, memory=draw.randrange(1, plan.predicted_peak_bytes + 1))
        except memfit.InfeasibleBudget as refused:
            memfit.find_plan(profile, memory=refused.needed_bytes)

    def _run(self, draw: random.Random) -> None:
        name = draw.choice(("run.json", "losses.jsonl", "plan.json", "profile.json"))
        with _replaced(self.run / name, self._spoil(self.run / name, draw)):
            read_plan(self.run), read_profile(self.run)
            if name == "run.json":
                check_resumable(self.run, self.options)
            source = read_source(self.run)
            if draw.random() < 0.02:  # a page takes a while
                self._shown(source)

    def _checkpoint(self, draw: random.Random) -> None:
        place = latest_checkpoint(self.run)
        assert place is not None
        name = draw.choice(("state.json",) * 6 + ("model.safetensors", "../latest", "../losses.jsonl"))
        with _replaced(place / name, self._spoil(place / name, draw)):
            found = latest_checkpoint(self.run)
            assert found is not None
            assert found.parent == self.run
            cut = self.run / "losses.jsonl"
            with _replaced(cut, cut.read_bytes()):
                cut_losses(self.run, 2)
            import jobs

            made = jobs.tiny()
            load_checkpoint(found, made.model, made.optimizer)

    def names(self, seed: int) -> None:
        """A run whose modules have the names of an attack: its page and its exports must be harmless."""
        draw = random.Random(seed)
        bad = draw.choice(BAD_NAMES)
        plan, profile = (json.loads((self.run / name).read_text()) for name in ("plan.json", "profile.json"))
        modules = {op[0][0] for graph in profile["graphs"] for op in graph["ops"]} - {""}
        assert modules
        told = {name: f"{bad}{name}" for name in modules}
        title = json.loads((self.run / "run.json").read_text())
        title["options"]["target"] = bad
        with (
            _replaced(self.run / "plan.json", json.dumps(_renamed(plan, told)).encode()),
            _replaced(self.run / "profile.json", sealed(_renamed(profile, told)).encode()),
            _replaced(self.run / "run.json", json.dumps(title).encode()),
        ):
            self._shown(read_source(self.run))

    def _shown(self, source: Source) -> None:
        """The page and every export of a source."""
        content = contents(source, plans=2)
        assert_harmless(page(content))
        for kind in EXPORTS if content.planned is not None else ():
            exported(content, kind)

    def _spoil(self, path: Path, draw: random.Random) -> bytes:
        """The changed content of a file, JSON or not."""
        text = path.read_bytes()
        if path.suffix == ".json" and draw.random() < 0.8:
            return self._text(text.decode(), draw).encode("utf-8", "surrogatepass")
        return spoiled(text.decode("latin-1"), draw).decode("utf-8", "ignore").encode("latin-1", "ignore")

    def strangers(self) -> list[str]:
        """What has been written outside of the run's folder, or changed inside of it."""
        now = self._outside(self.folder.parent)
        return sorted(str(path) for path in now.keys() ^ self.before.keys()) + [
            str(path) for path in now.keys() & self.before.keys() if now[path] != self.before[path]
        ]

    @staticmethod
    def _outside(folder: Path) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _replaced:
    """A file with other content while the body runs."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content, self.before = path, content, path.read_bytes()

    def __enter__(self) -> None:
        self.path.write_bytes(self.content)

    def __exit__(self, *error: object) -> None:
        self.path.write_bytes(self.before)


BAD_NAMES = (
    SCRIPT,
    "';alert(1);//",
    '"><svg onload=alert(1)>',
    "{{7*7}}${7*7}<%= 7 %>",
    "../../../etc/passwd",
    "=cmd|' /C calc'!A0,",
    "\u202e\u200b<!--",
    "]]></data><!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>",
)


def _renamed(data: Any, told: dict[str, str]) -> Any:
    """JSON data with some texts replaced."""
    if isinstance(data, dict):
        return {name: _renamed(value, told) for name, value in data.items()}
    if isinstance(data, list):
        return [_renamed(value, told) for value in data]
    return told.get(data, data) if isinstance(data, str) else data


def assert_harmless(text: str) -> None:
    """No script, image or line separator of a file's may stand in a page."""
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "<svg onload" not in text
    assert "<!ENTITY" not in text
    assert "<!--" not in text.partition('id="data">')[2].partition("</script>")[0]
    assert "\u2028" not in text.partition('id="data">')[2].partition("</script>")[0]


def wrong_gradients(profiles: Callable[[random.Random], str], seeds: range) -> list[str]:
    """Training from changed profiles that are taken: the gradient must be that of the plain step."""
    plain = net()
    plain.eval()
    loss_fn(plain, example()).backward()
    wrong = []
    for seed in seeds:
        try:
            profile = memfit.Profile.from_json(profiles(random.Random(seed)))
            model = net()
            model.eval()
            step = fitted(model, profile)
            step(example())
        except (memfit.MemfitError, ValueError):
            continue
        pairs = zip(plain.parameters(), model.parameters(), strict=True)
        if not all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7) for a, b in pairs):  # type: ignore
            wrong.append(f"profile {seed}")
    return wrong
