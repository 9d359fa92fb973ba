"""The config package loads nothing but the standard library."""

import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys
before = set(sys.modules)
import openmimo.config
for module in pkgutil.iter_modules(openmimo.config.__path__):
    importlib.import_module(f"openmimo.config.{module.name}")
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""


def test_config_imports_only_the_standard_library() -> None:
    """Catches an import of torch, numpy or any other package at the top of a config module."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["openmimo"]
