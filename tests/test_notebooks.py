"""The notebooks as stored: what a reader sees who runs nothing. That they run is nbmake's part."""

import ast
import importlib.util
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from ddp_tutorial.model import SimpleModel
from ddp_tutorial.script import NOTEBOOK as SCRIPT_NOTEBOOK
from ddp_tutorial.script import read_script, write_script
from tests.readme_picture import PICTURE, stored_figure

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = CHAPTERS + sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
MARKDOWN = [
    path for path in sorted(ROOT.rglob("*.md")) if not re.search(r"/\.", f"/{path.relative_to(ROOT).as_posix()}")
]
TEXTS = NOTEBOOKS + MARKDOWN  # without what lies in .venv and the like

ABSOLUTE_PATH = re.compile(r"(?<![\w.~}-])/(home|tmp|root|work|Users|opt)/|\b[A-Z]:\\")
DDP_NAMES = {
    "dist",
    "distributed",
    "rank",
    "local_rank",
    "world_size",
    "local_world_size",
    "record",
    "set_epoch",
    "DistributedSampler",
    "DistributedDataParallel",
}

over_notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
over_chapters = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def text_of(output) -> str:
    """What `output` shows as text. A picture shows none."""
    if output.output_type == "error":
        return "\n".join(output.traceback)
    if output.output_type == "stream":
        return output.text
    if "image/png" in output.data:
        return ""
    return output.data.get("text/markdown") or output.data.get("text/plain", "")


