"""Hostile programs against the sandbox: nothing is reached, no reward is forged, everything ends. And mutants of the
sandbox, each of which the corpus must catch: a check that cannot fail shows nothing.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_corpus import LIMITS, REAP_SECONDS, Finding, HostileProgram, World, corpus

from openmimo.tasks.sandbox import Layer, Level, available_level, run
from openmimo.tasks.sandbox import stage as stage_package

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")

CORPUS = corpus()
# What a busy machine may add before a time counts as late; `benchmarks/sandbox.py` reports the times themselves.
SLACK_SECONDS = 5.0
WITHOUT_NAMESPACES = ("pid_namespace",)
NOTHING_HELD = (*(layer.value for layer in Layer), "root_namespaces")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture(scope="module")
def level() -> Level:
    return available_level() or Level.LIMITED


def need(level: Level, wanted: Level) -> None:
    if level < wanted:
        pytest.skip(f"this machine holds programs at {level.name}")


def program(kind: str, name: str) -> HostileProgram:
    return next(found for found in CORPUS if (found.kind, found.name) == (kind, name))


def check(finding: Finding) -> None:
    assert finding.escapes == []
    assert not finding.forged
    assert finding.result.all_ended
    assert finding.result.seconds < LIMITS.seconds + REAP_SECONDS + SLACK_SECONDS


def names(programs: list[HostileProgram]) -> list[str]:
    return [f"{found.kind}: {found.name}" for found in programs]


def test_the_corpus_is_wide() -> None:
    """Catches programs lost by a slip in their text."""
    kinds = Counter(found.kind for found in CORPUS)
    assert len(CORPUS) >= 240
    assert len(kinds) >= 18
    assert min(kinds.values()) >= 7
    assert len({(found.kind, found.name) for found in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("hostile", CORPUS, ids=names(CORPUS))
def test_isolated(world: World, level: Level, hostile: HostileProgram) -> None:
    """Catches anything that gets out of namespaces, Landlock and filter together."""
    need(level, Level.ISOLATED)
    check(world.run(hostile, required=Level.ISOLATED))


@pytest.mark.parametrize("hostile", CORPUS[::3], ids=names(CORPUS[::3]))
def test_filtered(world: World, level: Level, hostile: HostileProgram) -> None:
    """Catches what only namespaces hold: containers often have none."""
    need(level, Level.FILTERED)
    check(world.run(hostile, required=Level.FILTERED, leave_out=WITHOUT_NAMESPACES))


@pytest.mark.slow
@pytest.mark.parametrize("hostile", CORPUS, ids=names(CORPUS))
@pytest.mark.parametrize("leave_out", [("root_namespaces",), WITHOUT_NAMESPACES, (*WITHOUT_NAMESPACES, "own_user")])
def test_every_other_way(world: World, level: Level, hostile: HostileProgram, leave_out: tuple[str, ...]) -> None:
    """The same in a user namespace, and without namespaces as another user and as this one."""
    need(level, Level.FILTERED)
    check(world.run(hostile, required=Level.FILTERED, leave_out=leave_out))


@pytest.mark.parametrize(
    ("kind", "name", "shown"),
    [
        ("files", "reads the secret", "secret was read"),
        ("files", "writes into it", "changed"),
        ("files", "changes its mode", "changed"),
        ("proc and environment", "environment of a neighbour", "secret was read"),
        ("proc and environment", "command line of a neighbour", "secret was read"),
        ("network", "TCP to a listener", "tcp"),
        ("network", "UDP", "udp"),
        ("network", "socket in a file", "unix"),
        ("network", "abstract socket", "abstract"),
        ("links", "to the secret", "secret was read"),
        ("tracing", "read a neighbour's memory", "ESCAPED"),
        ("tracing", "its limits", "ESCAPED"),
        ("signals to others", "a neighbour", "neighbour is in state"),
        ("signals to others", "the grader", "signal reached the grader"),
        ("signals to others", "through input's owner", "neighbour is in state"),
        ("other programs", "shell", "ESCAPED"),
        ("memory", "shared memory file", "ESCAPED"),
        ("kernel", "newest calls", "ESCAPED"),
    ],
)
def test_without_layers_the_attacks_work(world: World, kind: str, name: str, shown: str) -> None:
    """Catches attacks that fail for another reason than the sandbox, and evidence that shows nothing."""
    try:
        finding = world.run(program(kind, name), required=Level.LIMITED, leave_out=NOTHING_HELD)
        assert any(shown in escape for escape in finding.escapes), finding
    finally:
        world.repair()


MUTANTS = [
    # file, text, what stands there instead; the layers left out; a program that must be caught
    ("reaping.py", "    deadline = time", "    return False\n    deadline = time",
     (*WITHOUT_NAMESPACES, "seccomp"),
     "daemons that hold the pipes", "double fork", "processes left"),
    ("syscalls.py", '"socket": (41, 198),', "", WITHOUT_NAMESPACES, "network", "UDP", "udp"),
    ("syscalls.py", '"chmod": (90, -1),', "", (*WITHOUT_NAMESPACES, "own_user"),
     "files", "changes its mode", "changed"),
    ("syscalls.py", '"execve": (59, 221),', "", (*WITHOUT_NAMESPACES, "landlock"),
     "other programs", "itself", "ESCAPED"),
    ("syscalls.py", '"prlimit64": (302, 261)', '"prlimit64": (-1, -1)', (*WITHOUT_NAMESPACES, "own_user"),
     "tracing", "its limits", "ESCAPED"),
    ("syscalls.py", '"memfd_create": (319, 279),', "", (), "memory", "shared memory file", "ESCAPED"),
    ("syscalls.py", "LAST_KNOWN = 450", "LAST_KNOWN = 999", (), "kernel", "newest calls", "ESCAPED"),
    ("landlock.py", "for path in read:", 'for path in [*read, "/"]:', WITHOUT_NAMESPACES,
     "files", "reads the secret", "secret was read"),
    ("files.py", "    kernel.change_root(root)", "    pass", ("landlock",), "files", "passwords", "ESCAPED"),
    ("limits.py", '"RLIMIT_NPROC"', '"RLIMIT_NONE"', (), "fork bomb", "processes counted", "ESCAPED"),
    ("limits.py", '"RLIMIT_AS"', '"RLIMIT_NONE"', (), "memory", "map and touch", "ESCAPED"),
    ("files.py", "size={disk_bytes},", "size=1g,", (), "disk", "many files", "ESCAPED"),
    ("start.py", "    os.environ.clear()\n", "", (), "proc and environment", "environment", "ESCAPED"),
    ("start.py", "    os.close(report)\n", "", (), "inherited descriptors", "any but the first three", "ESCAPED"),
    ("lock.py", "CLONE_NEWNET", "CLONE_NEWUTS", ("seccomp", "landlock"), "network", "TCP to a listener", "tcp"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{mutant[0]}: {mutant[5]}" for mutant in MUTANTS])
def test_mutants_of_the_sandbox_are_caught(
    world: World, level: Level, mutant: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches layers that could be taken away without any program noticing."""
    need(level, Level.ISOLATED)
    file, text, instead, leave_out, kind, name, shown = mutant
    tmp_path.chmod(0o755)
    shutil.copytree(Path(stage_package.__file__).parent, tmp_path / "stage", ignore=shutil.ignore_patterns("__pyc*"))
    changed = tmp_path / "stage" / file
    source = changed.read_text()
    assert text in source
    changed.write_text(source.replace(text, instead))
    monkeypatch.setattr(run, "STAGE_FOLDER", tmp_path)
    try:
        finding = world.run(program(kind, name), required=Level.LIMITED, leave_out=tuple(leave_out))
        assert any(shown in escape for escape in finding.escapes), finding
    finally:
        world.repair()
