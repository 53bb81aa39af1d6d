"""Chapter 13's script on two ranks that a slow network joins. For `python -m benchmarks ways`, after `unshare_command`.

FOLDER RATE FLAG...: the folder has the script and what it needs, and gets what its ranks save; the rate is in Mbit/s,
0: no limit; the flags are the script's.
"""

import os
import runpy
import sys

from benchmarks import network_probe

SCRIPT = "train_by_ways.py"


def main() -> int:
    """Returns the exit code."""
    if "RANK" not in os.environ:
        return network_probe.run_agents("benchmarks.ways_probe")
    folder, rate, *flags = sys.argv[1:]
    network_probe.set_rate(int(rate))
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = [SCRIPT, *flags]
    runpy.run_path(SCRIPT, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
