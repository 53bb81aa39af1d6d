"""The notebooks as stored: what a reader sees who runs nothing. That they run is nbmake's part, with conftest.py."""

import ast
import difflib
import inspect
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from ddp_tutorial import ranks
from ddp_tutorial.show import notebook
from ddp_tutorial.show.difference import difference, hunks
from tests import readme_picture
from tests.ranks import DDP, RESILIENT, SINGLE, changed

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


# In the log of pytest

WORKER = """%%bash
echo "the worker's rank is $((1 + 2))"
echo "the worker's traceback" >&2
exit 1"""


def test_what_a_failed_cell_has_printed_is_in_the_log_and_solutions_are_slow(tmp_path):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    failing = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in ("print(6 * 7)", WORKER)])
    (tmp_path / "solutions").mkdir()
    for name in ("fails.ipynb", "solutions/fails.ipynb"):
        nbformat.write(failing, tmp_path / name)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
    ]
    log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "1 failed, 1 deselected" in log, log
    _, _, printed = log.partition("what the cell has printed")
    assert "the worker's rank is 3\n" in printed and "the worker's traceback\n" in printed, log
    assert "42\n" not in printed  # another cell's


# On a busy machine

BUSY = """
import random
import time

random = random.Random(0)


def slower(clock):
    shift, last = 0.0, clock()

    def read():
        nonlocal shift, last
        now = clock()
        shift += (now - last) * 1000 ** random.random()
        last = now
        return now + shift

    return read


time.perf_counter, time.process_time = slower(time.perf_counter), slower(time.process_time)
"""  # each time that is measured is up to a thousand times as long


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in CHAPTERS if re.search("perf_counter|process_time|timing", path.read_text())],
    ids=lambda path: path.stem,
)
def test_no_assertion_depends_on_how_busy_the_machine_is(path, tmp_path):
    """Of what it measures, a chapter tells how much it is. It must not fail where something else runs."""
    (tmp_path / "clocks").mkdir()
    (tmp_path / "clocks" / "sitecustomize.py").write_text(BUSY)  # Python imports it at its start
    shutil.copytree(path.parent, tmp_path / "notebooks", ignore=shutil.ignore_patterns("runs", "data", "solutions"))
    command = [sys.executable, "-m", "pytest", "--nbmake", "-p", "no:cacheprovider", tmp_path / "notebooks" / path.name]
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'clocks'}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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


# Sources


def program(cell) -> ast.Module:
    """The Python of a code cell."""
    return ast.parse("" if cell.source.startswith("%%") else re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M))


def calls(cell, name: str) -> list[ast.Call]:
    """The calls of a function, by its full name, in a code cell."""
    return [n for n in ast.walk(program(cell)) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]


def names_of(path: Path) -> dict:
    """What a notebook imports of this package, by the names that it uses."""
    names = {}
    for cell in cells(path):
        for node in program(cell).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and re.search(r"\bddp_tutorial\b", ast.unparse(node)):
                exec(ast.unparse(node), names)
    return names


def shown(path: Path) -> list[tuple[list, str]]:
    """What the cells of a notebook show with `notebook.source`, and what is stored of it."""
    names, found = names_of(path), []
    for cell in cells(path):
        for call in calls(cell, "notebook.source"):
            things = [eval(ast.unparse(argument), names) for argument in call.args]
            found.append((things, "\n".join(map(text_of, cell.outputs))))
    return found


def invalid_sources(texts: list[str]) -> list[str]:
    """The ```python blocks in texts that are not Python."""
    wrong = []
    for block in re.findall(r"^```python\n(.*?)^```", "\n".join(texts), re.M | re.S):
        try:
            compile(block, "block", "exec")
        except SyntaxError:
            wrong.append(block)
    return wrong


@over_notebooks
def test_every_stored_source_is_python(path):
    assert invalid_sources([text_of(output) for cell in cells(path) for output in cell.outputs]) == []


def test_a_source_that_is_not_python_is_noticed():
    good, bad = "class A:\n    def f(self):\n        pass\n", "class A:\ndef f(self):\npass\n"
    assert invalid_sources([f"```python\n{good}```\n", f"text\n```python\n{bad}```"]) == [bad]


@over_notebooks
def test_every_stored_source_is_the_one_of_today(path):
    for things, stored in shown(path):
        assert stored.strip() == notebook.source(*things).data, things


def test_chapters_show_sources():
    assert sum(len(shown(path)) for path in CHAPTERS) >= 10


