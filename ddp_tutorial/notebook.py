"""What a notebook needs around it."""

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from IPython.display import Markdown

from ddp_tutorial import plotting


def setup() -> None:
    """Call first in a notebook.

    Finds `torchrun` also where the virtual environment is not activated, gives each process one
    thread (as torchrun would, with a warning), keeps the profiler's log off the page, and sets the
    figures' style.
    """
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    plotting.use_style()


def sample_data(kind: str = "gaussian") -> Path:
    """Make the sample data `kind` ("gaussian" or "digits") in `data/` unless they are there; return the folder.

    Raises `RuntimeError` if that fails.
    """
    folder = Path("data") / kind
    command = [sys.executable, "-m", "data_gen", kind, "--out", str(folder), "--reuse"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    print(done.stdout, end="")
    return folder


def source(thing) -> Markdown:
    """The source of a class or function of the package, as the cell's output."""
    return Markdown(f"```python\n{textwrap.dedent(inspect.getsource(thing)).strip()}\n```")
