"""Probes of the machine, on texts and folders as other machines have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from openmimo.cli import machine
from openmimo.cli.machine import cgroup_limits, features_of, parse_cpuinfo, parse_sysctl

GIB = 2**30
X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = """processor\t: 0
Features\t: fp asimd sve bf16 i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
APPLE = """machdep.cpu.brand_string: Apple M2
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
"""
INTEL_MAC = """machdep.cpu.brand_string: Intel(R) Core(TM) i7
machdep.cpu.features: FPU SSE4.2 AVX1.0
machdep.cpu.leaf7_features: SMEP AVX2 BMI2
hw.optional.avx512f: 0
"""


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_x86_processor_is_named_and_all_its_features_are_found() -> None:
    """Flags of a later processor entry taken for the first one's, or a feature under a wrong spelling."""
    name, flags = parse_cpuinfo(X86)
    assert name == "Intel(R) Xeon(R) Platinum 8488C"
    assert features_of("x86_64", flags) == dict.fromkeys(machine.X86_FEATURES, True)


def test_arm_processor_without_a_name_is_described_by_its_part() -> None:
    """Linux on ARM gives no model name and calls the flags Features."""
    name, flags = parse_cpuinfo(ARM)
    assert name == "implementer 0x41 part 0xd40"
    assert features_of("aarch64", flags) == {"NEON": True, "SVE": True, "BF16": True, "I8MM": True}


@pytest.mark.parametrize(
    ("text", "architecture", "name", "found"),
    [
        (APPLE, "arm64", "Apple M2", {"NEON", "BF16", "I8MM"}),
        (INTEL_MAC, "x86_64", "Intel(R) Core(TM) i7", {"AVX2"}),
    ],
)
def test_macos_features(text: str, architecture: str, name: str, found: set[str]) -> None:
    """A feature whose sysctl value is 0 counted as present, or the two lists of Intel Macs missed."""
    got_name, flags = parse_sysctl(text)
    assert got_name == name
    assert {feature for feature, has in features_of(architecture, flags).items() if has} == found


def test_an_unknown_architecture_has_no_known_features() -> None:
    """A table of the wrong family shown for, say, POWER."""
    assert features_of("ppc64le", frozenset({"avx2"})) == {}


def test_cgroup_2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    """A limit of an outer group overlooked, or page cache counted as used."""
    write(tmp_path / "proc/self", cgroup="0::/outer/inner")
    top = tmp_path / "sys/fs/cgroup"
    write(top / "outer", cpu__max="150000 100000", memory__max=str(4 * GIB), memory__current=str(3 * GIB))
    write(top / "outer", memory__stat=f"anon 1\ninactive_file {GIB}")
    write(top / "outer/inner", cpu__max="max 100000", memory__max="max")
    limits = cgroup_limits(tmp_path)
    assert (limits.cores, limits.memory_bytes, limits.memory_left_bytes) == (1.5, 4 * GIB, 2 * GIB)


def test_cgroup_1_reads_its_own_file_names_at_the_base_too(tmp_path: Path) -> None:
    """In a container the listed path is the host's and does not exist inside."""
    write(tmp_path / "proc/self", cgroup="4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/")
    top = tmp_path / "sys/fs/cgroup"
    write(top / "cpu", **{"cpu__cfs_quota_us": "50000", "cpu__cfs_period_us": "100000"})
    write(top / "memory", memory__limit_in_bytes=str(2 * GIB), memory__usage_in_bytes=str(GIB))
    limits = cgroup_limits(tmp_path)
    assert (limits.cores, limits.memory_bytes, limits.memory_left_bytes) == (0.5, 2 * GIB, GIB)


def test_no_cgroup_means_no_limit(tmp_path: Path) -> None:
    """macOS, or a kernel without cgroups; and a quota of -1, which means none."""
    assert cgroup_limits(tmp_path) == machine.CgroupLimits(cores=None, memory_bytes=None, memory_left_bytes=None)
    write(tmp_path / "proc/self", cgroup="1:cpu:/")
    write(tmp_path / "sys/fs/cgroup/cpu", **{"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"})
    assert cgroup_limits(tmp_path).cores is None


@pytest.mark.parametrize(("quota", "expected"), [(0.5, 1), (1.5, 2), (64.0, 3), (None, 3)])
def test_usable_cores_are_the_quota_rounded_up_within_the_affinity(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int
) -> None:
    """Sixty-four threads on a container's two cores, or none at all for a quota below one."""
    limits = machine.CgroupLimits(cores=quota, memory_bytes=None, memory_left_bytes=None)
    monkeypatch.setattr(machine, "cgroup_limits", lambda: limits)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert machine.usable_cores() == expected


def test_available_memory_stays_below_the_cgroup_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's free memory reported inside a small container; and a limit above the machine taken for one."""
    monkeypatch.setattr(machine, "_read", lambda path: "MemTotal: 8388608 kB\nMemAvailable: 6291456 kB\n")
    for limit, left, expected in ((4 * GIB, GIB, GIB), (16 * GIB, 16 * GIB, 6 * GIB)):
        limits = machine.CgroupLimits(cores=None, memory_bytes=limit, memory_left_bytes=left)
        monkeypatch.setattr(machine, "cgroup_limits", lambda limits=limits: limits)
        memory = machine.read_memory()
        assert (memory.total_bytes, memory.available_bytes) == (8 * GIB, expected)
        assert memory.limit_bytes == (limit if limit < 8 * GIB else None)


def test_compiler_of_the_environment_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """$CXX ignored; a machine without a compiler said to have one."""
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\necho my compiler 1.0\necho more\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found = machine.read_compiler()
    assert (found.command, found.version) == (str(compiler), "my compiler 1.0")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.read_compiler().command is None
