"""The web site, as a reader has it: built from the stored outputs, every page opened on a laptop and on a phone.

SITE_SCREENSHOTS=DIR keeps a picture of every page.
"""

import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.chromium import IS_BLANK, console_errors
from tests.test_notebooks import NOTEBOOKS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *NOTEBOOKS]
PAGES = [source.relative_to(ROOT).with_suffix(".html").as_posix() for source in SOURCES]
PAGES += ["index.html", "genindex.html", "search.html"]
WINDOWS = {"laptop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}

# What is wrong with a page, as it is laid out.
LOOK = r"""async () => {
    const isBlank = IS_BLANK;
    const problems = [], width = document.documentElement.clientWidth;
    const tell = (what, elements) => elements.forEach(e => problems.push(`${what}: ${e.outerHTML.slice(0, 150)}`));
    const right = e => e.getBoundingClientRect().right;

    const images = [...document.querySelectorAll('img')], blank = [];
    for (const image of images)
        if (await isBlank(image)) blank.push(image);
    tell('nothing is painted', blank);
    tell('no text alternative', images.filter(i => !i.alt.trim() || i.alt.endsWith('.png')));
    tell('wider than the page', images.filter(i => right(i) > width + 1));

    // Code and tables may scroll, in a box of their own.
    const scrolls = e => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
    const all = [...document.querySelectorAll('article *')];
    tell('wider than the page', all.filter(e => right(e) > width + 1 && !scrolls(e)).slice(0, 1));
    if (document.scrollingElement.scrollWidth > width) problems.push('the page scrolls sideways');

    const prose = (document.querySelector('article') ?? document.body).cloneNode(true);
    prose.querySelectorAll('pre, code, script, style').forEach(e => e.remove());
    const raw = /\$|\\[a-z(\[]|\|:?-/;
    tell('not laid out', [...prose.querySelectorAll('p, li, td')].filter(e => raw.test(e.innerText)));
    tell('a formula has no size', [...document.querySelectorAll('math')].filter(e => !e.getBoundingClientRect().width));
    return problems;
}""".replace("IS_BLANK", IS_BLANK)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder and its address."""
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-M", "html", ROOT, built, "-c", ROOT / "docs", "-W"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=built / "html"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield built / "html", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(params=WINDOWS)
def window(browser, request):
    window = browser.new_context(viewport=WINDOWS[request.param])
    window.set_default_timeout(120_000)  # milliseconds, for a hang
    yield window
    window.close()


@pytest.fixture
def page(window):
    return window.new_page()


def problems(window, address: str, name: str) -> list[str]:
    """Open the page `name` and say what is wrong with it."""
    page, asked = window.new_page(), []  # a page that has been used may still say something of the one before
    page.on("request", lambda request: asked.append(request.url))
    with console_errors(page) as said:
        page.goto(f"{address}/{name}")
        page.wait_for_load_state("networkidle")
        found = page.evaluate(LOOK)
    if "SITE_SCREENSHOTS" in os.environ:
        picture = f"{name.removesuffix('.html').replace('/', '-')}-{page.viewport_size['width']}.png"
        page.screenshot(path=Path(os.environ["SITE_SCREENSHOTS"]) / picture, full_page=True)
    page.close()
    found += [f"asks another host: {url}" for url in asked if not url.startswith((f"{address}/", "data:"))]
    return found + [f"the console: {text}" for text in said]


def test_pages(site, window):
    found = {name: problems(window, site[1], name) for name in PAGES}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_there_is_no_other_page(site):
    built = {path.relative_to(site[0]).as_posix() for path in site[0].rglob("*.html")}
    assert {name for name in built if not name.startswith("_static/")} == set(PAGES)


def test_links_lead_somewhere(site):
    texts = {site[0] / name: (site[0] / name).read_text(encoding="utf-8") for name in PAGES}
    dead, n = [], 0
    for path, text in texts.items():
        for link in map(unquote, re.findall(r'<a\b[^>]*\bhref="([^"]*)"', text)):
            file, _, anchor = link.partition("#")
            if ":" in file:
                continue
            n += 1
            target = (path.parent / file).resolve() if file else path
            if not target.is_file() or (anchor and f'id="{anchor}"' not in texts[target]):
                dead.append((path.name, link))
    assert dead == [] and n > 500


def test_a_word_is_found(site, page):
    page.goto(f"{site[1]}/search.html?q=all-reduce")
    found = page.locator("ul.search li a")
    found.get_by_text("How DDP works", exact=True).wait_for()
    found.get_by_text("Measure scaling", exact=True).click()
    assert page.url.startswith(f"{site[1]}/notebooks/06_measure_scaling.html")


def test_the_sidebar_leads_to_a_chapter(site, page):
    page.goto(f"{site[1]}/")
    chapter = page.get_by_role("link", name="05 How DDP works").and_(
        page.locator(".bd-links__title ~ * a, .toctree-l1 a")
    )
    if page.viewport_size == WINDOWS["phone"]:
        assert not chapter.first.is_visible()
        page.get_by_role("button", name="Toggle primary sidebar").click()
    chapter.first.click()
    page.wait_for_url("**/notebooks/05_how_ddp_works.html")


def test_the_ring_moves(site, page):
    page.goto(f"{site[1]}/notebooks/05_how_ddp_works.html")
    picture = page.locator(".animation img")
    start = picture.get_attribute("src")
    page.get_by_label("Next frame").click()
    assert start.startswith("data:image/png") and picture.get_attribute("src") != start


WHITE = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"


PLANTED = {  # what stands on a page, and how what is found begins
    "missing": ("<img src=missing.png alt=x>", ["nothing is painted", "the console: Failed to load"]),
    "blank": (f'<img src="{WHITE}">', ["nothing is painted", "no text alternative"]),
    "wide": ("<hr style=width:2000px>", ["wider than the page: <hr", "the page scrolls sideways"]),
    "cut": ("<div style=overflow:hidden><hr style=width:2000px></div>", ["wider than the page: <hr"]),
    "raw": (
        "<p>$$x$$ and <code>$HOME</code></p><p>|a|\n|-|</p>",
        ["not laid out: <p>$$", "not laid out: <p>|a|"],
    ),
    "console": ("<script>throw Error('it broke')</script>", ["the console: it broke"]),
    "network": (
        "<script src=http://localhost:9/x.js></script>",
        ["asks another host", "the console: Failed to load"],
    ),
    "good": (
        "<pre style=overflow:auto><hr style=width:2000px></pre><math><mi>x</mi></math><code>$$</code>",
        [],
    ),
}


def test_what_is_wrong_is_seen(site, window):
    for name, (body, expected) in PLANTED.items():
        planted = site[0] / f"planted-{name}.html"
        planted.write_text(f"<!doctype html><link rel=icon href=data:,><article>{body}</article>")
        seen = problems(window, site[1], planted.name)
        planted.unlink()
        assert len(seen) == len(expected), (name, seen)
        assert all(text.startswith(what) for text, what in zip(seen, expected, strict=True)), (name, seen)
