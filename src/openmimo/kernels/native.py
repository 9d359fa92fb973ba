"""Building and loading the C++ kernels.

They are compiled on first use for the processor at hand and kept in a cache folder, keyed by source, compiler, flags
and processor. Without a compiler everything runs on the PyTorch twins. Set OPENMIMO_NATIVE=0 to force those.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
PRODUCTS = ("plain loops", "AVX-512 BF16", "AMX", "fp32 multiply-add")

# Reductions may be reordered so that they vectorise. -ffast-math would also change how the whole process rounds.
COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
REORDER_FLAGS = ("-fno-signed-zeros", "-fassociative-math")
# Tried in order: some compilers lack OpenMP, some do not know the processor.
FLAG_SETS: tuple[tuple[str, ...], ...] = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
BUILD_TIMEOUT_S = 300


@dataclass(frozen=True)
class NativeKernels:
    """The loaded library, or None with the reason. `fast`: its products use the processor's vector instructions."""

    library: ctypes.CDLL | None
    status: str
    fast: bool = False


@cache
def native_kernels() -> NativeKernels:
    """Load the kernels, building them at the first call on a machine."""
    if os.environ.get("OPENMIMO_NATIVE", "1") == "0":
        return NativeKernels(None, "switched off by OPENMIMO_NATIVE=0")
    compiler = find_compiler()
    if compiler is None:
        return NativeKernels(None, "no C++ compiler found; install g++ or clang++, or set CXX")
    try:
        path, flags = build(compiler, cache_folder())
        library = ctypes.CDLL(str(path))
    except (OSError, BuildError) as error:
        warnings.warn(f"C++ kernels are not used: {error}", RuntimeWarning, stacklevel=2)
        return NativeKernels(None, str(error))
    kind = library.openmimo_product_kind()
    status = f"built with {Path(compiler).name} {' '.join(flags)}; products by {PRODUCTS[kind]}"
    return NativeKernels(library, status, fast=kind > 0)


class BuildError(Exception):
    """The compiler refused the source under every set of flags."""


def find_compiler() -> str | None:
    """`CXX`, or the first of the usual names on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def cache_folder() -> Path:
    """OPENMIMO_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("OPENMIMO_CACHE") or Path(base) / "openmimo") / "kernels"


def build(
    compiler: str, folder: Path, flag_sets: tuple[tuple[str, ...], ...] = FLAG_SETS
) -> tuple[Path, tuple[str, ...]]:
    """Compile under the first set of flags that works, unless the folder has the result already.

    Raises: BuildError with the compiler's message; OSError if no folder can be written.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    key = "\n".join((*(path.read_text() for path in files), compiler, version, _processor()))
    sources = [str(path) for path in files if path.suffix == ".cpp"]
    folder = _writable(folder)
    message = ""
    for flags in flag_sets:
        command = [compiler, *COMMON_FLAGS, *REORDER_FLAGS, *flags]
        target = folder / f"training-{hashlib.sha256(f'{key}{flags}'.encode()).hexdigest()[:20]}.so"
        if target.exists():
            return target, flags
        # A name of its own until it is whole: several processes may build at once.
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
        try:
            done = subprocess.run(
                [*command, *sources, "-o", temporary], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
            )
            if done.returncode == 0:
                Path(temporary).replace(target)
                return target, flags
            message = done.stderr.strip()[-2000:]
        except subprocess.TimeoutExpired:
            message = f"{compiler} ran longer than {BUILD_TIMEOUT_S} s"
        finally:
            Path(temporary).unlink(missing_ok=True)
    raise BuildError(f"{compiler} could not compile the kernels: {message}")


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="openmimo-kernels-"))


def _processor() -> str:
    """What -march=native depends on, so that a shared home folder serves different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
