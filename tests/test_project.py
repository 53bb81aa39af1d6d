"""What the repository says about itself, in several places, is one thing."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.ranks import DDP, RESILIENT, SINGLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONDA_NAMES = {"pytorch": "torch", "playwright-python": "playwright"}
MACHINE_PATH = re.compile(r"(?<![\w.~}-])/(home|tmp|root|work|Users|opt)/|\b[A-Z]:\\+(Users|Program)")
FOLDERS = (".ci", ".github", "benchmarks", "data_gen", "ddp_tutorial", "notebooks", "tests")
MADE = {"__pycache__", ".ipynb_checkpoints", "data", "runs", "images"}


def split(requirement: str) -> tuple[str, frozenset[str]]:
    """Name and bounds: "a>=1,<2" is ("a", {">=1", "<2"})."""
    name, bounds = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement).groups()
    return CONDA_NAMES.get(name, name), frozenset(filter(None, bounds.replace(" ", "").split(",")))


def test_conda_and_pip_install_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda[-2:] == ["pip", {"pip": ["-e ."]}]
    extras = project["optional-dependencies"]
    own, *test = extras["test"]
    assert (own, set(extras)) == ("ddp-tutorial[bench]", {"bench", "test"})
    pip = project["dependencies"] + extras["bench"] + test
    pip.append("python" + project["requires-python"])
    assert dict(map(split, conda[:-2])) == dict(map(split, pip))
    assert len(conda[:-2]) == len(pip)


def test_every_conda_package_says_why():
    lines = (ROOT / "environment.yml").read_text().partition("dependencies:\n")[2].splitlines()
    assert [line for line in lines if not re.search(r"  # \w.* ", line) and line.strip() != "- pip:"] == []


def test_ci_runs_the_commands_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", "\n".join(re.findall(r"^```.*?^```", README, re.M | re.S)), re.M)
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m ddp_tutorial",
        'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest --nbmake',
    ]
    ci = ROOT / ".ci" / "run"
    lines = ci.read_text().splitlines()
    assert os.access(ci, os.X_OK) and "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("python3 ")] == [f"{command} || exit" for command in commands]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step] == [
        "bash .ci/run"
    ]


def test_readme_table_lists_every_chapter_with_its_minutes():
    listed = re.findall(r"^\| \[[^]]+\]\((notebooks/[^)]+\.ipynb)\) \|.*\| (\d+) \|", README, re.M)
    chapters = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert [name for name, _ in listed] == [path.relative_to(ROOT).as_posix() for path in chapters]
    for (_, minutes), path in zip(listed, chapters, strict=True):
        assert f"**Time:** {minutes} minutes to read" in path.read_text(), path


def test_licence():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 The ddp-tutorial authors\n")


# The laws of the design. Each is a function of texts, so that it can be shown to fail.


def n_lines(path: Path) -> int:
    """The lines of a program that are not blank."""
    return sum(bool(line.strip()) for line in path.read_text().splitlines())


@pytest.mark.parametrize("path, most", [(SINGLE, 65), (DDP, 95), (RESILIENT, 125)], ids=lambda value: str(value)[-16:])
def test_the_scripts_are_short(path, most):
    assert len(path.read_text().splitlines()) <= most


@pytest.mark.parametrize("room, most", [("lesson", 500), ("ranks", 600), ("show", 350)])
def test_the_rooms_are_small(room, most):
    names = {path.stem for path in MODULES if room_of(path) == room}
    assert names >= {"lesson": LESSON, "ranks": {"launch", "run"}, "show": {"figures", "difference"}}[room]
    assert sum(n_lines(path) for path in MODULES if room_of(path) == room) <= most


def test_lines_are_counted(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('"""Text."""\n\n  \nx = 1  # one\n# two\n')
    assert n_lines(path) == 3


PACKAGE = ROOT / "ddp_tutorial"
LESSON = {"data", "model", "training", "history", "flags", "console", "files"}
MODULES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT = {
    "lesson": {"lesson"},
    "ranks": {"lesson", "ranks"},
    "show": {"lesson", "show"},
    "__init__": set(),
    "__main__": {"lesson", "show"},
    "single_sample": {"lesson"},
    "ddp_sample": {"lesson"},
    "ddp_resilient": {"lesson", "ranks"},
}


def room_of(path: Path) -> str:
    """Where a file of the package, or a script, stands."""
    if path.parent == PACKAGE:
        return "lesson" if path.stem in LESSON else path.stem
    return path.relative_to(PACKAGE).parts[0] if path.is_relative_to(PACKAGE) else path.stem


def imported(text: str) -> set[str]:
    """What a program imports: "a.b" for `import a.b`, "a.b" and "a.b.c" for `from a.b import c`."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    """The rooms of the package in which these names stand."""
    second = {name.split(".")[1] for name in names if name.startswith("ddp_tutorial.")}
    return {"lesson" if name in LESSON else name for name in second}


def wrong_imports(room: str, text: str) -> set[str]:
    """What a program of that room must not import: other rooms, the generators, a notebook, or by relative names."""
    names = imported(text)
    first = {name.split(".")[0] for name in names}
    foreign = first & {"", "data_gen", "tests", "benchmarks", "notebooks", "nbimporter", "import_ipynb", "importnb"}
    return rooms_of(names) - MAY_IMPORT[room] | foreign


@pytest.mark.parametrize("path", [*MODULES, SINGLE, DDP, RESILIENT], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path):
    assert wrong_imports(room_of(path), path.read_text()) == set()


def test_the_rooms_are_known():
    assert {room_of(path) for path in (*MODULES, SINGLE, DDP, RESILIENT)} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    "room, line, wrong",
    [
        ("lesson", "from ddp_tutorial.ranks import exchange", {"ranks"}),
        ("lesson", "def f():\n    import ddp_tutorial.show.figures", {"show"}),
        ("ranks", "from ddp_tutorial import show", {"show"}),
        ("show", "from ddp_tutorial import files, ranks", {"ranks"}),
        ("show", "from ddp_tutorial.files import write_atomically", set()),
        ("__main__", "from ddp_tutorial.show import figures", set()),
        ("ddp_sample", "from ddp_tutorial import console, ranks", {"ranks"}),
        ("ddp_resilient", "from ddp_tutorial import console, ranks", set()),
        ("ddp_resilient", "from ddp_tutorial.show import figures", {"show"}),
        ("single_sample", "import ddp_tutorial.ranks.run as run", {"ranks"}),
        ("lesson", "from data_gen import gaussian", {"data_gen"}),
        ("lesson", "from . import ranks", {""}),
        ("show", "import import_ipynb", {"import_ipynb"}),
    ],
)
def test_wrong_imports_are_known(room, line, wrong):
    assert wrong_imports(room, line) == wrong


@pytest.mark.parametrize("path", sorted((ROOT / "data_gen").glob("*.py")), ids=lambda path: path.name)
def test_the_generators_do_not_know_the_package(path):
    assert {name.split(".")[0] for name in imported(path.read_text())} & {
        "ddp_tutorial",
        "benchmarks",
        "tests",
    } == set()


def distributed_words(text: str) -> list[str]:
    """What a program has that belongs to distributed training, in code or text."""
    words = r"torch\.distributed|_process_group|\ball_(?:reduce|gather)\b|DistributedDataParallel|DistributedSampler|\bdist\."
    return re.findall(words + r"|from torch import .*\bdistributed\b", text)


ONLY = {"__init__.py": "import torch.distributed.nn.functional", "__main__.py": '"torch.distributed.run"'}


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if room_of(path) != "ranks"] + sorted((ROOT / "data_gen").glob("*.py")),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_nothing_distributed_is_hidden(path):
    text = path.read_text()
    if path.parent == PACKAGE and path.name in ONLY:
        assert text.count(ONLY[path.name]) == 1
        text = text.replace(ONLY[path.name], "")
        text = re.sub("^# .*$", "", text, flags=re.M)  # why it is there
    assert distributed_words(text) == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import nn, distributed",
        "dist.barrier()",
        "torch.distributed.nn.functional",
        "destroy_process_group()",
        "x = all_reduce(x)",
        "model = DistributedDataParallel(model)",
        "from torch.utils.data import DistributedSampler",
    ],
)
def test_distributed_lines_are_known(line):
    assert len(distributed_words(line)) == 1
    assert distributed_words("distance = all_of_them  # the distribution") == []


def unexplained(old: str, new: str, word: str) -> list[str]:
    """The lines that `new` has and `old` has not and that do not end in `# word: why`, less docstring and blank ones."""

    def lines(text: str) -> list[str]:
        first = ast.parse(text).body[0]
        is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        return [line.strip() for line in text.splitlines()[first.end_lineno * is_text :] if line.strip()]

    known = set(lines(old))
    return [line for line in lines(new) if line not in known and not re.search(rf"  # {word}: \S.{{5,}}$", line)]


@pytest.mark.parametrize("old, new, word", [(SINGLE, DDP, "DDP"), (DDP, RESILIENT, "survive")], ids=["DDP", "survive"])
def test_every_new_line_of_a_script_says_why(old, new, word):
    assert unexplained(old.read_text(), new.read_text(), word) == []


@pytest.mark.parametrize(
    "line", ["y = 2", "y = 2  # DDP:", "y = 2  # DDP: yes", "y = 2  # survive: it must", "# DDP: so it is"]
)
def test_unexplained_lines_are_known(line):
    old = '"""Old."""\nx = 1\nif x:\n    z = 1\n'
    new = f'"""New,\n\nlonger."""\nx = 1\n\n{line}\nz = 1\ny = 3  # DDP: for a reason\n'
    assert unexplained(old, new, "DDP") == [line]


def test_no_file_names_a_folder_of_the_author():
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [path for path in files if not MADE & set(path.relative_to(ROOT).parts)]
    assert len(files) > 30
    assert [path for path in files if MACHINE_PATH.search(path.read_text(errors="replace"))] == []


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=lambda command: command[0])
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
