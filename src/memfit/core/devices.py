"""Accelerators as a few public numbers, so that a laptop can plan for one.

A roofline says how long an op takes at least: the slower of its arithmetic and its memory traffic, and a
launch. The peaks are those of the data sheets, dense and without sparsity:

- h100 (SXM5), h200 (SXM): NVIDIA H100 and H200 data sheets
- a100 (SXM4, 80 GB): NVIDIA A100 data sheet
- rtx4090: NVIDIA Ada GPU architecture whitepaper, appendix (bfloat16 with float32 accumulation)

Real kernels reach less. The two shares below are assumptions, not measurements; a plan depends on their
ratio only, and on a device that is present seconds are measured instead.
"""

from __future__ import annotations

from dataclasses import dataclass

_REACHED_FLOPS = 0.6
_REACHED_BYTES = 0.8
_LAUNCH_S = 4e-6


@dataclass(frozen=True, slots=True)
class Roofline:
    """A device as four numbers. The default is a large accelerator in reduced precision."""

    flops_per_s: float = 4e14
    bytes_per_s: float = 2e12
    launch_s: float = _LAUNCH_S
    float32_flops_per_s: float | None = None

    def seconds(self, flops: float, moved_bytes: float, *, is_float32: bool = False) -> float:
        """Time of one op on this device."""
        rate = self.float32_flops_per_s if is_float32 else None
        return self.launch_s + max(flops / (rate or self.flops_per_s), moved_bytes / self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator that one can plan for without having it."""

    name: str
    roofline: Roofline
    memory_bytes: int


def _device(name: str, bfloat16: float, float32: float, bytes_per_s: float, memory_bytes: float) -> Device:
    """A device by the peaks of its data sheet."""
    reached = Roofline(
        flops_per_s=bfloat16 * _REACHED_FLOPS,
        bytes_per_s=bytes_per_s * _REACHED_BYTES,
        float32_flops_per_s=float32 * _REACHED_FLOPS,
    )
    return Device(name, reached, int(memory_bytes))


DEVICES = {
    device.name: device
    for device in (
        _device("h100", 989.4e12, 66.9e12, 3.35e12, 80 * 2**30),
        _device("h200", 989.4e12, 66.9e12, 4.8e12, 141e9),
        _device("a100", 312e12, 19.5e12, 2.039e12, 80 * 2**30),
        _device("rtx4090", 165.2e12, 82.6e12, 1.008e12, 24 * 2**30),
    )
}


def device_named(name: str) -> Device:
    """The device of a name, in any case.

    Raises:
        ValueError: There is none; says which there are.
    """
    found = DEVICES.get(name.strip().lower())
    if found is None:
        raise ValueError(f"no device is called {name!r}: choose from {', '.join(DEVICES)}")
    return found
