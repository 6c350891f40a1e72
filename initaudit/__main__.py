"""`python -m initaudit` and the `initaudit` command."""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Runs the command line and exits with its status."""
    # Half a million objects that stay are made while torch and the package are imported, and looked through for cycles a dozen
    # times: an eighth of the start.
    gc.set_threshold(100_000, 20, 100)

    from initaudit.cli import run

    # numpy's BLAS would start threads for each of the small products that a pass over a tensor is made of: they cost more than
    # they bring, and --jobs has the cores do more of them side by side. It is asked once, when numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