def not_shown(public: dict, things: list) -> list[str]:
    """The names whose source is not shown: a function's or a class's own, or that of every method of the class."""

    def is_shown(thing) -> bool:
        methods = (
            [value for value in vars(thing).values() if inspect.isfunction(value)] if inspect.isclass(thing) else []
        )
        return thing in things or bool(methods) and all(method in things for method in methods)

    return [name for name, thing in public.items() if not is_shown(thing)]


def test_every_public_name_of_ranks_is_shown_with_its_source():
    things = [thing for path in CHAPTERS for shown_things, _ in shown(path) for thing in shown_things]
    assert not_shown({name: getattr(ranks, name) for name in ranks.__all__}, things) == []


def test_what_is_not_shown_is_known():
    class Pair:
        def one(self): ...

        def two(self): ...

    public = {"Pair": Pair, "cells": cells}
    assert not_shown(public, [Pair, cells]) == not_shown(public, [Pair.one, Pair.two, cells]) == []
    assert not_shown(public, [Pair.one]) == ["Pair", "cells"]


@pytest.mark.parametrize("number, old, new", [("04", SINGLE, DDP), ("07", DDP, RESILIENT)], ids=["04", "07"])
def test_the_chapter_shows_each_difference_as_it_is(number, old, new):
    (path,) = [path for path in CHAPTERS if path.name.startswith(number)]
    seen = set()
    for cell in cells(path):
        for call in calls(cell, "difference"):
            *files, numbers = *(argument.value for argument in call.args[:2]), [n.value for n in call.args[2:]]
            assert files == [old.name, new.name]
            stored = "\n".join(map(text_of, cell.outputs))
            assert stored.strip() == difference(old, new, *numbers).data, cell.source
            seen |= {*(numbers or range(1, len(hunks(old, new)) + 1))}
    assert sorted(seen) == list(range(1, len(hunks(old, new)) + 1))


# The scripts

WRITTEN = {"03": SINGLE, "04": DDP, "07": RESILIENT}


def drift(path: Path, script: Path) -> list[str]:
    """Where the file that a notebook's cell writes and the script differ."""
    texts = (notebook.written_file(path, script.name), script.read_text())
    return list(difflib.unified_diff(*(text.splitlines(keepends=True) for text in texts), "cell", "file"))


@pytest.mark.parametrize("number", WRITTEN)
def test_a_script_is_as_its_cell_writes_it(number):
    (path,) = [path for path in CHAPTERS if path.name.startswith(number)]
    assert drift(path, WRITTEN[number]) == []


def test_a_script_that_differs_is_noticed(tmp_path):
    (path,) = [path for path in CHAPTERS if path.name.startswith("03")]
    copy = changed(SINGLE, "momentum=0.9", "momentum=0.8", tmp_path / SINGLE.name)
    assert [line for line in drift(path, copy)[3:] if line[0] != " "] != []


@pytest.mark.parametrize("command", [["check"], ["format", "--check", "--diff"]], ids=lambda command: command[0])
def test_scripts_are_clean(command):
    command = [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", *WRITTEN.values()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [DDP, RESILIENT], ids=lambda path: path.stem)
def test_script_is_complete(path):
    words = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "nccl", "gloo", "init_process_group", "destroy_process_group"]
    words += ["set_device", "DistributedDataParallel", "class SimpleModel"]
    assert [word for word in words if word not in path.read_text()] == []


def test_the_canonical_pieces_are_used_in_the_canonical_way():
    text = DDP.read_text()
    pieces = ["DistributedSampler(train_set, world_size, rank,", "DataLoader(train_set, batch_size, sampler=sampler,"]
    pieces += ["sampler.set_epoch(epoch)", "= DistributedDataParallel(model)", "dist.all_reduce(sums)", "if rank == 0:"]
    assert [piece for piece in pieces if piece not in text] == []


def uncommented_ddp_lines(text: str) -> list[str]:
    """The lines of a program that name something of DDP's and do not end in `# DDP: why`, or `# survive: why`.

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
    return [lines[n - 1] for n in sorted(found) if not re.search(r"# (DDP|survive): \S.{5,}", lines[n - 1])]


@pytest.mark.parametrize("path", [DDP, RESILIENT], ids=lambda path: path.stem)
def test_every_ddp_line_says_why(path):
    assert uncommented_ddp_lines(path.read_text()) == []


def test_the_script_of_one_process_has_no_ddp_line():
    assert uncommented_ddp_lines(SINGLE.read_text()) == [] and "DDP" not in SINGLE.read_text()


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


@pytest.mark.parametrize("name", readme_picture.TITLES)
def test_the_readme_shows_the_figures_of_the_notebook(name):
    picture = readme_picture.picture(name).read_bytes()
    assert picture == readme_picture.stored_figure(name), "run python -m tests.readme_picture"
