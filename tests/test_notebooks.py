"""The notebooks as stored: what a reader sees who runs nothing. That they run is nbmake's part, with conftest.py.

A rule over all notebooks is one test, which lists all that break it.
"""

import ast
import functools
import inspect
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import nbformat
import pytest

from ddp_tutorial import ranks
from ddp_tutorial.show import notebook
from ddp_tutorial.show.difference import difference, hunks
from tests import readme_picture
from tests.ranks import DDP, RESILIENT, SINGLE

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = CHAPTERS + sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
MARKDOWN = [  # without what lies in .venv and the like
    path for path in sorted(ROOT.rglob("*.md")) if not re.search(r"/\.", f"/{path.relative_to(ROOT).as_posix()}")
]
ABSOLUTE_PATH = re.compile(r"(?<![\w.~}-])/(home|tmp|root|work|Users|opt)/|\b[A-Z]:\\")


@functools.cache
def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def cells(path: Path, kind: str = "code") -> list:
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def breaking(is_wrong: Callable, paths: Iterable[Path]) -> list[str]:
    """The names of the notebooks that `is_wrong` is true of."""
    assert paths
    return [name_of(path) for path in paths if is_wrong(path)]


def breaking_cells(is_wrong: Callable) -> list[str]:
    """Notebook and source of the code cells that `is_wrong` is true of."""
    assert NOTEBOOKS
    return [f"{name_of(path)}: {cell.source}" for path in NOTEBOOKS for cell in cells(path) if is_wrong(cell)]


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


@functools.cache
def headings(path: Path) -> list[str]:
    """The headings of a notebook or a Markdown file, with their #s."""
    if path.suffix == ".md":
        text = path.read_text()
    else:
        text = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    text = re.sub(r"^(```+).*?^\1\s*$", "", text, flags=re.M | re.S)
    return re.findall(r"^#+ .*$", text, flags=re.M)


# Outputs


def test_ran_from_top_to_bottom():
    def is_wrong(path):
        return [cell.execution_count for cell in cells(path)] != list(range(1, len(cells(path)) + 1))

    assert breaking(is_wrong, NOTEBOOKS) == []


def test_no_error_is_stored():
    def is_wrong(cell):
        return "raises-exception" not in tags(cell) and any(output.output_type == "error" for output in cell.outputs)

    assert breaking_cells(is_wrong) == []


def test_outputs_name_no_folder_of_the_author():
    def is_wrong(cell):
        texts = [text_of(output) for output in cell.outputs]
        texts += [v for output in cell.outputs for k, v in output.get("data", {}).items() if k.startswith("text/")]
        return ABSOLUTE_PATH.search("\n".join(texts))

    assert breaking_cells(is_wrong) == []


def test_outputs_are_short_and_without_warnings():
    def is_wrong(cell):
        text = "\n".join(text_of(output).rstrip("\n") for output in cell.outputs)
        is_folded = "hide-output" in tags(cell) and cell.metadata.jupyter.outputs_hidden  # on the site, in JupyterLab
        return (text.count("\n") >= 40 and not is_folded) or re.search("Warning|WARNING", text)

    assert breaking_cells(is_wrong) == []


def test_no_time_of_a_run_is_stored():
    assert breaking_cells(lambda cell: "execution" in cell.metadata) == [], "see CONTRIBUTING.md: record_timing"


def test_outputs_load_nothing_from_the_network():
    def is_wrong(cell):
        html = "\n".join("".join(output.get("data", {}).get("text/html", "")) for output in cell.outputs)
        return re.search(r"""\b(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", html)

    assert breaking_cells(is_wrong) == []


def test_files_are_small():
    assert breaking(lambda path: path.stat().st_size >= 300_000, NOTEBOOKS) == []


def has_silent_figure(cell) -> bool:
    """Whether a code cell shows a picture without a text alternative."""
    for output in cell.outputs:
        data = output.get("data", {})
        alternatives = re.findall(r"<img\b(?:[^>]*?\balt=\"([^\"]*)\")?", "".join(data.get("text/html", "")))
        if "image/png" in data:
            alternatives.append(output.metadata.get("image/png", {}).get("alt", ""))
        if not all(alternative.strip() for alternative in alternatives):
            return True
    return False


def test_every_figure_has_a_text_alternative():
    assert breaking_cells(has_silent_figure) == []


def test_a_silent_figure_is_found():
    for data, alt, is_silent in (
        ({"image/png": "AAAA"}, {}, True),
        ({"image/png": "AAAA"}, {"image/png": {"alt": "A finding"}}, False),
        ({"text/html": '<img id=a>\n<img alt="A finding" id=b>\n'}, {}, True),
    ):
        output = nbformat.v4.new_output("display_data", data=data, metadata=alt)
        assert has_silent_figure(nbformat.v4.new_code_cell("x", outputs=[output])) == is_silent, data


# Anatomy


def test_titles_start_with_the_verb_of_the_file_name():
    def is_wrong(path):
        title, *others = [heading for heading in headings(path) if heading.startswith("# ")]
        is_first = cells(path, "markdown")[0].source.startswith(title)
        return others or not is_first or title.split()[1].lower() != path.stem.split("_")[1]

    assert breaking(is_wrong, CHAPTERS) == []


def test_first_cells_say_what_to_expect():
    def is_wrong(path):
        labels = re.findall(r"\*\*(You will do|You will learn|You need|Time):?\*\*", read(path).cells[0].source)
        return labels != ["You will do", "You will learn", "You need", "Time"]

    assert breaking(is_wrong, CHAPTERS) == []


def test_sections():
    def is_wrong(path):
        sections = [heading.removeprefix("## ") for heading in headings(path) if heading.startswith("## ")]
        ending = ["Summary", "Exercises", "In practice", "Further reading"]
        return sections[-4:] != ending or not 4 <= len(sections[:-4]) <= 8

    assert breaking(is_wrong, CHAPTERS) == []


def test_last_lines_lead_to_the_neighbours():
    def is_wrong(path):
        last, i = read(path).cells[-1], CHAPTERS.index(path)
        linked = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", last.source.splitlines()[-1])
        neighbours = CHAPTERS[max(0, i - 1) : i] + CHAPTERS[i + 1 : i + 2]
        return last.cell_type != "markdown" or linked != [neighbour.name for neighbour in neighbours]

    assert breaking(is_wrong, CHAPTERS) == []


def test_first_code_cells_set_up():
    assert breaking(lambda path: "notebook.setup()" not in cells(path)[0].source.splitlines(), CHAPTERS) == []


def test_a_cell_asserts():
    def asserts(cell):
        return re.search(r"^\s*(assert |[\w.]*\.assert_\w+\()", cell.source, re.M)

    assert breaking(lambda path: not any(map(asserts, cells(path))), CHAPTERS) == []


def test_exercises_have_solutions():
    assert breaking(lambda path: not (path.parent / "solutions" / path.name).is_file(), CHAPTERS) == []


def test_code_cells_are_short():
    def is_wrong(path):
        code = [c.source for c in cells(path) if not c.source.startswith("%%writefile") and "long" not in tags(c)]
        return statistics.median(source.count("\n") + 1 for source in code) > 8

    assert breaking(is_wrong, CHAPTERS) == []


def is_folded(cell) -> bool:
    """On the site and in JupyterLab."""
    return "hide-input" in tags(cell) and cell.metadata.jupyter.source_hidden


def test_a_long_cell_is_folded_or_one_of_the_three_scripts():
    scripts = tuple(f"%%writefile {path.name}\n" for path in (SINGLE, DDP, RESILIENT))

    def is_wrong(cell):
        return cell.source.count("\n") >= 40 and not is_folded(cell) and not cell.source.startswith(scripts)

    assert [source for source in breaking_cells(is_wrong) if not source.startswith("notebooks/solutions/")] == []


def test_the_minutes_in_the_head_are_credible():
    """150 words and 15 lines of code a minute: at least three quarters of that, and not much more than with all code
    that is folded."""

    def is_wrong(path):
        words = sum(len(cell.source.split()) for cell in cells(path, "markdown"))
        lines = {is_folded(cell): 0 for cell in cells(path)}
        for cell in cells(path):
            lines[is_folded(cell)] += len([line for line in cell.source.splitlines() if line.strip()])
        said = int(re.search(r"\*\*Time:\*\* (\d+) minutes to read", read(path).cells[0].source)[1])
        least = words / 150 + lines.get(False, 0) / 15
        return not 0.75 * least <= said <= 1.25 * (least + lines.get(True, 0) / 15)

    assert breaking(is_wrong, CHAPTERS) == []


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
    words = ["--nbmake", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:warnings"]
    command = [sys.executable, "-m", "pytest", *words]
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


def test_launches_fail_loudly():
    assert breaking_cells(lambda cell: unsafe_launch(cell.source)) == []


def test_unsafe_launches_are_known():
    safe = [
        "%%bash\ntorchrun \\\n  a.py",
        "%%bash\ncd x\ntorchrun a.py\n",
        "%%bash\nset -euo pipefail\ntorchrun a.py | tail\necho done",
        "%%writefile a.sh\ntorchrun a.py\necho",
    ]
    unsafe = [
        "!torchrun a.py",
        "x = !python a.py",
        "%%bash\ntorchrun a.py | tail",
        "%%bash\ntorchrun a.py &",
        "%%bash\ntorchrun a.py\necho done",
        "%%bash\ntorchrun a.py\nset -euo pipefail\necho done",
        "%%bash --no-raise-error\ntorchrun a.py",
        "%%sh\ntorchrun a.py",
    ]
    assert [source for source in (*safe, *unsafe) if not unsafe_launch(source)] == safe


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


def test_links_lead_somewhere():
    broken = {name_of(path): broken_links(path) for path in NOTEBOOKS + MARKDOWN}
    assert {name: links for name, links in broken.items() if links} == {}


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


def test_every_stored_source_is_the_one_of_today_and_python():
    n_shown, differing = 0, []
    for path in NOTEBOOKS:
        for things, stored in shown(path):
            n_shown += 1
            differing += [(name_of(path), things)] * (stored.strip() != notebook.source(*things).data)
            for block in re.findall(r"^```python\n(.*?)^```", stored, re.M | re.S):
                compile(block, name_of(path), "exec")
    assert differing == [] and n_shown >= 10


def not_shown(public: dict, things: list) -> list[str]:
    """The names whose source is not shown: a function's or a class's own, or that of every method of the class."""

    def is_shown(thing) -> bool:
        values = vars(thing).values() if inspect.isclass(thing) else ()
        methods = [value for value in values if inspect.isfunction(value)]
        return thing in things or bool(methods) and all(method in things for method in methods)

    return [name for name, thing in public.items() if not is_shown(thing)]


def test_every_public_name_of_ranks_is_shown_with_its_source():
    things = [thing for path in CHAPTERS for shown_things, _ in shown(path) for thing in shown_things]
    assert not_shown({name: getattr(ranks, name) for name in ranks.__all__}, things) == []


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


def test_the_scripts_are_as_cells_write_them():
    for number, script in WRITTEN.items():
        (path,) = [path for path in CHAPTERS if path.name.startswith(number)]
        assert notebook.written_file(path, script.name) == script.read_text(), script.name


@pytest.mark.parametrize("name", readme_picture.TITLES)
def test_the_readme_shows_the_figures_of_the_notebook(name):
    picture = readme_picture.picture(name).read_bytes()
    assert picture == readme_picture.stored_figure(name), "run python -m tests.readme_picture"
