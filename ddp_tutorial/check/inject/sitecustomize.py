"""Python imports this when it starts, in each process that the doctor starts and in each that those start.

The watcher comes in right after torch, before the script can take a name from it.
"""

import importlib
import importlib.util
import json
import os
import sys

SETTINGS = "DDP_CHECK"  # the variable with the doctor's settings


def call(module: str, function: str) -> None:
    """Call MODULE.FUNCTION() of the doctor's package. What fails there is noted, and the script goes on."""
    settings = json.loads(os.environ[SETTINGS])
    sys.path.insert(0, settings["package"])
    try:
        getattr(importlib.import_module(module), function)()
    except Exception as error:
        with open(f"{settings['log']}/{os.getpid()}.jsonl", "a") as log:
            log.write(json.dumps({"kind": "watcher", "error": f"{module}.{function}: {error!r}"}) + "\n")
    finally:
        sys.path.remove(settings["package"])


class AfterImport:
    """A finder of modules that calls a function of the doctor as soon as a certain module has been imported."""

    def __init__(self):
        self.waiting = {
            "torch": ("ddp_tutorial.check.watch.install", "install"),
            "torchvision.datasets": ("ddp_tutorial.check.made_up.datasets", "install"),
        }

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        what = self.waiting.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                call(*what)

            spec.loader.exec_module = exec_module
        return spec


def import_hidden() -> None:
    """Import the sitecustomize that this one hides, if there is one."""
    mine, path = sys.modules.pop("sitecustomize", None), list(sys.path)
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in path if os.path.abspath(entry) != folder]
    try:
        importlib.import_module("sitecustomize")
    except ImportError:
        sys.modules["sitecustomize"] = mine
    finally:
        sys.path[:] = path


if SETTINGS in os.environ:
    finder = AfterImport()
    sys.meta_path.insert(0, finder)
    for name in sys.modules.keys() & finder.waiting.keys():  # in a copy of a process that has imported it
        call(*finder.waiting.pop(name))
import_hidden()
