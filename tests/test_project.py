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


@pytest.mark.parametrize("path", sorted((ROOT / "ddp_tutorial").glob("*.py")), ids=lambda path: path.name)
def test_package_hides_no_distributed_line(path):
    text = path.read_text()
    if path.name == "exchange.py":
        return  # the script calls it by name, and chapter 4 shows it
    if path.name == "__main__.py":
        text = text.replace('"torch.distributed.run"', "", 1)  # torchrun, by its module's name
    assert not re.search(
        r"torch\.distributed|_process_group|\ball_(reduce|gather)|DistributedDataParallel|\bdist\.", text
    )
    assert not re.search(r"from torch import .*\bdistributed\b|DistributedSampler\(", text)


@pytest.mark.parametrize("package, other", [("data_gen", "ddp_tutorial"), ("ddp_tutorial", "data_gen")])
def test_generators_and_package_do_not_import_each_other(package, other):
    for path in (ROOT / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert other not in [name.split(".")[0] for name in names], path


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
