"""``python -m benchmarks``: see `benchmarks/cli.py`."""

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; torchrun's ranks have one thread too
    from benchmarks.cli import main

    sys.exit(main())
