"""Which files of the machine a program needs to be Python, and a file system of its own that has only those."""

from __future__ import annotations

import os
import sys

from . import kernel

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
SHARED = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
# Installed packages lie inside the standard library's folder. They are none of the program's business: among them
# may be the very graders that judge it.
PACKAGE_FOLDERS = ("site-packages", "dist-packages")
# Where the new root is put together: the first of these that hides nothing that is needed.
MOUNT_POINTS = ("/tmp", "/mnt", "/var/tmp", "/srv", "/media")
WORK = "/tmp"


class Needed:
    """Paths that must be readable: the standard library's folders, and where shared libraries lie."""

    def __init__(self, library: tuple[str, ...], shared_libraries: tuple[str, ...]) -> None:
        self.library = library
        self.shared_libraries = shared_libraries


def needed() -> Needed:
    """Read from this process, which runs on them."""
    library = [path for path in sys.path if os.path.isabs(path) and os.path.isdir(path)]
    # A folder inside another one comes with it.
    library = [path for path in library if not any(path.startswith(f"{other}/") for other in library)]
    folders: dict[str, None] = {}
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            if ".so" in path:
                folders["/" + os.path.dirname(path)] = None
    shared = [path for path in folders if not any(f"{path}/".startswith(f"{other}/") for other in library)]
    return Needed(tuple(library), tuple(shared))


def readable_paths(paths: Needed, *, own_root: bool) -> tuple[list[str], list[str]]:
    """For Landlock: what may be read with all below it, and folders of which only names may be listed.

    A root of its own hides installed packages already.
    """
    read: list[str] = [*SHARED]
    if own_root:
        return [*read, *paths.library, *paths.shared_libraries], ["/"]
    for folder in paths.shared_libraries:
        if not any(path.startswith(f"{folder}/") for path in paths.library):
            read.append(folder)
            continue
        with os.scandir(folder) as entries:
            read += [entry.path for entry in entries if ".so" in entry.name and entry.is_file()]
    for folder in paths.library:
        with os.scandir(folder) as entries:
            read += [entry.path for entry in entries if entry.name not in PACKAGE_FOLDERS]
    return read, list(paths.library)


def enter_own_root(paths: Needed, disk_bytes: int, owner: tuple[int, int] | None) -> None:
    """Replace the root of all files by an empty one in memory, with `paths` read-only and one folder to write into.

    Must run in a mount namespace of its own; `owner` is the user and group of the folder, None for the caller's.
    Raises: OSError; the root is then the old one.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    shown = sorted((*paths.library, *paths.shared_libraries, *SHARED, *DEVICES))
    root = _mount_point(shown)
    safe = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", root, "tmpfs", safe, "size=256k,nr_inodes=1k,mode=755")
    for path in shown:  # a folder comes before what is in it, and with it
        if not any(path.startswith(f"{other}/") for other in shown):
            _show(path, root)
    for folder in paths.library:
        for name in PACKAGE_FOLDERS:
            if os.path.isdir(f"{root}{folder}/{name}"):
                kernel.mount("tmpfs", f"{root}{folder}/{name}", "tmpfs", safe | kernel.MS_RDONLY, "size=4k,mode=755")
    for name in ("lib", "lib64"):
        if os.path.islink(f"/{name}"):
            _link(os.readlink(f"/{name}"), f"{root}/{name}")
    work = f"{root}{WORK}"
    os.makedirs(work, exist_ok=True)
    owned = "" if owner is None else f",uid={owner[0]},gid={owner[1]}"
    options = f"size={disk_bytes},nr_inodes=1k,mode=700{owned}"
    kernel.mount("tmpfs", work, "tmpfs", safe | kernel.MS_NOEXEC, options)
    kernel.mount("none", root, None, kernel.MS_REMOUNT | safe | kernel.MS_RDONLY, "size=256k,nr_inodes=1k,mode=755")
    kernel.change_root(root)


def _mount_point(shown: list[str]) -> str:
    for folder in MOUNT_POINTS:
        if os.path.isdir(folder) and not any(path.startswith(f"{folder}/") for path in shown):
            return folder
    raise OSError(f"none of {', '.join(MOUNT_POINTS)} can take the program's root")


def _show(path: str, root: str) -> None:
    target = f"{root}{path}"
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    elif os.path.exists(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_CLOEXEC, 0o644))
    else:
        return
    if path in DEVICES:
        # Their use is what they are for: nothing is stored, so they keep their device rights.
        kernel.mount(path, target, None, kernel.MS_BIND)
    else:
        kernel.bind(path, target)


def _link(target: str, path: str) -> None:
    if not os.path.lexists(path):
        os.symlink(target, path)
