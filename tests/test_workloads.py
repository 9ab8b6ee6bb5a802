"""The two real workloads, and how a TARGET is found."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from memfit.workload import BadTarget, Workload, load_target
from memfit.workloads import images, text

TEXT = "memfit.workloads.text:workload"
IMAGES = "memfit.workloads.images:workload"


def first_batches(workload: Workload, start: int, count: int) -> list[dict[str, torch.Tensor]]:
    return list(islice(workload.batches_from(start), count))


@pytest.mark.parametrize("target", [TEXT, IMAGES])
def test_a_batch_is_a_function_of_seed_and_index_alone(target: str) -> None:
    straight = first_batches(load_target(target, batch_size=3, seed=5), 0, 4)
    later = first_batches(load_target(target, batch_size=3, seed=5), 3, 1)[0]
    other_seed = first_batches(load_target(target, batch_size=3, seed=6), 3, 1)[0]
    for name, tensor in later.items():
        assert tensor.shape[0] == 3
        assert torch.equal(tensor, straight[3][name])
    assert not all(torch.equal(tensor, other_seed[name]) for name, tensor in later.items())


@pytest.mark.parametrize("target", [TEXT, IMAGES])
def test_building_a_workload_leaves_the_random_state_alone(target: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = load_target(target, seed=7).model.state_dict()
    torch.randn(5)
    two = load_target(target, seed=7).model.state_dict()
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    three = load_target(target, seed=8).model.state_dict()
    assert not all(torch.equal(tensor, three[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("target", "steps"), [(TEXT, 8), (IMAGES, 12)])
def test_the_loss_falls(target: str, steps: int) -> None:
    workload = load_target(target, batch_size=16, seed=0)
    losses = []
    for batch in first_batches(workload, 0, steps):
        loss: Any = workload.loss_fn(workload.model, batch)
        torch.autograd.backward(loss)
        workload.optimizer.step()
        workload.optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_labels_are_the_next_bytes_of_real_source() -> None:
    batch = first_batches(load_target(TEXT, batch_size=4), 0, 1)[0]
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    crop = bytes(batch["tokens"][0].tolist())
    assert crop in text.standard_library_source()


def test_the_corpus_skips_what_does_not_belong_to_python(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("other" * 10)
    (tmp_path / "b.py").write_bytes(b"b" * 600_000)
    (tmp_path / "a.py").write_bytes(b"a" * 600_000)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    corpus = text.standard_library_source(tmp_path)
    assert corpus.replace(b"\n", b"") == b"a" * 600_000 + b"b" * 600_000


def test_a_python_without_its_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"a" * 999_999)
    with pytest.raises(ValueError, match=r"Only 999,999 bytes.*name another TARGET"):
        text.standard_library_source(tmp_path)


def test_the_gpt_cannot_see_the_future() -> None:
    model = text.build_model(dataclasses.replace(text.GPTConfig(), layers=2, dropout=0.0), 0, "cpu")
    tokens = torch.arange(64).reshape(2, 32)
    changed = tokens.clone()
    changed[:, 20] = 200
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_the_residual_network_writes_in_place_and_has_batch_statistics() -> None:
    workload = load_target(IMAGES, batch_size=2)
    modules = list(workload.model.modules())
    assert any(isinstance(module, torch.nn.ReLU) and module.inplace for module in modules)
    means = [m.running_mean for m in modules if isinstance(m, torch.nn.BatchNorm2d)]
    workload.loss_fn(workload.model, first_batches(workload, 0, 1)[0])
    assert means
    assert all(mean is not None and mean.abs().sum() > 0 for mean in means)


def test_crops_come_from_the_photograph_the_label_names(tmp_path: Path) -> None:
    for value, name in enumerate(images.PHOTOGRAPHS[:5]):
        Image.fromarray(np.full((80, 90, 3), 50 * value, dtype=np.uint8)).save(tmp_path / name, quality=100)
    crops = images.PhotoCrops(images.bundled_photographs(tmp_path), 9, 0, "cpu")
    batch = crops(0)
    assert batch["images"].shape == (9, 3, images.CROP_PIXELS, images.CROP_PIXELS)
    expected = batch["labels"].float() * 50 / 127.5 - 1
    torch.testing.assert_close(batch["images"].mean(dim=(1, 2, 3)), expected)


def test_every_photograph_that_is_named_is_in_the_installation() -> None:
    assert len(images.bundled_photographs()) == len(images.PHOTOGRAPHS)


def test_missing_photographs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Only 0 of the bundled photographs.*Install scikit-image again"):
        images.bundled_photographs(tmp_path)


def test_a_file_is_a_target_and_takes_only_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("from jobs import job\n")
    (tmp_path / "mine.py").write_text(
        "from beside import job\ndef make(batch_size=2):\n    return job(batch_size=batch_size)\n"
    )
    workload = load_target(f"{tmp_path}/mine.py:make", batch_size=5, seed=3, device="cpu")
    assert first_batches(workload, 0, 1)[0]["tokens"].shape[0] == 5


def test_a_module_of_the_current_folder_is_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local_module_of_this_test.py").write_text("from jobs import tiny\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(load_target("local_module_of_this_test:tiny"), Workload)


def test_a_broken_file_is_refused_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import module_that_does_not_exist\n")
    with pytest.raises(BadTarget, match=r"does not import: ModuleNotFoundError.*must work first"):
        load_target(f"{tmp_path}/broken.py:make")


def test_batches_that_end_start_again() -> None:
    made = load_target("jobs:tiny")
    workload = dataclasses.replace(made, batches=[10, 20, 30])
    assert list(islice(workload.batches_from(2), 5)) == [30, 10, 20, 30, 10]
    assert list(islice(workload.batches_from(7), 1)) == [20]
