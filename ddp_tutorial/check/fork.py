"""Start a rank: as a new process, or for many checks in a row, as a copy of one that has imported PyTorch already."""

import atexit
import importlib.util
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path

from ddp_tutorial.launcher import Forked, begin_anew, run_as_main

INJECT = Path(__file__).resolve().parent / "inject"


def new_process(words: Sequence[str], environment: Mapping[str, str], folder: Path, said: Path) -> subprocess.Popen:
    """`python *words` as a new process, which imports everything itself."""
    with said.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=dict(environment),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def forked(words: Sequence[str], environment: Mapping[str, str], folder: Path, said: Path) -> Forked:
    """A copy of the fork server that becomes `python *words`; it writes stdout and stderr to the file `said`.

    `words` are the path of a script, or -m and the name of a module, and the arguments.
    """
    return Forked(become, list(words), dict(environment), folder, said)


def become(words: list[str], environment: dict[str, str], folder: Path, said: Path) -> None:
    """Make this copy of the server what `python *words` would be in a session of its own."""
    os.setsid()
    said.touch()
    begin_anew(environment, folder, (said, said))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    first = folder if is_module else Path(words[0]).resolve().parent
    sys.path[:0] = [str(first), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    code = 0
    try:
        runpy.run_path(str(INJECT / "sitecustomize.py"))
        if is_module:
            spec = spec_of_module(words[1])
            sys.argv[0] = spec.origin
            run_as_main(spec.loader.get_code(spec.name), __file__=spec.origin, __spec__=spec, __package__=spec.parent)
        else:
            run_as_main(compile(Path(words[0]).read_bytes(), words[0], "exec"), __file__=words[0])
    except SystemExit as left:
        code = exit_code(left)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def spec_of_module(name: str) -> ModuleSpec | None:
    """What `python -m name` runs."""
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    return spec


def exit_code(left: SystemExit) -> int:
    """As Python has it: a text is printed, and means 1."""
    if left.code is None or isinstance(left.code, int):
        return left.code or 0
    print(left.code, file=sys.stderr)
    return 1
