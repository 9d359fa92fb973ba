"""How much a set of layers is worth. Plain text, so that the set-up in the sandbox and its caller share one rule."""

from __future__ import annotations

from collections.abc import Set

LIMITED, FILTERED, ISOLATED = 1, 2, 3

FILTERED_NEEDS = frozenset({"landlock", "seccomp", "no_new_privileges", "process_limit"})
ISOLATED_NEEDS = frozenset(
    {
        "pid_namespace",
        "mount_namespace",
        "network_namespace",
        "ipc_namespace",
        "seccomp",
        "no_new_privileges",
        "process_limit",
        "no_capabilities",
    }
)


def missing(level: int, held: Set[str]) -> frozenset[str]:
    """The layers that `level` needs beyond those held; a root of its own does what Landlock does for files."""
    if level >= ISOLATED:
        return ISOLATED_NEEDS - held
    if level == FILTERED:
        lacking = FILTERED_NEEDS - held
        return lacking - {"landlock"} if "mount_namespace" in held else lacking
    return frozenset()


def level_of(held: Set[str]) -> int:
    """The highest level that the layers reach."""
    return next(level for level in (ISOLATED, FILTERED, LIMITED) if not missing(level, held))
