"""What holds a program: single layers, and the three levels that they add up to."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, IntEnum

from openmimo.errors import SandboxError
from openmimo.tasks.sandbox.stage import levels


class Layer(str, Enum):
    """One thing that holds a program, reported only where the system granted it.

    The members named after namespaces are Linux namespaces of the program's own; the mount namespace comes with a root
    in memory that shows Python and nothing else of the machine's files.
    """

    WALL_CLOCK = "wall_clock"
    RESOURCE_LIMITS = "resource_limits"
    EMPTY_ENVIRONMENT = "empty_environment"
    PROCESS_LIMIT = "process_limit"
    OWN_USER = "own_user"
    NO_NEW_PRIVILEGES = "no_new_privileges"
    NO_CAPABILITIES = "no_capabilities"
    SECCOMP = "seccomp"
    LANDLOCK = "landlock"
    LANDLOCK_NETWORK = "landlock_network"
    LANDLOCK_SCOPE = "landlock_scope"
    USER_NAMESPACE = "user_namespace"
    PID_NAMESPACE = "pid_namespace"
    MOUNT_NAMESPACE = "mount_namespace"
    NETWORK_NAMESPACE = "network_namespace"
    IPC_NAMESPACE = "ipc_namespace"
    UTS_NAMESPACE = "uts_namespace"


class Level(IntEnum):
    """What the layers add up to.

    LIMITED: limits, wall clock, empty environment and folder. Holds mistakes, not malice: the program sees what its
    user sees. FILTERED: no files of others, no network, no signals, no other programs, by Landlock (or a root of its
    own) and a system call filter. ISOLATED: besides, namespaces of its own, which end with everything that is in them.
    """

    LIMITED = levels.LIMITED
    FILTERED = levels.FILTERED
    ISOLATED = levels.ISOLATED

    def missing(self, held: Iterable[Layer]) -> tuple[str, ...]:
        """The layers that this level needs beyond those held."""
        return tuple(sorted(levels.missing(self, frozenset(layer.value for layer in held))))


def read_layers(text: str) -> frozenset[Layer]:
    """The layers that the set-up reports, joined by commas."""
    return frozenset(Layer(name) for name in text.split(",") if name)


def level_of(held: Iterable[Layer]) -> Level:
    """The highest level that the layers reach."""
    return Level(levels.level_of(frozenset(layer.value for layer in held)))


def available_level() -> Level | None:
    """The level that a program reaches on this machine, by running an empty one; None where none runs at all.

    Cost: one run, tens of milliseconds.
    """
    from openmimo.tasks.sandbox.run import run_program

    try:
        return run_program("", required=Level.LIMITED).level
    except SandboxError:
        return None
