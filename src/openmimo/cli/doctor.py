"""`openmimo doctor`: what this machine offers, what works on it, what is missing and how to get it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from openmimo.cli.machine import Compiler, Memory, Processor, Sandbox

# What the optional dependencies of this version are for, by extra.
EXTRAS: Mapping[str, str] = {
    "plots": "training curves as pictures",
    "data": "training on Parquet files",
    "bench": "benchmarks beside transformers and llama.cpp",
    "dev": "tests and checks",
}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GET_COMPILER = "apt install g++, or xcode-select --install"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The file system of the current folder."""

    path: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """The installed PyTorch; `build` is cpu, cuda 12.8, rocm 6.4, ..."""

    version: str
    build: str
    threads: int
    cpu_capability: str
    mkldnn: bool
    cuda_devices: tuple[str, ...]
    mps: bool


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The C++ kernels: whether they run here, how they were made or why not, and how to get them."""

    usable: bool
    status: str
    get: str


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A set of optional packages and the version of each, None where it is missing."""

    name: str
    purpose: str
    packages: dict[str, str | None]
    get: str

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name, version in self.packages.items() if version is None)


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Something that is missing, and how to get it."""

    what: str
    get: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything `openmimo doctor` says; `--json` prints it."""

    openmimo: str
    python: str
    system: str
    processor: Processor
    memory: Memory
    disk: Disk
    torch: TorchBuild | None
    torch_error: str | None
    compiler: Compiler
    kernels: Kernels
    sandbox: Sandbox | None
    program_level: str | None
    extras: tuple[Extra, ...]
    works: tuple[str, ...]
    missing: tuple[Gap, ...]


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Examine this machine: what works here, what is missing and how to get it."""
    report = examine()
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        print_tables(console, report)
    else:
        for section, facts in report_facts(report).items():
            for name, value in facts:
                typer.echo(f"{section} {name}: {value}")
        for works in report.works:
            typer.echo(f"works: {works}")
        for gap in report.missing:
            typer.echo(f"missing: {gap.what}; {gap.get}")


def examine() -> Report:
    """Look at everything; imports torch, and goes on without it where that fails."""
    import openmimo
    from openmimo.cli.machine import read_compiler, read_memory, read_processor, read_sandbox

    processor, compiler = read_processor(), read_compiler()
    torch_build, torch_error = _read_torch()
    kernels = _read_kernels()
    extras = tuple(_read_extras())
    usage = shutil.disk_usage(".")
    sandbox = read_sandbox()
    return Report(
        openmimo=openmimo.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        processor=processor,
        memory=read_memory(),
        disk=Disk(path=str(Path.cwd()), free_bytes=usage.free, total_bytes=usage.total),
        torch=torch_build,
        torch_error=torch_error,
        compiler=compiler,
        kernels=kernels,
        sandbox=sandbox,
        program_level=None if sandbox is None else _read_program_level(),
        extras=extras,
        works=tuple(_works(processor, torch_build, compiler, kernels, extras)),
        missing=tuple(_gaps(processor, torch_build, torch_error, compiler, kernels, extras)),
    )


def report_facts(report: Report) -> dict[str, list[tuple[str, str]]]:
    """The facts in the order of the printed report: section -> (name, value)."""
    facts = {
        "openmimo": [("version", report.openmimo), ("python", report.python), ("system", report.system)],
        "processor": _processor_facts(report.processor),
        "memory": [
            ("total", _gib(report.memory.total_bytes)),
            ("available", _gib(report.memory.available_bytes)),
            ("cgroup limit", "none" if report.memory.limit_bytes is None else _gib(report.memory.limit_bytes)),
        ],
        "disk": [("free", f"{_gib(report.disk.free_bytes)} of {_gib(report.disk.total_bytes)} at {report.disk.path}")],
        "torch": _torch_facts(report),
        "compiler": [("C++", report.compiler.version or "none"), ("Python.h", _yes(report.compiler.python_headers))],
        "kernels": [("C++", ("" if report.kernels.usable else "none: ") + report.kernels.status)],
        "sandbox": [
            ("user namespaces", "unknown" if report.sandbox is None else _yes(report.sandbox.user_namespaces)),
            ("Landlock", "unknown" if report.sandbox is None else f"ABI {report.sandbox.landlock_abi}"),
            ("untrusted programs", report.program_level or "unknown"),
        ],
    }
    facts["packages"] = [
        (extra.name, ", ".join(f"{name} {version or '(missing)'}" for name, version in extra.packages.items()))
        for extra in report.extras
    ]
    return facts


def _processor_facts(processor: Processor) -> list[tuple[str, str]]:
    has = [name for name, found in processor.features.items() if found]
    has_not = [name for name, found in processor.features.items() if not found]
    return [
        ("name", f"{processor.name} ({processor.architecture})"),
        ("has", ", ".join(has) or "none of the known instruction sets"),
        ("has not", ", ".join(has_not) or "-"),
        ("cores", f"{processor.cores_usable} usable of {processor.cores}"),
    ]


def _torch_facts(report: Report) -> list[tuple[str, str]]:
    build = report.torch
    if build is None:
        return [("version", f"missing ({report.torch_error})")]
    return [
        ("version", f"{build.version} ({build.build})"),
        ("threads", str(build.threads)),
        ("kernels", build.cpu_capability + (", oneDNN" if build.mkldnn else ", no oneDNN")),
        ("GPU", ", ".join(build.cuda_devices) or ("Apple MPS" if build.mps else "none")),
    ]


def _read_torch() -> tuple[TorchBuild | None, str | None]:
    """The build, or why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
        return None, str(error).strip().partition("\n")[0]
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    return TorchBuild(
        version=torch.__version__,
        build=f"cuda {cuda}" if cuda else f"rocm {hip}" if hip else "cpu",
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        mkldnn=torch.backends.mkldnn.is_available(),
        cuda_devices=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        mps=torch.backends.mps.is_available(),
    ), None


