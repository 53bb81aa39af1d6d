"""python -m tests.stress_launches [N]: N launches of four ranks beside two busy processes; counts how they end."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.ranks import HANG, NOTEBOOKS, data_gen, torchrun


def launch(script: Path, data: Path, out: Path, timeout: float) -> str:
    """How a launch ended: "ok", "abort" or "hang". The output of one that is not ok goes to stderr."""
    flags = ("--data-dir", data, "--out", out, "--epochs", 2)
    try:
        done = torchrun(4, script, *flags, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        print(error.stdout, error.stderr, file=sys.stderr)
        return "hang"
    if done.returncode == 0 and "epoch   2" in done.stdout and not done.stderr:
        return "ok"
    print(f"exit code {done.returncode}", done.stdout, done.stderr, sep="\n", file=sys.stderr)
    return "abort"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress_launches", description=__doc__)
    parser.add_argument("n", nargs="?", type=int, default=100, help="launches (%(default)s)")
    scripts = ("ddp_sample", "ddp_resilient")
    parser.add_argument("--script", choices=scripts, default=scripts[1], help="which to launch (%(default)s)")
    parser.add_argument("--timeout", type=float, default=HANG, help="seconds until a launch hangs (%(default)s)")
    args = parser.parse_args()
    ends, start = Counter(), time.monotonic()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            script, data = NOTEBOOKS / f"{args.script}.py", folder / "data"
            data_gen("gaussian", "--out", data, "--n-train", 512, "--n-val", 512)
            for i in range(args.n):
                ends[launch(script, data, folder / "out", args.timeout)] += 1
                print(f"{i + 1}/{args.n}: {dict(ends)}", flush=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    seconds = time.monotonic() - start
    what = f"{args.n} launches of {args.script}.py on 4 ranks"
    print(f"{what}: {ends['ok']} ok, {ends['abort']} abort, {ends['hang']} hang; {seconds:.0f} s")
    return 0 if ends["ok"] == args.n else 1


if __name__ == "__main__":
    sys.exit(main())
