"""What is said of a machine: each trap where it is set, and nowhere else; control groups as on Linux."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memfit.core.machine import TRIED, Card, Level, Machine, findings
from memfit.runtime.machine import Group, control_group, cpu_memory, machine, speeds

GIB = 1 << 30
ROOT = Path(__file__).parents[2]
SOUND = Machine(
    system="Linux",
    python="3.11.7",
    torch="2.13.0+cpu",
    cpu="x86_64",
    cores=8,
    threads=8,
    free_bytes=20 * GIB,
    total_bytes=32 * GIB,
    installed_bytes=32 * GIB,
    packages=(("transformers", "5.23.0"), ("peft", None)),
)
WITH_CARD = replace(
    SOUND,
    torch="2.13.0+cu130",
    cuda="13.0",
    cards=(Card("H100", 79 * GIB, 80 * GIB),),
    allocator="expandable_segments:True",
)


def texts(found: Machine) -> set[tuple[Level, str, str]]:
    return {(finding.level, finding.subject, finding.text) for finding in findings(found)}


def test_a_sound_machine_has_no_problem_and_only_what_torch_itself_is_known_for() -> None:
    for sound in (SOUND, WITH_CARD):
        told = [finding for finding in findings(sound) if finding.level is not Level.OK]
        assert {finding.subject for finding in told} == {"known trap"}
        assert all(finding.level is Level.NOTE and finding.cure for finding in told)


@pytest.mark.parametrize(
    ("changed", "level", "subject", "cure"),
    [
        (replace(SOUND, torch="2.9.1"), Level.PROBLEM, "torch", "torch>=2.10"),
        (replace(SOUND, torch="2.12.1"), Level.NOTE, "torch", "checks"),
        (replace(SOUND, python="3.10.2"), Level.PROBLEM, "Python", "3.11"),
        (replace(SOUND, system="Darwin"), Level.NOTE, "system", "bytes"),
        (replace(SOUND, packages=(("peft", "0.9.0"),)), Level.PROBLEM, "peft", "peft>=0.18"),
        (replace(SOUND, packages=(("peft", "0.30.0"),)), Level.NOTE, "peft", "checks"),
        (replace(SOUND, total_bytes=4 * GIB), Level.NOTE, "memory", "80%"),
        (replace(SOUND, process_limit_bytes=4 * GIB), Level.NOTE, "memory", "limit"),
        (replace(SOUND, threads=9), Level.NOTE, "threads", "OMP_NUM_THREADS=8"),
        (replace(SOUND, cuda="13.0"), Level.NOTE, "CUDA", "nvidia-smi"),
        (replace(WITH_CARD, is_caching=False), Level.PROBLEM, "CUDA allocator", "unset"),
        (replace(WITH_CARD, allocator=""), Level.NOTE, "CUDA allocator", "expandable_segments:True"),
    ],
)
def test_each_trap_is_told_with_its_cure_and_nothing_else_changes(
    changed: Machine, level: Level, subject: str, cure: str
) -> None:
    sound = WITH_CARD if changed.cards else SOUND
    (new,) = [
        finding
        for finding in findings(changed)
        if (finding.level, finding.subject, finding.text) not in texts(sound)
        and finding.level is not Level.OK
        and finding.subject != "known trap"
    ]
    assert (new.level, new.subject) == (level, subject)
    assert cure in new.cure


def test_another_allocator_of_cuda_is_told() -> None:
    told = findings(replace(WITH_CARD, allocator="backend:cudaMallocAsync"))
    assert any("backend:" in finding.cure for finding in told)


def test_the_versions_are_those_of_the_page_and_the_pins() -> None:
    page, pins = (ROOT / name for name in ("docs/versions.md", "requirements.txt"))
    rows = [row.split("|")[1:4] for row in page.read_text().splitlines() if row.startswith("| 2.")]
    passed = [
        (torch.strip(), transformers.strip()) for torch, transformers, tests in rows if "fail" not in tests
    ]
    assert set(TRIED["torch"]) == {torch for torch, _ in passed}
    assert set(TRIED["transformers"]) == {transformers for _, transformers in passed}
    pinned = dict(line.split("==") for line in pins.read_text().splitlines() if "==" in line)
    for name in ("accelerate", "lightning", "peft"):
        assert TRIED[name] == (pinned[name],)


def write(files: dict[str, str], root: Path) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


V2 = {
    "own": "0::/job/step\n",
    "fs/memory.max": "max\n",
    "fs/job/memory.max": "8000\n",
    "fs/job/memory.current": "5000\n",
    "fs/job/memory.stat": "anon 1000\ninactive_file 1500\n",
    "fs/job/cpu.max": "150000 100000\n",
    "fs/job/step/memory.max": "9000\n",
    "fs/job/step/memory.current": "100\n",
    "fs/job/step/cpu.max": "max 100000\n",
}
V1_IN_A_CONTAINER = {
    "own": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n",
    "fs/memory/memory.limit_in_bytes": "7000\n",
    "fs/memory/memory.usage_in_bytes": "6000\n",
    "fs/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 2000\n",
    "fs/cpu/cpu.cfs_quota_us": "50000\n",
    "fs/cpu/cpu.cfs_period_us": "100000\n",
}
V1_WITHOUT_LIMITS = {
    "own": "4:memory:/job\n1:cpu:/\n",
    "fs/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
    "fs/cpu/cpu.cfs_quota_us": "-1\n",
    "fs/cpu/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (V2, Group(8000, 3500, 1.5)),
        (V1_IN_A_CONTAINER, Group(7000, 4000, 0.5)),
        (V1_WITHOUT_LIMITS, Group()),
        ({}, Group()),
    ],
    ids=["version 2", "version 1", "no limit", "no control groups"],
)
def test_the_tightest_control_group_counts(tmp_path: Path, files: dict[str, str], expected: Group) -> None:
    write(files, tmp_path)
    assert control_group(tmp_path / "own", tmp_path / "fs") == expected


def test_this_machine_is_read() -> None:
    free_bytes, total_bytes = cpu_memory()
    found = machine()
    assert 0 < free_bytes <= total_bytes == found.total_bytes <= found.installed_bytes
    assert found.cores >= 1
    assert found.threads >= 1
    assert dict(found.packages).keys() == {"transformers", "accelerate", "lightning", "peft"}


def test_speeds_of_the_cpu_are_measured() -> None:
    found = speeds("cpu")
    assert found.copy_bytes_per_s > 0
    assert found.float32_flops_per_s > 0
    assert found.bfloat16_flops_per_s > 0
    assert found.to_device_bytes_per_s is None
