"""The few Linux calls that Python 3.11 does not offer, through the C library. Every failure is an OSError."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

# Spelled out, because importing `signal` costs as much as everything else here.
SIGKILL = 9

_CAPABILITY_VERSION_3 = 0x20080522
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000

_libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A system call by number; whole numbers are passed as 64-bit words."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *words))


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags))


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    _checked(
        _libc.mount(
            source.encode(),
            target.encode(),
            None if kind is None else kind.encode(),
            ctypes.c_ulong(flags),
            None if options is None else options.encode(),
        )
    )


def bind(source: str, target: str) -> None:
    """Show `source` at `target` too, read-only, without device files or set-uid rights, submounts included."""
    mount(source, target, None, MS_BIND | MS_REC)
    attributes = (1 | 2 | 4).to_bytes(8, "little") + bytes(24)  # read-only, nosuid, nodev; clears none
    try:
        call(442, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, len(attributes))  # mount_setattr, Linux 5.12
    except OSError:
        mount(source, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def change_root(folder: str) -> None:
    """Make `folder`, a mount point, the root of all files; the old root is gone afterwards."""
    os.chdir(folder)
    pivot_root = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine)
    if pivot_root is None:
        raise OSError("pivot_root: unknown number on this processor")
    call(pivot_root, b".", b".")  # the old root now lies on top of the new one
    _checked(_libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def prctl(option: int, value: int | ctypes.Array[ctypes.c_char], pointer: bytes | None = None) -> None:
    word = ctypes.c_ulong(value) if isinstance(value, int) else value
    _checked(_libc.prctl(option, word, pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)))


def drop_capabilities() -> None:
    """Give up every capability of this process for good (no_new_privs keeps a later exec from granting any)."""
    header = _CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4)
    _checked(_libc.capset(header, bytes(24)))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
