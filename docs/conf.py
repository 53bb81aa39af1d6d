"""The pages as a web site, from the notebooks' stored outputs: sphinx-build -M html . docs/_build -c docs -W

The notebooks and the README are taken from where they are. No page loads anything from the network.
"""

import json
import operator
import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "Learn distributed training with PyTorch DDP"
html_title = "PyTorch DDP, in notebooks"
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "notebooks/*.ipynb", "notebooks/solutions/*.ipynb"]
exclude_patterns = [".*", "runs", "docs"]  # or they are searched for pages

extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # an output may hold a table
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # a cell may write a file in another language than Python
myst_heading_slug_func = operator.methodcaller("replace", " ", "-")  # as JupyterLab names a heading

html_theme = "sphinx_book_theme"
html_theme_options = {
    "home_page_in_toc": True,
    "show_prev_next": False,  # every chapter ends with links of its own
    "use_fullscreen_button": False,
    "footer_content_items": [],
}
html_context = {"default_mode": "auto"}  # light or dark, as the browser is set
templates_path = ["_templates"]
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # which a browser draws by itself


def front_page(app, docname: str, source: list[str]) -> None:
    """Put the sidebar's order into the README: the chapters of its table, then their solutions."""
    if docname != root_doc:
        return
    chapters = re.findall(r"^\| \[(.+?)\]\(notebooks/(.+?)\.ipynb\)", source[0], re.M)
    parts = {"Chapters": "notebooks", "Solutions": "notebooks/solutions"}
    trees = {part: [f"{title} <{folder}/{name}>" for title, name in chapters] for part, folder in parts.items()}
    for part, pages in (trees | {"Project": ["CONTRIBUTING"]}).items():
        source[0] += "\n".join(["\n\n```{toctree}", ":hidden:", f":caption: {part}", "", *pages, "```\n"])
    source[0] = source[0].replace("](notebooks/solutions)", f"](notebooks/solutions/{chapters[0][1]}.ipynb)")


def text_alternatives(app, docname: str, source: list[str]) -> None:
    """Hand each figure's text alternative to MyST-NB, which takes it from the cell and not from the output."""
    if not docname.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = output["metadata"].get("image/png", {}).get("alt", "")
                cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
    source[0] = json.dumps(notebook)


def index(app, exception) -> None:
    """A web server shows index.html for the folder."""
    if exception is None:
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def inline_math(translator, node) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(translator, node) -> None:
    translator.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
    app.connect("source-read", front_page)
    app.connect("source-read", text_alternatives)
    app.connect("build-finished", index)
