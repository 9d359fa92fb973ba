"""Running the program's text, in the process that has been locked in."""

from __future__ import annotations

import os
import sys

# Told apart from the codes that programs choose themselves; one that chooses it says no more than "no memory".
OUT_OF_MEMORY = 86


def run_source(source: str) -> int:
    """Run `source` as the main module; returns the exit code. SystemExit passes through."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    try:
        # The one place where text becomes code: no file, socket, environment or other process is within reach here.
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except SystemExit:
        raise
    except MemoryError:
        _complain(b"MemoryError\n")
        return OUT_OF_MEMORY
    except BaseException as error:
        import traceback  # here, because every start would pay for it

        frames = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, frames)
        return 1
    return 0


def _complain(text: bytes) -> None:
    """Without any allocation that could fail again."""
    try:
        os.write(2, text)
    except OSError:
        return
