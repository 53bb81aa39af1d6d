"""What a call has measured, on the disk after each round: if it is stopped, the next call goes on from there."""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ddp_tutorial.files import write_atomically

ROOT = Path(__file__).parents[1]
MEASURED_CODE = ("benchmarks/**/*.py", "data_gen/*.py", "ddp_tutorial/**/*.py")  # and measuring
MEASURED_CODE += ("notebooks/ddp_*.py", "notebooks/12_*.ipynb", "notebooks/13_*.ipynb")


class MeasurementStore:
    """Of each section, its measurements by their names. All are of one machine, one code and one kind of call."""

    def __init__(self, path: Path, settings: dict[str, Any], again: bool = False):
        """Read what is there, unless it is to be measured `again`. Raises `ValueError` if it has other settings."""
        self.path, self.settings = path, settings
        self.sections: dict[str, dict[str, Any]] = {}
        if path.exists() and not again:
            stored = json.loads(path.read_text())
            for name, value in settings.items():
                if stored["settings"][name] != value:
                    raise ValueError(
                        f"{path}: a call that was stopped has measured this with {name} {stored['settings'][name]}, "
                        f"not {value}: --again measures it anew, another --out keeps it"
                    )
            self.sections = stored["sections"]

    def measure(self, section: str, name: str, function: Callable, *args, **options) -> Any:
        """What `function` returns, as JSON gives it back; not called if that is on the disk."""
        measured = self.sections.setdefault(section, {})
        if name not in measured:
            measured[name] = json.loads(json.dumps(function(*args, **options)))
            self.write()
        return measured[name]

    def forget(self, sections: list[str]) -> None:
        """A call has printed these to its end: the next one measures them anew."""
        self.sections = {name: measured for name, measured in self.sections.items() if name not in sections}
        if self.sections:
            self.write()
        else:
            self.path.unlink(missing_ok=True)

    def write(self) -> None:
        """Replace the file as a whole."""
        text = json.dumps({"settings": self.settings, "sections": self.sections}, indent=1)
        write_atomically(self.path, text.encode())


def settings(quick: bool) -> dict[str, Any]:
    """What must not differ between measurements that stand in one table."""
    code = hashlib.sha256()
    for path in sorted(path for pattern in MEASURED_CODE for path in ROOT.glob(pattern)):
        code.update(path.read_bytes())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"cores": len(os.sched_getaffinity(0)), "CPU": cpu_name(), "GPU": gpu}
    versions = {name: version_of(name) for name in ("torch", "numpy", "accelerate", "lightning")}
    return {"--quick": quick} | machine | {"Python": platform.python_version()} | versions | {"code": code.hexdigest()}


def cpu_name() -> str:
    """The model, as Linux names it (psutil does not), else the architecture."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def version_of(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
