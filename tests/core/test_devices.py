"""Planning for a device that is not there."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import memfit
from memfit.cli import main
from memfit.core.devices import DEVICES, Roofline, device_named
from memfit.runtime.fake import fake_tensors


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_is_found_by_name_in_any_case(name: str) -> None:
    assert device_named(name.upper()) is DEVICES[name]


def test_an_unknown_device_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'tpu': choose from h100, h200, a100, rtx4090"):
        device_named("tpu")


def test_an_op_takes_the_slower_of_arithmetic_and_traffic_and_a_launch() -> None:
    device = Roofline(flops_per_s=100.0, bytes_per_s=10.0, launch_s=1.0, float32_flops_per_s=50.0)
    assert device.seconds(400.0, 10.0) == 5.0
    assert device.seconds(400.0, 10.0, is_float32=True) == 9.0
    assert device.seconds(100.0, 30.0) == 4.0


def step_s(name: str, dtype: torch.dtype) -> float:
    """Predicted seconds of a step of one wide layer."""
    with fake_tensors():
        model = nn.Linear(4096, 4096).to(dtype)
        batch = torch.zeros(4096, 4096, dtype=dtype)
        found = memfit.profile(model, lambda m, x: m(x).sum(), batch, micro_batch_size=4096, device=name)
    assert found.source == f"roofline of {name}"
    assert found.alignment_bytes == 512
    return memfit.find_plan(found, memory="64GiB").predicted_step_s


def test_faster_devices_take_less_time_and_float32_takes_more() -> None:
    seconds = [step_s(name, torch.bfloat16) for name in ("h200", "h100", "a100", "rtx4090")]
    assert seconds == sorted(seconds)
    assert step_s("a100", torch.float32) > 5 * step_s("a100", torch.bfloat16)


def test_the_command_plans_for_most_of_a_device_unless_told_how_much(
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = "memfit.workloads.images:workload"
    arguments = ["plan", target, "--batch-size", "2", "--device", "rtx4090", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["budget_bytes"] == int(0.9 * 24 * 2**30)
    assert (
        main(["plan", target, "--batch-size", "2", "--device", "rtx4090", "--memory", "1GiB", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["budget_bytes"] == 2**30
