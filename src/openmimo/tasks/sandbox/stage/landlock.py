"""Landlock: the files, TCP ports, signals and abstract sockets that this process may still reach. Linux 5.13 and up.

Not restricted by Landlock, and so refused by the system call filter: changing modes, owners, times and extended
attributes, `truncate` by path (before version 3), sockets in files, and all network but TCP.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from . import kernel

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15
ALL_FOR_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
# How many rights over files each version knows: making and removing entries since 1, links between folders since 2,
# truncation since 3, device control since 5.
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
LAST_KNOWN_VERSION = 5
TCP_RIGHTS = 3
SCOPES = 3


def version() -> int:
    """The kernel's version of Landlock, 0 where there is none."""
    try:
        return kernel.call(CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def restrict(read: Iterable[str], listed: Iterable[str], devices: Iterable[str], write: Iterable[str]) -> list[str]:
    """Lock this process, which must have no_new_privs, in; returns the names of the layers that hold.

    `read` is what may be read (with all below it), `listed` folders whose names alone may be listed, `devices`
    files to read and write, `write` where files and folders may be made, changed and removed.
    Raises: OSError when the kernel refuses.
    """
    abi = version()
    if abi < 1:
        raise OSError("no Landlock")
    every_right = (1 << RIGHTS[min(abi, LAST_KNOWN_VERSION)]) - 1
    network = TCP_RIGHTS if abi >= 4 else 0
    scopes = SCOPES if abi >= 6 else 0
    words = (every_right, network, scopes)[: 3 if abi >= 6 else 2 if abi >= 4 else 1]
    attributes = b"".join(word.to_bytes(8, "little") for word in words)
    ruleset = kernel.call(CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path in read:
            _allow(ruleset, path, READ_FILE | READ_DIR)
        for path in listed:
            _allow(ruleset, path, READ_DIR)
        for path in devices:
            _allow(ruleset, path, every_right & (READ_FILE | WRITE_FILE | TRUNCATE))
        for path in write:
            _allow(ruleset, path, every_right & ~EXECUTE)
        kernel.call(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return ["landlock", *(["landlock_network"] if network else []), *(["landlock_scope"] if scopes else [])]


def _allow(ruleset: int, path: str, rights: int) -> None:
    """A rule for all below `path`; paths that are not there are passed over."""
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= ALL_FOR_FILES
        attributes = rights.to_bytes(8, "little") + opened.to_bytes(4, "little")
        kernel.call(ADD_RULE, ruleset, 1, attributes, 0)
    finally:
        os.close(opened)
