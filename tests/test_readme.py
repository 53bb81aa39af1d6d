"""The README's commands, run in order in a fresh copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
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


def run(block: str, folder: Path) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in ("DDP_DATA_DIR", "RANK")}
    env |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=env, capture_output=True, text=True
    )


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
    (shown,) = re.findall(r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = iter(stdout.splitlines())
    assert [line for line in shown.splitlines() if line != "..." and line not in lines] == []


def test_the_difference_has_as_many_lines_as_said():
    marked = re.findall("  # DDP: ", (ROOT / "notebooks" / "ddp_sample.py").read_text())
    assert f"as a difference of {len(marked)} lines" in (ROOT / "README.md").read_text()


def test_a_line_that_is_not_printed_is_noticed():
    with pytest.raises(AssertionError):
        assert_shown("1. Sample data: Gaussian classes\n3. Look\n")
