"""Each notebook in JupyterLab, as a reader has it: opened in Chromium and looked at as stored; two are run, Run All.

BROWSER_SCREENSHOTS=DIR keeps pictures of every notebook.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from tests.chromium import IS_BLANK, console_errors
from tests.test_notebooks import NOTEBOOKS

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "notebooks"
RUN = ["01_load_data.ipynb", "05_how_ddp_works.ipynb"]  # 05 brings a script: the animation of the ring
TIMEOUT = 900  # seconds a notebook may run, if it does not hang
SETTINGS = {
    # Otherwise cells outside the window are not in the page, and nobody could look at them.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}

SCRIPTS = {"single_sample.py", "ddp_sample.py", "ddp_resilient.py"}

# The code cells' prompts, and the text of a dialog; `done` once nothing runs or waits to, though something has run.
STATE = """() => {
    const found = document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt');
    const prompts = [...found].map(p => p.innerText.trim());
    const dialog = document.querySelector('.jp-Dialog-content')?.innerText ?? '';
    const idle = document.querySelector('#jp-main-statusbar').innerText.includes('| Idle');
    return {prompts, dialog, done: dialog || (idle && !prompts.includes('[*]:') && prompts.some(p => p !== '[ ]:'))};
}"""

# What the notebook holds: its cells, and those of them whose Markdown is laid out.
CELLS = """() => ['.jp-Cell', '.jp-MarkdownCell .jp-MarkdownOutput > *:first-child'].map(
    selector => document.querySelectorAll('.jp-Notebook ' + selector).length)"""

# The number of figures; those that show nothing; the outputs of which a part hangs over the right edge.
FIGURES = """async () => {
    const isBlank = IS_BLANK;
    const within = '.jp-Notebook :is(.jp-OutputArea-output, .jp-MarkdownOutput) ';
    const blank = [], images = [...document.querySelectorAll(within + 'img')];
    for (const [i, image] of images.entries())
        if (await isBlank(image)) blank.push(i);
    const outputs = [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output')];
    const clipped = outputs.filter(output => output.scrollWidth > output.clientWidth + 1);
    return {
        n: document.querySelectorAll('.jp-Notebook .jp-RenderedImage img').length,
        blank,
        clipped: clipped.map(output => output.dataset.mimeType),
    };
}""".replace("IS_BLANK", IS_BLANK)


class Lab:
    """A JupyterLab over the folder `root` with no settings but ours; its Python is the one that runs pytest."""

    def __init__(self, root: Path, config: Path):
        self.root = root
        (config / "labconfig").mkdir(parents=True)
        (config / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.token = f"http://127.0.0.1:{port}", secrets.token_hex(16)
        folders = ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
        environment = {name: value for name, value in os.environ.items() if name != "JUPYTER_PATH"}
        environment |= {name: str(config / name) for name in folders}
        environment |= {"JUPYTER_CONFIG_DIR": str(config), "IPYTHONDIR": str(config / "ipython")}
        flags = [f"--ServerApp.root_dir={root}", f"--port={port}", "--ServerApp.port_retries=0", "--no-browser"]
        flags += [f"--IdentityProvider.token={self.token}"] + ["--allow-root"] * (os.geteuid() == 0)
        self.log = config / "jupyterlab.log"
        with open(self.log, "w") as log:
            command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", *flags]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                self.ask("GET", "/api/status")
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text()[-2000:]}")

    def ask(self, method: str, path: str) -> bytes:
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(self.url + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read()

    def stop_kernels(self) -> None:
        for session in json.loads(self.ask("GET", "/api/sessions")):
            self.ask("DELETE", f"/api/sessions/{session['id']}")

    def stop(self) -> None:
        self.process.terminate()  # it ends its kernels first
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("jupyter") / "config")
    yield lab
    lab.stop()


@pytest.fixture(scope="module")
def window(browser):
    """Its pages share what they have loaded of JupyterLab."""
    window = browser.new_context(viewport={"width": 1280, "height": 1000})
    yield window
    window.close()


@pytest.fixture
def page(window, lab):
    page = window.new_page()
    yield page
    page.close()
    lab.stop_kernels()


def n_figures(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def open_in_lab(lab: Lab, page, path: Path) -> list[str]:
    """Open the notebook `path`, under `lab.root`, and wait for its cells and its kernel; return what is wrong."""
    notebook = nbformat.read(path, as_version=4)
    n_text = sum(cell.cell_type == "markdown" for cell in notebook.cells)
    page.goto(f"{lab.url}/lab/tree/{path.relative_to(lab.root).as_posix()}?token={lab.token}&reset")
    page.wait_for_function(f"String(({CELLS})()) === '{len(notebook.cells)},{n_text}'", timeout=120_000)
    idle = page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle"))
    dialog = page.locator(".jp-Dialog-content")  # such as the choice of a kernel, where the file names none
    idle.or_(dialog).first.wait_for(timeout=120_000)
    if dialog.count():
        return [f"a dialog when it opens: {dialog.first.inner_text()}"]
    page.keyboard.press("Control+b")  # the file browser goes: the notebook has the window to itself
    return []


def seen(page, name: str, n_stored: int, said: list[str]) -> list[str]:
    """What is wrong with the figures and outputs that are seen, and with what the page has `said`."""
    page.wait_for_timeout(500)  # for the last output to be laid out
    figures = page.evaluate(FIGURES)
    screenshots(page, name)
    problems = []
    if figures["n"] != n_stored:
        problems.append(f"{figures['n']} figures are shown, {n_stored} are stored")
    if figures["blank"]:
        problems.append(f"images that show nothing: {figures['blank']}")
    if figures["clipped"]:
        problems.append(f"outputs wider than the page: {figures['clipped']}")
    return problems + [f"in the console: {text}" for text in said]


def look(lab: Lab, page, path: Path, name: str) -> list[str]:
    """Open the notebook `path` and run nothing; return what is wrong with what is seen."""
    n_stored = n_figures(nbformat.read(path, as_version=4))
    with console_errors(page) as said:
        return open_in_lab(lab, page, path) or seen(page, name, n_stored, said)


def run_all(lab: Lab, page, path: Path, name: str) -> list[str]:
    """Open the notebook `path` and run it; return what is wrong with what is seen."""
    from playwright.sync_api import TimeoutError

    notebook = nbformat.read(path, as_version=4)
    n_stored, code = n_figures(notebook), [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:  # so that all that is seen was made in this run
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)
    with console_errors(page) as said:
        if problems := open_in_lab(lab, page, path):
            return problems
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            page.wait_for_function(f"({STATE})().done", timeout=TIMEOUT * 1000, polling=500)
        except TimeoutError:
            pass  # the prompts tell which cells have not run
        state = page.evaluate(STATE)
        problems = seen(page, name, n_stored, said)
    if state["dialog"]:
        return [f"a dialog: {state['dialog']}"]
    is_folded = [cell.metadata.get("jupyter", {}).get("source_hidden") for cell in code]  # a folded one has no prompt
    if state["prompts"] != ["" if folded else f"[{i}]:" for i, folded in enumerate(is_folded, 1)]:
        problems.append(f"the cells' prompts are {state['prompts']}")
    return problems + [f"a cell failed: {error}" for error in errors(path, page)]


def errors(path: Path, page) -> list[str]:
    """Save the notebook and return its cells' errors, which look like any other text on stderr in the page."""
    page.keyboard.press("Control+s")
    page.wait_for_function("document.querySelector('.jp-mod-dirty') === null")
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        if "raises-exception" not in cell.metadata.get("tags", []):
            found += [o for o in cell.get("outputs", []) if o.output_type == "error"]
    return [f"{error.ename}: {error.evalue}" for error in found]


def screenshots(page, name: str) -> None:
    if "BROWSER_SCREENSHOTS" not in os.environ:
        return
    folder = Path(os.environ["BROWSER_SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}-??.png"):
        old.unlink()
    panel = page.locator(".jp-Notebook .jp-WindowedPanel-outer, .jp-Notebook.jp-WindowedPanel-outer").first
    height, window = panel.evaluate("panel => [panel.scrollHeight, panel.clientHeight]")
    for i, top in enumerate(range(0, height, window)):
        panel.evaluate("(panel, top) => panel.scrollTop = top", top)
        page.wait_for_timeout(100)
        panel.screenshot(path=folder / f"{name}-{i + 1:02}.png")


def copied(lab: Lab, name: str, how: str) -> tuple[Path, str]:
    """The notebook in a folder of its own, without what others have made there; and what it is called in pictures."""
    folder = lab.root / f"{Path(name).with_suffix('').as_posix().replace('/', '-')}-{how}"
    made = shutil.ignore_patterns("data", "runs", ".*", "*.py")  # but the scripts, which are not made
    shutil.copytree(FOLDER, folder, ignore=lambda *where: made(*where) - SCRIPTS)
    return folder / name, folder.name


@pytest.mark.parametrize("name", [path.relative_to(FOLDER).as_posix() for path in NOTEBOOKS])
def test_as_stored(lab, page, name):
    assert look(lab, page, *copied(lab, name, "stored")) == []


@pytest.mark.parametrize("name", RUN)
def test_run_all(lab, page, name):
    assert run_all(lab, page, *copied(lab, name, "run")) == []


def written(lab: Lab, name: str, *cells) -> tuple[Path, str]:
    """A notebook of these code cells, and what it is called in pictures."""
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = lab.root / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path, name


def assert_problems(found: list[str], expected: list[str]) -> None:
    assert len(found) == len(expected), found
    assert all(problem in text for problem, text in zip(expected, found, strict=True)), found


SHOW = "import IPython.display as d, matplotlib.pyplot as plt; "


@pytest.mark.parametrize(
    "sources, problems",
    [
        (
            [
                SHOW + "plt.plot([1, 2])",
                SHOW + "plt.figure(facecolor='white').add_axes((0, 0, 1, 1)).axis('off')",
                SHOW + "d.display({'image/png': 'AAAA'}, raw=True)",
                SHOW + "d.display(d.HTML('<hr style=width:2000px>'))",
                SHOW + "d.display(d.Javascript('console.error(1 + 1)'))",
                SHOW + "d.display(d.Javascript('setTimeout(() => { throw new Error(2 + 1) })'))",
            ],
            [
                "3 figures are shown, 0 are stored",
                "images that show nothing: [1, 2]",
                "wider than the page: ['text/html']",
                "in the console: 2",
                "in the console: 3",
            ],
        ),
        (["1", "raise RuntimeError('it broke')", "2"], ["['[1]:', '[2]:', '[ ]:']", "RuntimeError: it broke"]),
        (["import os; os._exit(1)"], ["a dialog: "]),
    ],
    ids=["pictures", "failing-cell", "dead-kernel"],
)
def test_what_is_wrong_in_a_run_is_seen(lab, page, request, sources, problems):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    assert_problems(run_all(lab, page, *written(lab, request.node.callspec.id, *cells)), problems)


def test_what_is_wrong_as_stored_is_seen(lab, page):
    data = [{"image/png": "AAAA"}, {"text/html": f"<table><td>{'&nbsp;' * 900}</table><img src='missing.png'>"}]
    stored = [nbformat.v4.new_output("display_data", data=one) for one in data]
    found = look(lab, page, *written(lab, "stored", nbformat.v4.new_code_cell("1", outputs=stored)))
    expected = [
        "images that show nothing: [0, 1]",
        "wider than the page: ['text/html']",
        "in the console: Failed to load",
    ]
    assert_problems(found, expected)
