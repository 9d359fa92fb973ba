"""What this machine offers: processor, memory, compiler, sandboxing. Standard library only.

None stands for what the system does not tell.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Instruction set -> how /proc/cpuinfo (or, on macOS, sysctl) spells it.
X86_FEATURES: Mapping[str, tuple[str, ...]] = {
    "AVX2": ("avx2",),
    "AVX-512 F": ("avx512f",),
    "AVX-512 BF16": ("avx512_bf16",),
    "AVX-512 VNNI": ("avx512_vnni", "avx512vnni"),
    "AMX BF16": ("amx_bf16",),
    "AMX INT8": ("amx_int8",),
}
ARM_FEATURES: Mapping[str, tuple[str, ...]] = {
    "NEON": ("asimd", "neon", "advsimd"),
    "SVE": ("sve",),
    "BF16": ("bf16", "feat_bf16"),
    "I8MM": ("i8mm", "feat_i8mm"),
}
BF16_FEATURES = ("AVX-512 BF16", "AMX BF16", "BF16")


@dataclass(frozen=True, kw_only=True)
class Processor:
    """`cores_usable` respects the affinity mask and the cgroup quota, rounded up to whole cores."""

    name: str
    architecture: str
    features: dict[str, bool]
    cores: int
    cores_usable: int

    @property
    def has_bf16(self) -> bool:
        return any(self.features.get(name, False) for name in BF16_FEATURES)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """`limit_bytes` is the cgroup's, None where there is none; `available_bytes` stays below it."""

    total_bytes: int | None
    available_bytes: int | None
    limit_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class CgroupLimits:
    """The tightest limits of this process's group and those above it; `memory_left_bytes` counts caches as free."""

    cores: float | None
    memory_bytes: int | None
    memory_left_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """What torch.compile needs to make kernels for the processor."""

    command: str | None
    version: str | None
    python_headers: bool


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """What an unprivileged process may use to lock itself in; `landlock_abi` is 0 without Landlock."""

    user_namespaces: bool
    landlock_abi: int


def read_processor() -> Processor:
    """The processor that this process runs on."""
    cpuinfo = _read(Path("/proc/cpuinfo"))
    name, flags = parse_cpuinfo(cpuinfo) if cpuinfo else parse_sysctl(_output("sysctl", "machdep.cpu", "hw.optional"))
    architecture = platform.machine() or "unknown"
    return Processor(
        name=name or platform.processor() or architecture,
        architecture=architecture,
        features=features_of(architecture, flags),
        cores=os.cpu_count() or 1,
        cores_usable=usable_cores(),
    )


def usable_cores() -> int:
    """How many cores this process may keep busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_limits().cores
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def features_of(architecture: str, flags: frozenset[str]) -> dict[str, bool]:
    """Which of the instruction sets that matter here are among `flags`; empty for an unknown architecture."""
    if architecture.lower() in ("x86_64", "amd64", "i386", "i686"):
        known = X86_FEATURES
    elif architecture.lower().startswith(("arm", "aarch64")):
        known = ARM_FEATURES
    else:
        return {}
    return {name: not flags.isdisjoint(spellings) for name, spellings in known.items()}


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """Name (may be empty) and lower-case flags from the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", "")
    if not name and "CPU part" in fields:
        name = f"implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    return name, frozenset((fields.get("flags") or fields.get("Features") or "").lower().split())


def parse_sysctl(text: str) -> tuple[str, frozenset[str]]:
    """The same from the output of `sysctl machdep.cpu hw.optional` on macOS."""
    name, flags = "", set[str]()
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "machdep.cpu.brand_string":
            name = value
        elif key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
            flags.update(value.lower().split())
        elif key.startswith("hw.optional.") and value == "1":
            flags.add(key.rpartition(".")[2].lower())
    return name, frozenset(flags)


def read_memory() -> Memory:
    """Memory of the machine, cut to the cgroup's limit."""
    sizes = {key: int(rest.split()[0]) * 1024 for key, rest in _fields(_read(Path("/proc/meminfo")), ":") if rest}
    total = sizes.get("MemTotal") or _physical_memory()
    available = sizes.get("MemAvailable")
    limits = cgroup_limits()
    limit = limits.memory_bytes
    if limit is None or (total is not None and limit >= total):
        return Memory(total_bytes=total, available_bytes=available, limit_bytes=None)
    left = [room for room in (available, limits.memory_left_bytes) if room is not None]
    return Memory(total_bytes=total, available_bytes=min(left, default=None), limit_bytes=limit)


def cgroup_limits(root: Path = Path("/")) -> CgroupLimits:
    """Limits of both cgroup versions; `root` stands for the file system's root."""
    quotas: list[float] = []
    for folder in _cgroup_folders(root, "cpu"):
        words = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us").strip(),
            _read(folder / "cpu.cfs_period_us").strip(),
        ]
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    memory: list[int] = []
    left: list[int] = []
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        if limit is not None:
            stat = dict(_fields(_read(folder / "memory.stat"), " "))
            caches = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
            memory.append(limit)
            left.append(max(0, limit - max(0, used - caches)))
    return CgroupLimits(
        cores=min(quotas, default=None),
        memory_bytes=min(memory, default=None),
        memory_left_bytes=min(left, default=None),
    )


def read_compiler() -> Compiler:
    """The C++ compiler that torch.compile would call: $CXX, else the platform's."""
    usual = ("clang++", "g++") if sys.platform == "darwin" else ("g++", "clang++")
    found = (shutil.which(command) for command in (os.environ.get("CXX", ""), *usual) if command)
    command = next((path for path in found if path), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    version = _output(command, "--version").partition("\n")[0] if command else None
    return Compiler(command=command, version=version or None, python_headers=headers.exists())


# Runs in a process of its own: unsharing cannot be undone, and a filter may kill whoever asks.
_SANDBOX_PROBE = """
import ctypes, json
libc = ctypes.CDLL(None, use_errno=True)
create_ruleset, version_flag, new_user = 444, 1, 0x10000000
abi = libc.syscall(create_ruleset, None, ctypes.c_size_t(0), version_flag)
print(json.dumps([libc.unshare(new_user) == 0, max(0, abi)]))
"""


def read_sandbox() -> Sandbox | None:
    """Tries user namespaces and asks for the Landlock version; None where that cannot be asked."""
    answer = _output(sys.executable, "-I", "-c", _SANDBOX_PROBE) if sys.platform == "linux" else ""
    if not answer:
        return None
    user_namespaces, landlock_abi = json.loads(answer)
    return Sandbox(user_namespaces=user_namespaces, landlock_abi=landlock_abi)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups and of all groups above them."""
    top = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = top / controller if controllers else top
        # In a container the path may be the host's and lead nowhere; the base is always there.
        folder = base / path.strip("/")
        yield folder
        while folder != base and base in folder.parents:
            folder = folder.parent
            yield folder


def _fields(text: str, separator: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, _, value = line.partition(separator)
        yield key.strip(), value.strip()


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
