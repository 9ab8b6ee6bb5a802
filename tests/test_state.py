"""Checkpoints: what is saved comes back bit for bit, and what is damaged is refused with a cure."""

from __future__ import annotations

import errno
import json
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from memfit.runtime.state import (
    BadCheckpoint,
    Position,
    RandomState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


class Tied(nn.Module):
    """Tied weights, BatchNorm, a buffer outside the state_dict, dropout and a bfloat16 parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        self.steps: torch.Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        noisy = nn.functional.dropout(self.norm(self.embed(tokens)), 0.3) * self.scale
        logits: torch.Tensor = self.head(noisy)
        return logits


Trained = tuple[Tied, torch.optim.Optimizer]


def build(optimizer: str = "AdamW") -> Trained:
    model = Tied()
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    return model, getattr(torch.optim, optimizer)(model.parameters(), lr=0.01, **options)


def train(model: Tied, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 16, (12,))
        shift = int(random.random() * 3) + int(np.random.randint(3))
        loss = nn.functional.cross_entropy(model(tokens), (tokens + shift) % 16)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """A disk with no room: the kernel refuses any file beyond ``size_bytes``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 2 and 4."""
    model, optimizer = build()
    for step in (2, 4):
        train(model, optimizer, 2)
        save_checkpoint(tmp_path, Position(step, 3), model, optimizer)
    return tmp_path


@pytest.mark.parametrize("optimizer_name", ["AdamW", "SGD", "Adagrad", "RMSprop"])
def test_a_resumed_run_has_the_same_losses_and_weights(tmp_path: Path, optimizer_name: str) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model, optimizer = build(optimizer_name)
    train(model, optimizer, 3)
    save_checkpoint(tmp_path, Position(3, 4), model, optimizer)
    undisturbed = train(model, optimizer, 4)

    again, again_optimizer = build(optimizer_name)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    position, drawn = load_checkpoint(checkpoint, again, again_optimizer)
    drawn.restore()

    assert position == Position(3, 4)
    assert train(again, again_optimizer, 4) == undisturbed
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.steps == 7
    assert again.head.weight is again.embed.weight


def test_saving_leaves_every_generator_as_it_was(tmp_path: Path) -> None:
    before = RandomState.capture()
    save_checkpoint(tmp_path, Position(1), *build_quietly(before))
    after = RandomState.capture()
    assert torch.equal(before.tensors["cpu"], after.tensors["cpu"])
    assert (before.python, before.numpy) == (after.python, after.numpy)


def build_quietly(state: RandomState) -> Trained:
    trained = build()
    state.restore()
    return trained


def test_a_tied_weight_is_stored_once(saved: Path) -> None:
    size_bytes = (saved / "step-00000004" / "model.safetensors").stat().st_size
    model = Tied()
    whole_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    tied_bytes = 16 * 8 * 4
    header_bytes = int.from_bytes((saved / "step-00000004" / "model.safetensors").read_bytes()[:8], "little")
    assert size_bytes == 8 + header_bytes + whole_bytes - tied_bytes + model.steps.element_size()


def test_the_two_last_checkpoints_stay(tmp_path: Path) -> None:
    trained = build()
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, Position(step), *trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000015"]


def test_going_back_to_an_older_checkpoint_gives_up_the_later_one(saved: Path) -> None:
    (saved / "latest").write_text("step-00000002")
    save_checkpoint(saved, Position(3), *build())
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-00000002", "step-00000003"]


def test_a_half_written_checkpoint_is_neither_used_nor_kept(saved: Path) -> None:
    (saved / "step-00000006.tmp").mkdir()
    (saved / "step-00000006.tmp" / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(saved) == saved / "step-00000004"
    save_checkpoint(saved, Position(8), *build())
    assert not list(saved.glob("*.tmp"))


def test_a_checkpoint_that_is_being_removed_has_not_the_name_of_a_whole_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: removed.append(path.name))
    save_checkpoint(saved, Position(6, 3), *build())
    assert "step-00000002.tmp" in removed
    assert all(name.endswith(".tmp") for name in removed)


def test_a_folder_without_checkpoints_has_no_latest_one(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None


def test_a_full_disk_is_an_error_that_says_so_and_leaves_the_last_checkpoint(saved: Path) -> None:
    with (
        largest_file(600),
        pytest.raises(OSError, match=r"disk is full.*previous checkpoint is untouched") as e,
    ):
        save_checkpoint(saved, Position(6), *build())
    assert e.value.errno == errno.EFBIG
    assert latest_checkpoint(saved) == saved / "step-00000004"
    assert load_checkpoint(saved / "step-00000004", *build())[0].step == 4
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-00000002", "step-00000004"]


@pytest.mark.parametrize("name", ["model", "optimizer", "random"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_file_is_named_and_the_other_checkpoint_offered(
    saved: Path, name: str, damage: str
) -> None:
    path = saved / "step-00000004" / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-3])
    else:
        content[-2] ^= 1
        path.write_bytes(content)
    model, optimizer = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BadCheckpoint, match=rf"{name}\.safetensors is.*step-00000002"):
        load_checkpoint(saved / "step-00000004", model, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "damaged"),
        ("[]", "no JSON object"),
        ('{"format": "other"}', "not written by memfit"),
        ('{"format": "memfit-checkpoint", "version": 99}', "version 99"),
        ('{"format": "memfit-checkpoint", "version": 1}', "damaged"),
    ],
)
def test_a_foreign_or_damaged_state_file_is_refused(saved: Path, content: str, says: str) -> None:
    (saved / "step-00000004" / "state.json").write_text(content)
    with pytest.raises(BadCheckpoint, match=rf"state\.json.*{says}"):
        load_checkpoint(saved / "step-00000004", *build())


@pytest.mark.parametrize("content", [b"../../etc", b"step-00000099", b"\xff\xfe", b""])
def test_a_pointer_to_nothing_is_refused_with_the_checkpoints_there_are(saved: Path, content: bytes) -> None:
    (saved / "latest").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"latest.*step-00000002, step-00000004"):
        latest_checkpoint(saved)


def test_a_checkpoint_of_another_model_is_refused(saved: Path) -> None:
    other = nn.Linear(3, 3)
    with pytest.raises(BadCheckpoint, match=r"Resume with the TARGET"):
        load_checkpoint(saved / "step-00000004", other, torch.optim.AdamW(other.parameters()))


def test_a_checkpoint_of_another_optimizer_is_refused(saved: Path) -> None:
    model = Tied()
    two_groups: list[dict[str, object]] = [{"params": [model.scale]}, {"params": [model.embed.weight]}]
    with pytest.raises(BadCheckpoint, match=r"does not fit this model and optimizer"):
        load_checkpoint(saved / "step-00000004", model, torch.optim.AdamW(two_groups))


def test_state_that_is_not_data_is_refused_by_name(tmp_path: Path) -> None:
    model, optimizer = build()
    optimizer.param_groups[0]["schedule"] = lambda step: step
    with pytest.raises(ValueError, match=r"function at 'optimizer\.param_groups\.0\.schedule'"):
        save_checkpoint(tmp_path, Position(1), model, optimizer)
    assert latest_checkpoint(tmp_path) is None


def test_the_files_are_ordinary_safetensors(saved: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(saved / "step-00000004" / "model.safetensors")
    assert tensors["model.state.scale"].dtype is torch.bfloat16
    state = json.loads((saved / "step-00000004" / "state.json").read_text())
    assert state["position"] == {"step": 4, "micro_batch_size": 3}