def _read_runtime() -> list[str]:
    """The runtime's kernel tables that work here; none without the compiled extension."""
    try:  # the extension itself, which is there without PyTorch too
        return importlib.import_module("openmimo._native").available_kernels()
    except ImportError:
        return []


def _read_kernels() -> Kernels:
    """Load the C++ kernels, which builds them where that was not done yet."""
    import warnings

    from openmimo.kernels.native import native_kernels

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it
        found = native_kernels()
    switched_off = os.environ.get("OPENMIMO_NATIVE") == "0"
    get = "unset OPENMIMO_NATIVE" if switched_off else f"{GET_COMPILER}; CXX=... names another one"
    return Kernels(usable=found.library is not None, status=found.status, get=get)


def _read_program_level() -> str | None:
    """How well an untrusted program is held here, by running an empty one; None where none runs."""
    from openmimo.tasks.sandbox import available_level

    level = available_level()
    return None if level is None else level.name.lower()


def _read_extras() -> Iterator[Extra]:
    """The extras that the installed package declares and this version uses."""
    try:
        requirements = metadata.requires("openmimo") or []
    except metadata.PackageNotFoundError:  # run from a source folder that is not installed
        return
    for name, purpose in EXTRAS.items():
        packages = {package: _version(package) for package in extra_packages(requirements, name)}
        yield Extra(name=name, purpose=purpose, packages=packages, get=_pip(f"openmimo[{name}]"))


def extra_packages(requirements: Sequence[str], extra: str) -> list[str]:
    """Names of the packages in `extra`, those of other extras that it includes among them."""
    names: dict[str, None] = {}
    for requirement in requirements:
        if not re.search(rf"""extra == ["']{re.escape(extra)}["']""", requirement):
            continue
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        inner = re.match(r"openmimo\[([^]]*)\]", requirement)
        for part in inner[1].split(",") if inner else ():
            names |= dict.fromkeys(extra_packages(requirements, part.strip()))
        if not inner:
            names[name] = None
    return sorted(names)


def _works(
    processor: Processor,
    torch_build: TorchBuild | None,
    compiler: Compiler,
    kernels: Kernels,
    extras: Sequence[Extra],
) -> Iterator[str]:
    if torch_build is not None:
        yield f"training, decoding, conversion (torch {torch_build.version}, {torch_build.threads} threads)"
    if torch_build is not None and torch_build.cuda_devices:
        yield f"CUDA ({', '.join(torch_build.cuda_devices)})"
    if processor.has_bf16:
        yield "bf16 products in hardware"
    if kernels.usable:
        yield "fused C++ kernels in bf16 training"
    runtime = _read_runtime()
    if runtime:
        yield f"decoding in the C++ runtime ({', '.join(runtime)})"
    if compiler.command and compiler.python_headers:
        yield f"torch.compile for the processor ({compiler.command})"
    for extra in extras:
        if not extra.missing:
            yield f"{extra.purpose} ({extra.name})"


def _gaps(
    processor: Processor,
    torch_build: TorchBuild | None,
    torch_error: str | None,
    compiler: Compiler,
    kernels: Kernels,
    extras: Sequence[Extra],
) -> Iterator[Gap]:
    if torch_build is None:
        yield Gap(
            what=f"torch, without which no model runs ({torch_error})",
            get=f"{_pip('torch')} --index-url {CPU_INDEX}, or the build for your GPU from https://pytorch.org",
        )
    if not processor.has_bf16:
        yield Gap(
            what="bf16 products in hardware",
            get="this processor has none; the C++ kernels multiply bf16 as fp32, and without them training is in fp32",
        )
    if not _read_runtime():
        yield Gap(
            what="C++ runtime, without which decoding runs in PyTorch, slower",
            get="install a C++20 compiler, then: pip install --force-reinstall --no-deps -e .",
        )
    if not kernels.usable:
        yield Gap(what=f"C++ kernels, without which bf16 training is slower ({kernels.status})", get=kernels.get)
    if not compiler.command:
        yield Gap(what="a C++ compiler for torch.compile", get=GET_COMPILER)
    elif not compiler.python_headers:
        yield Gap(what="Python.h for torch.compile", get="apt install python3-dev, or your system's like")
    if not extras:
        yield Gap(what="openmimo as an installed package", get="pip install --editable . in its folder")
    for extra in extras:
        if extra.missing:
            yield Gap(what=f"{extra.purpose} ({', '.join(extra.missing)})", get=extra.get)


def print_tables(console: Console, report: Report) -> None:
    """The report for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for section, facts in report_facts(report).items():
        for index, (name, value) in enumerate(facts):
            table.add_row(f"[bold]{section}[/]" if index == 0 else "", f"[dim]{name}[/]", escape(value))
    console.print(table)
    findings = Table.grid(padding=(0, 2))
    for works in report.works:
        findings.add_row("[green]works[/]", escape(works))
    for gap in report.missing:
        findings.add_row("[yellow]missing[/]", f"{escape(gap.what)}\n[dim]{escape(gap.get)}[/]")
    console.print()
    console.print(findings)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _pip(requirement: str) -> str:
    """The command that installs `requirement` for the Python that runs now."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return f'{shlex.quote(str(python))} -m pip install "{requirement}"'


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
