"""How the tests call the doctor, and read what it says."""

import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

import ddp_tutorial.check
from tests.ranks import HANG, environment

PATIENT = ("--seconds", "600", "--patience", "60")  # no test fails because a machine is busy


def command(*words) -> list[str]:
    return [sys.executable, "-m", "ddp_tutorial.check", *map(str, words)]


def say(folder: Path, *words, **variables) -> subprocess.CompletedProcess:
    """`python -m ddp_tutorial.check words` in `folder`."""
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = environment(os.environ.get("TMPDIR", "/tmp")) | {"PYTHONPATH": paths} | variables
    return subprocess.run(command(*words), cwd=folder, env=env, capture_output=True, text=True, timeout=4 * HANG)


def check(folder: Path, *words, **variables) -> dict:
    """What the doctor's JSON holds."""
    patience = () if "--patience" in words else PATIENT
    with chdir(folder), mock.patch.dict(os.environ, variables):
        return ddp_tutorial.check.check(*patience, *words)


def check_text(folder: Path, text: str, *flags) -> dict:
    (folder / "train.py").write_text(text)
    return check(folder, *flags, "train.py")


def short(report: dict, *levels: str) -> list[str]:
    """Findings of these levels, or of all, one line each."""
    return [
        f"{f['level']} {f['rule']} at {f['line']}: {f['seen']}"
        for f in report["findings"]
        if not levels or f["level"] in levels
    ]


def has(report: dict, level: str, rule: str, lines: list[int] | None = None) -> bool:
    return any(
        f["level"] == level and f["rule"] == rule and (lines is None or f["line"] in lines) for f in report["findings"]
    )
