"""Each notebook in JupyterLab, as a reader has it: opened in Chromium, Run All, looked at.

BROWSER_SCREENSHOTS=DIR keeps pictures of every notebook after its run.
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

pytestmark = pytest.mark.browser

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb")) + sorted(FOLDER.glob("solutions/*.ipynb"))
TIMEOUT = 300  # seconds a notebook may run
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

SETTINGS = {
    # Otherwise cells outside the window are not in the page, and nobody could look at them.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}

SCRIPTS = {"single_sample.py", "ddp_sample.py", "ddp_resilient.py"}

# The code cells' prompts, and the text of a dialog; `done` once nothing runs or waits to, though something has run.
STATE = """() => {
    const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].map(p => p.innerText.trim());
    const dialog = document.querySelector('.jp-Dialog-content')?.innerText ?? '';
    const idle = document.querySelector('#jp-main-statusbar').innerText.includes('| Idle');
    return {prompts, dialog, done: dialog || (idle && !prompts.includes('[*]:') && prompts.some(p => p !== '[ ]:'))};
}"""

# The number of figures; those that show nothing; the outputs of which a part hangs over the right edge.
FIGURES = """async () => {
    const blank = [], images = [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output img')];
    for (const [i, image] of images.entries()) {
        const canvas = new OffscreenCanvas(100, 100).getContext('2d');
        try {
            await image.decode();
            canvas.drawImage(image, 0, 0, 100, 100);
        } catch { }
        const pixels = new Uint32Array(canvas.getImageData(0, 0, 100, 100).data.buffer);
        if (!image.naturalWidth || !image.getBoundingClientRect().width || pixels.every(p => p === pixels[0]))
            blank.push(i);
    }
    const outputs = [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output')];
    const clipped = outputs.filter(output => output.scrollWidth > output.clientWidth + 1);
    return {
        n: document.querySelectorAll('.jp-Notebook .jp-RenderedImage img').length,
        blank,
        clipped: clipped.map(output => output.dataset.mimeType),
    };
}"""


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


@pytest.fixture(scope="module")  # not "session": Playwright's event loop would still run under nbmake's
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: install the package chromium")
    with playwright.sync_playwright() as p:
        # Playwright itself turns off the sandbox (which root cannot have) and most background traffic.
        quiet = ["--disable-domain-reliability", "--disable-sync", "--no-pings"]
        browser = p.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("jupyter") / "config")
    yield lab
    lab.stop()


@pytest.fixture
def page(browser, lab):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    yield page
    page.close()
    lab.stop_kernels()


def run_all(lab: Lab, page, path: Path, name: str) -> list[str]:
    """Open the notebook `path`, which is under `lab.root`, and run it; return what is wrong with what is seen."""
    from playwright.sync_api import TimeoutError

    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    n_figures = sum("image/png" in output.get("data", {}) for output in outputs)
    for cell in code:  # so that all that is seen was made in this run
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)

    page.goto(f"{lab.url}/lab/tree/{path.relative_to(lab.root).as_posix()}?token={lab.token}&reset")
    idle = page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle"))
    dialog = page.locator(".jp-Dialog-content")  # such as the choice of a kernel, where the file names none
    idle.or_(dialog).first.wait_for(timeout=120_000)
    if dialog.count():
        return [f"a dialog before the run: {dialog.first.inner_text()}"]
    page.keyboard.press("Control+b")  # the file browser goes: the notebook has the window to itself
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    try:
        page.wait_for_function(f"({STATE})().done", timeout=TIMEOUT * 1000, polling=500)
    except TimeoutError:
        pass  # the prompts tell which cells have not run
    state = page.evaluate(STATE)
    page.wait_for_timeout(500)  # for the last output to be laid out
    figures = page.evaluate(FIGURES)
    screenshots(page, name)

    if state["dialog"]:
        return [f"a dialog: {state['dialog']}"]
    problems = []
    if state["prompts"] != [f"[{i + 1}]:" for i in range(len(code))]:
        problems.append(f"the cells' prompts are {state['prompts']}")
    problems += [f"a cell failed: {error}" for error in errors(path, page)]
    if figures["n"] != n_figures:
        problems.append(f"{figures['n']} figures are shown, {n_figures} are stored")
    if figures["blank"]:
        problems.append(f"images that show nothing: {figures['blank']}")
    if figures["clipped"]:
        problems.append(f"outputs wider than the page: {figures['clipped']}")
    return problems


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


@pytest.mark.parametrize("name", [path.relative_to(FOLDER).as_posix() for path in NOTEBOOKS])
def test_run_all(lab, page, name):
    # Each in a folder of its own: it runs without what another one has made.
    folder = lab.root / Path(name).with_suffix("").as_posix().replace("/", "-")
    made = shutil.ignore_patterns("data", "runs", ".*", "*.py")  # but the scripts, which are not made
    shutil.copytree(FOLDER, folder, ignore=lambda *where: made(*where) - SCRIPTS)
    assert run_all(lab, page, folder / name, folder.name) == []


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
            ],
            [
                "3 figures are shown, 0 are stored",
                "images that show nothing: [1, 2]",
                "wider than the page: ['text/html']",
            ],
        ),
        (["1", "raise RuntimeError('it broke')", "2"], ["['[1]:', '[2]:', '[ ]:']", "RuntimeError: it broke"]),
        (["import os; os._exit(1)"], ["a dialog: "]),
    ],
    ids=["pictures", "failing-cell", "dead-kernel"],
)
def test_what_is_wrong_is_seen(lab, page, request, sources, problems):
    path = lab.root / f"{request.node.callspec.id}.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    seen = run_all(lab, page, path, path.stem)
    assert len(seen) == len(problems), seen
    assert all(problem in text for problem, text in zip(problems, seen, strict=True)), seen
