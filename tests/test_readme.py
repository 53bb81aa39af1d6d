"""The README's commands: each names programs and flags that are there; and, slow, all run in a fresh copy."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from data_gen.__main__ import parse_args
from ddp_tutorial import flags
from ddp_tutorial.console import UserError
from ddp_tutorial.ranks import check_flags, parse
from tests.ranks import RESILIENT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
INSTALLS = [block for block in BLOCKS if block.startswith("python3 -m venv")]  # .ci/run runs these, as they are


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files that git knows or would add, with this environment as `.venv`."""
    folder = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    if not Path(sys.prefix, "bin", "activate").exists():
        pytest.skip("this is not a virtual environment")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def test_outside_of_a_clone_the_first_command_makes_nothing(tmp_path):
    """As after `pip install .`, which takes no notebooks along."""
    for package in ("ddp_tutorial", "data_gen"):
        shutil.copytree(ROOT / package, tmp_path / package)
    done = run(f"{sys.executable} -m ddp_tutorial || [ $? = 2 ]", tmp_path)
    assert done.returncode == 0 and "install the clone with 'pip install -e .'" in done.stderr, done
    assert not (tmp_path / "runs").exists()


def run(block: str, folder: Path) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in ("DDP_DATA_DIR", "RANK")}
    env |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_blocks_run_in_order(clone):
    quickstart = INSTALLS[0].rpartition(" && ")[2]
    blocks = [quickstart, *(block for block in BLOCKS if block not in INSTALLS)]
    assert len(BLOCKS) == 4 and quickstart == ".venv/bin/python -m ddp_tutorial\n"
    session = ""  # one shell: what a block activates is there for the next
    for block in blocks:
        done = run(session + block, clone)
        assert done.returncode == 0, done.stdout + done.stderr
        session += "".join(line for line in block.splitlines(keepends=True) if line.startswith("source "))
        if block == quickstart:
            assert_shown(done.stdout)
    for name in ("runs/quickstart/results/losses.png", "runs/mine/model.pt", "runs/long/checkpoint.pt"):
        assert (clone / name).stat().st_size > 1000


def assert_shown(stdout: str) -> None:
    """The lines that the README says the first command prints are among `stdout`'s, in order."""
    (shown,) = re.findall(r"^```text\n(.*?)^```", README, re.M | re.S)
    lines = iter(stdout.splitlines())
    assert [line for line in shown.splitlines() if line != "..." and line not in lines] == []


def test_the_difference_has_as_many_lines_as_said():
    marked = re.findall("  # DDP: ", (ROOT / "notebooks" / "ddp_sample.py").read_text())
    assert f"as a difference of {len(marked)} lines" in README


def commands() -> list[str]:
    """What the README starts in Python, in its blocks and in its text."""
    text = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    named = "\n".join(BLOCKS).replace(" && ", "\n").splitlines() + re.findall("`([^`\n]+)`", text)
    named = [command.removeprefix(".venv/bin/") for command in named]
    return [command for command in named if command.startswith(("python ", "torchrun "))]


def read(command: str, monkeypatch) -> None:
    """Parse a command as its programs do; raises if they do not know it."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        launch = get_args_parser().parse_args(words)
        words = [launch.training_script, *launch.training_script_args]
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), words[1]
        if words[1] == "data_gen":
            parse_args(words[2:])
    else:
        assert (ROOT / words[0]).is_file(), words[0]
        monkeypatch.setattr(sys, "argv", words)
        if Path(words[0]).name == RESILIENT.name:
            check_flags(parse("What it does."))
        else:
            flags.parse("What it does.")


def test_programs_and_flags_are_there(monkeypatch):
    assert {command.split()[0] for command in commands()} == {"python", "torchrun"} and len(commands()) >= 5
    for command in commands():
        print(command)
        read(command, monkeypatch)


def test_what_is_not_there_is_noticed(monkeypatch):
    for command, error in {
        "torchrun --nproc-per-knot=4 notebooks/ddp_sample.py": SystemExit,
        "torchrun --nproc-per-node=4 notebooks/ddp_simple.py": AssertionError,
        "torchrun --nproc-per-node=4 notebooks/ddp_sample.py --resume": UserError,
        "torchrun --nproc-per-node=4 notebooks/ddp_resilient.py --restart": UserError,
        "python -m data_gen digits --into runs": SystemExit,
        "python -m no_such_module": AssertionError,
    }.items():
        print(command)
        with pytest.raises(error):
            read(command, monkeypatch)
