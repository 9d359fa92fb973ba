"""Rules of the whole package: light import, imports that go down only, no calls that run data as code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import openmimo

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip
# Text becomes code in one place alone: the process that the sandbox has locked in.
ALLOWED = {"openmimo/tasks/sandbox/stage/program.py": ["exec"]}
FORBIDDEN_KEYWORDS = {"shell", "allow_pickle"}


def violations(source: str) -> list[str]:
    """What in `source` could run data as code, with line numbers. Aliases of imports are followed."""
    found: list[str] = []
    aliases: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        imported: dict[str, str] = {}
        if isinstance(node, ast.Import):
            imported = {name.asname or name.name.split(".")[0]: name.name for name in node.names if name.asname}
            imported |= {name.name.split(".")[0]: name.name.split(".")[0] for name in node.names if not name.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported = {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
        aliases |= imported
        found += [
            f"line {node.lineno}: import of {full}"
            for full in imported.values()
            if full.split(".")[0] in FORBIDDEN_MODULES or full in FORBIDDEN_CALLS
        ]
    for node in ast.walk(tree):
        name = dotted(node, aliases)
        if name in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: {name}")
        if isinstance(node, ast.Call):
            found += [
                f"line {node.lineno}: {keyword.arg}"
                for keyword in node.keywords
                if keyword.arg in FORBIDDEN_KEYWORDS
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
    return found


def dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """The full name that an expression such as `t.load` refers to; empty for other expressions."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT / "src")) for path in SOURCES])
def test_source_runs_no_data_as_code(path: Path) -> None:
    """A checkpoint, recipe or model answer that could execute something on load."""
    allowed = ALLOWED.get(path.relative_to(ROOT / "src").as_posix(), [])
    found = violations(path.read_text(encoding="utf-8"))
    assert [line.rpartition(" ")[2] for line in found] == allowed, found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch as t\nf = t.load",
        "from torch import load",
        "eval('1')",
        "run = exec",
        "import os\nos.system('ls')",
        "from yaml import load as read\n",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
    ],
)
def test_the_search_finds_what_it_should(source: str) -> None:
    """A search that passes everything."""
    assert violations(source) != []


def test_the_search_lets_harmless_code_pass() -> None:
    """`model.eval()` and explicit refusals are not what it looks for."""
    source = (
        "model.eval()\nimport os.path\nimport torch\nnp.load('x', allow_pickle=False)\nos.path.join('a')\njson.load(f)"
    )
    assert violations(source) == []


def test_import_openmimo_imports_no_torch() -> None:
    """`openmimo --help` and `openmimo.__version__` taking seconds."""
    code = "import sys, openmimo; openmimo.__version__; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", openmimo.__all__)
def test_every_public_name_can_be_used(name: str) -> None:
    """A name promised in `__all__` whose module has moved."""
    assert getattr(openmimo, name).__name__ == name
    assert name in dir(openmimo)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """hasattr() and `from openmimo import x` rely on the kind of error; the text lists what there is."""
    with pytest.raises(AttributeError, match="build_model"):
        openmimo.buildmodel  # noqa: B018
    assert not hasattr(openmimo, "torch")


def test_imports_go_down_the_house_only() -> None:
    """A package that imports one above it or beside it."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout
