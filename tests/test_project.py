"""What the repository says about itself, in several places, is one thing."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests import rooms
from tests.ranks import DDP, RESILIENT, SINGLE
from tests.rooms import LESSON, MODULES, PACKAGE, PROGRAMS, ROOMS, imported, room_of, rooms_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OWN_PACKAGES = {"benchmarks", "data_gen", "ddp_tutorial", "tests"}
CONDA_NAMES = {"pytorch": "torch", "playwright-python": "playwright"}
MACHINE_PATH = re.compile(r"(?<![\w.~}-])/(home|tmp|root|work|Users|opt)/|\b[A-Z]:\\+(Users|Program)")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FOLDERS = (".ci", ".github", "benchmarks", "data_gen", "ddp_tutorial", "docs", "notebooks", "tests")
MADE = {"__pycache__", ".ipynb_checkpoints", "_build", "data", "runs", "images"}


def split(requirement: str) -> tuple[str, frozenset[str]]:
    """Name and bounds: "a>=1,<2" is ("a", {">=1", "<2"})."""
    name, bounds = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement).groups()
    return CONDA_NAMES.get(name, name), frozenset(filter(None, bounds.replace(" ", "").split(",")))


def test_conda_and_pip_install_the_same():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    *conda, last, by_pip = conda
    assert (last, by_pip) == ("pip", {"pip": [*by_pip["pip"][:-1], "-e ."]})
    conda += by_pip["pip"][:-1]
    extras = PROJECT["optional-dependencies"]
    own, *test = extras["test"]
    assert (own, set(extras)) == ("ddp-tutorial[bench,docs,stream]", {"bench", "docs", "stream", "test"})
    pip = PROJECT["dependencies"] + extras["bench"] + extras["docs"] + extras["stream"] + test
    pip.append("python" + PROJECT["requires-python"])
    assert dict(map(split, conda)) == dict(map(split, pip))
    assert len(conda) == len(pip)


INSTALL_AND_START = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m ddp_tutorial"
INSTALL_TESTS = 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]"'
QUICK, SLOW = ".venv/bin/pytest --nbmake", ".venv/bin/pytest --nbmake -m slow"


def test_the_readme_says_how_to_start_and_to_test():
    commands = re.findall(r"^python3 -m venv .*$", "\n".join(re.findall(r"^```.*?^```", README, re.M | re.S)), re.M)
    assert commands == [INSTALL_AND_START, f"{INSTALL_TESTS} && {QUICK}"]
    assert f"`{SLOW}` runs the rest" in README


def runs(workflow: str) -> dict[str, list[str]]:
    """The shell commands of each job of a workflow."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())["jobs"]
    return {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}


def test_github_runs_the_commands_of_the_readme():
    assert runs("test.yml") == {
        "quick": [INSTALL_AND_START, f"{INSTALL_TESTS} && {QUICK}"],
        "slow": [f"{INSTALL_TESTS} && {SLOW}"],
    }
    install, upgrade, _, test = runs("weekly.yml")["newest-torch"]
    assert (install, upgrade, test) == (INSTALL_TESTS, ".venv/bin/pip install --upgrade torch", QUICK)
    assert runs("weekly.yml")["links"] == ["python3 .ci/links.py"] and (ROOT / ".ci" / "links.py").exists()


