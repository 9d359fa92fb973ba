"""The locks that a process closes behind itself. Each is tried, and counted only if the kernel granted it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from . import limits
from .files import Needed

if sys.platform == "linux":
    from . import files, kernel, landlock, seccomp

    NAMESPACES = {
        "mount_namespace": kernel.CLONE_NEWNS,
        "network_namespace": kernel.CLONE_NEWNET,
        "ipc_namespace": kernel.CLONE_NEWIPC,
        "uts_namespace": kernel.CLONE_NEWUTS,
    }

# Users that nothing else runs as: the limit on processes then counts the program's alone, and a signal to all
# processes of the user reaches no one else.
FIRST_OWN_USER, NUM_OWN_USERS = 1 << 30, 1 << 28
NOBODY = 65534
# In a user namespace the launcher and init count as the program's user.
HELPERS = 2
COUNTS_PER_NAMESPACE = (5, 14)


def choose_user(held: set[str]) -> tuple[int, int] | None:
    """The user and group that a program started by root runs as; None if this process may not change its user."""
    if os.geteuid() != 0:
        return None
    own = FIRST_OWN_USER + int.from_bytes(os.urandom(4), "big") % NUM_OWN_USERS
    for user in (own, NOBODY):
        try:
            os.setresuid(-1, user, 0)
            os.setresuid(-1, 0, 0)
        except OSError:
            continue
        return (user, user)
    return None


class Lock:
    """What is to be locked and how; `held` collects the layers that hold.

    `user` is the user and group to run as, None for the caller's; `numbers` are those of `limits.NAMES`.
    """

    def __init__(
        self,
        numbers: dict[str, int],
        without: frozenset[str],
        held: set[str],
        user: tuple[int, int] | None,
        paths: Needed,
    ) -> None:
        self.numbers = numbers
        self.without = without
        self.held = held
        self.user = user
        self.paths = paths
        self.other_tasks = 0

    @property
    def unique_user(self) -> bool:
        return self.user is not None and self.user[0] >= FIRST_OWN_USER

    def forget_user(self) -> None:
        """There is no other user to run as."""
        self.user = None

    def count_other_tasks(self) -> None:
        """The limit on processes counts all tasks of the user: those there are now come on top of the program's."""
        if self.unique_user:
            return
        if "user_namespace" in self.held and _release() >= COUNTS_PER_NAMESPACE:
            self.other_tasks = HELPERS
        else:
            self.other_tasks = limits.tasks_of_user(os.getuid() if self.user is None else self.user[0])

    def enter_other_namespaces(self) -> None:
        """Namespaces for network, messages and names, and one for files with a root of its own."""
        self.count_other_tasks()
        wanted = {name: flag for name, flag in NAMESPACES.items() if name not in self.without}
        for name, flag in wanted.items():
            self._try(name, lambda flag=flag: kernel.unshare(flag))
        if "mount_namespace" in self.held:
            self.held.remove("mount_namespace")
            self._try(
                "mount_namespace", lambda: files.enter_own_root(self.paths, self.numbers["disk_bytes"], self.user)
            )

    def close(self) -> None:
        """Lock this process in for good. What follows runs with what is left."""
        own_root = "mount_namespace" in self.held
        readable = files.readable_paths(self.paths, own_root=own_root) if sys.platform == "linux" else ([], [])
        limits.apply(self.numbers, self.other_tasks)
        if self.user is not None and self._user_can_read():
            self._try("own_user", self._change_user)
        if sys.platform != "linux":
            return
        # Root is exempt from the limit on processes: as root the program gets none but its own.
        limited = os.getuid() != 0 or "own_user" in self.held
        self._try("no_new_privileges", lambda: kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1))
        self._try("no_capabilities", kernel.drop_capabilities)
        if "landlock" not in self.without:
            self._restrict(*readable, [files.WORK] if own_root else [])
        self._try("seccomp", lambda: seccomp.install(allow_tasks=limited))
        if limited or "seccomp" in self.held:
            self.held.add("process_limit")
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)

    def _restrict(self, read: list[str], listed: list[str], write: list[str]) -> None:
        try:
            self.held.update(landlock.restrict(read, listed, files.DEVICES, write))
        except OSError:
            return

    def _user_can_read(self) -> bool:
        """Whether the other user may read the standard library: it may lie in a home that is closed to others."""
        assert self.user is not None
        os.setresuid(-1, self.user[0], 0)
        try:
            return all(os.access(path, os.R_OK | os.X_OK, effective_ids=True) for path in self.paths.library)
        except NotImplementedError:
            return True
        finally:
            os.setresuid(-1, 0, 0)

    def _change_user(self) -> None:
        assert self.user is not None
        user, group = self.user
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)

    def _try(self, name: str, action: Callable[[], object]) -> None:
        if name in self.without:
            return
        try:
            action()
        except OSError:
            return
        self.held.add(name)


def _release() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))
