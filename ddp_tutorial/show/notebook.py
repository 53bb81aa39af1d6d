"""What a notebook needs around it."""

import base64
import inspect
import io
import json
import os
import re
import subprocess
import sys
import textwrap
from html import escape
from pathlib import Path

from IPython import get_ipython
from IPython.core.pylabtools import print_figure
from IPython.display import HTML, Markdown
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from PIL import Image

from ddp_tutorial.show import figures, prepare_launches


def setup() -> None:
    """Call first in a notebook.

    Finds `torchrun` also where the virtual environment is not activated, gives each process one thread (as torchrun
    would, with a warning), keeps the profiler's log off the page, and sets the figures' style and number of colours.
    """
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    prepare_launches()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    figures.use_style()
    small_pictures()


def sample_data(kind: str = "gaussian") -> Path:
    """Make the sample data `kind` ("gaussian" or "digits") in `data/` unless they are there; return the folder.

    Raises `RuntimeError` if that fails.
    """
    folder = Path("data") / kind
    command = (sys.executable, "-m", "data_gen", kind, "--out", folder, "--reuse")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    print(done.stdout, end="")
    return folder


def source(*things) -> Markdown:
    """The source of classes and functions of the package, as the cell's output."""
    texts = [textwrap.dedent(inspect.getsource(thing)).strip() for thing in things]
    return Markdown("```python\n" + "\n\n\n".join(texts) + "\n```")


def written_file(path: Path, name: str) -> str:
    """The text of the file `name` that a `%%writefile` cell of the notebook `path` writes."""
    magic = f"%%writefile {name}\n"
    sources = ("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
    (text,) = (source for source in sources if source.startswith(magic))
    return text.removeprefix(magic) + "\n"  # as %%writefile ends the file


def fewer_colors(png: bytes, n: int) -> bytes:
    """A picture in at most `n` colours, as a smaller file. What is small keeps its colour: a star, a red word."""
    how = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 1, "dither": Image.Dither.NONE}
    original = Image.open(io.BytesIO(png)).convert("RGB")
    picture = original.quantize(n, **how)
    palette, ground = picture.getpalette(), 3 * picture.getpixel((0, 0))
    palette[ground : ground + 3] = original.getpixel((0, 0))  # or a white ground would take on a tinge
    picture.putpalette(palette)
    picture.save(smaller := io.BytesIO(), "png", optimize=True)
    return smaller.getvalue()


def text_alternative(figure: Figure) -> str:
    """What the figure states, for those who cannot see it: its title, or its panels', or the label of one without."""
    titles = [ax.get_title(side).rstrip(",") for ax in figure.axes for side in ("left", "center", "right")]
    return " ".join((figure.get_suptitle() or "; ".join(filter(None, titles)) or figure.get_label()).split())


def small_pictures() -> None:
    """Show this notebook's figures with a text alternative, and in at most 64 colours: a third of the size."""
    import matplotlib_inline.backend_inline  # noqa: F401  # registers its own formatter, which is not to come later

    png = get_ipython().display_formatter.formatters["image/png"]
    png.for_type(Figure, lambda figure: (fewer_colors(print_figure(figure), 64), {"alt": text_alternative(figure)}))


def animation_html(animation: FuncAnimation) -> HTML:
    """`animation` with buttons, whole in itself: matplotlib's own takes the buttons' icons from the network.

    Raises `ValueError` if something is left that would be loaded.
    """
    html = re.sub(r"<link\b[^>]*>", "", animation.to_jshtml(default_mode="once"))
    frame = r"(?<=data:image/png;base64,)[\w+/=\\\n]+"
    html = re.sub(frame, lambda f: base64.b64encode(fewer_colors(base64.b64decode(f[0]), 16)).decode(), html)
    first = re.search(r'frames\[0\] = "(.+?)"', html, re.S)[1].replace("\\\n", "")  # seen where no script runs
    html = html.replace("<img ", f'<img src="{first}" alt="{escape(text_alternative(animation._fig))}" ')
    icons = {"minus": "−", "fast-backward": "|◀◀", "step-backward": "|◀", "play fa-flip-horizontal": "◀"}
    icons |= {"pause": "||", "play": "▶", "step-forward": "▶|", "fast-forward": "▶▶|", "plus": "+"}
    html = re.sub(r'<i class="fa fa-([\w -]+)"></i>', lambda icon: icons[icon[1]], html)
    if re.search(r"""\b(src|href)\s*=\s*["']?(https?:)?//|\bfa-|@import|url\(""", html):
        raise ValueError("the animation would load something from the network")
    return HTML(html)