def check_schema(name: str, *files: Path) -> subprocess.CompletedProcess:
    """Compare files with a schema that check-jsonschema has built in. It needs no network."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{name}", *files]
    return subprocess.run(command, capture_output=True, text=True)


def test_workflows_follow_githubs_schema():
    assert {path.name for path in WORKFLOWS} >= {"test.yml", "weekly.yml"}
    done = check_schema("github-workflows", *WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr


def unpinned(text: str) -> list[str]:
    """The lines of a workflow that use an action, not by a full commit with the version as a comment: tags can move."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*(- )?uses:", line)]
    return [line for line in lines if not re.fullmatch(r"(- )?uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)]


def test_actions_are_pinned():
    texts = "\n".join(path.read_text() for path in WORKFLOWS)
    pins = set(re.findall(r"uses: (.*)@(\w+) # (.*)", texts))
    assert pins and unpinned(texts) == []
    assert len(pins) == len({name for name, _, _ in pins}), "one action has two pins"
    for line in (
        "- uses: actions/checkout@v6",
        f"uses: actions/checkout@{'0' * 40}",
        f"- uses: actions/checkout@{'0' * 39} # v6.0.2",
        f"- uses: actions/checkout@{'0' * 40} # the newest",
    ):
        assert unpinned(f"steps:\n  {line}\n  - run: uses\n") == [line]


def test_workflows_end_and_may_only_read():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"} and "concurrency" in workflow, path
        assert all(job["timeout-minutes"] <= 120 for job in workflow["jobs"].values()), path


def test_citation():
    done = check_schema("citation-file-format", ROOT / "CITATION.cff")
    assert done.returncode == 0, done.stdout + done.stderr
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["authors"] == [{"name": "The ddp-tutorial authors"}]
    assert f"# {citation['title']}\n" in README
    assert (citation["version"], citation["abstract"]) == (PROJECT["version"], PROJECT["description"])
    assert citation["license"] == "MIT"
    assert not {"doi", "identifiers", "date-released", "commit"} & set(citation)  # nothing that is not so yet


def test_the_releases_of_pytorch_are_the_same_everywhere():
    (bounds,) = [SpecifierSet(name[5:]) for name in PROJECT["dependencies"] if name.startswith("torch")]
    (oldest,) = [spec.version for spec in bounds if spec.operator == ">="]
    (above,) = [spec.version for spec in bounds if spec.operator == "<"]
    assert f'"torch<{above}" --index-url' in README
    assert f"PyTorch ({oldest} to 2.{int(above.split('.')[1]) - 1})" in README
    (pin,) = re.findall(r"^torch==(.*)$", (ROOT / ".ci" / "constraints.txt").read_text(), re.M)
    named = re.findall(r"torch-versions (2[\d. ]+\d)", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) == 1 and all(release in bounds for release in [pin, *named[0].split()])
    assert "export PIP_CONSTRAINT=.ci/constraints.txt" in (ROOT / ".ci" / "run").read_text()


DISTRIBUTIONS = metadata.packages_distributions()  # {module: those that bring it}
IMPORTERS = {  # of a folder: the extras that its programs may use, beside what everybody installs
    "ddp_tutorial": set(),
    "data_gen": set(),
    ".ci": set(),
    "benchmarks": {"bench", "stream"},
    "docs": {"docs"},
    "tests": {"bench", "docs", "stream", "test"},
}


def undeclared(text: str, extras: set[str]) -> set[str]:
    """The modules that a program imports, of packages that neither the dependencies nor these extras name."""
    by_extras = [name for extra in extras for name in PROJECT["optional-dependencies"][extra]]
    requirements = PROJECT["dependencies"] + by_extras
    declared = {canonicalize_name(split(name)[0]) for name in requirements if "[" not in name}
    modules = {name.split(".")[0] for name in imported(text)} - {""} - set(sys.stdlib_module_names) - OWN_PACKAGES
    return {name for name in modules if not declared & set(map(canonicalize_name, DISTRIBUTIONS.get(name, [])))}


def test_what_is_imported_is_declared():
    missing = {}
    for folder, extras in IMPORTERS.items():
        programs = [path for path in (ROOT / folder).rglob("*.py") if not MADE & set(path.relative_to(ROOT).parts)]
        assert programs, folder
        for path in [*programs, *[ROOT / "conftest.py"] * (folder == "tests")]:
            if modules := undeclared(path.read_text(), extras):
                missing[path.relative_to(ROOT).as_posix()] = modules
    assert missing == {}
    assert undeclared("import PIL.Image, psutil\nfrom nbformat import read\nimport tests", set()) == {
        "psutil",
        "nbformat",
    }
    assert undeclared("import psutil, nowhere", {"bench"}) == {"nowhere"}


# The programs of .ci, run in a folder of their own, with a python3 that makes an environment of two stubs.

PYTHON3 = """#!/bin/bash
mkdir -p "$3/bin"
printf '#!/bin/bash\\necho "$0 $*" >>log\\n' | tee "$3/bin/pip" "$3/bin/python" >"$3/bin/pytest"
echo '[[ "$0 $*" != *"$FAILS"* ]]' >>"$3/bin/pytest"
chmod +x "$3"/bin/*
"""


def run_ci(folder: Path, *command: str, fails: str) -> tuple[int, list[str], list[str]]:
    """Exit code, the lines printed and the commands run; pytest fails where its command line has `fails` in it."""
    (folder / "bin").mkdir()
    for name, text in {"python3": PYTHON3, "chromium": "#!/bin/bash\n", "apt-get": "#!/bin/bash\n"}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / ".ci").mkdir()
    (folder / ".ci" / command[0]).write_text((ROOT / ".ci" / command[0]).read_text())
    env = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAILS": fails}
    done = subprocess.run(
        ["bash", f".ci/{command[0]}", *command[1:]], cwd=folder, env=env, capture_output=True, text=True
    )
    log = folder / "log"
    return (
        done.returncode,
        (done.stdout + done.stderr).splitlines(),
        log.read_text().splitlines() if log.exists() else [],
    )


INSTALLED = "quick lane, with the installation of its packages, passed"


@pytest.mark.parametrize(
    "fails, code, said",
    [
        ("nothing", 0, ["start passed", INSTALLED, "slow lane passed"]),
        ("-m slow", 1, ["start passed", INSTALLED, "slow lane failed"]),
        ("--nbmake", 1, ["start passed", "quick lane failed"]),
    ],
    ids=["passes", "slow-fails", "quick-fails"],
)
def test_ci_runs_the_commands_of_the_readme_and_the_slow_lane(tmp_path, fails, code, said):
    ended, printed, log = run_ci(tmp_path, "run", fails=fails)
    assert (ended, len(printed)) == (code, len(said)), printed
    assert all(re.search(f"the (first )?{part} after \\d+ s$", line) for part, line in zip(said, printed, strict=True))
    commands = f"{INSTALL_AND_START} && {INSTALL_TESTS} && {QUICK} && {SLOW}".replace('"', "").split(" && ")
    assert log == [part for part in commands if not part.startswith("python3")][: len(said) + 2]


def test_ci_stops_at_the_first_failure_of_an_installation():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert os.access(ROOT / ".ci" / "run", os.X_OK) and "set -euo pipefail" in lines
    starts = [line for line in lines if re.match(r"python3 |\.venv/", line)]
    assert [line.partition(" || ")[0] for line in starts] == [INSTALL_AND_START, f"{INSTALL_TESTS} && {QUICK}", SLOW]
    assert all(re.search(r' \|\| failed "the [\w ]+"$', line) for line in starts)


def test_each_release_of_pytorch_is_tested_and_one_that_fails_is_named(tmp_path):
    code, printed, log = run_ci(tmp_path, "torch-versions", "2.11.0", "2.14.1", "--", "-k", "x y", fails=".venv-2.11.0")
    assert code == 1 and len(printed) == 2
    assert re.match(r"torch 2\.11\.0: failed after \d+ s", printed[0])
    assert re.match(r"torch 2\.14\.1: passed after \d+ s", printed[1])
    assert log == [
        f".venv-{release}/bin/{command}"
        for release in ("2.11.0", "2.14.1")
        for command in (f"pip install torch=={release} -e .[test]", "pytest --nbmake -k x y")
    ]


def test_without_a_release_there_is_nothing_to_test(tmp_path):
    code, printed, log = run_ci(tmp_path, "torch-versions", "--", "-k", "x", fails="nothing")
    assert (code, len(printed), log) == (2, 1, [])


@pytest.fixture(scope="module")
def links():
    spec = importlib.util.spec_from_file_location("links", ROOT / ".ci" / "links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_are_found(links):
    found = links.all_addresses()
    assert found["https://download.pytorch.org/whl/cpu"] and len(found) > 20
    assert found["https://arxiv.org/abs/2006.15704"].startswith("notebooks/")  # the paper on DDP
    text = "See <https://a.b/c>, [that](https://a.b/d_(e)), *https://a.b/f*; `https://a.b/g` or https://a.b/h?i=j#k."
    assert links.addresses(text) == {f"https://a.b/{end}" for end in ("c", "d_(e)", "f", "g", "h?i=j#k")}


class Answers(BaseHTTPRequestHandler):
    """Answers /404 with 404, and so on."""

    def do_GET(self):
        self.send_response(int(self.path[1:]))
        self.end_headers()

    def log_message(self, *args):
        pass


def test_a_link_that_is_gone_is_told(links, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}"
        why = [links.problem(f"{home}/{status}", pauses=(0,)) for status in (200, 403, 404, 500)]
        server.shutdown()
    assert why == ["", "", "status 404", "status 500"]
    assert "refused" in links.problem(home, pauses=())  # nobody listens any more


def test_readme_table_lists_every_chapter_with_its_minutes():
    listed = re.findall(r"^\| \[[^]]+\]\((notebooks/[^)]+\.ipynb)\) \|.*\| (\d+) \|", README, re.M)
    chapters = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert [name for name, _ in listed] == [path.relative_to(ROOT).as_posix() for path in chapters]
    for (_, minutes), path in zip(listed, chapters, strict=True):
        assert f"**Time:** {minutes} minutes to read" in path.read_text(), path


def test_licence():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 The ddp-tutorial authors\n")


# The laws of the design


def test_the_scripts_are_short():
    most = {SINGLE: 65, DDP: 95, RESILIENT: 125}
    assert {path.name: n for path, n in most.items() if len(path.read_text().splitlines()) > n} == {}


def wrong_imports(room: str, text: str) -> set[str]:
    """What a program of that room must not import: other rooms, a notebook, or by relative names."""
    names = imported(text)
    foreign = {name.split(".")[0] for name in names} & {"", "notebooks", "nbimporter", "import_ipynb", "importnb"}
    return rooms_of(names) - ROOMS[room].may_import | foreign


def test_imports_run_one_way():
    assert {room_of(path) for path in PROGRAMS} == set(ROOMS)
    wrong = {path.name: wrong_imports(room_of(path), path.read_text()) for path in PROGRAMS}
    assert {name: names for name, names in wrong.items() if names} == {}


def test_wrong_imports_are_known():
    for room, line, wrong in (
        ("lesson", "from ddp_tutorial.ranks import exchange", {"ranks"}),
        ("lesson", "def f():\n    import ddp_tutorial.show.figures", {"show"}),
        ("ranks", "from ddp_tutorial import show", {"show"}),
        ("show", "from ddp_tutorial import files, ranks", {"ranks"}),
        ("show", "from ddp_tutorial.files import write_atomically", set()),
        ("__main__", "from ddp_tutorial.show import figures", set()),
        ("ddp_sample", "from ddp_tutorial import flags, ranks", {"ranks"}),
        ("ddp_resilient", "from ddp_tutorial import flags, ranks", set()),
        ("ddp_resilient", "from ddp_tutorial.show import figures", {"show"}),
        ("single_sample", "import ddp_tutorial.ranks.run as run", {"ranks"}),
        ("lesson", "from data_gen import gaussian", {"data_gen"}),
        ("data_gen", "from ddp_tutorial import files", {"lesson"}),
        ("benchmarks", "from tests import ranks", {"tests"}),
        ("lesson", "from . import ranks", {""}),
        ("show", "import import_ipynb", {"import_ipynb"}),
    ):
        assert wrong_imports(room, line) == wrong, line


def test_the_picture_of_the_rooms():
    assert all(3 <= len(room.knows.split()) <= 6 for room in ROOMS.values())
    is_drawn = rooms.picture() in (ROOT / "CONTRIBUTING.md").read_text()
    assert is_drawn, "python -m tests.rooms prints the block that belongs into CONTRIBUTING.md"


def test_an_arrow_is_drawn_once():
    arrows = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert rooms.direct(arrows) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}


def words_of_ranks(text: str) -> list[str]:
    """What a program has that belongs to ranks and launchers, in code or text."""
    return re.findall(r"(?<![A-Za-z])(?:[Rr]anks?|RANKS?)(?![A-Za-z])|torchrun|WORLD_SIZE|[Ll]auncher|os\._exit", text)


def test_the_lesson_knows_nothing_of_ranks():
    texts = {path.name: path.read_text() for path in MODULES if room_of(path) == "lesson"}
    assert {Path(name).stem for name in texts} == LESSON
    assert {name: words_of_ranks(text) for name, text in texts.items() if words_of_ranks(text)} == {}


def test_words_of_ranks_are_known():
    for line in (
        'rank = int(os.environ["LOCAL_RANK"])',
        "# The ranks' files",
        "print_rank0(each)",
        '"""torchrun ends it."""',
        'os.environ.get("WORLD_SIZE")',
        "from ddp_tutorial.launcher import launch",
        "os._exit(1)",
    ):
        assert words_of_ranks(line), line
    assert words_of_ranks("frankly, this world_size of a line is ranked; os.exit") == []


def distributed_words(text: str) -> list[str]:
    """What a program has that belongs to distributed training, in code or text."""
    words = r"torch\.distributed|_process_group|\ball_(?:reduce|gather)\b|DistributedDataParallel|DistributedSampler"
    return re.findall(words + r"|\bdist\.|from torch import .*\bdistributed\b", text)


ONLY = {
    "__init__.py": "import torch.distributed.nn.functional",  # early: torch would do it too late by itself
    "__main__.py": '"torch.distributed.run"',  # it starts torchrun
    "launcher.py": "from torch.distributed import TCPStore",  # the launching process holds it, as torchrun's agent does
}


def test_nothing_distributed_is_hidden():
    """The doctor names what it watches, and takes part in nothing: under it a script ends in the same bits."""
    found, open_rooms = {}, {"ranks", "check"}
    for path in (
        *(path for path in MODULES if room_of(path) not in open_rooms),
        *(ROOT / "data_gen").glob("*.py"),
        SINGLE,
    ):
        text = path.read_text()
        if path.parent == PACKAGE and path.name in ONLY:
            assert text.count(ONLY[path.name]) == 1
            text = text.replace(ONLY[path.name], "")
            text = re.sub("^# .*$", "", text, flags=re.M)  # why it is there
        found[path.name] = distributed_words(text)
    assert {name: words for name, words in found.items() if words} == {}


def test_distributed_lines_are_known():
    for line in (
        "import torch.distributed as dist",
        "from torch import nn, distributed",
        "dist.barrier()",
        "torch.distributed.nn.functional",
        "destroy_process_group()",
        "x = all_reduce(x)",
        "model = DistributedDataParallel(model)",
        "from torch.utils.data import DistributedSampler",
    ):
        assert len(distributed_words(line)) == 1, line
    assert distributed_words("distance = all_of_them  # the distribution") == []


def unexplained(old: str, new: str, word: str) -> list[str]:
    """The lines that `new` has, `old` has not, and that do not end in `# word: why`; less docstring and blank ones."""

    def lines(text: str) -> list[str]:
        first = ast.parse(text).body[0]
        is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        return [line.strip() for line in text.splitlines()[first.end_lineno * is_text :] if line.strip()]

    known = set(lines(old))
    return [line for line in lines(new) if line not in known and not re.search(rf"  # {word}: \S.{{5,}}$", line)]


def test_every_new_line_of_a_script_says_why():
    assert unexplained(SINGLE.read_text(), DDP.read_text(), "DDP") == []
    assert unexplained(DDP.read_text(), RESILIENT.read_text(), "survive") == []
    assert "DDP" not in SINGLE.read_text()


def test_unexplained_lines_are_known():
    old = '"""Old."""\nx = 1\nif x:\n    z = 1\n'
    for line in ("y = 2", "y = 2  # DDP:", "y = 2  # DDP: yes", "y = 2  # survive: it must", "# DDP: so it is"):
        new = f'"""New,\n\nlonger."""\nx = 1\n\n{line}\nz = 1\ny = 3  # DDP: for a reason\n'
        assert unexplained(old, new, "DDP") == [line]


def test_the_scripts_with_ddp_use_the_gpus():
    """What no machine without a GPU would miss."""
    for path in (DDP, RESILIENT):
        assert [
            word for word in ('("nccl", device)', "cuda.set_device(local_rank)") if word not in path.read_text()
        ] == []


def written() -> list[Path]:
    """The files that somebody has written: no outputs, no caches, no pictures."""
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [path for path in files if not MADE & set(path.relative_to(ROOT).parts)]
    assert len(files) > 30
    return files


def test_no_file_names_a_folder_of_the_author():
    assert [path for path in written() if MACHINE_PATH.search(path.read_text(errors="replace"))] == []


def test_no_line_is_kept_from_the_formatter():
    exempt = re.compile(r"# fmt: " + "(skip|off)")  # in two parts: this line is not one
    assert [path for path in written() if exempt.search(path.read_text(errors="replace"))] == []


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=lambda command: command[0])
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
