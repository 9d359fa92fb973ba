"""`python -m openmimo`, which is what `torchrun -m openmimo` starts."""

import logging
import os
import sys

from openmimo.cli.main import main


def leave(status: object) -> None:
    """End one of several processes without tearing down the interpreter.

    gloo's threads may still let go of tensors then, for which they would take a lock that is gone: "terminate called
    without an active exception" after a run that has succeeded. https://github.com/pytorch/pytorch/pull/179291
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(bool(status)))


if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        if "TORCHELASTIC_RUN_ID" in os.environ and not isinstance(ended.code, str):
            leave(ended.code)
        raise
