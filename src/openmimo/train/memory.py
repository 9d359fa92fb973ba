"""Keeping freed memory with the process.

Training frees and asks again for the same large blocks in every step. glibc hands blocks of this size back to the
system, which then clears each page anew.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory(threshold_bytes: int = 1 << 30) -> bool:
    """Ask glibc to keep freed blocks below `threshold_bytes`; False where the C library has no such setting."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    kept = libc.mallopt(_M_MMAP_THRESHOLD, threshold_bytes)
    return bool(kept and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