def without_code(markdown: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(```+|~~~+).*?^\1\s*$", "", markdown, flags=re.M | re.S))


def headings(path: Path) -> list[str]:
    """The headings of a notebook or a Markdown file, with their #s."""
    if path.suffix == ".md":
        text = path.read_text()
    else:
        text = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    text = re.sub(r"^(```+).*?^\1\s*$", "", text, flags=re.M | re.S)
    return re.findall(r"^#+ .*$", text, flags=re.M)


# Outputs


def test_there_are_chapters():
    assert len(CHAPTERS) >= 4


@over_notebooks
def test_ran_from_top_to_bottom(path):
    assert [cell.execution_count for cell in cells(path)] == list(range(1, len(cells(path)) + 1))


@over_notebooks
def test_no_error_is_stored(path):
    for cell in cells(path):
        if "raises-exception" not in tags(cell):
            assert not [output for output in cell.outputs if output.output_type == "error"], cell.source


@over_notebooks
def test_outputs_name_no_folder_of_the_author(path):
    for cell in cells(path):
        for output in cell.outputs:
            texts = [text_of(output), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
            assert not ABSOLUTE_PATH.search("\n".join(texts)), cell.source


@over_notebooks
def test_outputs_are_short_and_without_warnings(path):
    for cell in cells(path):
        text = "\n".join(text_of(output).rstrip("\n") for output in cell.outputs)
        assert text.count("\n") < 40, cell.source
        assert not re.search("Warning|WARNING", text), text


@over_notebooks
def test_no_time_of_a_run_is_stored(path):
    assert not [cell for cell in cells(path) if "execution" in cell.metadata], "see CONTRIBUTING.md: record_timing"


@over_notebooks
def test_outputs_load_nothing_from_the_network(path):
    for cell in cells(path):
        for output in cell.outputs:
            html = "".join(output.get("data", {}).get("text/html", ""))
            assert not re.search(r"""\b(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", html), cell.source


@over_notebooks
def test_file_is_small(path):
    assert path.stat().st_size < 300_000


# Anatomy


@over_chapters
def test_title_starts_with_the_verb_of_the_file_name(path):
    titles = [heading for heading in headings(path) if heading.startswith("# ")]
    assert len(titles) == 1
    assert titles[0].split()[1].lower() == path.stem.split("_")[1]
    assert cells(path, "markdown")[0].source.startswith(titles[0])


@over_chapters
def test_first_cell_says_what_to_expect(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    labels = re.findall(r"\*\*(You will do|You will learn|You need|Time):?\*\*", first)
    assert labels == ["You will do", "You will learn", "You need", "Time"]


@over_chapters
def test_sections(path):
    sections = [heading.removeprefix("## ") for heading in headings(path) if heading.startswith("## ")]
    assert sections[-4:] == ["Summary", "Exercises", "In practice", "Further reading"]
    assert 4 <= len(sections[:-4]) <= 8


@over_chapters
def test_last_line_leads_to_the_neighbours(path):
    last = nbformat.read(path, as_version=4).cells[-1]
    assert last.cell_type == "markdown"
    linked = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", last.source.splitlines()[-1])
    i = CHAPTERS.index(path)
    assert linked == [neighbour.name for neighbour in CHAPTERS[max(0, i - 1) : i] + CHAPTERS[i + 1 : i + 2]]


@over_chapters
def test_first_code_cell_sets_up(path):
    assert "notebook.setup()" in cells(path)[0].source.splitlines()


@over_chapters
def test_a_cell_asserts(path):
    assert any(re.search(r"^\s*(assert |[\w.]*\.assert_\w+\()", cell.source, re.M) for cell in cells(path))


@over_chapters
def test_exercises_have_solutions(path):
    assert (path.parent / "solutions" / path.name).is_file()


@over_chapters
def test_code_cells_are_short(path):
    code = [c.source for c in cells(path) if not c.source.startswith("%%writefile") and "long" not in tags(c)]
    assert statistics.median(source.count("\n") + 1 for source in code) <= 8


# Launches and links


def unsafe_launch(source: str) -> str | None:
    """Why a launch in the code cell `source` could fail in silence, or None."""
    if re.search(r"^\s*(\w+\s*=\s*)?!.*\b(torchrun|python\d?)\b", source, re.M):
        return "`!command` hides the exit code"
    magic, _, script = source.partition("\n")
    lines = [line.strip() for line in script.replace("\\\n", " ").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("#")]
    launches = [i for i, line in enumerate(lines) if re.search(r"\btorchrun\b", line)]
    if not magic.startswith("%%") or magic.startswith("%%writefile") or not launches:
        return None
    if magic.strip() != "%%bash":
        return "only a plain %%bash cell is known to fail with its command"
    if "set -euo pipefail" in lines[: launches[0]]:
        return None
    if launches != [len(lines) - 1] or re.search(r"[|;&]", lines[-1]):
        return "without `set -euo pipefail` only the last command's exit code counts"
    return None


@over_notebooks
def test_launches_fail_loudly(path):
    for cell in cells(path):
        assert unsafe_launch(cell.source) is None, cell.source


@pytest.mark.parametrize(
    "source, safe",
    [
        ("%%bash\ntorchrun \\\n  a.py", True),
        ("%%bash\ncd x\ntorchrun a.py\n", True),
        ("%%bash\nset -euo pipefail\ntorchrun a.py | tail\necho done", True),
        ("%%writefile a.sh\ntorchrun a.py\necho", True),
        ("!torchrun a.py", False),
        ("x = !python a.py", False),
        ("%%bash\ntorchrun a.py | tail", False),
        ("%%bash\ntorchrun a.py &", False),
        ("%%bash\ntorchrun a.py\necho done", False),
        ("%%bash\ntorchrun a.py\nset -euo pipefail\necho done", False),
        ("%%bash --no-raise-error\ntorchrun a.py", False),
        ("%%sh\ntorchrun a.py", False),
    ],
)
def test_unsafe_launches_are_known(source, safe):
    assert (unsafe_launch(source) is None) is safe


def broken_links(path: Path) -> list[str]:
    """The links of a notebook or a Markdown file that lead to no file, or to no heading of it."""
    parts = [path.read_text()] if path.suffix == ".md" else [cell.source for cell in cells(path, "markdown")]
    text = without_code("\n\n".join(parts))
    links = re.findall(r"\]\(([^()\s]+(?:\([^()\s]*\))?[^()\s]*)(?:\s+\"[^\"]*\")?\)", text)
    links += re.findall(r"\b(?:src|href)=[\"']([^\"']+)", text) + re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.M)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in map(anchor_of(target), headings(target))):
            broken.append(link)
    return broken


def anchor_of(target: Path):
    """How `target`'s headings become anchors: JupyterLab keeps them as they are, GitHub simplifies Markdown's."""
    if target.suffix == ".ipynb":
        return lambda heading: re.sub("[`*]", "", heading.lstrip("# ")).replace(" ", "-")
    return lambda heading: re.sub(r"[^\w -]", "", heading.lstrip("# ").lower()).replace(" ", "-")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_broken_links_are_known(tmp_path):
    (tmp_path / "b.md").write_text("# A title: its `code`\n")
    path = tmp_path / "a.md"
    path.write_text(
        "[x](b.md) [x](b.md#a-title-its-code) [x](https://c.d/e) `[x](f.md)`\n\n```\n[x](g.md)\n```\n"
        '![x](h.png) [x](b.md#no) [x](#none) <img src="i.png">\n\n[j]: k.md\n'
    )
    assert broken_links(path) == ["h.png", "b.md#no", "#none", "i.png", "k.md"]


# The script


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """ddp_sample.py, as its cell has it."""
    path = tmp_path_factory.mktemp("stored") / "ddp_sample.py"
    write_script(path)
    return path


@pytest.mark.parametrize("command", [["check"], ["format", "--check", "--diff"]], ids=lambda command: command[0])
def test_script_is_clean(script, command):
    command = [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_script_is_short_and_complete(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 180
    words = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "nccl", "destroy_process_group", "set_device"]
    assert [word for word in [*words, "DistributedDataParallel", "class SimpleModel"] if word not in text] == []


def uncommented_ddp_lines(text: str) -> list[str]:
    """The lines of a program that name something of DDP's and do not end in `# DDP: why`.

    What a message says of ranks (an f-string's fields) does not count.
    """
    found = set()

    def visit(node) -> None:
        if isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.ImportFrom) and "distributed" in node.module.split("."):
            found.add(node.lineno)
        names = {getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "arg", "") or ""}
        if isinstance(node, ast.alias):
            names = {*node.name.split("."), node.asname}
        if names & DDP_NAMES:
            found.add(node.end_lineno)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(text))
    lines = text.splitlines()
    return [lines[n - 1] for n in sorted(found) if not re.search(r"# DDP: \S.*\s\S", lines[n - 1])]


def test_every_ddp_line_says_why(script):
    assert uncommented_ddp_lines(script.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed",
        "from torch.distributed import barrier",
        "import torch.distributed as dist  # DDP:",
        "sampler.set_epoch(1)  # shuffle",
        "if rank == 0: pass  # DDP: yes",
        "f(world_size=2)",
        "dist.barrier()",
        "ddp_model = DistributedDataParallel(model)",
    ],
)
def test_ddp_lines_are_known(line):
    assert uncommented_ddp_lines(f"import sys\n{line}\n") == [line]
    assert uncommented_ddp_lines(f"import sys\n{line.split('  #')[0]}  # DDP: for a reason\n") == []


def test_script_has_the_package_model(script):
    """The script's `SimpleModel` is the reader's copy; it must not drift from the one that the chapters explain."""
    spec = importlib.util.spec_from_file_location("stored_ddp_sample", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours, theirs = SimpleModel(5, 3), module.SimpleModel(5, 3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))


def test_the_pieces_in_the_text_are_lines_of_the_script():
    text = "\n".join(cell.source for cell in cells(SCRIPT_NOTEBOOK, "markdown"))
    pieces = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    script = set(read_script().splitlines())
    assert len(pieces) >= 6
    assert [line for piece in pieces for line in piece.splitlines() if line not in script] == []


def test_the_readme_shows_the_figure_of_the_notebook():
    assert PICTURE.read_bytes() == stored_figure(), "run python -m tests.readme_picture"
